# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Union of columns, diagonals, local window and sinks of one query tile."""

from .naive import merge

__all__ = ["merge"]
