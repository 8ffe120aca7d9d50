# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The prefill over a paged cache, by the Triton kernels. Launches kernels only: nothing waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_vsprefill.kernels.attend import triton as attend_triton
from vllm_vsprefill.kernels.attend.paged import check_attend
from vllm_vsprefill.kernels.guard import triton as guard_triton
from vllm_vsprefill.kernels.guard import upper_bound
from vllm_vsprefill.kernels.guard.paged import check_guard
from vllm_vsprefill.kernels.merge import triton as merge_triton
from vllm_vsprefill.kernels.merge.paged import check_build_index
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.recall import triton as recall_triton
from vllm_vsprefill.kernels.recall.paged import check_recall
from vllm_vsprefill.kernels.sampled import triton as sampled_triton
from vllm_vsprefill.kernels.sampled.paged import check_sampled
from vllm_vsprefill.kernels.score import triton as score_triton
from vllm_vsprefill.kernels.score.paged import check_score_missing
from vllm_vsprefill.kernels.select import triton as select_triton
from vllm_vsprefill.kernels.select.paged import check_gather, check_select
from vllm_vsprefill.kernels.tile_index import TileIndex
from vllm_vsprefill.kernels.types import Budgets
from vllm_vsprefill.plan import RequestRows
from vllm_vsprefill.prefill.buffers import DeviceBuffers
from vllm_vsprefill.prefill.layer import SparseLayer


class PagedOperations(NamedTuple):
    """One version of every operation; the contracts are those of the functions in each ``paged.py``."""

    sampled: Callable[..., None]
    score_missing: Callable[..., None]
    gather: Callable[..., None]
    select: Callable[..., None]
    build_index: Callable[..., object]
    guard: Callable[..., None]
    attend: Callable[..., object]
    recall: Callable[..., None]


TRITON = PagedOperations(
    sampled_triton.sampled,
    score_triton.score_missing,
    select_triton.gather,
    select_triton.select,
    merge_triton.build_index,
    guard_triton.guard,
    attend_triton.attend,
    recall_triton.recall,
)


@dataclass(frozen=True, slots=True)
class Round:
    """Requests that go through the kernels together; all tensors are on the device.

    Attributes:
        whole: all rows of their chunks, on whole sequences; columns and diagonals are chosen for these.
        rows: without the dense last rows.
        guarded: ``rows`` as ``guard`` leaves them, or None where no selection can exceed ``max_density``.
        tiles: lists of keys for every tile, where those are chosen (``CudaTilePrefill``).
    """

    whole: Batch
    rows: Batch
    guarded: Batch | None = None
    tiles: TileIndex | None = None


class CudaPrefill:
    """Estimate, select, merge, guard, attend: once, for the layers of one model on one device.

    A layer calls ``choose`` and then ``attend``, round by round; what was chosen lies in the buffers in between.
    Arguments are checked for the first layer of a worker that runs sparse: the others are like it, and checking takes
    the host as long as launching.

    Args:
        budgets: how many columns and diagonals are kept at least and at most.
        buffers: allocated for a pattern and for the largest round.
        max_density: share of the causal pairs above which ``guard`` leaves a request to the dense kernel.
        operations: the versions to use.
    """

    def __init__(
        self,
        budgets: Budgets,
        buffers: DeviceBuffers,
        *,
        max_density: float = 1.0,
        operations: PagedOperations = TRITON,
    ) -> None:
        self.budgets = budgets
        self.buffers = buffers
        self.max_density = max_density
        self.operations = operations
        self.is_warm = False

    def rounds(self, sparse: Sequence[RequestRows]) -> list[tuple[RequestRows, ...]]:
        """Requests that go through the kernels together: as many as the buffers have room for."""
        size = self.buffers.requests
        return [tuple(sparse[i : i + size]) for i in range(0, len(sparse), size)]

    def index(self, requests: Sequence[RequestRows]) -> TileIndex | None:
        """Nothing: what is chosen has its place in the buffers."""
        return None

    def may_exceed(self, rows: RequestRows) -> bool:
        """Whether a selection for these rows could compute more than ``max_density`` of them."""
        if self.max_density >= 1.0:
            return False
        pattern = self.buffers.work.index.pattern
        return upper_bound(pattern, rows.rows, rows.seq_len, self.budgets) > self.max_density

    def choose(self, layer: SparseLayer, query: Tensor, kv: PagedKV, requests: Round, *, scale: float) -> None:
        """Choose the keys of a round, with whole sequences in view.

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
        do, work = self.operations, self.buffers.work
        logits = self._logits(layer, kv)
        if layer.place == 0:
            self._check(layer, query, kv, requests, scale, logits)
        self._estimate(layer, query, kv, requests.whole, scale, logits)
        do.select(work.gathered, requests.whole, layer.tau, work.index, work.select, budgets=self.budgets)
        # A choice for each tile among what was selected belongs here.
        do.build_index(work.index, kv, requests.rows)
        if requests.guarded is not None:
            rows, end, counts = self.buffers.dense_rows, self.buffers.sparse_end, self.buffers.guarded(layer.place)
            do.guard(work.index, requests.rows, self.max_density, dense_rows=rows, sparse_end=end, counts=counts)

    def attend(
        self, layer: SparseLayer, query: Tensor, kv: PagedKV, requests: Round, *, scale: float, out: Tensor
    ) -> None:
        """Attend to what ``choose`` chose for the same round.

        Writes its rows of ``out``, shaped like ``query``, without those of requests that ``guard`` sent away.

        Raises:
            ValueError: as for ``choose``.
        """
        index, visited = self.buffers.work.index, self.buffers.visited(layer.place)
        rows = requests.rows if requests.guarded is None else requests.guarded
        if layer.place == 0:
            check_attend(query, kv, index, rows, scale, out, None, visited)
        self.operations.attend(query, kv, index, rows, scale=scale, dense_last=0, out=out, visited=visited)

    def recall(self, layer: SparseLayer, query: Tensor, kv: PagedKV, requests: Round, *, scale: float) -> None:
        """Look how much of the true attention of a few rows ``attend`` covers, after ``choose`` and before anything
        else uses the buffers. Adds to ``buffers.covered(layer.place)``, without requests that ``guard`` sent away.

        Raises:
            ValueError: as for ``choose``; or the buffers were allocated without room for it.
        """
        work = self.buffers.work
        if work.recall is None:
            raise ValueError("the buffers were allocated without recall_rows")
        totals = self.buffers.covered(layer.place)
        rows = requests.rows if requests.guarded is None else requests.guarded
        if layer.place == 0:
            check_recall(query, kv, rows, work.index, work.recall, totals, scale)
        self.operations.recall(query, kv, rows, work.index, work.recall, totals, scale=scale)

    def _check(
        self, layer: SparseLayer, query: Tensor, kv: PagedKV, requests: Round, scale: float, logits: Tensor | None
    ) -> None:
        """Check what the kernels of ``choose`` are given, before the first of them is launched."""
        work = self.buffers.work
        if layer.weights is not None and logits is not None:
            check_score_missing(kv, requests.whole, layer.weights, logits, work.missing)
            check_gather(logits, kv, requests.whole, work.gathered)
        elif work.sampled is not None:
            check_sampled(query, kv, requests.whole, work.sampled, work.gathered, scale)
        check_select(work.gathered, requests.whole, layer.tau, work.index, work.select, self.budgets)
        check_build_index(work.index, kv, requests.rows)
        if requests.guarded is not None:
            rows, end, counts = self.buffers.dense_rows, self.buffers.sparse_end, self.buffers.guarded(layer.place)
            check_guard(work.index, requests.rows, self.max_density, rows, end, counts)

    def _logits(self, layer: SparseLayer, kv: PagedKV) -> Tensor | None:
        """Logits of the layer's cache slots, where it has an indexer; all missing, where none are kept."""
        if layer.weights is None:
            return None
        if layer.logits is None:
            return self.buffers.missing_logits(kv.cache.shape[0] * kv.block_size)
        return layer.logits.slots

    def _estimate(
        self, layer: SparseLayer, query: Tensor, kv: PagedKV, batch: Batch, scale: float, logits: Tensor | None
    ) -> None:
        """Importance of every key and distance, as logits in ``buffers.work.gathered``."""
        do, work = self.operations, self.buffers.work
        if layer.weights is not None:
            do.score_missing(kv, batch, layer.weights, logits, work.missing)
            do.gather(logits, kv, batch, work.gathered)
        elif work.sampled is not None:
            do.sampled(query, kv, batch, work.sampled, work.gathered, scale=scale)
        else:
            raise ValueError("the buffers were allocated without sampled_rows, and the layer has no indexer")

    def warm_up(self, layer: SparseLayer, kv: PagedKV, dtype: torch.dtype, *, scale: float) -> None:
        """Compile all kernels with a made-up request, which reads and scores block 0 of the cache. Clears the counts.

        Args:
            layer: the layer; others have the same shape.
            kv: its cache; the block table is ignored.
            dtype: of the queries.
            scale: as for ``choose``.
        """
        self.is_warm = True
        rows, device = 64, kv.cache.device
        query = torch.zeros(rows, layer.heads.num_heads, layer.heads.head_size, dtype=dtype, device=device)
        table = torch.zeros(1, -(-rows // kv.block_size), dtype=torch.int32, device=device)
        batch = Batch.from_lists([rows], [rows], device)
        requests = Round(batch, batch, batch._replace(row_end=self.buffers.sparse_end[:1]))
        kv = kv._replace(block_table=table)
        self.choose(layer, query, kv, requests, scale=scale)
        if self.buffers.work.recall is not None:
            self.recall(layer, query, kv, requests, scale=scale)
            self.buffers.recall.zero_()
        self.attend(layer, query, kv, requests, scale=scale, out=torch.empty_like(query))
        self.buffers.counts.zero_()
