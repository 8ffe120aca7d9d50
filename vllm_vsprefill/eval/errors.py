# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What can go wrong in an evaluation and is for its user to mend."""

from __future__ import annotations

INSTALL = "pip install '.[eval]' in the folder of vllm-vsprefill"


class EvalError(RuntimeError):
    """An evaluation that cannot start or go on. The message says what was found, what was expected and what to do."""
