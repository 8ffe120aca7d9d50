# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What can go wrong in a training run and is for its user to mend."""

from __future__ import annotations

INSTALL = "pip install '.[train]' in the folder of vllm-vsprefill"


class DistilError(RuntimeError):
    """A run that cannot start or go on. The message says what was found, what was expected and what to do."""


def first_line(error: Exception) -> str:
    """What another library's error says, as part of a sentence; its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
