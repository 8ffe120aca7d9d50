# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The prefill over a paged cache with a list of keys for every tile. Launches kernels only: nothing waits for the
device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_vsprefill.kernels.attend_tiles import triton as attend_triton
from vllm_vsprefill.kernels.attend_tiles.paged import check_attend_tiles
from vllm_vsprefill.kernels.guard import triton as guard_triton
from vllm_vsprefill.kernels.guard.paged import check_guard_tiles
from vllm_vsprefill.kernels.merge import triton as merge_triton
from vllm_vsprefill.kernels.merge.paged import check_build_tiles
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.price import triton as price_triton
from vllm_vsprefill.kernels.price.naive import kinds_of_length
from vllm_vsprefill.kernels.price.paged import check_price
from vllm_vsprefill.kernels.rank import triton as rank_triton
from vllm_vsprefill.kernels.rank.paged import check_rank
from vllm_vsprefill.kernels.tile_index import TileIndex
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.kernels.variance import triton as variance_triton
from vllm_vsprefill.kernels.variance.paged import check_variance
from vllm_vsprefill.plan import RequestRows
from vllm_vsprefill.prefill.cuda import Round
from vllm_vsprefill.prefill.layer import SparseLayer
from vllm_vsprefill.prefill.tiles import TileBuffers


class TileOperations(NamedTuple):
    """One version of every operation; the contracts are those of the functions in each ``paged.py``."""

    variance: Callable[..., None]
    price: Callable[..., None]
    guard: Callable[..., None]
    rank: Callable[..., None]
    build_tiles: Callable[..., object]
    attend_tiles: Callable[..., object]


TRITON = TileOperations(
    variance_triton.variance,
    price_triton.price,
    guard_triton.guard_tiles,
    rank_triton.rank,
    merge_triton.build_tiles,
    attend_triton.attend_tiles,
)


class CudaTilePrefill:
    """Variance, price, guard, rank, merge, attend: once, for the layers of one model on one device.

    Called like ``CudaPrefill``.

    Args:
        price: squared relative output error of a layer that all pairs of one KV head are worth.
        buffers: allocated for the largest round.
        max_density: share of the causal pairs above which a request is left to the dense kernel.
        operations: the versions to use.
    """

    def __init__(
        self,
        price: float,
        buffers: TileBuffers,
        *,
        max_density: float = 1.0,
        operations: TileOperations = TRITON,
    ) -> None:
        self.price = price
        self.buffers = buffers
        self.max_density = max_density
        self.operations = operations
        self.is_warm = False

    def rounds(self, sparse: Sequence[RequestRows]) -> list[tuple[RequestRows, ...]]:
        """Requests that go through the kernels together: neighbours with the same tiles."""
        found: list[list[RequestRows]] = []
        for rows in sparse:
            pattern = self.buffers.tiling.of(rows.seq_len)
            fits = found and len(found[-1]) < self.buffers.requests
            if fits and self.buffers.tiling.of(found[-1][0].seq_len) == pattern:
                found[-1].append(rows)
            else:
                found.append([rows])
        return [tuple(one) for one in found]

    def index(self, requests: Sequence[RequestRows]) -> TileIndex:
        """Lists of a round, in the buffers."""
        longest = max(rows.seq_len for rows in requests)
        return self.buffers.index(max(rows.row_end for rows in requests), len(requests), longest)

    def may_exceed(self, rows: RequestRows) -> bool:
        """Whether a choice for these rows could compute more than ``max_density`` of them."""
        return self.max_density < 1.0

    def choose(self, layer: SparseLayer, query: Tensor, kv: PagedKV, requests: Round, *, scale: float) -> None:
        """Choose the keys of a round; what was chosen lies in the buffers until the next call.

        Afterwards ``buffers.dense_rows`` says which requests the dense kernel has to compute, if the round is guarded.

        Args:
            layer: the layer.
            query: ``[rows, num_heads, head_size]``, all rows of the step.
            kv: keys and values of the layer, those of the rows included.
            requests: the round.
            scale: factor on ``q . k`` before the softmax.

        Raises:
            ValueError: an argument does not fit the kernels or the buffers; names it.
        """
        do, buffers, index, rows = self.operations, self.buffers, _lists(requests), requests.rows
        prior = buffers.prior
        if layer.place == 0:
            self._check(layer, query, kv, requests, scale)
        if buffers.variance is not None:
            do.variance(query, kv, rows, index.pattern, *buffers.variance, scale=scale)
        do.price(query, kv, rows, index, buffers.price, scale=scale, price=self.price, prior=prior)
        if requests.guarded is not None:
            counts = buffers.guarded(layer.place)
            do.guard(
                index, rows, self.max_density, dense_rows=buffers.dense_rows, sparse_end=buffers.sparse_end,
                counts=counts,
            )  # fmt: skip
            rows = requests.guarded
        do.rank(query, kv, rows, index, buffers.rank, scale=scale, prior=prior)
        do.build_tiles(index, kv, rows)

    def attend(
        self, layer: SparseLayer, query: Tensor, kv: PagedKV, requests: Round, *, scale: float, out: Tensor
    ) -> None:
        """Attend to what ``choose`` chose for the same round.

        Writes its rows of ``out``, shaped like ``query``, without those of requests that the guard sent away.

        Raises:
            ValueError: as for ``choose``.
        """
        index, visited = _lists(requests), self.buffers.visited(layer.place)
        rows = requests.rows if requests.guarded is None else requests.guarded
        if layer.place == 0:
            check_attend_tiles(query, kv, index, rows, scale, out, visited)
        self.operations.attend_tiles(query, kv, index, rows, scale=scale, out=out, visited=visited)

    def _check(self, layer: SparseLayer, query: Tensor, kv: PagedKV, requests: Round, scale: float) -> None:
        """Check what the kernels of ``choose`` are given, before the first of them is launched."""
        buffers, index, rows = self.buffers, _lists(requests), requests.rows
        if buffers.variance is not None:
            check_variance(query, kv, rows, index.pattern, *buffers.variance, scale)
        check_price(query, kv, rows, index, buffers.price, scale, self.price, buffers.prior)
        check_rank(query, kv, rows, index, buffers.rank, scale, buffers.prior)
        check_build_tiles(index, kv, rows)
        if requests.guarded is not None:
            check_guard_tiles(
                index, rows, self.max_density, buffers.dense_rows, buffers.sparse_end, buffers.guarded(layer.place)
            )

    def warm_up(self, layer: SparseLayer, kv: PagedKV, dtype: torch.dtype, *, scale: float) -> None:
        """Compile all kernels with made-up requests, which read block 0 of the cache. Clears the counts.

        Args:
            layer: the layer; others have the same shape.
            kv: its cache; the block table is ignored.
            dtype: of the queries.
            scale: as for ``choose``.
        """
        self.is_warm = True
        rows, device = 64, kv.cache.device
        query = torch.zeros(rows, layer.heads.num_heads, layer.heads.head_size, dtype=dtype, device=device)
        for pattern, limit in self.buffers.tiling.patterns:
            for bound in [rows, *(n for n in kinds_of_length() if rows < n <= limit)]:
                self._warm_up_one(layer, kv, query, pattern, bound, scale)
        self.buffers.counts.zero_()

    def _warm_up_one(
        self, layer: SparseLayer, kv: PagedKV, query: Tensor, pattern: SparsePattern, bound: int, scale: float
    ) -> None:
        """One request of short length in a round that might be as long as ``bound``: kernels depend on that."""
        rows, device = query.shape[0], query.device
        table = torch.zeros(1, -(-bound // kv.block_size), dtype=torch.int32, device=device)
        batch = Batch.from_lists([rows], [rows], device)._replace(max_seq_len=bound)
        kv = kv._replace(block_table=table)
        index = self.buffers.storage.view(pattern, rows, 1, bound)
        requests = Round(batch, batch, batch._replace(row_end=self.buffers.sparse_end[:1]), index)
        self.choose(layer, query, kv, requests, scale=scale)
        self.attend(layer, query, kv, requests, scale=scale, out=torch.empty_like(query))


def _lists(requests: Round) -> TileIndex:
    if requests.tiles is None:
        raise ValueError("the round has no room for lists of tiles")
    return requests.tiles
