# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""VSPREFILL on vLLM's CUDA platform: the stock FlashAttention backend, with long prefills handed to ``CudaPrefill``.

Nothing here waits for the device in the forward pass or allocates per layer (FlashAttention itself does, for
log-sum-exps). Steps are planned in ``cuda_builder``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from vllm_vsprefill.backends import cuda_limits
from vllm_vsprefill.backends.cuda_builder import SparseRound, VSPrefillFlashMetadataBuilder
from vllm_vsprefill.backends.cuda_runtime import CudaRuntime
from vllm_vsprefill.backends.layer import Call, DecoderBackendMixin, SparseLayerMixin
from vllm_vsprefill.backends.step import DenseRun, SparseStep
from vllm_vsprefill.kernels.forget.triton import forget
from vllm_vsprefill.kernels.paged import FP8_DTYPES, QUERY_DTYPES, PagedKV
from vllm_vsprefill.kernels.score.paged import prepare_weights
from vllm_vsprefill.kernels.types import IndexerLayerWeights
from vllm_vsprefill.prefill.layer import SparseLayer
from vllm_vsprefill.stats import LayerCounts


class VSPrefillFlashBackend(DecoderBackendMixin, FlashAttentionBackend):
    """Stock FlashAttention with sparse prefill of long prompts."""

    @staticmethod
    def get_impl_cls() -> type[VSPrefillFlashImpl]:
        return VSPrefillFlashImpl

    @staticmethod
    def get_builder_cls() -> type[VSPrefillFlashMetadataBuilder]:
        return VSPrefillFlashMetadataBuilder


class VSPrefillFlashImpl(SparseLayerMixin[CudaRuntime], FlashAttentionImpl):
    """Attention of one layer."""

    _backend = VSPrefillFlashBackend
    _forget = staticmethod(forget)
    _runtime_class = CudaRuntime

    def platform_reasons(self) -> dict[str, bool]:
        model = self._vllm_config.model_config
        others = [] if self._runtime is None else [sparse.heads for sparse in self._runtime.layers.values()]
        return {
            **cuda_limits.head_reasons(self.head_size, self.num_heads, self.num_kv_heads),
            f"the model computes in {model.dtype}": model.dtype not in QUERY_DTYPES,
            f"its KV cache is of type {self.kv_cache_dtype}": not self._reads_cache(),
            "its heads differ from those of the model's first layer, which workspaces are shared with": any(
                other != self.heads for other in others
            ),
        }

    def _reads_cache(self) -> bool:
        if self.kv_cache_dtype.startswith("fp8"):
            return self.kv_cache_dtype in ("fp8", "fp8_e4m3", "fp8_e5m2")
        return not self.cache_differs() and self.kv_cache_dtype in ("auto", "float16", "bfloat16")

    def set_up(self, layer: Any, sparse: SparseLayer, act_dtype: torch.dtype) -> SparseLayer:
        """Bring thresholds and indexer to the device, as buffers of the layer, so that sleep mode brings them back."""
        device = torch.device(current_platform.device_type)
        tensors, weights = {"tau": sparse.tau.to(device)}, sparse.weights
        if weights is not None:
            weights = prepare_weights(IndexerLayerWeights(*(part.to(device) for part in weights)), act_dtype)
            tensors |= weights._asdict()
        for name, tensor in tensors.items():
            layer.register_buffer(f"vsprefill_{name}", tensor, persistent=False)
        return dataclasses.replace(sparse, weights=weights, tau=tensors["tau"])

    def prepare(self, runtime: CudaRuntime, sparse: SparseLayer, call: Call) -> None:
        """Allocate in vLLM's profiling run; compile the kernels at start-up, with the first batch that has a KV cache,
        not with the first long prompt. They read and score the cache's first block, which vLLM gives to nobody."""
        query = call.query
        if call.metadata is None:
            buffers = runtime.prefill_on(query.device).buffers
            if self.kv_cache_dtype.startswith("fp8"):
                tokens = self._vllm_config.scheduler_config.max_num_batched_tokens
                buffers.reserve_queries((tokens, self.num_heads, self.head_size), self._vllm_config.model_config.dtype)
            return
        if runtime.is_warm or call.kv_cache.numel() == 0:
            return
        if query.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self.takes(runtime, call):
            kv = self._paged(call, query.new_empty(0, dtype=torch.int32))
            runtime.prefill_on(query.device).warm_up(sparse, kv, self._vllm_config.model_config.dtype, scale=self.scale)

    def takes(self, runtime: CudaRuntime, call: Call) -> bool:
        """Whether the kernels can use these queries and the scales that belong to them and to the cache."""
        reasons = []
        query, layer = call.query, call.layer
        quantised = query.dtype in FP8_DTYPES
        if not quantised and query.dtype not in QUERY_DTYPES:
            reasons.append(f"its queries arrive as {query.dtype}")
        if self.kv_cache_dtype.startswith("fp8"):
            scales = [layer._k_scale, layer._v_scale, *([layer._q_scale] if quantised else [])]
            if any(scale.numel() != 1 for scale in scales):
                reasons.append("its quantisation has a scale for each head")
        if reasons:
            runtime.explain_stock(reasons)
        return not reasons

    def attend_sparse(
        self,
        runtime: CudaRuntime,
        sparse: SparseLayer,
        step: SparseStep[SparseRound],
        call: Call,
        run_dense: Callable[[DenseRun], None],
    ) -> LayerCounts:
        tokens = call.metadata.num_actual_tokens
        query, output, scale = call.query[:tokens], call.output[:tokens], self.scale
        prefill = runtime.prefill_on(query.device)
        if query.dtype in FP8_DTYPES:
            # FlashAttention 3 is given quantised queries with a quantised cache; the kernels here compute in the
            # model's type.
            query = prefill.buffers.unquantised(query, self._vllm_config.model_config.dtype)
            scale *= float(call.layer._q_scale_float)
        probe = runtime.probe if runtime.probe is not None and runtime.probe.is_due else None
        looks = runtime.recall_check is not None and runtime.recall_check.is_due
        place, tail, scores = sparse.place, runtime.gate.dense_last_rows, sparse.weights is not None
        for one in step.rounds:
            kv = self._paged(call, one.block_table)
            if probe is not None:
                probe.before_choosing(place)
            prefill.choose(sparse, query, kv, one.batches, scale=scale)
            if probe is not None:
                probe.after_choosing(place, prefill.buffers, step, tail, scores=scores)
            if looks:
                runtime.look_at_recall(sparse, query, kv, one.batches, scale=scale)
                looks = False  # one round is enough
            for run in one.fallbacks:
                run_dense(run)
            if probe is not None:
                probe.before_attending(place)
            prefill.attend(sparse, query, kv, one.batches, scale=scale, out=output)
            if probe is not None:
                probe.after_attending(place)
                probe = None  # one round is enough
        # Visited pairs, and chunks that were dense after all, the device counts.
        return LayerCounts(sparse_chunks=len(step.plan.sparse))

    def _paged(self, call: Call, block_table: torch.Tensor) -> PagedKV:
        """The cache as the kernels read it: ``[num_blocks, H, block, 2 * D]``."""
        kv_cache = call.kv_cache
        if kv_cache.dim() != 4 or kv_cache.shape[1] != self.num_kv_heads or kv_cache.shape[3] != 2 * self.head_size:
            raise RuntimeError(
                f"VSPREFILL does not know a KV cache of shape {tuple(kv_cache.shape)} for {self.num_kv_heads} heads of "
                f"{self.head_size}; this vLLM lays it out differently"
            )
        if not self.kv_cache_dtype.startswith("fp8"):
            return PagedKV(kv_cache, block_table)
        dtype = torch.float8_e5m2 if self.kv_cache_dtype == "fp8_e5m2" else current_platform.fp8_dtype()
        return PagedKV(kv_cache.view(dtype), block_table, call.layer._k_scale, call.layer._v_scale)
