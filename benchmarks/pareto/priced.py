# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the backend computes without a trained indexer: the operations ``price`` and ``rank``, and variants of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.pareto.chunk import Chunk, Kept, products
from vllm_vsprefill.kernels.price.naive import BINS, SIZES, bin_of, ladder, sizes_of
from vllm_vsprefill.kernels.rows import spread_rows
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.kernels.variance.naive import variance

Sets = Callable[[int, int, "Tensor | slice"], Tensor]
"""KV head, step of the ladder, tiles -> keys they list, bool ``[tiles, n]``."""


@dataclass
class Priced:
    """Keys by the mean query of each tile, how many by the price of a pair.

    Attributes:
        price: squared relative output error of a layer that all pairs of one KV head are worth.
        window, sinks: kept in any case.
        tile: rows of a tile.
        parts: of a tile, with a mean query each.
        rows: rows whose true attention is looked at.
        unit: what a key's score is relative to: attention to sinks and window (``near``), to all keys (``all``), or to
            the near keys and to every eighth of the others, taken eight times (``some``).
        group: mean or max over the query heads of a KV head.
        bars: False keeps the same number of keys in every tile instead of all above one bar.
        prior: ``ideal`` adds to a key's scores, whatever the tile, the logarithm of how much more true attention the
            chunk's rows pay to it than its scores say: what an indexer that rates keys could add at best. ``variance``
            adds what the operation of that name computes.
        sketch: dimensions of the random projection in which errors are measured; 0: none, exact.
    """

    price: float = 0.02
    window: int = 256
    sinks: int = 64
    tile: int = 16
    parts: int = 1
    rows: int = 64
    unit: Literal["near", "all", "some"] = "near"
    group: Literal["mean", "max"] = "max"
    bars: bool = True
    prior: Literal["none", "ideal", "variance"] = "none"
    sketch: int = 0

    def __post_init__(self) -> None:
        self.block = self.tile

    def keep(self, chunk: Chunk) -> Kept:
        near = chunk.nearby(self.window, self.sinks)
        hidden = chunk.positions >= chunk.ends[:, None]
        wanted = ~near & ~hidden
        scores = self._scores(chunk, near, hidden)
        if self.prior == "ideal":
            scores += self._prior(chunk, scores, wanted, hidden)[:, None]
        elif self.prior == "variance":
            pattern = SparsePattern(block_q=self.tile, parts=self.parts)
            q, k = chunk.q.transpose(0, 1), chunk.k.transpose(0, 1)
            scores += variance(q, k, scale=chunk.scale, pattern=pattern)[:, None]
        keys = near.expand(len(scores), -1, -1).clone()
        sets = self._sets(chunk, scores, wanted)
        best = self._best(chunk, near, wanted, sets)
        for h, step in enumerate(best.tolist()):
            if step == len(SIZES):
                keys[h] = ~hidden
            else:
                keys[h] |= sets(h, step, slice(None)) & wanted
        return Kept(keys)

    def _scores(self, chunk: Chunk, near: Tensor, hidden: Tensor) -> Tensor:
        """float32 ``[Hkv, tiles, n]``."""
        heads, group = chunk.k.shape[0], chunk.group
        scores = torch.empty(heads, chunk.blocks, chunk.seq_len, device=chunk.device)
        means = self._means(chunk)
        counted = ~hidden if self.unit == "all" else near
        if self.unit == "some":
            far = ~near & ~hidden & (chunk.positions % 8 == 3)
            weight = torch.where(far, 8.0, 1.0).log()
            counted = near | far
        for h in range(heads):
            found = torch.zeros(()) if self.group == "mean" else torch.full((), -torch.inf)
            found = found.to(chunk.device)
            for mean, there in ((mean[h * group + g], there) for mean, there in means for g in range(group)):
                logits = products(mean, chunk.k[h]) * chunk.scale
                units = logits + weight if self.unit == "some" else logits
                unit = units.masked_fill(~counted, float("-inf")).logsumexp(-1, keepdim=True)
                one = torch.where(there, logits - unit, float("-inf"))
                if self.group == "mean":
                    one = one.exp() / (group * sum(part.int() for _, part in means))
                    found = found + one
                else:
                    found = torch.maximum(found, one)
            scores[h] = found.log() if self.group == "mean" else found
        return scores

    def _prior(self, chunk: Chunk, scores: Tensor, wanted: Tensor, hidden: Tensor) -> Tensor:
        """float32 ``[Hkv, n]``, at most 4 either way; keys that hardly anybody looks at are left alone."""
        size = (chunk.ends - chunk.starts)[:, None]
        true = (chunk.true_mass() / size).masked_fill_(~wanted, 0.0).sum(1)
        said = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill_(~wanted, 0.0).sum(1)
        return ((true + 1e-5) / (said + 1e-5)).log().clamp(-4.0, 4.0)

    def _means(self, chunk: Chunk) -> list[tuple[Tensor, Tensor]]:
        """For each part of a tile: its mean queries ``[Hq, tiles, D]``, and ``[tiles, 1]`` whether it has rows."""
        part = -(-self.tile // self.parts)
        padded = torch.nn.functional.pad(chunk.q.float(), (0, 0, 0, chunk.blocks * self.tile - chunk.rows))
        rows = padded.unflatten(1, (-1, self.tile))
        found = []
        for first in range(0, self.tile, part):
            size = ((chunk.ends - chunk.starts).clamp(max=first + part) - first)[:, None]
            mean = (rows[:, :, first : first + part].sum(2) / size.clamp(min=1)).to(chunk.q.dtype)
            found.append((mean, size > 0))
        return found

    def _sets(self, chunk: Chunk, scores: Tensor, wanted: Tensor) -> Sets:
        """What each step of the ladder lists."""
        if not self.bars:
            order = torch.where(wanted, scores, -torch.inf)

            def fixed(h: int, step: int, tiles: Tensor | slice) -> Tensor:
                some = order[h, tiles]
                chosen = torch.zeros_like(some, dtype=torch.bool)
                if step:
                    index = some.topk(min(sizes_of(chunk.seq_len)[step], some.shape[-1]), -1).indices
                    chosen.scatter_(-1, index, True)
                return chosen

            return fixed
        bins = bin_of(scores)
        rows = torch.tensor(spread_rows(chunk.rows, self.rows), device=chunk.device) // self.tile
        counts = torch.stack([torch.bincount(b[rows][wanted[rows] & (b[rows] >= 0)], minlength=BINS) for b in bins])
        steps = ladder(counts, len(rows), chunk.seq_len)

        def above(h: int, step: int, tiles: Tensor | slice) -> Tensor:
            return bins[h, tiles] >= steps[h, step]

        return above

    def _best(self, chunk: Chunk, near: Tensor, wanted: Tensor, sets: Sets) -> Tensor:
        """Index of the best step for each KV head; ``len(SIZES)`` keeps everything."""
        rows = torch.tensor(spread_rows(chunk.rows, self.rows), device=chunk.device)
        tiles = rows // self.tile
        seen = chunk.positions <= (rows + chunk.first)[:, None]
        heads = chunk.k.shape[0]
        error = torch.zeros(heads, len(SIZES) + 1, device=chunk.device)
        density = torch.ones(heads, len(SIZES) + 1, device=chunk.device)
        total = torch.zeros((), device=chunk.device)
        for h in range(heads):
            logits = products(chunk.q[h * chunk.group : (h + 1) * chunk.group, rows], chunk.k[h]) * chunk.scale
            probs = torch.softmax(logits.masked_fill_(~seen, float("-inf")), -1)
            values = chunk.v[h].float()
            if self.sketch:
                generator = torch.Generator().manual_seed(0)
                signs = torch.randint(0, 2, (values.shape[1], self.sketch), generator=generator) * 2 - 1
                values = values @ (signs.to(values) / self.sketch**0.5)
            true = probs @ values
            total += true.square().sum()
            for step in range(len(SIZES)):
                kept = seen & (near[tiles] | (sets(h, step, tiles) & wanted[tiles]))
                some = probs * kept
                error[h, step] = ((some @ values) / some.sum(-1, keepdim=True) - true).square().sum()
                density[h, step] = kept.sum() / seen.sum()
        return (error / total + self.price * density).argmin(1)
