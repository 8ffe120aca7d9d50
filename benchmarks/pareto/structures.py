# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The structures a selection can have: columns for a whole chunk, keys for a tile of queries, blocks, diagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from benchmarks.pareto.chunk import Chunk, Computed, Kept, products
from vllm_vsprefill.kernels.sampled.naive import sampled
from vllm_vsprefill.kernels.select.naive import select
from vllm_vsprefill.kernels.types import Budgets

SIZES = (0, 128, 256, 512, 1024, 2048, 4096)
"""Keys a tile may keep by the rule ``error``, everything aside."""

UNWANTED = -1.0
"""Score of keys that need no choosing; true scores are not negative."""


class Estimator(Protocol):
    """A method. Dense attention runs where it returns None."""

    block: int

    def keep(self, chunk: Chunk) -> Kept | Computed | None:
        """What the chunk's rows look at, or what they get."""


def mean_query_mass(
    chunk: Chunk,
    tile: int,
    probes: int,
    heads: int,
    group: str = "mean",
    over: str = "mean",
    spread: float = 0.0,
    score: str = "bf16",
) -> Tensor:
    """Attention of the mean query of each part of a tile.

    Args:
        chunk: the rows.
        tile: rows of a tile, a multiple of ``probes``.
        probes: parts of a tile whose mean queries are looked at.
        heads: lists: KV heads or query heads.
        group: mean or max over the query heads of a list.
        over: mean or max over a tile's parts.
        spread: factor on the second term of the logarithm of the mean of ``exp(q . k)`` over a part's rows: half the
            variance of the logits, channels taken as independent. 0 leaves it out.
        score: precision of mean query and key: the model's own, ``fp8`` (e4m3, one scale a token) or ``int4``.

    Returns:
        float32 ``[heads, tiles, n]``.
    """
    part = tile // probes
    tiles = -(-chunk.rows // tile)
    rows = torch.arange(tiles * probes, device=chunk.device) * part
    last = (rows + part).clamp(max=chunk.rows) + chunk.first
    hidden = chunk.positions >= last[:, None]
    empty = rows >= chunk.rows
    per_list = chunk.q.shape[0] // heads
    scores = torch.empty(heads, tiles, chunk.seq_len, device=chunk.device)
    for h in range(heads):  # one list at a time keeps the logits small
        rows_q = chunk.q[h * per_list : (h + 1) * per_list].float()
        rows_q = torch.nn.functional.pad(rows_q, (0, 0, 0, tiles * tile - chunk.rows)).unflatten(1, (-1, part))
        size = (chunk.rows - rows).clamp(min=1, max=part)[:, None]
        mean = rows_q.sum(2) / size
        k = chunk.k[h * per_list // chunk.group]
        logits = products(_rounded(mean.to(k.dtype), score), _rounded(k, score)) * chunk.scale
        if spread:
            variance = (rows_q.square().sum(2) / size - mean.square()).clamp(min=0)
            logits += products(variance.to(k.dtype), k.square()) * (spread * chunk.scale**2 / 2)
        mass = torch.softmax(logits.masked_fill_(hidden, float("-inf")), dim=-1)
        mass[:, empty] = 0.0
        mass = mass.unflatten(1, (tiles, probes))
        mass = mass.amax(2) if over == "max" else mass.mean(2)
        scores[h] = mass.amax(0) if group == "max" else mass.mean(0)
    return scores


def _rounded(x: Tensor, score: str) -> Tensor:
    """``x`` as it reads back from fewer bits, with one scale a token."""
    if score == "bf16":
        return x
    largest = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12)
    if score == "fp8":
        return ((x.float() * (448 / largest)).to(torch.float8_e4m3fn).float() * (largest / 448)).to(x.dtype)
    return ((x.float() * (7 / largest)).round() * (largest / 7)).to(x.dtype)


def top_keys(scores: Tensor, count: int) -> Tensor:
    """bool, like ``scores [..., n]``: the largest ``count`` that are wanted at all."""
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if count > 0:
        chosen.scatter_(-1, scores.topk(min(count, scores.shape[-1]), dim=-1).indices, True)
    return chosen & (scores > UNWANTED)


def smallest_set(scores: Tensor, may_leave: Tensor) -> Tensor:
    """bool, like ``scores [..., n]``: the smallest set that leaves out no more than ``may_leave [...]``."""
    ranked, order = scores.clamp(min=0).sort(-1, descending=True)
    rest = ranked.flip(-1).cumsum(-1).flip(-1)  # what is left out before this key is taken
    taken = rest > may_leave[..., None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, taken) & (scores > UNWANTED)


def residual_pairs(chunk: Chunk, size: int) -> float:
    """Pairs that the means of a residual cost: one for every row and block of keys before it."""
    return float(((chunk.ends - chunk.starts) * (chunk.starts // size)).sum())


def output_errors(chunk: Chunk, options: list[Tensor], num_rows: int = 64) -> Tensor:
    """Squared error of the output on sampled rows, relative to the squared output of all heads together.

    Args:
        chunk: the rows.
        options: lists of keys, bool ``[L, blocks, n]`` each.
        num_rows: rows that are looked at, spread over the blocks and over the places within a block.

    Returns:
        float32 ``[options, L]``; its sum over lists is the layer's squared relative error.
    """
    count = min(num_rows, chunk.rows)
    rows = torch.tensor([chunk.rows * i // count for i in range(count)], device=chunk.device)
    rows = (rows + torch.arange(count, device=chunk.device) * 37 % max(chunk.rows // count, 1)).clamp(
        max=chunk.rows - 1
    )
    blocks = rows // chunk.block
    later = chunk.positions > (rows + chunk.first)[:, None]
    lists = len(options[0])
    heads = chunk.q.shape[0] // lists
    error = torch.zeros(len(options), lists, device=chunk.device)
    total = torch.zeros((), device=chunk.device)
    for h in range(lists):
        kv = h * heads // chunk.group
        logits = products(chunk.q[h * heads : (h + 1) * heads, rows], chunk.k[kv]) * chunk.scale
        probs = torch.softmax(logits.masked_fill_(later, float("-inf")), -1)
        values = chunk.v[kv].float()
        true = probs @ values
        total += true.square().sum()
        for i, option in enumerate(options):
            kept = probs * option[h, blocks]
            error[i, h] = (kept @ values / kept.sum(-1, keepdim=True) - true).square().sum()
    return error / total


@dataclass
class Structure:
    """Window and sinks, columns for the chunk, keys for each tile: each part with its own ranking and size.

    Attributes:
        window: keys less than this before any row of a block are kept.
        sinks: first keys of the sequence that are kept.
        columns: columns that the whole chunk keeps.
        columns_by: what ranks them: attention of all rows outside window and sinks (an oracle), of 64 rows, or of
            the tiles' mean queries.
        keys: keys that each tile keeps besides.
        tile: rows of a tile; a multiple of the block, which is 128 rows or the tile if that is smaller.
        rank: what ranks them: the tile's mean query, or the attention of all of its rows (an oracle).
        probes: parts of a tile with a mean query each.
        over: mean or max over these parts (of an oracle: over the tile's rows and query heads).
        spread: factor on the logits' variance over a part's rows (see ``mean_query_mass``).
        score: precision in which mean queries meet keys: bf16, fp8 or int4.
        group: mean or max over the query heads of a list.
        lists: lists a KV head or a query head.
        granule: keys that are chosen together, in blocks on the grid of positions.
        candidates: share of the keys, best in the chunk's ranking, among which tiles choose.
        rule: how many: ``keys`` of them; as many on average, by one bar for all tiles of a chunk (``share``); the
            smallest set with the share ``level`` of what window, sinks and columns leave over (``mass``); the smallest
            set that leaves out no more than ``level`` of everything (``left``); every key whose score reaches ``level``
            of the largest one beside window and sinks (``peak``), or ``level`` itself (``floor``); or of ``SIZES``, for
            all tiles of a chunk alike, the one with the smallest sum of squared output error on sampled rows and
            ``level`` times density (``error``; see ``output_errors``).
        bars: with the rule ``error``, sizes are means over a chunk's tiles, reached by one bar for all of them.
        max_keys: cap on what a rule takes; 0: none.
        diagonals: distances beyond the window that every row looks at, ranked by the attention of 64 rows.
        residual: keys in a block of those whose left-out ones enter the softmax as their mean; 0: none.
        only: the one list that is sparse, the others keep everything; None: all lists are sparse.
        scales: factors on ``keys`` or ``level`` by layer, or by layer and list; 0 leaves window, sinks and columns.
            With the rule ``error`` they weight the error.
    """

    window: int = 256
    sinks: int = 64
    columns: int = 0
    columns_by: Literal["oracle", "rows", "tiles"] = "oracle"
    keys: int = 0
    tile: int = 128
    rank: Literal["mean", "oracle"] = "mean"
    probes: int = 1
    over: Literal["mean", "max"] = "mean"
    spread: float = 0.0
    score: Literal["bf16", "fp8", "int4"] = "bf16"
    group: Literal["mean", "max"] = "mean"
    lists: Literal["kv", "query"] = "kv"
    granule: int = 1
    candidates: float = 1.0
    rule: Literal["keys", "share", "mass", "left", "peak", "floor", "error"] = "keys"
    level: float = 0.0
    bars: bool = False
    max_keys: int = 0
    diagonals: int = 0
    residual: int = 0
    only: int | None = None
    scales: list[float] | list[list[float]] | None = None

    def __post_init__(self) -> None:
        self.block = min(self.tile, 128)
        if self.tile % self.block or self.tile % self.probes:
            raise ValueError(f"tile {self.tile} is no multiple of {self.block} rows and {self.probes} probes")

    def keep(self, chunk: Chunk) -> Kept:
        heads = chunk.q.shape[0] if self.lists == "query" else chunk.k.shape[0]
        near = chunk.nearby(self.window, self.sinks)
        keys = near.expand(heads, -1, -1).clone()
        by_tile = None
        if self.keys or self.rule != "keys" or self.columns_by == "tiles":
            by_tile = self._rank(chunk, heads)
        if self.columns or self.candidates < 1:
            ranking = self._rank_columns(chunk, near, by_tile, heads)
        if self.columns:
            keys |= top_keys(ranking, self.columns)[:, None] & (chunk.positions < chunk.ends[:, None])
        if by_tile is not None and (self.keys or self.rule != "keys"):
            per_tile = self.tile // self.block
            wanted = ~keys[:, _last_blocks(chunk, per_tile)]
            if self.candidates < 1:
                wanted &= top_keys(ranking, int(self.candidates * chunk.seq_len))[:, None]
            if self.rule == "error":
                keys = self._choose_by_error(chunk, by_tile, wanted, keys)
            else:
                chosen = self._choose(by_tile, wanted, chunk.layer)
                keys |= chosen.repeat_interleave(per_tile, 1)[:, : chunk.blocks]
        if self.only is not None:
            keys[torch.arange(heads, device=chunk.device) != self.only] = chunk.positions < chunk.ends[:, None]
        kept = Kept(keys, residual=self.residual)
        if self.diagonals:
            kept.diagonals = self._choose_diagonals(chunk, heads)
        if self.residual:
            kept.extra_pairs = residual_pairs(chunk, self.residual)
        return kept

    def _rank(self, chunk: Chunk, heads: int) -> Tensor:
        """Scores of the tiles, ``[heads, tiles, n]``."""
        if self.rank == "oracle":
            blocks = chunk.true_mass(self.over)
            per_tile = self.tile // self.block
            blocks = torch.nn.functional.pad(blocks, (0, 0, 0, -chunk.blocks % per_tile)).unflatten(1, (-1, per_tile))
            return blocks.amax(2) if self.over == "max" else blocks.sum(2) / self.tile
        return mean_query_mass(chunk, self.tile, self.probes, heads, self.group, self.over, self.spread, self.score)

    def _rank_columns(self, chunk: Chunk, near: Tensor, by_tile: Tensor | None, heads: int) -> Tensor:
        """Scores of the chunk's columns, ``[heads, n]``: attention outside window and sinks."""
        if self.columns_by == "oracle":
            mass = chunk.true_mass().masked_fill_(near, 0.0).sum(1)
        elif self.columns_by == "tiles":
            assert by_tile is not None
            last = near[_last_blocks(chunk, self.tile // self.block)]
            mass = by_tile.masked_fill(last, 0.0).sum(1)
        else:
            mass = sampled_mass(chunk, self.window)
        mass = mass.repeat_interleave(heads // mass.shape[0], 0)
        return torch.where(chunk.positions < self.sinks, UNWANTED, mass)

    def _factors(self, layer: int, heads: int) -> list[float]:
        given = 1.0 if self.scales is None else self.scales[layer]
        return given if isinstance(given, list) else [given] * heads

    def _choose_by_error(self, chunk: Chunk, scores: Tensor, wanted: Tensor, keys: Tensor) -> Tensor:
        """bool ``[heads, blocks, n]``: what is kept already, and each list's best size of set."""
        per_tile = self.tile // self.block
        scores = torch.where(wanted, scores, UNWANTED)
        options = []
        for size in SIZES:
            if self.bars:
                more = top_keys(scores.flatten(1), size * scores.shape[1]).view_as(scores)
            else:
                more = top_keys(scores, size)
            options.append(keys | more.repeat_interleave(per_tile, 1)[:, : chunk.blocks])
        options.append((chunk.positions < chunk.ends[:, None]).expand_as(keys))
        seen = chunk.visible_rows.double()
        density = torch.stack([torch.stack([(k * seen).sum() for k in option]) for option in options]) / seen.sum()
        weight = torch.tensor(self._factors(chunk.layer, len(keys)), device=chunk.device)
        best = (output_errors(chunk, options) * weight + self.level * density).argmin(0)
        return torch.stack([options[i][h] for h, i in enumerate(best.tolist())])

    def _choose(self, scores: Tensor, wanted: Tensor, layer: int) -> Tensor:
        """bool ``[heads, tiles, n]``: keys chosen by tile."""
        factor = self._factors(layer, len(scores))
        total = scores.sum(-1)
        scores = torch.where(wanted, scores, UNWANTED)
        if self.granule > 1:
            scores, size = self._pool(scores), scores.shape[-1]
        cap = top_keys(scores, self.max_keys // self.granule) if self.max_keys else None
        if self.rule == "keys":
            chosen = torch.stack(
                [top_keys(s, round(self.keys * f / self.granule)) for s, f in zip(scores, factor, strict=True)]
            )
        elif self.rule == "share":
            counts = [round(self.keys * f / self.granule) * scores.shape[1] for f in factor]
            chosen = torch.stack([top_keys(s.flatten(), c).view_as(s) for s, c in zip(scores, counts, strict=True)])
        else:
            level = self.level * torch.tensor(factor, device=scores.device)[:, None]
            usable = scores.clamp(min=0)
            if self.rule == "mass":
                chosen = smallest_set(scores, usable.sum(-1) * (1 - level))
            elif self.rule == "left":
                chosen = smallest_set(scores, total * level)
            elif self.rule == "peak":
                chosen = scores >= usable.amax(-1, keepdim=True) * level[..., None]
            else:
                chosen = scores >= level[..., None]
            chosen &= scores > UNWANTED
        if cap is not None:
            chosen &= cap
        if self.granule > 1:
            chosen = chosen.repeat_interleave(self.granule, -1)[..., :size] & wanted
        return chosen

    def _pool(self, scores: Tensor) -> Tensor:
        """Sums of wanted scores by granule; granules without any stay unwanted."""
        padded = torch.nn.functional.pad(scores, (0, -scores.shape[-1] % self.granule), value=UNWANTED)
        parts = padded.unflatten(-1, (-1, self.granule))
        return torch.where((parts > UNWANTED).any(-1), parts.clamp(min=0).sum(-1), UNWANTED)

    def _choose_diagonals(self, chunk: Chunk, heads: int) -> Tensor:
        _, mass = sampled(chunk.q.transpose(0, 1), chunk.k.transpose(0, 1), scale=chunk.scale, num_rows=64)
        mass[:, : self.window] = UNWANTED
        return top_keys(mass.repeat_interleave(heads // mass.shape[0], 0), self.diagonals)


def _last_blocks(chunk: Chunk, per_tile: int) -> Tensor:
    """int64 ``[tiles]``: index of each tile's last block."""
    tiles = -(-chunk.blocks // per_tile)
    return (torch.arange(1, tiles + 1, device=chunk.device) * per_tile - 1).clamp(max=chunk.blocks - 1)


def sampled_mass(chunk: Chunk, window: int, num_rows: int = 64) -> Tensor:
    """Attention of a few rows outside their window, float32 ``[Hkv, n]``."""
    count = min(num_rows, chunk.rows)
    rows = torch.tensor([chunk.rows * (i + 1) // count - 1 for i in range(count)], device=chunk.device)
    at = (rows + chunk.first)[:, None]
    mass = torch.empty(chunk.k.shape[0], chunk.seq_len, device=chunk.device)
    for h in range(chunk.k.shape[0]):
        q = chunk.q[h * chunk.group : (h + 1) * chunk.group, rows]
        logits = products(q, chunk.k[h]) * chunk.scale
        probs = torch.softmax(logits.masked_fill_(chunk.positions > at, float("-inf")), dim=-1)
        mass[h] = probs.masked_fill_(chunk.positions > at - window, 0.0).sum((0, 1))
    return mass


@dataclass
class Sampled:
    """VSPREFILL's training-free estimator with the thresholds of a preset (SampleAttention, arXiv 2406.15486).

    Columns and diagonals for the whole chunk by the attention of ``rows`` of its rows; a layer whose selection is
    denser than ``max_density`` runs dense. The defaults are those of ``balanced``.
    """

    window: int = 512
    sinks: int = 64
    tau_columns: float = 0.9
    tau_diagonals: float = 0.9
    min_columns: int = 128
    max_columns: int = 0
    max_diagonals: int = 0
    rows: int = 64
    max_density: float = 0.5
    block: int = 128

    def keep(self, chunk: Chunk) -> Kept | None:
        columns, diagonals = sampled(
            chunk.q.transpose(0, 1), chunk.k.transpose(0, 1), scale=chunk.scale, num_rows=self.rows
        )
        chosen = select(
            columns,
            diagonals,
            tau_columns=self.tau_columns,
            tau_diagonals=self.tau_diagonals,
            budgets=Budgets(self.min_columns, self.max_columns or None, 0, self.max_diagonals or None),
        )
        shape = (chunk.k.shape[0], chunk.seq_len + 1)  # one place more for the filling
        on_columns, on_diagonals = (
            torch.zeros(shape, dtype=torch.bool, device=chunk.device).scatter_(1, index.long(), True)[:, :-1]
            for index in (chosen.columns, chosen.diagonals)
        )
        keys = chunk.nearby(self.window, self.sinks) | on_columns[:, None]
        keys &= chunk.positions < chunk.ends[:, None]
        kept = Kept(keys, on_diagonals)
        # Columns, and what diagonals add where they meet no column: an estimate, as the backend makes it.
        share = on_columns.float().mean(1)
        share = share + (1 - share) * on_diagonals.float().mean(1)
        return None if float(share.mean()) > self.max_density else kept


@dataclass
class RowOracle:
    """Upper bound: every row keeps its own keys by its own true attention, beside window and sinks.

    Attributes:
        keys: keys a row keeps; 0: those whose attention reaches ``level``.
        level: share of a row's attention from which a key is kept.
        lists: one set a KV head, by the mean over its query heads, or one a query head.
    """

    window: int = 256
    sinks: int = 64
    keys: int = 0
    level: float = 1.0
    lists: Literal["kv", "query"] = "kv"
    block: int = 128

    def keep(self, chunk: Chunk) -> Computed:
        output = torch.empty_like(chunk.q)
        count = torch.zeros((), dtype=torch.float64, device=chunk.device)
        near = chunk.nearby(self.window, self.sinks)
        for h in range(chunk.k.shape[0]):
            heads = slice(h * chunk.group, (h + 1) * chunk.group)
            for b in range(chunk.blocks):
                r0, r1 = chunk.bounds(b)
                end = chunk.first + r1
                logits = products(chunk.q[heads, r0:r1], chunk.k[h, :end]) * chunk.scale
                at = chunk.first + torch.arange(r0, r1, device=chunk.device)[:, None]
                later = chunk.positions[:end] > at
                probs = torch.softmax(logits.masked_fill_(later, float("-inf")), -1)
                score = probs if self.lists == "query" else probs.mean(0, keepdim=True)
                score = torch.where(near[b, :end] | later, UNWANTED, score)
                chosen = top_keys(score, self.keys) if self.keys else score >= self.level
                kept = (chosen | near[b, :end]) & ~later
                count += kept.sum() * (chunk.group / len(kept))
                probs = torch.softmax(logits.masked_fill_(~kept, float("-inf")), -1)
                output[heads, r0:r1] = probs.to(chunk.v.dtype) @ chunk.v[h, :end]
        return Computed(output, count / chunk.q.shape[0])
