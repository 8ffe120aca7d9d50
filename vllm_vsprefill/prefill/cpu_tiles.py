# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The prefill over contiguous keys and values with a list of keys for every tile, one sequence at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from vllm_vsprefill.kernels.attend_tiles import cpu as attend_cpu
from vllm_vsprefill.kernels.attend_tiles import naive as attend_naive
from vllm_vsprefill.kernels.price import cpu as price_cpu
from vllm_vsprefill.kernels.price import naive as price_naive
from vllm_vsprefill.kernels.rank import cpu as rank_cpu
from vllm_vsprefill.kernels.rank import naive as rank_naive
from vllm_vsprefill.kernels.types import Bars, SparsePattern
from vllm_vsprefill.kernels.variance import cpu as variance_cpu
from vllm_vsprefill.kernels.variance import naive as variance_naive
from vllm_vsprefill.prefill.layer import SparseLayer


class TileOperations(NamedTuple):
    """One version of every operation; the contracts are those of the functions in each ``naive.py``."""

    variance: Callable[..., Tensor]
    price: Callable[..., Bars]
    rank: Callable[..., Tensor]
    attend_tiles: Callable[..., tuple[Tensor, int]]


CPU = TileOperations(variance_cpu.variance, price_cpu.price, rank_cpu.rank, attend_cpu.attend_tiles)
REFERENCE = TileOperations(variance_naive.variance, price_naive.price, rank_naive.rank, attend_naive.attend_tiles)
"""Plain PyTorch, for tensors of any device; slow."""


class CPUTilePrefill:
    """Variance, price, guard, rank, attend: once, for the layers of one model. Merging is a part of ``attend_tiles``.

    Called like ``CPUPrefill``.

    Args:
        pattern: tiles, window, sinks.
        price: squared relative output error of a layer that all pairs of one KV head are worth.
        priced_rows: rows of a chunk whose true attention is computed.
        max_density: share of the causal pairs above which nothing is chosen.
        operations: the versions to use.

    Attributes:
        cached, scored: there are no index logits here: 0.
    """

    def __init__(
        self,
        pattern: SparsePattern,
        price: float,
        *,
        priced_rows: int = 64,
        max_density: float = 1.0,
        operations: TileOperations = CPU,
    ) -> None:
        self.pattern = pattern
        self.price = price
        self.priced_rows = priced_rows
        self.max_density = max_density
        self.operations = operations
        self.cached = self.scored = 0

    def choose(
        self,
        layer: SparseLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: int,
        *,
        scale: float,
        slots: Tensor | None = None,
    ) -> Tensor | None:
        """Choose the keys of a chunk's tiles.

        Args:
            layer: the layer.
            query: ``[T, num_heads, head_size]``, the chunk's rows.
            key, value: ``[n, num_kv_heads, head_size]``, the whole sequence; the last ``T`` positions are the chunk's.
            rows: how many of the rows run sparse, the first ones.
            scale: factor on ``q . k`` before the softmax.
            slots: not needed.

        Returns:
            bool ``[num_kv_heads, tiles, n - T + rows]``, for ``attend``, or None where it would compute more than
            ``max_density``.
        """
        seq_len = key.shape[0] - query.shape[0] + rows
        query, key, value = query[:rows], key[:seq_len], value[:seq_len]
        prior = self.prior(query, key, scale=scale)
        bars = self.bars(query, key, value, prior, scale=scale)
        return None if self.exceeds(bars) else self.listed(query, key, bars, prior, scale=scale)

    def prior(self, query: Tensor, key: Tensor, *, scale: float) -> Tensor | None:
        """What is added to the scores of each key, float32 ``[num_kv_heads, n]``, or None for nothing; the tensors as
        for ``choose``, without rows that do not run sparse."""
        if not self.pattern.variance:
            return None
        return self.operations.variance(query, key, scale=scale, pattern=self.pattern)

    def bars(self, query: Tensor, key: Tensor, value: Tensor, prior: Tensor | None, *, scale: float) -> Bars:
        """From which score on tiles list a key; the tensors as for ``prior``."""
        return self.operations.price(
            query, key, value, scale=scale, pattern=self.pattern, price=self.price, num_rows=self.priced_rows,
            prior=prior,
        )  # fmt: skip

    def exceeds(self, bars: Bars) -> bool:
        """Whether a choice would compute more than ``max_density``."""
        return self.max_density < 1.0 and float(bars.density.mean()) > self.max_density

    def listed(self, query: Tensor, key: Tensor, bars: Bars, prior: Tensor | None, *, scale: float) -> Tensor:
        """Keys that the tiles of a chunk list, bool ``[num_kv_heads, tiles, n]``; the tensors as for ``prior``."""
        return self.operations.rank(query, key, bars.scores, scale=scale, pattern=self.pattern, prior=prior)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chosen: Tensor,
        rows: int,
        *,
        scale: float,
        out: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Attend to what ``choose`` chose for the same chunk; only the first ``rows`` rows are computed.

        Returns:
            ``[rows, num_heads, head_size]``, in ``out`` if given, and the (row, key) pairs visited, over all KV heads.
        """
        seq_len = key.shape[0] - query.shape[0] + rows
        return self.operations.attend_tiles(
            query[:rows], key[:seq_len], value[:seq_len], chosen, self.pattern, scale=scale, out=out
        )

    def tile_keys(self, chosen: Tensor, rows: int) -> float:
        """Keys before its window that a tile attends to, mean of tiles and KV heads.

        Args:
            chosen: from ``choose``, on the CPU.
            rows: as for ``choose``.
        """
        pattern, (heads, tiles, seq_len) = self.pattern, chosen.shape
        starts = [pattern.window_start(tile * pattern.block_q) for tile in pattern.tiles(rows, seq_len)]
        sinks = sum(min(start, pattern.sink_keys) for start in starts)
        # Several times as fast as PyTorch's sum of booleans.
        return (np.count_nonzero(chosen.numpy()) / heads + sinks) / tiles
