# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""RULER's metric."""

from __future__ import annotations

import re

from vllm_vsprefill.eval.ruler.problem import Problem

_UNPRINTABLE = re.compile(r"[\x00-\x1f]")


def score(problem: Problem, answer: str) -> float:
    """Share of the expected answers that occur in an answer, case aside; for question answering 1 if any does."""
    said = _UNPRINTABLE.sub("\n", answer.strip()).strip().lower()
    found = [expected.lower() in said for expected in problem.answers]
    return float(any(found)) if problem.any_of else sum(found) / len(found)
