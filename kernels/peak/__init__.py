# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the rows of a range give each column at most, or in all, at a least distance."""

from .cpu import column_weights

__all__ = ["column_weights"]
