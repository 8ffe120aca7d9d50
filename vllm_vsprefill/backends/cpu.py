# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""VSPREFILL on vLLM's CPU platform: the stock CPU backend, with long prefills routed through score, select, attend."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from vllm_vsprefill import _compat
from vllm_vsprefill.backends import cpu_layout
from vllm_vsprefill.backends.layer import DecoderBackendMixin, DenseRun, SparseLayerMixin
from vllm_vsprefill.kernels.attend import attend
from vllm_vsprefill.kernels.forget import forget
from vllm_vsprefill.kernels.guard import expected_density
from vllm_vsprefill.kernels.sampled import sampled
from vllm_vsprefill.kernels.score import score
from vllm_vsprefill.kernels.select import distributions, select
from vllm_vsprefill.plan import RequestRows, StepPlan, plan_step
from vllm_vsprefill.registration import BACKEND_NAME
from vllm_vsprefill.runtime import LayerState, Runtime, Workspace
from vllm_vsprefill.stats import LayerCounts


class VSPrefillCPUBackend(DecoderBackendMixin, CPUAttentionBackend):
    """Stock CPU attention with sparse prefill of long contexts."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[VSPrefillCPUImpl]:
        return VSPrefillCPUImpl

    @staticmethod
    def get_builder_cls() -> type[VSPrefillCPUMetadataBuilder]:
        return VSPrefillCPUMetadataBuilder


@dataclasses.dataclass(frozen=True, slots=True)
class SparseStep:
    """Attached to the stock metadata.

    Attributes:
        plan: which rows run sparse.
        dense_runs: stock metadata of the other rows; empty if all rows are dense.
        fallbacks: for each sparse request, stock metadata of its rows, for layers where sparse would not pay.
        block_ids: for each sparse request, its blocks.
        seq_lens: for each sparse request, its tokens including those of this step.
    """

    plan: StepPlan
    dense_runs: tuple[DenseRun, ...]
    fallbacks: tuple[DenseRun, ...]
    block_ids: tuple[list[int], ...]
    seq_lens: tuple[int, ...]


class VSPrefillCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds the stock metadata and, when some request runs sparse, a plan beside it."""

    # The plan belongs to one step; vLLM must not copy metadata from one KV cache group to another.
    supports_update_block_table = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._runtime = Runtime.of(self.vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """The stock metadata with the attribute ``vsprefill``: a :class:`SparseStep`, or None without a prefill."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.vsprefill = self._plan(common_attn_metadata) if metadata.causal is True else None
        return metadata

    def _plan(self, common: Any) -> SparseStep | None:
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens.tolist()
        self._runtime.look_at_switch()
        plan = plan_step(starts, lengths, _compat.prefill_flags(common), self._runtime.gate)
        self._runtime.note_step(plan)
        if not plan.prefill_pairs:
            return None
        if not plan.sparse:
            return SparseStep(plan, (), (), (), ())
        return SparseStep(
            plan,
            tuple(self._dense_run(common, run) for run in plan.dense_runs),
            tuple(self._dense_run(common, (rows,)) for rows in plan.sparse),
            tuple(common.block_table_tensor[rows.request].tolist() for rows in plan.sparse),
            tuple(lengths[rows.request] for rows in plan.sparse),
        )

    def _dense_run(self, common: Any, run: tuple[RequestRows, ...]) -> DenseRun:
        """Stock metadata of a run of requests, as if they were a batch of their own."""
        row_start, row_end = run[0].row_start, run[-1].row_end
        requests = [rows.request for rows in run]
        starts = (
            torch.tensor([*(rows.row_start for rows in run), row_end], dtype=common.query_start_loc.dtype) - row_start
        )
        part = dataclasses.replace(
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
        return DenseRun(row_start, row_end, super().build(0, part))


class VSPrefillCPUImpl(SparseLayerMixin, CPUAttentionBackendImpl):
    """Attention of one layer."""

    _backend = VSPrefillCPUBackend
    _forget = staticmethod(forget)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reader: cpu_layout.CacheReader | None = None

    def platform_reasons(self) -> dict[str, bool]:
        return {
            "its KV cache is quantised": self.is_fp8_kv_cache,
            "its KV cache holds another type than the model computes in": self.cache_differs(),
        }

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of a step; shapes as in the stock backend. Writes into ``output`` and returns it."""
        step: SparseStep | None = getattr(attn_metadata, "vsprefill", None)
        if step is None or self._runtime is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return output
        plan = step.plan
        heads = self.num_kv_heads

        def stock(run: DenseRun) -> None:
            rows = slice(run.row_start, run.row_end)
            super(VSPrefillCPUImpl, self).forward(
                layer, query[rows], key[rows], value[rows], kv_cache, run.metadata, output[rows], *args, **kwargs
            )

        if self._state is None or not plan.sparse:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            pairs = heads * plan.prefill_pairs
            counts = LayerCounts(pairs, pairs, dense_chunks=1)
        else:
            for run in step.dense_runs:
                stock(run)
            counts = LayerCounts(heads * plan.dense_prefill_pairs, heads * plan.prefill_pairs)
            for i, request in enumerate(plan.sparse):
                visited = self._sparse(layer, self._state, query, kv_cache, output, step, i)
                if visited is None:
                    stock(step.fallbacks[i])
                    counts += LayerCounts(heads * request.causal_pairs, dense_chunks=1)
                else:
                    counts += LayerCounts(visited, sparse_chunks=1)
        self._runtime.record(self._layer_index, counts)
        return output

    def _sparse(
        self,
        layer: Any,
        state: LayerState,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        step: SparseStep,
        i: int,
    ) -> int | None:
        """Sparse rows of the ``i``-th sparse request; columns and diagonals are chosen with the whole context in view,
        the chunk's dense last rows included. Returns the pairs computed, or None, with nothing computed, where sparse
        attention would not pay."""
        request, block_ids, seq_len = step.plan.sparse[i], step.block_ids[i], step.seq_lens[i]
        runtime = self._runtime
        assert runtime is not None
        options = runtime.options
        if self._reader is None:
            self._reader = self._infer_layout(layer, kv_cache)
        keys, values = _WORKSPACE.keys_values(self.num_kv_heads, seq_len, self.head_size, kv_cache.dtype)
        self._reader.read(kv_cache, block_ids, keys, values)
        keys, values = keys.transpose(0, 1), values.transpose(0, 1)  # [n, H, D]
        if state.weights is None:
            chunk = query[request.row_start : request.row_end + seq_len - request.seq_len]
            columns, diagonals = sampled(chunk, keys, scale=self.scale, num_rows=options.sampled_rows)
        else:
            logits = self._logits(state, keys, values, block_ids, kv_cache.shape[2])
            columns, diagonals = distributions(logits)
        selection = select(
            columns,
            diagonals,
            tau_columns=state.tau_columns,
            tau_diagonals=state.tau_diagonals,
            budgets=runtime.budgets,
        )
        rows, n = slice(request.row_start, request.row_end), request.seq_len
        selection = selection.below(n)
        if expected_density(selection, runtime.pattern, request.rows, n) > options.max_density:
            return None
        _, visited = attend(
            query[rows],
            keys[:n],
            values[:n],
            selection,
            runtime.pattern,
            scale=self.scale,
            out=output[rows],
        )
        return int(visited)

    def _logits(
        self, state: LayerState, keys: torch.Tensor, values: torch.Tensor, block_ids: list[int], block_size: int
    ) -> torch.Tensor:
        """Index logits of a context, float32 ``[n, H, 2]``: the cached ones, and the missing ones computed now."""
        assert state.weights is not None
        n, heads, _ = keys.shape
        if state.logits is None:
            return _finite(score(keys, values, state.weights))
        offsets = torch.arange(n)
        slots = torch.tensor(block_ids, dtype=torch.int64)[offsets // block_size] * block_size + offsets % block_size
        cache = state.logits.slots
        logits: torch.Tensor = cache.index_select(0, slots)  # [n, 2H]
        missing = logits[:, 0].isnan().nonzero().squeeze(1)
        if len(missing):
            first, end = int(missing[0]), int(missing[-1]) + 1
            if end - first == len(missing):  # the usual case, the chunk's own tokens: no copy of keys and values
                fresh = score(keys[first:end], values[first:end], state.weights)
            else:
                fresh = score(keys[missing], values[missing], state.weights)
            fresh = _finite(fresh).flatten(1)
            logits.index_copy_(0, missing, fresh)
            cache.index_copy_(0, slots[missing], fresh)
        return logits.view(n, heads, 2)

    def _infer_layout(self, layer: Any, kv_cache: torch.Tensor) -> cpu_layout.CacheReader:
        stock: Any = super()

        def write(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
            stock.do_kv_cache_update(layer, key, value, cache, slots)

        return cpu_layout.infer(write, self.num_kv_heads, kv_cache.shape[2], self.head_size, kv_cache.dtype)


_WORKSPACE = Workspace()


def _finite(logits: torch.Tensor) -> torch.Tensor:
    """Logits without NaN, which marks a missing slot, and without infinities, which a softmax turns into NaN."""
    limit = 1e30
    return torch.nan_to_num(logits, nan=limit, posinf=limit, neginf=-limit)
