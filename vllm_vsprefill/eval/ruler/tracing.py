# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Variable tracking: which variables hold a value, through a chain of assignments."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from vllm_vsprefill.eval.draw import UPPER, Draw
from vllm_vsprefill.eval.ruler.problem import NOISE, Problem

TOKENS = 30
HOPS = 4
EXAMPLE_TOKENS = 500  # greatest length of the worked example before the problem, answer included

TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)


def _one(draw: Draw, letters: int, size: int, used: set[str]) -> Problem:
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = draw.letters(UPPER, letters)
        if name not in used:
            used.add(name)
            names.append(name)
    value = draw.number(5)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
    lines = [NOISE + "\n"] * max(size, len(chain) + 1)
    for offset, place in enumerate(sorted(draw.rng.sample(range(len(lines)), len(chain)))):
        lines.insert(place + offset, chain[offset])
    context = " ".join(lines).replace(". \n", ".\n")
    prefix = PREFIX.format(count=HOPS + 1, value=value)
    return Problem(TEXT.format(context=context, value=value), prefix, tuple(names))


def example_size(count: Callable[[str], int]) -> int:
    """Lines of noise of the worked example: five, ten, ... as fit its length."""
    size = 5
    while size < 50:
        worked = _worked(_one(Draw("report", "example"), 3, size + 5, set()))
        if count(worked) + TOKENS > EXAMPLE_TOKENS:
            break
        size += 5
    return size


def _worked(problem: Problem) -> str:
    return f"{problem.text}{problem.prefix} {' '.join(problem.answers)}\n\n"


def make(draw: Draw, size: int, example: int) -> Problem:
    """A problem with ``size`` lines of noise, after a worked example with ``example`` lines and shorter names."""
    used: set[str] = set()
    worked = _worked(_one(draw, 3, example, used))
    problem = _one(draw, 5, size, used)
    return Problem(f"{worked}\n\n{problem.text}", problem.prefix, problem.answers)
