# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much each KV head keeps, by the output error of a few rows: the fast path for CPUs.

The steps of the ladder are nested: each holds what the one before it holds. So every listed key belongs to the first
step that lists it, and is multiplied with its value once; the outputs of the steps are running sums. Keys that only the
last step lists, most of them, appear in the true output alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..checks import check_prior
from ..parallel import run_pieces
from ..rows import spread_rows
from ..tiles_cpu import TILES, TileScores
from ..types import Bars, SparsePattern
from .naive import BINS, HIGHEST, LOWEST, bar_of, check_price, ladder, rows_of

Bins = npt.NDArray[np.int16]

# Logits of one piece of work: 2 MiB in bfloat16.
MAX_LOGITS = 1 << 20


class _Tile(NamedTuple):
    """A tile with rows that are looked at.

    Attributes:
        tile: index on the absolute grid.
        positions: of the rows.
        start: the first key of its window; it can list the keys from the sinks up to here.
    """

    tile: int
    positions: list[int]
    start: int


def _tiles(positions: list[int], pattern: SparsePattern) -> list[_Tile]:
    found: list[_Tile] = []
    for position in positions:
        tile = position // pattern.block_q
        if not found or found[-1].tile != tile:
            found.append(_Tile(tile, [], pattern.window_start(tile * pattern.block_q)))
        found[-1].positions.append(position)
    return found


def _bins(
    call: TileScores, prior: Tensor | None, head: int, tiles: list[_Tile]
) -> tuple[list[Bins], npt.NDArray[np.int64]]:
    """Bins of the keys that each tile can list, and how many keys of all its rows lie in each, from -1 on."""
    sinks = call.pattern.sink_keys
    counts = np.zeros(BINS + 1, dtype=np.int64)
    some = [tile.tile for tile in tiles]
    bins = np.empty((len(tiles), call.width(some)), dtype=np.int16)
    for first, scores in call.scores(head, some):
        best = scores.amax(1).float()
        if prior is not None:
            best += prior[head, first : first + scores.shape[2]]
        scaled = best.sub_(LOWEST).mul_(BINS / (HIGHEST - LOWEST))
        bins[:, first : first + scores.shape[2]] = scaled.floor_().clamp_(-1, BINS - 1).to(torch.int16).numpy()
    found = [row[sinks : tile.start] for row, tile in zip(bins, tiles, strict=True)]
    for row, tile in zip(found, tiles, strict=True):
        counts += np.bincount(row + 1, minlength=BINS + 1) * len(tile.positions)
    return found, counts


class _Rows:
    """What the rows of one chunk attend to.

    Args:
        call: the chunk.
        q: ``[T, Hq, D]``, its queries.
        v: ``[n, Hkv, D]``.
    """

    def __init__(self, call: TileScores, q: Tensor, v: Tensor) -> None:
        self.call = call
        self.queries = q.unflatten(1, (v.shape[1], -1))
        self.v = v.transpose(0, 1).to(call.k.dtype).contiguous()
        # A channel of ones sums up the probabilities. [Hkv, n, D + 1]
        # In float32, whose products have nothing to prepare: oneDNN compiles a bfloat16 product of a new shape, which
        # takes longer than the products of a tile, and the steps of each tile are as long as they happen to be.
        self.counted = torch.nn.functional.pad(self.v.float(), (0, 1), value=1.0)

    def errors(self, head: int, tiles: list[_Tile], bins: list[Bins], steps: list[int]) -> Tensor:
        """Squared errors of the steps for some tiles' rows, and behind them the squared true output; float32."""
        call = self.call
        positions = [position for tile in tiles for position in tile.positions]
        end = positions[-1] + 1
        keys = call.k[head, :end]
        queries = self.queries[[position - call.first for position in positions], head].to(keys.dtype).flatten(0, 1)
        group = len(queries) // len(positions)
        # Any shift is right; near the largest logit products are rounded least.
        reference = torch.cat((keys[:16], keys[positions]))
        shift = (reference @ queries.T).amax(0).float().mul_(-call.scale).to(queries.dtype).unsqueeze(1)
        probs = call.buffers.take("probs", len(queries), end)
        torch.addmm(shift, queries, keys.T, alpha=call.scale, out=probs)
        for i, position in enumerate(positions):
            probs[i * group : (i + 1) * group, position + 1 :] = float("-inf")
        torch.softmax(probs, -1, out=probs)
        true = (probs @ self.v[head, :end]).float()
        # The step that each bin belongs to; len(steps) is the last one, which is not computed here.
        step_of = (np.arange(BINS)[:, None] < np.array(steps)).sum(1).astype(np.uint8)
        sums = torch.empty(len(steps) + 2, *true.shape[:1], self.counted.shape[2])
        first = 0
        for tile, row in zip(tiles, bins, strict=True):
            last = first + len(tile.positions) * group
            self._sums(head, tile, row, step_of, steps, probs[first:last], sums[:, first:last])
            first = last
        # Of sinks, window and each step -> of each step with all that it holds. [steps, rows * group, D + 1]
        held = sums.cumsum(0)[2:]
        size = true.shape[1]
        outputs = held[..., :size] / held[..., size:].clamp(min=1e-30)
        return torch.cat(((outputs - true).square_().sum((1, 2)), true.square().sum().view(1)))

    def _sums(
        self,
        head: int,
        tile: _Tile,
        bins: Bins,
        step_of: npt.NDArray[np.uint8],
        steps: list[int],
        probs: Tensor,
        sums: Tensor,
    ) -> None:
        """Writes, for the rows of one tile, what sinks, window, and the keys of each step add to the output."""
        values = self.counted[head]
        sinks = min(self.call.pattern.sink_keys, tile.start)
        end = tile.positions[-1] + 1
        torch.mm(probs[:, :sinks].float(), values[:sinks], out=sums[0])
        torch.mm(probs[:, tile.start : end].float(), values[tile.start : end], out=sums[1])
        listed = np.flatnonzero(bins >= steps[-1])
        step = step_of[bins[listed]]
        index = listed[np.argsort(step, kind="stable")] + self.call.pattern.sink_keys
        # NumPy takes columns several times as fast as PyTorch, but knows no bfloat16.
        raw = probs.view(torch.int16) if probs.element_size() == 2 else probs
        weights = torch.from_numpy(np.take(raw.numpy(), index, axis=1)).view(probs.dtype).float()
        kept = values.index_select(0, torch.from_numpy(index))
        first = 0
        for i, last in enumerate(np.bincount(step, minlength=len(steps)).cumsum().tolist(), 2):
            torch.mm(weights[:, first:last], kept[first:last], out=sums[i])
            first = last


def _cut(tiles: list[_Tile], rows: int) -> list[tuple[int, int]]:
    """Ranges of neighbouring tiles with at most so many rows, unless one alone has more."""
    found, first, count = [], 0, 0
    for i, tile in enumerate(tiles):
        if i > first and count + len(tile.positions) > rows:
            found.append((first, i))
            first, count = i, 0
        count += len(tile.positions)
    return [*found, (first, len(tiles))]


def price(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    pattern: SparsePattern,
    price: float,
    num_rows: int = 64,
    prior: Tensor | None = None,
) -> Bars:
    """Same contract as ``naive.price``, for CPU tensors.

    Products are in the dtype of the inputs. Where two steps are about equally good, either may be taken.
    """
    check_price(q, k, v, scale, price, num_rows)
    check_prior(prior, k)
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}; this version runs on the CPU only")
    n, num_kv_heads = k.shape[0], k.shape[1]
    heads = range(num_kv_heads)
    call = TileScores(q, k, scale=scale, pattern=pattern)
    positions = [row + call.first for row in spread_rows(q.shape[0], rows_of(num_rows, n))]
    tiles = _tiles(positions, pattern)
    step = max(min(len(tiles) // 4, TILES // pattern.parts), 1)
    ranges = [(i, min(i + step, len(tiles))) for i in range(0, len(tiles), step)]
    binned = run_pieces([partial(_bins, call, prior, head, tiles[i:j]) for head in heads for i, j in ranges])
    bins: list[list[Bins]] = [[] for _ in heads]
    counted = np.zeros((num_kv_heads, BINS + 1), dtype=np.int64)
    for piece, (found, count) in enumerate(binned):
        bins[piece // len(ranges)] += found
        counted[piece // len(ranges)] += count
    counts = torch.from_numpy(counted[:, 1:])
    steps = ladder(counts, len(positions), n)

    rows = _Rows(call, q, v)
    ranges = _cut(tiles, max(MAX_LOGITS // (q.shape[1] // num_kv_heads * n), 1))
    pieces: list[Callable[[], Tensor]] = [
        partial(rows.errors, head, tiles[i:j], bins[head][i:j], steps[head].tolist())
        for head in heads
        for i, j in ranges
    ]
    sums = torch.stack(run_pieces(pieces)).unflatten(0, (num_kv_heads, len(ranges))).sum(1)
    # The last step lists everything.
    errors = torch.cat((sums[:, :-1], torch.zeros(num_kv_heads, 1)), 1)
    total = sums[:, -1].sum().clamp(min=1e-30)
    seen = sum(position + 1 for position in positions)
    near = seen - sum(max(tile.start - pattern.sink_keys, 0) * len(tile.positions) for tile in tiles)
    above = torch.cat((counts.flip(1).cumsum(1).flip(1), torch.zeros(num_kv_heads, 1, dtype=torch.int64)), 1)
    density = torch.cat((((near + above.gather(1, steps)) / seen).float(), torch.ones(num_kv_heads, 1)), 1)
    best = (errors / total + price * density).argmin(1, keepdim=True)
    bars = bar_of(steps).masked_fill(steps == BINS, float("inf"))
    bars = torch.cat((bars, torch.full((num_kv_heads, 1), float("-inf"))), 1)
    return Bars(bars.gather(1, best).squeeze(1), density.gather(1, best).squeeze(1))
