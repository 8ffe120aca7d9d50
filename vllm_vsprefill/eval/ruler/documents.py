# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Question answering: the document that answers it, among others."""

from __future__ import annotations

from vllm_vsprefill.eval.draw import Draw, belongs
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.options import Split
from vllm_vsprefill.eval.ruler.problem import Problem
from vllm_vsprefill.eval.ruler.sources import Library, Question

TOKENS = 32
_ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
TEXT = _ORDER + "\n\nThe following are given documents.\n\n{context}\n\n" + _ORDER + "\n\nQuestion: {query}"
PREFIX = " Answer:"


def question(library: Library, split: Split, seed: int, index: int) -> Question:
    """A split's question by its number, in an order that depends on the seed.

    Raises:
        EvalError: there are not so many.
    """
    own = [q for q in library.questions if belongs(q.text, split)]
    if index >= len(own):
        raise EvalError(f"the data set has {len(own)} questions for {split}, fewer than --samples")
    return Draw(split, "questions", seed).shuffled(own)[index]


def make(draw: Draw, asked: Question, library: Library, size: int) -> Problem:
    """A problem with ``size`` documents: those needed, related ones, then any others."""
    chosen = list(asked.needed)
    more = max(size - len(chosen), 0)
    chosen += draw.rng.sample(asked.related, min(more, len(asked.related)))
    if (more := size - len(chosen)) > 0:
        taken = set(chosen)
        others = [i for i in range(len(library.documents)) if i not in taken]
        chosen += draw.rng.sample(others, min(more, len(others)))
    lines = [f"Document {i}:\n{library.documents[which]}" for i, which in enumerate(draw.shuffled(chosen), 1)]
    return Problem(TEXT.format(context="\n\n".join(lines), query=asked.text), PREFIX, asked.answers, any_of=True)
