# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Per-token importance logits of the VSIndexer."""

from .cpu import score

__all__ = ["score"]
