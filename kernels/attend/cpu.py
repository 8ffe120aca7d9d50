# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Sparse causal attention in blocks of query rows: the fast path for CPUs.

Distance 0 is always part of the pattern, so every granule that overlaps a tile's own positions is kept. Hence the keys
of a block of rows within a tile split into two parts:

- *past*: the tile's merged keys before the block's first row, visible to all of its rows;
- *own*: the keys of the block's rows themselves, all kept, under the plain causal mask.

In both the query heads of a group are packed into the row axis, so that a key is gathered and multiplied once per KV
head. Blocks of one KV head run in batches; what all blocks of a batch see of the past is gathered once for them. The
parts are joined by their log-sum-exp. Nothing of size rows x keys is ever held, and of the pattern only one batch's
bitmap over the keys. Batches and KV heads are independent pieces of work for the cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..granules import BoolArray, IntArray, tile_granules
from ..parallel import run_pieces
from ..types import Selection, SparsePattern
from .naive import check_attend

# Rows of a block at most: larger tiles are cut, which bounds the mask of the own part and changes no result.
MAX_ROWS = 256
# Rows and blocks of a batch at most, unless one block alone has more rows.
BATCH_ROWS = 512
BATCH_BLOCKS = 16
# Keys that the blocks of a batch must have in common at least before those are worth a call of their own.
MIN_COMMON = 256
# The flash kernel is up to a third slower where the number of keys is not a multiple of this.
KEY_ALIGNMENT = 32


class _Block(NamedTuple):
    """Rows ``start .. end - 1`` of the tile ``tile_start .. tile_end - 1``, all positions."""

    start: int
    end: int
    tile_start: int
    tile_end: int


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``[B, H, R, D]`` over ``[B, H, m, D]``; output and its natural log-sum-exp ``[B, H, R]``."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, attn_mask=mask, scale=scale
    )
    return out, lse


def _join(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Joins partial attentions ``(out [..., D], lse [...])`` over disjoint keys; at least float32."""
    if len(parts) == 1:
        return parts[0][0]
    # [parts, ..., 1], float32 or float64
    weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0).unsqueeze(-1)
    joined = parts[0][0].to(weights.dtype, copy=True).mul_(weights[0])
    for (out, _), weight in zip(parts[1:], weights[1:], strict=True):
        joined.addcmul_(out.to(weights.dtype), weight)
    return joined


class _Call:
    """Tensors of one call in the layout that the blocks need: KV head outermost, the group's heads beside a row."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float) -> None:
        self.scale = scale
        self.first_row = k.shape[0] - q.shape[0]
        self.group = q.shape[1] // k.shape[1]
        self.size = q.shape[2]
        shape = (k.shape[1], self.group)
        # [Hkv, T, group, D]
        self.q = q.unflatten(1, shape).transpose(0, 1).contiguous()
        self.out = out.unflatten(1, shape).transpose(0, 1)
        # [Hkv, n, D]; no copy if the caller's tensors have contiguous rows per head
        self.k, self.v = (x.transpose(0, 1) if x.stride(2) == 1 else x.transpose(0, 1).contiguous() for x in (k, v))
        self._masks: dict[int, Tensor] = {}
        # One pair of buffers for each thread that works on the call
        self._buffers = threading.local()

    def queries(self, head: int, start: int, end: int, num_blocks: int) -> Tensor:
        """``[num_blocks, 1, rows * group, D]`` view of the rows from ``start`` to ``end``, cut into equal blocks."""
        rows: Tensor = self.q[head, start - self.first_row : end - self.first_row]
        return rows.view(num_blocks, 1, -1, self.size)

    def store(self, head: int, start: int, end: int, value: Tensor) -> None:
        """Writes the output of the rows from ``start`` to ``end``."""
        rows = self.out[head, start - self.first_row : end - self.first_row]
        rows.copy_(value.reshape(rows.shape))

    def own(self, head: int, start: int, end: int, num_blocks: int) -> tuple[Tensor, Tensor]:
        """Causal attention of equal blocks of rows to their own positions."""
        count = (end - start) // num_blocks
        if count not in self._masks:
            future = torch.ones(count, count, dtype=torch.bool).triu_(1).repeat_interleave(self.group, dim=0)
            mask = torch.zeros(future.shape, dtype=self.q.dtype).masked_fill_(future, float("-inf"))
            self._masks[count] = mask[None, None]
        keys, values = (x[head, start:end].unflatten(0, (num_blocks, 1, count)) for x in (self.k, self.v))
        return _flash(self.queries(head, start, end, num_blocks), keys, values, self.scale, self._masks[count])

    def gather(self, head: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, 1, m, D]`` at the positions ``[B, m]``, in buffers that the next call reuses."""
        needed = index.numel() * self.size
        buffers: tuple[Tensor, Tensor] | None = getattr(self._buffers, "pair", None)
        if buffers is None or buffers[0].numel() < needed:
            # Some room to grow: the lists of later tiles tend to be a little longer.
            buffers = self.q.new_empty(needed * 5 // 4), self.q.new_empty(needed * 5 // 4)
            self._buffers.pair = buffers
        gathered = []
        for source, buffer in zip((self.k[head], self.v[head]), buffers, strict=True):
            target = buffer[:needed].view(-1, self.size)
            torch.index_select(source, 0, index.view(-1), out=target)
            gathered.append(target.view(index.shape[0], 1, index.shape[1], self.size))
        return gathered[0], gathered[1]


def _dense_rows(call: _Call, head: int, start: int, end: int) -> int:
    """Rows ``start .. end - 1`` of one KV head attend to every key up to their own position; returns the pairs."""
    parts = [call.own(head, start, end, 1)]
    if start:
        past_k, past_v = (x[head, None, None, :start] for x in (call.k, call.v))
        parts.append(_flash(call.queries(head, start, end, 1), past_k, past_v, call.scale))
    call.store(head, start, end, _join(parts))
    count = end - start
    return count * start + count * (count + 1) // 2


def _cut(first_row: int, last_row: int, seq_len: int, block_q: int) -> list[_Block]:
    """Blocks that cover the rows ``first_row .. last_row - 1``."""
    blocks = []
    for tile_start in range(first_row // block_q * block_q, last_row, block_q):
        tile_end = min(tile_start + block_q, seq_len)
        for start in range(tile_start, tile_end, MAX_ROWS):
            block = _Block(max(start, first_row), min(start + MAX_ROWS, tile_end, last_row), tile_start, tile_end)
            if block.start < block.end:
                blocks.append(block)
    return blocks


def _batches(blocks: list[_Block]) -> Iterator[list[_Block]]:
    """Batches of neighbouring blocks with equally many rows."""
    batch = blocks[:1]
    for block in blocks[1:]:
        rows = block.end - block.start
        if rows != batch[0].end - batch[0].start or len(batch) >= min(BATCH_ROWS // rows, BATCH_BLOCKS):
            yield batch
            batch = []
        batch.append(block)
    yield batch


def _past_keys(columns: IntArray, diagonals: IntArray, batch: list[_Block], pattern: SparsePattern) -> BoolArray:
    """bool ``[blocks, m]``: the keys before each block's first row that its tile attends to."""
    starts, ends = (np.array([getattr(block, name) for block in batch]) for name in ("tile_start", "tile_end"))
    seen = np.repeat(tile_granules(diagonals, starts, ends, pattern), pattern.block_k, axis=1)
    seen[:, columns[: np.searchsorted(columns, seen.shape[1])]] = True
    for row, block in zip(seen, batch, strict=True):
        row[block.start :] = False
    return seen


def _past(call: _Call, head: int, batch: list[_Block], seen: BoolArray) -> tuple[Tensor, Tensor]:
    """Attention of each block to its own list of past keys; a log-sum-exp of -inf where a list is empty."""
    lists = [np.flatnonzero(row) for row in seen]
    width = -(-max(map(len, lists)) // KEY_ALIGNMENT) * KEY_ALIGNMENT
    index = np.empty((len(batch), width), dtype=np.int64)
    mask = torch.zeros(len(batch), 1, 1, width, dtype=call.q.dtype)
    for i, (keys, block) in enumerate(zip(lists, batch, strict=True)):
        # Padded to one length with a key that the rows see anyway, so that nothing unseen (a NaN, say) is touched.
        # The mask hides the padding; a list must not become empty by it, since its softmax would be 0 / 0.
        index[i, : len(keys)] = keys
        index[i, len(keys) :] = block.start
        mask[i, ..., max(len(keys), 1) :] = float("-inf")
    past_k, past_v = call.gather(head, torch.from_numpy(index))
    queries = call.queries(head, batch[0].start, batch[-1].end, len(batch))
    out, lse = _flash(queries, past_k, past_v, call.scale, mask)
    for i, keys in enumerate(lists):
        if not len(keys):
            lse[i] = float("-inf")
    return out, lse


def _sparse_rows(
    call: _Call, head: int, columns: IntArray, diagonals: IntArray, batch: list[_Block], pattern: SparsePattern
) -> int:
    """The rows of one batch of blocks for one KV head; returns the number of (row, key) pairs visited."""
    seen = _past_keys(columns, diagonals, batch, pattern)
    rows = batch[0].end - batch[0].start
    visited = rows * int(np.count_nonzero(seen)) + len(batch) * (rows * (rows + 1) // 2)
    start, end = batch[0].start, batch[-1].end
    parts = [call.own(head, start, end, len(batch))]
    common = np.flatnonzero(seen.all(axis=0)) if len(batch) > 1 else np.empty(0, dtype=np.int64)
    # Whatever exceeds the alignment stays in the blocks' own lists.
    common = common[: len(common) // KEY_ALIGNMENT * KEY_ALIGNMENT]
    if len(common) >= MIN_COMMON:
        seen[:, common] = False
        keys, values = call.gather(head, torch.from_numpy(common)[None])
        out, lse = _flash(call.queries(head, start, end, 1), keys, values, call.scale)
        parts.append((out.view(parts[0][0].shape), lse.view(parts[0][1].shape)))
    if seen.any():
        parts.append(_past(call, head, batch, seen))
    call.store(head, start, end, _join(parts))
    return visited


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    pattern: SparsePattern,
    *,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Same contract as ``naive.attend``, for CPU tensors; sums in float32 (float64 for float64 inputs).

    Makes no copy of ``k`` and ``v`` as long as their last axis is contiguous; fastest if they are views of contiguous
    ``[Hkv, n, D]`` tensors.
    """
    check_attend(q, k, v, selection, pattern, scale, out)
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}; this version runs on the CPU only")
    seq_len, num_kv_heads, _ = k.shape
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    call = _Call(q, k, v, out, scale)
    dense_row = max(call.first_row, seq_len - pattern.dense_last)
    heads = range(num_kv_heads)
    pieces: list[Callable[[], int]] = [
        partial(_dense_rows, call, head, start, min(start + MAX_ROWS, seq_len))
        for start in range(dense_row, seq_len, MAX_ROWS)
        for head in heads
    ]
    if dense_row > call.first_row:
        blocks = _cut(call.first_row, dense_row, seq_len, pattern.block_q)
        # Per head the valid prefix of each list
        columns, diagonals = (
            [row[:count].numpy().astype(np.int64) for row, count in zip(items, counts.tolist(), strict=True)]
            for items, counts in (selection[:2], selection[2:])
        )
        pieces += [
            partial(_sparse_rows, call, head, columns[head], diagonals[head], batch, pattern)
            for batch in _batches(blocks)
            for head in heads
        ]
    # Every piece writes rows and heads of its own.
    return out, sum(run_pieces(pieces))
