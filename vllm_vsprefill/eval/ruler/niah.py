# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Needles in a haystack: RULER's eight retrieval tasks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from vllm_vsprefill.eval.draw import Draw
from vllm_vsprefill.eval.ruler import sources
from vllm_vsprefill.eval.ruler.problem import NOISE, Haystack, Problem

TOKENS = 128
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = [round(i * 100 / 39) for i in range(40)]  # per cent of the essays' sentences, evenly spaced

Kind = Literal["numbers", "words", "uuids"]


@dataclass(frozen=True)
class Needles:
    """What is hidden, and in what: one row of RULER's table of tasks."""

    haystack: Haystack
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


def _one(draw: Draw, kind: Kind) -> str:
    if kind == "numbers":
        return draw.number(7)
    if kind == "uuids":
        return draw.uuid()
    return draw.pair(sources.words("adjective"), sources.words("noun"))


def sentences(text: str) -> list[str]:
    """Sentences of a text. RULER splits with nltk; needles go between sentences, wherever exactly those end."""
    return re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+", text.strip())


def make(draw: Draw, task: Needles, size: int, essays: tuple[str, ...]) -> Problem:
    """A problem with ``size`` sentences of haystack, or words of the essays, which begin anew where they end."""
    keys = [_one(draw, task.key) for _ in range(task.keys)]
    values = [[_one(draw, task.value) for _ in range(task.values)] for _ in keys]
    needles = draw.shuffled(
        [
            NEEDLE.format(kind=task.value, key=key, value=value)
            for key, own in zip(keys, values, strict=True)
            for value in own
        ]
    )
    asked = draw.rng.sample(range(task.keys), task.queries)
    if task.haystack == "essay":
        context = _in_essays(draw, needles, (essays * (size // len(essays) + 1))[:size])
    else:
        lines = [NOISE] * size
        if task.haystack == "needle":
            lines = [
                NEEDLE.format(kind=task.value, key=_one(draw, task.key), value=_one(draw, task.value))
                for _ in range(size)
            ]
        places = sorted(draw.rng.sample(range(max(size, len(needles))), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        context = "\n".join(lines)
    names = [keys[i] for i in asked]
    query = f"{', '.join(names[:-1])}, and {names[-1]}" if len(names) > 1 else names[0]
    return _asked(context, query, task, tuple(value for i in asked for value in values[i]))


def _in_essays(draw: Draw, needles: list[str], essay: tuple[str, ...]) -> str:
    parts = sentences(" ".join(essay))
    depths = sorted(draw.rng.sample(DEPTHS, len(needles)))
    out, last = [], 0
    for depth, needle in zip(depths, needles, strict=True):
        place = len(parts) * depth // 100
        out += [" ".join(parts[last:place]), needle]
        last = place
    return " ".join([*out, " ".join(parts[last:])])


def _asked(context: str, query: str, task: Needles, answers: tuple[str, ...]) -> Problem:
    one = task.queries * task.values == 1
    kind = task.value[:-1] if one else task.value
    are, some, what = ("is", "A", "What is the") if one else ("are", "Some", "What are all the")
    text = (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {kind} afterwards.\n{context}\n"
        f"{what} special magic {kind} for {query} mentioned in the provided text?"
    )
    return Problem(text, f" The special magic {kind} for {query} mentioned in the provided text {are}", answers)
