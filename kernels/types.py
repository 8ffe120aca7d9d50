# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Data types shared by every operation of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparsePattern:
    """The part of the sparsity pattern that does not depend on the prompt.

    Positions are absolute positions in the sequence; query tiles and key granules lie on the absolute grids
    ``position // block_q`` and ``position // block_k``, so the pattern does not move with the chunk boundaries.

    Attributes:
        block_q: query tile, in positions. All rows of a tile share one list of keys.
        block_k: key granule, in positions, to which diagonals, local window and sinks are rounded outwards.
        window: local window, in positions: diagonals ``0 .. window - 1`` are always kept. A query attends to itself
            even with 0.
        sinks: the first positions of the sequence that are always kept.
        dense_last: last rows of the call that attend to every key up to their own position.
        parts: of a tile, each of which ranks the keys by a mean query of its own.
        variance: whether half the variance of a key's logits over the queries of a tile is added to its scores there.

    Raises:
        ValueError: a field is not of its type or is out of range; the message names the field.
    """

    block_q: int = 128
    block_k: int = 64
    window: int = 1024
    sinks: int = 64
    dense_last: int = 64
    parts: int = 1
    variance: bool = False

    def __post_init__(self) -> None:
        for name, minimum in (
            ("block_q", 1),
            ("block_k", 1),
            ("window", 0),
            ("sinks", 0),
            ("dense_last", 0),
            ("parts", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an int, got {value!r}")
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        if not isinstance(self.variance, bool):
            raise ValueError(f"variance must be true or false, got {self.variance!r}")

    # What follows from the pattern alone. Kernels work these out by themselves, with the same formulas; everything on
    # the host asks here.

    @property
    def reach(self) -> int:
        """Diagonals ``0 .. reach - 1`` are kept: the window, and a query's own position in any case."""
        return max(self.window, 1)

    @property
    def sink_granules(self) -> int:
        """Granules that hold a sink."""
        return -(-self.sinks // self.block_k)

    @property
    def sink_keys(self) -> int:
        """Sinks, rounded up to granules."""
        return self.sink_granules * self.block_k

    @property
    def window_granules(self) -> int:
        """The last relative granule that the window reaches (see ``granules_of``)."""
        return (self.reach + self.block_k - 2) // self.block_k

    @property
    def granules_per_diagonal(self) -> int:
        """Granules at most that a tile touches along one diagonal."""
        return (self.block_q + self.block_k - 2) // self.block_k + 1

    @property
    def near_keys(self) -> int:
        """Keys that every row is taken to compute beside its columns and diagonals: window, own tile, rounding."""
        return self.window + self.block_q + self.block_k

    @property
    def part_positions(self) -> int:
        """Positions of a part of a tile; the last parts may have fewer, or none."""
        return -(-self.block_q // self.parts)

    def part(self, tile: int, part: int, first: int, seq_len: int) -> tuple[int, int]:
        """First position of a part of a tile, and the one behind its last, of those from ``first`` to ``seq_len``.

        The part is empty where the second is not above the first.
        """
        start, size = tile * self.block_q, self.part_positions
        end = min(start + (part + 1) * size, start + self.block_q, seq_len)
        return max(start + part * size, first), end

    def window_start(self, tile_start: int) -> int:
        """The first key of the window of the tile that starts there: what its first row sees, rounded to granules."""
        return max(tile_start - self.reach + 1, 0) // self.block_k * self.block_k

    def tiles(self, rows: int, seq_len: int) -> range:
        """Tiles of the absolute grid that hold one of the last ``rows`` positions of a sequence."""
        return range((seq_len - rows) // self.block_q, (seq_len - 1) // self.block_q + 1)

    @staticmethod
    def causal_pairs(rows: int, seq_len: int) -> int:
        """(query, key) pairs of the last ``rows`` rows of a sequence under the causal mask alone."""
        return rows * (2 * seq_len - rows + 1) // 2

    def granules_of(self, diagonals: Tensor, seq_len: int) -> int:
        """Relative granules beyond the window that a set of diagonals touches, of a full tile.

        Granule ``r`` lies ``r * block_k`` positions before the tile's first one, rounded to granules, and holds a key
        at distance ``d`` from one of the tile's rows iff ``r * block_k - block_k < d < r * block_k + block_q``.
        """
        block_k = self.block_k
        hit = torch.zeros(max(seq_len + 2 * block_k, 1) // block_k + 1, dtype=torch.bool, device=diagonals.device)
        diagonals = diagonals[diagonals < seq_len].long()
        last = (diagonals + block_k - 1) // block_k
        for step in range(self.granules_per_diagonal):
            granule = last - step
            inside = (granule > self.window_granules) & (granule * block_k + self.block_q > diagonals)
            hit[granule[inside]] = True
        return int(hit.sum())

    def expected_keys(self, num_columns: float, num_granules: float, share: float) -> float:
        """Keys that a row of a chunk computes on average.

        Args:
            num_columns: columns and sinks of the selection.
            num_granules: granules along diagonals beyond the window.
            share: of the sequence, what a row sees on average.
        """
        return share * num_columns + num_granules * self.block_k + self.near_keys

    def tile_keys(self, columns: Tensor, diagonals: Tensor, tile_start: int, tile_end: int) -> Tensor:
        """Every key that some row of a query tile attends to, each once; arguments are as for ``merge.naive.merge``,
        which checks them."""
        device = columns.device
        near = torch.arange(self.reach, device=device)
        rows = torch.arange(tile_start, tile_end, device=device)
        # [rows, diagonals]
        touched = rows.unsqueeze(1) - torch.cat((near, diagonals.long())).unsqueeze(0)
        sinks = torch.arange(min(self.sinks, tile_end), device=device)
        granules = torch.cat((touched[touched >= 0], sinks)).div(self.block_k, rounding_mode="floor").unique()
        offsets = torch.arange(self.block_k, device=device)
        keys = torch.cat(((granules.unsqueeze(1) * self.block_k + offsets).flatten(), columns.long()))
        merged: Tensor = keys[keys < tile_end].unique()
        return merged


class Budgets(NamedTuple):
    """How many columns and diagonals a selection holds at least and at most.

    Attributes:
        min_columns: columns kept at least.
        max_columns: columns kept at most; None: no cap.
        min_diagonals: diagonals kept at least.
        max_diagonals: diagonals kept at most; None: no cap.
    """

    min_columns: int = 0
    max_columns: int | None = None
    min_diagonals: int = 0
    max_diagonals: int | None = None


UNLIMITED = Budgets()


class Selection(NamedTuple):
    """Columns and diagonals chosen for one sequence, per KV head.

    Every row of ``columns`` and ``diagonals`` is valid up to its count only; what follows is undefined and may lie
    outside the sequence.

    Attributes:
        columns: int32 ``[H_kv, max_cols]``, ascending key positions.
        num_columns: int32 ``[H_kv]``.
        diagonals: int32 ``[H_kv, max_diags]``, ascending diagonals in positions; 0 is the query itself.
        num_diagonals: int32 ``[H_kv]``.
    """

    columns: Tensor
    num_columns: Tensor
    diagonals: Tensor
    num_diagonals: Tensor

    def below(self, seq_len: int) -> Selection:
        """The same choice for the first ``seq_len`` tokens only: later columns and longer diagonals are gone.

        The arrays are shared, only the counts are new.
        """

        def count(values: Tensor, counts: Tensor) -> Tensor:
            valid = torch.arange(values.shape[1], device=values.device) < counts.unsqueeze(1)
            return (valid & (values < seq_len)).sum(1, dtype=torch.int32)

        return Selection(
            self.columns,
            count(self.columns, self.num_columns),
            self.diagonals,
            count(self.diagonals, self.num_diagonals),
        )


class Bars(NamedTuple):
    """How much of a chunk each KV head keeps beyond window and sinks, as ``price`` decides it and ``rank`` reads it.

    Attributes:
        scores: float32 ``[H_kv]``, the least score of a key that a tile lists (see ``tile_scores.tile_scores``); +inf
            lists none, -inf every key.
        density: float32 ``[H_kv]``, share of the chunk's causal pairs that is to be expected.
    """

    scores: Tensor
    density: Tensor


class IndexerLayerWeights(NamedTuple):
    """Weights of the two linear layers of the VSIndexer for one attention layer, stacked over KV heads.

    Attributes:
        w1: ``[H_kv, 2 * D, hidden]``.
        b1: ``[H_kv, hidden]``.
        w2: ``[H_kv, hidden, 2]``; the last axis is (column, diagonal).
        b2: ``[H_kv, 2]``.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
