# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What ``select`` marks, ``merge`` lists and ``guard`` and ``attend`` read: the choice of every request of a round."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_tensor
from .launch import cdiv
from .paged import Batch
from .types import SparsePattern

BLOCK = 1024  # positions of a block, which one program handles
RANK = 64  # positions between two entries of the rank tables
NONE = 255  # no distance near enough


class Index(NamedTuple):
    """What ``attend`` reads. ``C`` is the room for positions, ``G`` that for granules.

    Attributes:
        columns: int32 ``[requests, Hkv, C]``, columns and sinks, ascending.
        slots: int32 ``[requests, Hkv, C]``, their cache slots, ``block * block_size + offset``.
        rank: int32 ``[requests, Hkv, C // 64]``, how many of them lie below ``64 * i``.
        granules: int32 ``[requests, Hkv, G]``, relative granules beyond the window, ascending.
        granule_rank: int32 ``[requests, Hkv, G // 64]``, how many of them are below ``64 * i``.
        near: uint8 ``[requests, Hkv, G]``, see ``merge/triton.py``; 255 for none.
        flags: uint8 ``[requests, 2, Hkv, C]``, nonzero where a column (0) or distance (1) is selected.
        counts: int32 ``[requests, 2, Hkv, C // 1024]``, scratch.
        pattern: what it was laid out for.
    """

    columns: Tensor
    slots: Tensor
    rank: Tensor
    granules: Tensor
    granule_rank: Tensor
    near: Tensor
    flags: Tensor
    counts: Tensor
    pattern: SparsePattern


def check_pattern(pattern: SparsePattern) -> None:
    """Checks that the kernels can run a pattern: they need what makes granules shift with the tiles.

    Raises:
        ValueError: names the field.
    """
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
    q, k = pattern.block_q, pattern.block_k
    if q & (q - 1) or not 16 <= q <= 128:
        raise ValueError(f"block_q must be a power of two from 16 to 128 for this version, got {q}")
    if k & (k - 1) or k > q:
        raise ValueError(f"block_k must be a power of two of at most block_q ({q}) for this version, got {k}")


def allocate_index(
    num_requests: int, num_kv_heads: int, max_seq_len: int, pattern: SparsePattern, device: torch.device | str
) -> Index:
    """Room for an index; allocate it once. About ``9 + 5 / block_k`` bytes a position and KV head.

    Args:
        num_requests: requests of a round.
        num_kv_heads: KV heads.
        max_seq_len: longest sequence.
        pattern: its ``block_k`` decides the number of granules.
        device: device.
    """
    check_pattern(pattern)
    # One block more than positions: the rank of a sequence's end lies behind its last position.
    width = (cdiv(max_seq_len, BLOCK) + 1) * BLOCK
    granules = (cdiv(cdiv(max_seq_len, pattern.block_k), BLOCK) + 1) * BLOCK
    lead = (num_requests, num_kv_heads)

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Index(
        room(*lead, width),
        room(*lead, width),
        room(*lead, width // RANK),
        room(*lead, granules),
        room(*lead, granules // RANK),
        room(*lead, granules, dtype=torch.uint8),
        room(num_requests, 2, num_kv_heads, width, dtype=torch.uint8),
        room(num_requests, 2, num_kv_heads, width // BLOCK),
        pattern,
    )


def check_index(index: Index, batch: Batch, num_kv_heads: int, device: torch.device) -> None:
    """Checks that an index has room for a batch.

    Raises:
        ValueError: names the argument.
    """
    check_pattern(index.pattern)
    flags = check_tensor("index.flags", index.flags, 4, (torch.uint8,))
    if flags.device != device:
        raise ValueError(f"index is on {flags.device}, expected {device}")
    if flags.shape[2] != num_kv_heads:
        raise ValueError(f"index has room for {flags.shape[2]} KV heads, not {num_kv_heads}")
    if flags.shape[0] < batch.num_requests:
        raise ValueError(f"index has room for {flags.shape[0]} requests, not {batch.num_requests}")
    if flags.shape[3] < (cdiv(batch.max_seq_len, BLOCK) + 1) * BLOCK:
        raise ValueError(f"index has no room for sequences of {batch.max_seq_len} tokens")
