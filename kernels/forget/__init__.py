# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Marks the logits of cache slots as missing."""

from .paged import MISSING, forget

__all__ = ["MISSING", "forget"]
