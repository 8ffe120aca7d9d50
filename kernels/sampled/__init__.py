# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Training-free estimate of columns and diagonals."""

from .cpu import sampled

__all__ = ["sampled"]
