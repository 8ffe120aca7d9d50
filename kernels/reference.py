# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the plain references over a paged cache share: the requests of a round, and contiguous views of
one. Not for serving."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .index import Index
from .paged import FP8_DTYPES, Batch, PagedKV
from .types import Selection


def with_rows(batch: Batch) -> Iterator[tuple[int, int, int, int]]:
    """Each request that has rows: its number, its first row, the one behind its last, and its length."""
    bounds = zip(batch.row_start.tolist(), batch.row_end.tolist(), batch.seq_len.tolist(), strict=True)
    for request, (start, end, seq_len) in enumerate(bounds):
        if start != end:
            yield request, start, end, seq_len


def cache_slots(kv: PagedKV, request: int, seq_len: int) -> Tensor:
    """Slots of the first ``seq_len`` positions of a request, int64 ``[seq_len]``."""
    position = torch.arange(seq_len, device=kv.block_table.device)
    return kv.block_table[request].long()[position // kv.block_size] * kv.block_size + position % kv.block_size


def keys_values(kv: PagedKV, request: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Contiguous keys and values of one sequence, ``[seq_len, Hkv, D]`` each; those of an fp8 cache as float32."""
    ids = kv.block_table[request, : -(-seq_len // kv.block_size)].long()
    # [blocks, Hkv, block, 2D] -> [n, Hkv, 2D]
    return _split(kv, kv.cache[ids].transpose(1, 2).flatten(0, 1)[:seq_len])


def slot_values(kv: PagedKV, slots: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one KV head in some slots, ``[slots, D]`` each; those of an fp8 cache as float32."""
    slots = slots.long()
    return _split(kv, kv.cache[slots // kv.block_size, head, slots % kv.block_size])


def _split(kv: PagedKV, both: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values that lie side by side."""
    k, v = both[..., : kv.head_size], both[..., kv.head_size :]
    if kv.cache.dtype in FP8_DTYPES:
        k = k.float() * (1.0 if kv.k_scale is None else kv.k_scale)
        v = v.float() * (1.0 if kv.v_scale is None else kv.v_scale)
    return k, v


def selection_of(index: Index, request: int, seq_len: int) -> Selection:
    """The choice of one request as its flags say it, on the index's device."""

    def lists(flags: Tensor) -> tuple[Tensor, Tensor]:
        counts = flags.sum(1, dtype=torch.int32)
        width = int(counts.max()) if counts.numel() else 0
        order = torch.argsort((~flags).to(torch.uint8), dim=1, stable=True)[:, :width]
        return order.int(), counts

    columns, diagonals = index.flags[request, :, :, :seq_len] != 0
    return Selection(*lists(columns), *lists(diagonals))
