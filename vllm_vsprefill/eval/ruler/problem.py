# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""One question of RULER."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Problem:
    """A prompt in two parts, and what its answer is to contain.

    Attributes:
        text: what is asked: haystack, then question.
        prefix: how the answer begins, given to the model; RULER's begin with a space.
        answers: what is looked for.
        any_of: one of the answers will do (question answering); else their share counts.
    """

    text: str
    prefix: str
    answers: tuple[str, ...]
    any_of: bool = False


Haystack = Literal["noise", "essay", "needle"]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
