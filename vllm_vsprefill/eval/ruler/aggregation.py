# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which words occur most often: common words in a numbered list, frequent words in a coded text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from vllm_vsprefill.eval.draw import LOWER, Draw
from vllm_vsprefill.eval.ruler.problem import Problem

CWE_TOKENS, FWE_TOKENS = 120, 50
COMMON = 10
SHORT = 4096  # prompts below this have fewer repetitions
ALPHA = 2.0
LETTERS = 6
VOCABULARY_SHARE = 50  # tokens of a prompt for each word of the coded text's vocabulary

CWE_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?"
)
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE_TEXT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def _numbered(items: Sequence[str]) -> str:
    return " ".join(f"{i}. {item}" for i, item in enumerate(items, 1))


def _listed(draw: Draw, words: Sequence[str], size: int, often: int, seldom: int) -> tuple[str, list[str]]:
    chosen = draw.rng.sample(words, size)
    common = chosen[:COMMON]
    return _numbered(draw.shuffled(common * often + chosen[COMMON:] * seldom)), common


def common_words(draw: Draw, words: Sequence[str], size: int, length: int) -> Problem:
    """A list of ``size`` different words for a prompt of ``length`` tokens, after a worked example."""
    short = length < SHORT
    example, known = _listed(draw, words, *((20, 3, 1) if short else (40, 10, 3)))
    context, common = _listed(draw, words, size, *((6, 1) if short else (30, 3)))
    worked = f"{CWE_TEXT.format(context=example)}{CWE_PREFIX} {_numbered(known)}"
    return Problem(f"{worked}\n{CWE_TEXT.format(context=context)}", CWE_PREFIX, tuple(common))


def frequent_words(draw: Draw, size: int, length: int) -> Problem:
    """A text of about ``size`` coded words whose frequencies fall with the square of their rank.

    The most frequent one is written as dots, and is no answer.
    """
    vocabulary = ["...", *draw.names(LOWER, LETTERS, max(length // VOCABULARY_SHARE, 8) - 1)]
    total = math.pi**2 / 6  # zeta(ALPHA)
    text: list[str] = []
    for rank, word in enumerate(vocabulary, 1):
        text += [word] * int(size * rank**-ALPHA / total)
    return Problem(FWE_TEXT.format(context=" ".join(draw.shuffled(text))), FWE_PREFIX, tuple(vocabulary[1:4]))
