# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Random draws of a sample: the same ones again from the same seed, and never one of another split's."""

from __future__ import annotations

import hashlib
import random
import string
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from vllm_vsprefill.eval.options import Split

T = TypeVar("T")

_EIGHTHS: dict[Split, frozenset[int]] = {
    "calibration": frozenset({0}),
    "validation": frozenset({1}),
    "report": frozenset(range(2, 8)),
}


def belongs(text: str, split: Split) -> bool:
    """Whether a word, number, name or question is one of a split's. Every text belongs to exactly one."""
    return hashlib.sha256(text.encode()).digest()[0] % 8 in _EIGHTHS[split]


class Draw:
    """Draws of one sample.

    Args:
        split: whatever is drawn belongs to it.
        parts: what tells the sample from others: seed, task, length, number.
    """

    def __init__(self, split: Split, *parts: object) -> None:
        self.split = split
        self.rng = random.Random("/".join(map(str, (split, *parts))))  # of text: the same on every platform

    def own(self, make: Callable[[], str]) -> str:
        """The first of the texts made that belongs to the split."""
        while not belongs(text := make(), self.split):
            pass
        return text

    def number(self, digits: int) -> str:
        """A number of so many digits."""
        return self.own(lambda: str(self.rng.randint(10 ** (digits - 1), 10**digits - 1)))

    def letters(self, alphabet: str, count: int) -> str:
        """A name of so many letters."""
        return self.own(lambda: "".join(self.rng.choices(alphabet, k=count)))

    def names(self, alphabet: str, letters: int, count: int) -> list[str]:
        """Different names."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.letters(alphabet, letters)] = None
        return list(found)

    def uuid(self) -> str:
        """A random UUID."""
        return self.own(lambda: str(uuid.UUID(int=self.rng.getrandbits(128), version=4)))

    def pair(self, first: Sequence[str], second: Sequence[str]) -> str:
        """A word of each list, with a hyphen between them."""
        return self.own(lambda: f"{self.rng.choice(first)}-{self.rng.choice(second)}")

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All of them in another order."""
        return self.rng.sample(items, len(items))


UPPER, LOWER = string.ascii_uppercase, string.ascii_lowercase
