# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Attention over window, sinks and a list of keys for each tile of queries: the fast path for CPUs.

What a tile keeps is gathered once per KV head, its own keys last, and serves all query heads of the group. Two plain
matrix products with a softmax between them then take the rows; PyTorch's flash kernel needs 1.8 times as long for the
same block (Zen 4, bfloat16). The logits between them are in the dtype of the inputs. A rounding of 2**-9 of a large
logit would be felt, so that each row's logits are shifted, before they are rounded, to be near zero where they matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..parallel import run_pieces
from ..tiles_cpu import Buffers, product_dtype
from ..types import SparsePattern
from .naive import check_attend_tiles

# Logits held at a time: 4 MiB in bfloat16. A tile with more is taken in parts, of MIN_ROWS positions at least.
MAX_LOGITS = 1 << 21
MIN_ROWS = 16
# Positions of one piece of work at least.
PIECE_ROWS = 128
# Lists are filled up to multiples of this. oneDNN compiles a product when its shape is new, which takes longer than the
# product itself for many a tile; it keeps about a thousand of them.
GRANULE = 128
# Keys whose logits say by how much a row is shifted: so many of the first and so many of its tile.
REFERENCE = 16


class _Call:
    """Tensors of one call in the layout that the pieces need: KV head outermost, the group's heads beside a row."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, pattern: SparsePattern, out: Tensor) -> None:
        dtype = product_dtype(q.dtype)
        self.pattern = pattern
        self.seq_len, self.first_row = k.shape[0], k.shape[0] - q.shape[0]
        self.group, self.size = q.shape[1] // k.shape[1], q.shape[2]
        shape = (k.shape[1], self.group)
        # [Hkv, T, group, D]
        self.q = q.unflatten(1, shape).transpose(0, 1).contiguous().to(dtype)
        self.out = out.unflatten(1, shape).transpose(0, 1)
        # [Hkv, n, D]; no copy if the caller's tensors are views of such
        self.k, self.v = (x.transpose(0, 1).to(dtype).contiguous() for x in (k, v))
        self.keys = keys.numpy()
        self._masks: dict[int, Tensor] = {}
        self.buffers = Buffers(dtype)

    def future(self, count: int) -> Tensor:
        """``[count * group, count]``: -inf where a key is behind the row's position."""
        if count not in self._masks:
            behind = torch.ones(count, count, dtype=torch.bool).triu_(1).repeat_interleave(self.group, dim=0)
            self._masks[count] = torch.zeros(behind.shape, dtype=self.q.dtype).masked_fill_(behind, float("-inf"))
        return self._masks[count]

    def gather(self, head: int, tile: int, end: int) -> tuple[Tensor, Tensor, range]:
        """Keys and values ``[m, D]`` before position ``end`` that a tile attends to, ascending, and which of them only
        fill up a shape."""
        sinks, start = self.pattern.sink_keys, self.pattern.window_start(tile * self.pattern.block_q)
        if sinks < start:
            listed = np.flatnonzero(self.keys[head, tile - self.first_row // self.pattern.block_q, sinks:start])
            if len(listed) < start - sinks:
                kept = sinks + len(listed)
                near = min(-(-len(listed) // GRANULE) * GRANULE + sinks, start)
                index = torch.from_numpy(np.pad(listed + sinks, (0, near - kept)))
                found = []
                for source, name in ((self.k[head], "keys"), (self.v[head], "values")):
                    target = self.buffers.take(name, near + end - start, self.size)
                    target[:sinks] = source[:sinks]
                    torch.index_select(source, 0, index, out=target[sinks:near])
                    target[near:] = source[start:end]
                    found.append(target)
                return found[0], found[1], range(kept, near)
        return self.k[head, :end], self.v[head, :end], range(0)


def _tiles(call: _Call, head: int, tiles: range, scale: float) -> int:
    """The rows of some tiles for one KV head; returns the number of (row, key) pairs visited."""
    block_q = call.pattern.block_q
    visited = 0
    for tile in tiles:
        start, end = max(tile * block_q, call.first_row), min((tile + 1) * block_q, call.seq_len)
        keys, values, fill = call.gather(head, tile, end)
        parts = -(-(end - start) // max(MAX_LOGITS // (call.group * len(keys)), MIN_ROWS))
        rows = -(-(end - start) // parts)
        for first in range(start, end, rows):
            last = min(first + rows, end)
            _rows(call, head, first, last, keys[: len(keys) - (end - last)], values, fill, scale)
        count = end - start
        visited += count * (len(keys) - len(fill) - count) + count * (count + 1) // 2
    return visited


def _rows(
    call: _Call, head: int, first: int, last: int, keys: Tensor, values: Tensor, fill: range, scale: float
) -> None:
    """Rows ``first .. last - 1`` of a tile attend to ``keys [m, D]`` but those in ``fill``; the last ones are their
    own."""
    count = last - first
    queries = call.q[head, first - call.first_row : last - call.first_row].flatten(0, 1)
    # Any shift is right. These keys bring it near the largest logit: sinks and neighbours are what most rows attend to.
    step = -(-count // REFERENCE)
    reference = torch.cat((keys[:REFERENCE], keys[-count::step]))
    shift = (reference @ queries.T).amax(0).float().mul_(-scale).to(queries.dtype).unsqueeze(1)
    logits = call.buffers.take("logits", len(queries), len(keys))
    torch.addmm(shift, queries, keys.T, alpha=scale, out=logits)
    logits[:, fill.start : fill.stop] = float("-inf")
    logits[:, -count:] += call.future(count)
    torch.softmax(logits, dim=-1, out=logits)
    result = logits @ values[: len(keys)]
    call.out[head, first - call.first_row : last - call.first_row] = result.view(count, call.group, call.size)


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    pattern: SparsePattern,
    *,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Same contract as ``naive.attend_tiles``, for CPU tensors.

    Fastest if ``k`` and ``v`` are views of contiguous ``[Hkv, n, D]`` tensors, which are not copied then.
    """
    check_attend_tiles(q, k, v, keys, pattern, scale, out)
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}; this version runs on the CPU only")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    call = _Call(q, k, v, keys, pattern, out)
    tiles = pattern.tiles(q.shape[0], k.shape[0])
    step = max(PIECE_ROWS // pattern.block_q, 1)
    # The longest first, so that the cores end together. Every piece writes rows and heads of its own.
    pieces: list[Callable[[], int]] = [
        partial(_tiles, call, head, tiles[i : i + step], scale)
        for i in reversed(range(0, len(tiles), step))
        for head in range(k.shape[1])
    ]
    return out, sum(run_pieces(pieces))
