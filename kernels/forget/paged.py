# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Marks the logits of cache slots as missing: the plain reference, which the CPU uses, too."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES, check_tensor

MISSING = float("nan")
"""What a slot holds whose token has not been scored."""


def check_forget(logits: Tensor, slot_mapping: Tensor) -> None:
    """Checks every argument of ``forget``.

    Raises:
        ValueError: wrong dtype, shape, stride or device; names the argument.
    """
    check_tensor("logits", logits, 2, FLOAT_DTYPES)
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows, got strides {logits.stride()}")
    check_tensor("slot_mapping", slot_mapping, 1, (torch.int64,))
    if not slot_mapping.is_contiguous():
        raise ValueError("slot_mapping must be contiguous")
    if slot_mapping.device != logits.device:
        raise ValueError(f"slot_mapping is on {slot_mapping.device} but logits is on {logits.device}")


def forget(logits: Tensor, slot_mapping: Tensor) -> None:
    """Marks slots as missing.

    Args:
        logits: ``[slots, width]``, contiguous rows, written in place.
        slot_mapping: int64 ``[tokens]``, slots; negative ones are padding and skipped.
    """
    logits.index_fill_(0, slot_mapping[slot_mapping >= 0], MISSING)
