# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Sparse attention over selected columns and diagonals."""

from .cpu import attend

__all__ = ["attend"]
