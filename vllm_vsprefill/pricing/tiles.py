# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Attention of a pass as the backend computes it with a list of keys for every tile: by the package's own operations,
the paged ones on a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.plan import Gate, RequestRows
from vllm_vsprefill.prefill.cpu_tiles import CPUTilePrefill
from vllm_vsprefill.prefill.cuda import Round
from vllm_vsprefill.prefill.cuda_tiles import TRITON, CudaTilePrefill, TileOperations
from vllm_vsprefill.prefill.layer import Heads, SparseLayer
from vllm_vsprefill.prefill.tiles import TileBuffers, TileShape, tiling_of
from vllm_vsprefill.pricing.passes import GRANULE, LayerRows, attend_dense, dense
from vllm_vsprefill.tuning import PlatformTuning


class Served(NamedTuple):
    """What a server is like, the price aside.

    Attributes:
        options: with the platform's defaults filled in.
        tuning: the platform's.
        heads: of a layer.
        layers: those that can run sparse, whatever the options say.
        longest: tokens of the longest sequence.
    """

    options: VSPrefillConfig
    tuning: PlatformTuning
    heads: Heads
    layers: tuple[int, ...]
    longest: int

    def facts(self) -> dict[str, Any]:
        """What decides what is computed, fit for JSON."""
        options = self.options
        pattern = tiling_of(options, self.tuning, self.heads, self.longest).of(self.longest)
        return {
            "window": pattern.window,
            "sinks": pattern.sinks,
            "block_q": pattern.block_q,
            "block_k": pattern.block_k,
            "tile_parts": pattern.parts,
            "tile_variance": pattern.variance,
            "dense_last_rows": options.dense_last_rows,
            "sampled_rows": options.sampled_rows,
            "max_density": options.max_density,
            "dense_layers": list(options.dense_layers),
        }

    def gate(self) -> Gate:
        """Which chunks run sparse, the dense beginning aside, which stands for what is said about sequences."""
        min_rows = self.options.min_rows
        return Gate(0, self.options.dense_last_rows, 0, self.tuning.min_rows_sampled if min_rows is None else min_rows)


class Tiles:
    """One version of ``sparse``: a chunk's rows at a price.

    Args:
        served: what the server is like.
    """

    any_parts = True
    """Whether tiles may have any number of parts."""

    def __init__(self, served: Served) -> None:
        self.served = served
        options, tuning, heads, longest = served.options, served.tuning, served.heads, served.longest
        self.tiling = tiling_of(options, tuning, heads, longest, any_parts=self.any_parts)

    def sparse(self, rows: LayerRows, price: float, max_density: float) -> tuple[Tensor, float] | None:
        """Attention of some rows.

        Args:
            rows: without those at the end of their chunk that are dense.
            price: as of the option.
            max_density: share of the causal pairs above which nothing is computed.

        Returns:
            ``[Hq, T, D]`` and the pairs computed, mean over the KV heads; None where a server would run them dense.
        """
        raise NotImplementedError


class ContiguousTiles(Tiles):
    """By the operations over contiguous keys and values, on a CPU."""

    def sparse(self, rows: LayerRows, price: float, max_density: float) -> tuple[Tensor, float] | None:
        prefill = CPUTilePrefill(
            self.tiling.of(rows.seq_len),
            price,
            priced_rows=self.served.options.sampled_rows,
            max_density=max_density,
        )
        q, k, v = (x.transpose(0, 1) for x in (rows.q, rows.k, rows.v))
        prior = prefill.prior(q, k, scale=rows.scale)
        bars = prefill.bars(q, k, v, prior, scale=rows.scale)
        if prefill.exceeds(bars):
            return None
        listed = prefill.listed(q, k, bars, prior, scale=rows.scale)
        out, visited = prefill.attend(q, k, v, listed, len(q), scale=rows.scale)
        return out.transpose(0, 1), visited / k.shape[1]


class PagedTiles(Tiles):
    """By the operations over a paged cache, on a GPU.

    Args:
        served: what the server is like.
        chunk: rows of the longest chunk.
        dtype: of queries.
        device: where.
        operations: the versions to use.
    """

    any_parts = False  # also where a CPU is served, and a GPU computes what it would choose

    def __init__(
        self,
        served: Served,
        chunk: int,
        dtype: torch.dtype,
        device: torch.device,
        operations: TileOperations = TRITON,
    ) -> None:
        super().__init__(served)
        shape = TileShape(served.heads, dtype, served.longest, 1, served.options.sampled_rows)
        self.buffers = TileBuffers.allocate(shape, self.tiling, max_num_seqs=1, max_tokens=chunk, device=device)
        self.operations = operations
        tau = torch.zeros(2, served.heads.num_kv_heads, dtype=torch.float64)
        self.layer = SparseLayer(0, 0, served.heads, None, tau)  # layers take turns with one place in the counters

    def sparse(self, rows: LayerRows, price: float, max_density: float) -> tuple[Tensor, float] | None:
        count, seq_len = rows.q.shape[1], rows.seq_len
        prefill = CudaTilePrefill(price, self.buffers, max_density=max_density, operations=self.operations)
        request = RequestRows(0, 0, count, seq_len)
        batch = Batch.from_lists([count], [seq_len], rows.q.device)
        guarded = None
        if prefill.may_exceed(request):
            guarded = batch._replace(row_end=self.buffers.sparse_end[:1])
        # The sequence's room is a cache whose blocks lie in order.
        cache = rows.room.unflatten(1, (-1, GRANULE)).transpose(0, 1)
        table = torch.arange(cache.shape[0], dtype=torch.int32, device=cache.device)[None]
        kv, requests = PagedKV(cache, table), Round(batch, batch, guarded, prefill.index([request]))
        query = rows.q.transpose(0, 1).contiguous()
        prefill.choose(self.layer, query, kv, requests, scale=rows.scale)
        if guarded is not None and int(self.buffers.sparse_end[0]) == 0:
            return None
        out = torch.empty_like(query)
        self.buffers.counts.zero_()
        prefill.attend(self.layer, query, kv, requests, scale=rows.scale, out=out)
        visited = float(self.buffers.visited(0).sum())
        return out.transpose(0, 1), visited / self.served.heads.num_kv_heads


class Priced:
    """Attention of one pass at a price, and what it computes.

    Args:
        tiles: computes sparse rows.
        price: as of the option.
        max_density: as of the option.

    Attributes:
        computed, causal: pairs so far, over the layers that can run sparse.
    """

    def __init__(self, tiles: Tiles, price: float, max_density: float) -> None:
        self.tiles, self.price, self.max_density = tiles, price, max_density
        self.computed = self.causal = 0.0
        self._gate = tiles.served.gate()
        self._layers = set(tiles.served.layers) - set(tiles.served.options.dense_layers)

    @property
    def density(self) -> float:
        """Computed pairs / causal pairs."""
        return self.computed / self.causal if self.causal else 1.0

    def __call__(self, rows: LayerRows) -> Tensor:
        """Attention of a chunk's rows, ``[Hq, T, D]``."""
        count = rows.q.shape[1]
        if rows.layer in self.tiles.served.layers:
            self.causal += SparsePattern.causal_pairs(count, rows.seq_len)
        tail, found = self.tiles.served.options.dense_last_rows, None
        if rows.layer in self._layers and self._gate.admits(count, rows.seq_len, True):
            sparse = rows._replace(q=rows.q[:, : count - tail], seq_len=rows.seq_len - tail)
            found = self.tiles.sparse(sparse, self.price, self.max_density)
        if found is None:
            if rows.layer in self.tiles.served.layers:
                self.computed += SparsePattern.causal_pairs(count, rows.seq_len)
            return attend_dense(rows)
        out, pairs = found
        self.computed += pairs + SparsePattern.causal_pairs(tail, rows.seq_len)
        if not tail:
            return out
        return torch.cat((out, dense(rows.q[:, count - tail :], rows.k, rows.v, rows.scale)), 1)
