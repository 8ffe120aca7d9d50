# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The largest problem that fits a length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from vllm_vsprefill.eval.errors import EvalError

Problem = TypeVar("Problem")

ROUNDS = 12
SLACK = 0.01  # of a length that may stay unused


@dataclass(frozen=True)
class Fitted(Generic[Problem]):
    """A problem and its prompt's tokens."""

    problem: Problem
    ids: list[int]


def fit(
    build: Callable[[int], Problem],
    tokens: Callable[[Problem], list[int]],
    limit: int,
    smallest: int,
    largest: int | None = None,
) -> Fitted[Problem]:
    """The problem of the greatest size whose prompt has at most ``limit`` tokens, or nearly.

    Sizes are found by straight lines through what was tried: prompts grow about evenly. What is returned always fits.

    Args:
        build: a problem of a size, the same one whenever asked.
        tokens: of its prompt.
        limit: tokens.
        smallest, largest: sizes; without a largest one there is none.

    Raises:
        EvalError: not even the smallest fits.
    """
    problem = build(smallest)
    ids = tokens(problem)
    if len(ids) > limit:
        raise EvalError(f"the smallest prompt has {len(ids):,} tokens, which leaves no room for the answer")
    best, size, counted = Fitted(problem, ids), smallest, len(ids)
    too_big = largest + 1 if largest is not None else None
    trial = smallest * 2 + 16
    for _ in range(ROUNDS):
        if too_big is not None:
            trial = min(trial, too_big - 1)
        if trial <= size or limit - counted <= SLACK * limit:
            break
        problem = build(trial)
        ids = tokens(problem)
        each = max((len(ids) - counted) / (trial - size), 1e-6)
        if len(ids) <= limit:
            best, size, counted = Fitted(problem, ids), trial, len(ids)
        else:
            too_big = trial
        trial = max(size + int((limit - counted) / each), size + 1)
        if too_big is not None and trial >= too_big:
            trial = (size + too_big) // 2
    return best
