# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Long contexts for people without a corpus: facts, questions inside and at the end, repeated passages.

Text is made of a few thousand everyday words, so any tokenizer will do. What matters to an indexer is that some tokens
are asked for much later and most are not; the answers stand in the text, so a model that can retrieve does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_vsprefill.distil.data import Ids, leading_tokens
from vllm_vsprefill.distil.errors import DistilError

_THINGS = (
    "river garden engine letter window market bridge island captain mirror forest candle harbour teacher station "
    "village library hammer blanket mountain orchard kitchen satellite violin lantern carpet museum ticket feather "
    "basket compass diary factory glacier hospital journal kettle ladder magnet notebook"
).split()
_NAMES = (
    "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Katya Luis Mira Nadia Oskar Petra Quinn Rosa Samir Tessa "
    "Umar Vera Wanda Xenia Yusuf Zoe Anton Bianca Cyrus Delia"
).split()
_PLACES = (
    "Lisbon Oslo Accra Perth Lima Quito Sofia Turin Dakar Hanoi Minsk Osaka Porto Riga Seoul Tunis Vienna Warsaw "
    "Zagreb Bergen Cairo Delhi Geneva Havana"
).split()
_VERBS = "carried painted repaired sold described forgot measured visited borrowed hid lost returned counted".split()
_ADJECTIVES = "old silver quiet broken narrow bright wooden heavy small green distant famous empty warm".split()


def _sentence(rng: np.random.Generator) -> str:
    def pick(words: list[str]) -> str:
        return words[int(rng.integers(len(words)))]

    kind = int(rng.integers(4))
    if kind == 0:
        return f"{pick(_NAMES)} {pick(_VERBS)} the {pick(_ADJECTIVES)} {pick(_THINGS)} in {pick(_PLACES)}."
    if kind == 1:
        return f"On day {int(rng.integers(1, 400))} the {pick(_THINGS)} of {pick(_PLACES)} was {pick(_ADJECTIVES)}."
    if kind == 2:
        return (
            f"Nobody in {pick(_PLACES)} knew why the {pick(_THINGS)} and the {pick(_THINGS)} were {pick(_ADJECTIVES)}."
        )
    return f"{pick(_NAMES)} wrote to {pick(_NAMES)} about a {pick(_ADJECTIVES)} {pick(_THINGS)}."


def document(rng: np.random.Generator, words: int) -> str:
    """A text of about ``words`` words: filler with facts, questions with their answers at later places."""
    parts: list[str] = []
    facts: list[tuple[str, str, int]] = []
    passages: list[str] = []
    size = 0
    repeated = [_sentence(rng) for _ in range(int(rng.integers(2, 6)))] if rng.random() < 0.4 else None

    def add(text: str) -> None:
        nonlocal size
        parts.append(text)
        size += text.count(" ") + 1

    def ask(i: int) -> None:
        owner, thing, code = facts[i]
        add(f"\nQuestion: What is the code of the {thing} that belongs to {owner}?\nAnswer: {code}.\n")

    fact_rate, question_rate = rng.uniform(0.02, 0.2), rng.uniform(0.01, 0.08)
    while size < words:
        draw = rng.random()
        if draw < fact_rate:
            owner, thing = _NAMES[int(rng.integers(len(_NAMES)))], _THINGS[int(rng.integers(len(_THINGS)))]
            number = int(rng.integers(10_000, 100_000))
            if not any(known[:2] == (owner, thing) for known in facts):
                facts.append((owner, thing, number))
                add(f"The code of the {thing} that belongs to {owner} is {number}.")
        elif draw < fact_rate + question_rate and facts:
            ask(int(rng.integers(len(facts))))
        elif draw < fact_rate + question_rate + 0.03 and len(passages) > 8:
            start = int(rng.integers(len(passages) - 4))
            add("As was said before: " + " ".join(passages[start : start + int(rng.integers(2, 5))]))
        else:
            text = repeated[len(passages) % len(repeated)] if repeated else _sentence(rng)
            passages.append(text)
            add(text)
    for i in rng.permutation(len(facts))[:4].tolist():
        ask(i)
    return " ".join(parts)


class Synthetic:
    """Generated documents, tokenised; position ``i`` is the ``i``-th document.

    Args:
        tokenizer: the model's.
        vocabulary: rows of the model's embedding.
        seed: of the stream.
        held_out: a stream of its own that training never sees.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, seed: int, held_out: bool = False) -> None:
        self.description = "generated documents" + (", held out" if held_out else "")
        self._tokenizer, self._seed, self._held_out = tokenizer, seed, held_out
        sample = self._ids(document(self._rng(0), 2000))
        if len(sample) == 0 or int(sample.max()) >= vocabulary:
            raise DistilError(
                f"the tokenizer does not belong to the model: it gives the id {int(sample.max(initial=0))}, the model "
                f"has {vocabulary} embeddings; give the right one with --tokenizer"
            )
        self._tokens_per_word = len(sample) / 2000
        self._start = np.asarray(leading_tokens(tokenizer), np.int64)

    def _rng(self, position: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, int(self._held_out), position])

    def _ids(self, text: str) -> Ids:
        return np.asarray(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)

    def sequence(self, position: int, length: int) -> Ids:
        words = int(1.1 * length / self._tokens_per_word) + 50
        while len(ids := self._ids(document(self._rng(position), words))) < length:
            words = words * 3 // 2
        # The end, where the last questions are, is kept, behind what prompts begin with.
        return np.concatenate((self._start, ids[len(ids) - length + len(self._start) :]))

    def after(self, position: int, length: int) -> int:
        del length
        return position + 1

    def identity(self) -> str:
        start = f"-{self._start.tolist()}" if len(self._start) else ""
        return f"synthetic-1-{self._seed}-{self._held_out}{start}"
