# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Attention of a round to windows and the lists of its tiles: the plain reference over requests, and the checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_like, check_scale, check_tensor
from ..paged import QUERY_DTYPES, Batch, PagedKV, check_device, check_queries
from ..reference import keys_values, slot_values, with_rows
from ..tile_index import EVERYTHING, TileIndex, check_tiles


def check_attend_tiles(
    q: Tensor, kv: PagedKV, index: TileIndex, batch: Batch, scale: float, out: Tensor | None, visited: Tensor | None
) -> None:
    """Checks every argument of ``attend_tiles``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch; the message names the argument.
    """
    check_queries(q, kv, batch)
    check_tiles(index, batch, kv.num_kv_heads, q.device)
    for name, value, ndim in (("starts", index.starts, 2), ("counts", index.counts, 2), ("slots", index.slots, 1)):
        check_tensor(f"index.{name}", value, ndim, (torch.int32,))
        if value.device != q.device:
            raise ValueError(f"index.{name} is on {value.device} but q is on {q.device}")
        if ndim == 2 and value.shape != index.bits.shape[:2]:
            raise ValueError(f"index.{name} has shape {tuple(value.shape)}, expected {tuple(index.bits.shape[:2])}")
        if not value.is_contiguous():
            raise ValueError(f"index.{name} must be contiguous, got strides {value.stride()}")
    check_scale(scale)
    if out is not None:
        check_tensor("out", out, 3, QUERY_DTYPES)
        check_like("out", out, "q", q, shape=True)
        if out.stride(2) != 1:
            raise ValueError(f"out must have contiguous channels, got strides {out.stride()}")
    if visited is not None:
        check_tensor("visited", visited, 1, (torch.int64,))
        if visited.device != q.device:
            raise ValueError(f"visited is on {visited.device} but q is on {q.device}")
        if visited.shape[0] < batch.num_requests or not visited.is_contiguous():
            raise ValueError(f"visited must be contiguous with an entry per request, got shape {tuple(visited.shape)}")
    check_device("q", q)


def attend_tiles(
    q: Tensor,
    kv: PagedKV,
    index: TileIndex,
    batch: Batch,
    *,
    scale: float,
    out: Tensor | None = None,
    visited: Tensor | None = None,
) -> Tensor:
    """Causal attention of the rows of several requests to the keys of their tile's window, and those that it lists.

    The semantics are those of ``naive.attend_tiles``, request by request; sinks are part of a list. ``dense_last`` of
    the pattern is not looked at.

    Args:
        q: ``[rows, Hq, D]``, contiguous channels; bfloat16, float16 or float32.
        kv: the cache, of the same dtype or fp8.
        index: ``starts``, ``counts`` and ``slots`` of the same batch are read. A list holds keys below the window of
            its tile, each once; the order does not matter.
        batch: which rows belong to which request. Rows of no request are left as they are.
        scale: factor on ``q . k`` before the softmax.
        out: ``[rows, Hq, D]``, written if given.
        visited: int64 ``[requests]``; the (row, key) pairs of all KV heads are added to it if given.

    Returns:
        The output, ``[rows, Hq, D]``.
    """
    if out is None:
        out = torch.empty_like(q)
    pattern = index.pattern
    group = q.shape[1] // kv.num_kv_heads
    for i, row_start, row_end, n in with_rows(batch):
        first = n - (row_end - row_start)
        k, v = keys_values(kv, i, n)
        for tile in pattern.tiles(row_end - row_start, n):
            place = index.place(row_start, i, first, tile)
            start, end = max(tile * pattern.block_q, first), min((tile + 1) * pattern.block_q, n)
            rows = slice(row_start + start - first, row_start + end - first)
            for head in range(kv.num_kv_heads):
                heads = slice(head * group, (head + 1) * group)
                count, at = int(index.counts[head, place]), int(index.starts[head, place])
                window = 0 if count == EVERYTHING else pattern.window_start(tile * pattern.block_q)
                count = max(count, 0)
                listed, values = slot_values(kv, index.slots[at : at + count], head)
                keys = torch.cat((listed, k[window:end, head])).float()
                values = torch.cat((values, v[window:end, head])).float()
                own = torch.arange(window, end, device=q.device) <= torch.arange(start, end, device=q.device)[:, None]
                seen = torch.cat((own.new_ones(end - start, count), own), 1)
                # [group, rows, keys]
                logits = q[rows, heads].transpose(0, 1).float() @ keys.T * scale
                weights = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1)
                out[rows, heads] = (weights @ values).transpose(0, 1).to(out.dtype)
                if visited is not None:
                    visited[i] += int(seen.sum())
    return out
