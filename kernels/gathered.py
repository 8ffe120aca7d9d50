# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The estimates of a round as ``select`` reads them, from whichever estimator they come."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import cdiv
from .paged import Batch

BLOCK = 1024  # positions of a block, which one program handles


class GatheredLogits(NamedTuple):
    """Logits of every position of every request side by side. ``C`` is the room for positions.

    The token at position ``t`` of a sequence of ``n`` tokens speaks for column ``t`` and for distance ``n - 1 - t``.

    Attributes:
        logits: float32 ``[requests, 2, Hkv, C]``; column, diagonal.
        block_max: float32 ``[requests, 2, Hkv, C // 1024]``, the largest logit of every block.
    """

    logits: Tensor
    block_max: Tensor


def allocate_gathered(
    num_requests: int, num_kv_heads: int, max_seq_len: int, device: torch.device | str
) -> GatheredLogits:
    """Room for gathered logits, 8 bytes a position and KV head; allocate it once."""
    width = cdiv(max_seq_len, BLOCK) * BLOCK
    lead = (num_requests, 2, num_kv_heads)
    return GatheredLogits(
        torch.empty(*lead, width, dtype=torch.float32, device=device),
        torch.empty(*lead, width // BLOCK, dtype=torch.float32, device=device),
    )


def check_gathered(gathered: GatheredLogits, batch: Batch, num_kv_heads: int, device: torch.device) -> None:
    """Checks that there is room for a batch.

    Raises:
        ValueError: names the argument.
    """
    room = gathered.logits
    if room.device != device or room.shape[0] < batch.num_requests or room.shape[2] != num_kv_heads:
        raise ValueError(f"gathered is for {tuple(room.shape)} on {room.device}, too small for this batch")
    if room.shape[3] < batch.max_seq_len:
        raise ValueError(f"gathered has no room for sequences of {batch.max_seq_len} tokens")
