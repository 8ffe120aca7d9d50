# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""VSPREFILL on vLLM's CPU platform: the stock CPU backend, with long prefills handed to ``CPUPrefill``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_vsprefill.backends import cpu_layout
from vllm_vsprefill.backends.layer import Call, DecoderBackendMixin, SparseLayerMixin
from vllm_vsprefill.backends.step import DenseRun, SparseBuilderMixin, SparseStep
from vllm_vsprefill.kernels.forget import forget
from vllm_vsprefill.kernels.types import Selection
from vllm_vsprefill.metrics import Look
from vllm_vsprefill.plan import RequestRows, StepPlan
from vllm_vsprefill.prefill.cpu import CPUPrefill
from vllm_vsprefill.prefill.cpu_tiles import CPUTilePrefill
from vllm_vsprefill.prefill.layer import SparseLayer
from vllm_vsprefill.recall_check import ROWS
from vllm_vsprefill.runtime import Runtime
from vllm_vsprefill.stats import LayerCounts


class VSPrefillCPUBackend(DecoderBackendMixin, CPUAttentionBackend):
    """Stock CPU attention with sparse prefill of long prompts."""

    @staticmethod
    def get_impl_cls() -> type[VSPrefillCPUImpl]:
        return VSPrefillCPUImpl

    @staticmethod
    def get_builder_cls() -> type[VSPrefillCPUMetadataBuilder]:
        return VSPrefillCPUMetadataBuilder


@dataclasses.dataclass(frozen=True, slots=True)
class SparseRequest:
    """The sparse rows of one request; each is a round of its own.

    Attributes:
        rows: its rows without the dense last ones.
        tail: how many dense rows follow.
        block_ids: its blocks.
        fallback: stock call for its rows, for layers where sparse would not pay.
    """

    rows: RequestRows
    tail: int
    block_ids: list[int]
    fallback: DenseRun


class CPURuntime(Runtime):
    """What the layers of one model share on a CPU."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        options = self.options
        self.workspace = cpu_layout.Workspace()
        self.prefill: CPUPrefill | CPUTilePrefill
        limit = options.max_density
        if self.lists_by_tile:
            self.prefill = CPUTilePrefill(self.pattern, self.price, priced_rows=options.sampled_rows, max_density=limit)
        else:
            self.prefill = CPUPrefill(self.pattern, self.budgets, sampled_rows=options.sampled_rows, max_density=limit)
        self._recall: dict[int, tuple[float, float]] = {}  # by layer, summed over KV heads, and how many

    def look_at_recall(self, index: int, found: torch.Tensor) -> None:
        """Add up the recall of what a layer has chosen, ``[num_kv_heads]``."""
        assert self.recall_check is not None
        self.recall_check.mark()
        total, number = self._recall.get(index, (0.0, 0.0))
        self._recall[index] = total + float(found.sum()), number + len(found)

    def publish(self) -> None:
        if self.recall_check is not None and self.recall_check.take():
            self.recall_check.read(self._recall)
        super().publish()


class VSPrefillCPUMetadataBuilder(SparseBuilderMixin[SparseRequest], CPUAttentionMetadataBuilder):
    """Builds the stock metadata and, when some request runs sparse, a plan beside it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._runtime = CPURuntime.of(self.vllm_config)
        self._runtime.announce(self.vllm_config, self.layer_names)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The stock metadata with the attribute ``vsprefill``: a :class:`SparseStep`, or None without a prefill."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.vsprefill = self.plan(common_attn_metadata, metadata) if metadata.causal is True else None
        return metadata

    def cut(
        self, plan: StepPlan, starts: list[int], lengths: list[int], common: Any, metadata: Any
    ) -> SparseStep[SparseRequest]:
        return SparseStep(
            plan,
            tuple(self._dense_run(common, run) for run in plan.dense_runs),
            tuple(
                SparseRequest(
                    rows,
                    lengths[rows.request] - rows.seq_len,
                    common.block_table_tensor[rows.request].tolist(),
                    self._dense_run(common, (rows,)),
                )
                for rows in plan.sparse
            ),
        )

    def _dense_run(self, common: Any, run: tuple[RequestRows, ...]) -> DenseRun:
        """Stock metadata of a run of requests, as if they were a batch of their own."""
        row_start, row_end = run[0].row_start, run[-1].row_end
        requests = [rows.request for rows in run]
        starts = (
            torch.tensor([*(rows.row_start for rows in run), row_end], dtype=common.query_start_loc.dtype) - row_start
        )
        own = dataclasses.replace(
            common,
            query_start_loc=starts,
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor([rows.seq_len for rows in run], dtype=common.seq_lens.dtype),
            num_reqs=len(run),
            num_actual_tokens=row_end - row_start,
            max_query_len=max(rows.rows for rows in run),
            max_seq_len=max(rows.seq_len for rows in run),
            block_table_tensor=common.block_table_tensor[requests],
            slot_mapping=common.slot_mapping[row_start:row_end],
        )
        return DenseRun(row_start, row_end, super().build(0, own))


class VSPrefillCPUImpl(SparseLayerMixin[CPURuntime], CPUAttentionBackendImpl):
    """Attention of one layer."""

    _backend = VSPrefillCPUBackend
    _forget = staticmethod(forget)
    _runtime_class = CPURuntime

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader: cpu_layout.CacheReader | None = None

    def platform_reasons(self) -> dict[str, bool]:
        return {
            "its KV cache is quantised": self.is_fp8_kv_cache,
            "its KV cache holds another type than the model computes in": self.cache_differs(),
        }

    def attend_sparse(
        self,
        runtime: CPURuntime,
        sparse: SparseLayer,
        step: SparseStep[SparseRequest],
        call: Call,
        run_dense: Callable[[DenseRun], None],
    ) -> LayerCounts:
        kv_cache = call.kv_cache
        if self._reader is None:
            self._reader = self._infer_layout(call.layer, kv_cache)
        counts = LayerCounts()
        prefill: Any = runtime.prefill  # what it chooses is its own affair
        looks = runtime.recall_check is not None and runtime.recall_check.is_due
        cached, scored = prefill.cached, prefill.scored
        choosing, attending, attended = 0.0, 0.0, 0
        selections: list[Selection] = []
        tile_keys: list[float] = []
        for request in step.rounds:
            rows = request.rows
            seq_len = rows.seq_len + request.tail
            keys, values = runtime.workspace.keys_values(self.num_kv_heads, seq_len, self.head_size, kv_cache.dtype)
            self._reader.read(kv_cache, request.block_ids, keys, values)
            key, value = keys.transpose(0, 1), values.transpose(0, 1)  # [n, H, D]
            chunk = call.query[rows.row_start : rows.row_end + request.tail]
            slots = None
            if sparse.logits is not None:
                slots = cpu_layout.slots(request.block_ids, seq_len, kv_cache.shape[2])
            start = time.perf_counter()
            chosen = prefill.choose(sparse, chunk, key, value, rows.rows, scale=self.scale, slots=slots)
            end = time.perf_counter()
            choosing += end - start
            if chosen is None:
                run_dense(request.fallback)
                counts += LayerCounts(self.num_kv_heads * rows.causal_pairs, dense_chunks=1, handed_back=1)
            else:
                out = call.output[rows.row_start : rows.row_end]
                _, visited = prefill.attend(chunk, key, value, chosen, rows.rows, scale=self.scale, out=out)
                attending += time.perf_counter() - end
                attended += 1
                if isinstance(chosen, Selection):
                    selections.append(chosen)
                    if looks:
                        found = prefill.recall(chunk, key, chosen, rows.rows, scale=self.scale, num_rows=ROWS)
                        runtime.look_at_recall(sparse.index, found)
                else:
                    tile_keys.append(prefill.tile_keys(chosen, rows.rows))
                counts += LayerCounts(int(visited), sparse_chunks=1)
        runtime.recorder.look(
            sparse.index,
            Look(
                choosing,
                attending if attended else None,
                _mean([chosen.num_columns for chosen in selections]),
                _mean([chosen.num_diagonals for chosen in selections]),
                prefill.cached - cached,
                prefill.scored - scored,
                sum(tile_keys) / len(tile_keys) if tile_keys else None,
            ),
        )
        return counts

    def _infer_layout(self, layer: Any, kv_cache: torch.Tensor) -> cpu_layout.CacheReader:
        stock: Any = super()

        def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
            stock.do_kv_cache_update(layer, key, value, cache, slots)

        return cpu_layout.infer(write, self.num_kv_heads, kv_cache.shape[2], self.head_size, kv_cache.dtype)


def _mean(numbers: list[torch.Tensor]) -> float | None:
    """Mean over the KV heads of all requests, or None without any."""
    return float(torch.cat(numbers).double().mean()) if numbers else None
