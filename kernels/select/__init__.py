# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Selection of columns and diagonals by cumulative threshold."""

from .cpu import distributions, select

__all__ = ["distributions", "select"]
