# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What an attention layer with VSPREFILL does on every platform: find itself, decide, set itself up, share out rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType

from vllm_vsprefill import _compat
from vllm_vsprefill.backends.step import DenseRun, SparseStep
from vllm_vsprefill.metrics import QUERY_TYPE, UNSUPPORTED_LAYER
from vllm_vsprefill.prefill.layer import Heads, SparseLayer
from vllm_vsprefill.registration import BACKEND_NAME
from vllm_vsprefill.runtime import Runtime, find_layer_name
from vllm_vsprefill.side_cache import SUFFIX, LogitCache
from vllm_vsprefill.stats import LayerCounts

RuntimeT = TypeVar("RuntimeT", bound=Runtime)


@dataclass(frozen=True, slots=True)
class Call:
    """What a layer's forward pass was called with; ``query`` and ``output`` may be padded.

    Attributes:
        layer: vLLM's attention layer.
        query: ``[rows, num_heads, head_size]``.
        kv_cache: of this layer, the keys and values of the rows included.
        metadata: the stock metadata; None in vLLM's profiling run.
        output: ``[rows, num_heads, head_size]``, to be written.
    """

    layer: Any
    query: torch.Tensor
    kv_cache: torch.Tensor
    metadata: Any
    output: torch.Tensor


class DecoderBackendMixin:
    """Comes before the stock backend class: what VSPREFILL does not take over from it."""

    # Every write to the cache must pass by do_kv_cache_update, which marks the slots. An attribute, as in vLLM: a
    # method of that name would read as true.
    supports_kv_cache_update_bypass: bool = False

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # runs of rows are cut where the host believes requests to begin


class SparseLayerMixin(Generic[RuntimeT]):
    """Comes before the stock implementation class of one layer."""

    supports_dcp: bool = False
    supports_pcp: bool = False

    _backend: ClassVar[Any]
    """Backend class of the layer; the logit cache asks for the same block sizes and layout."""
    _forget: Any
    """Marks cache slots as missing on this platform."""
    _runtime_class: type[RuntimeT]
    """What the layers of a model share on this platform."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config: Any = get_current_vllm_config()
        self._runtime: RuntimeT | None = None
        self._sparse: SparseLayer | None = None
        self._layer_index = -1
        self._stock_kind = UNSUPPORTED_LAYER  # why it does not run sparse, for the metrics

    @property
    def heads(self) -> Heads:
        """Heads of this layer."""
        this: Any = self
        return Heads(this.num_heads, this.num_kv_heads, this.head_size)

    def unsupported_reasons(self) -> list[str]:
        """Why this kind of layer cannot run sparse; empty if it can."""
        this: Any = self
        reasons = {
            "it is not a decoder layer": this.attn_type != AttentionType.DECODER,
            "it has a sliding window": this.sliding_window not in (None, -1, (-1, -1)),
            "it has ALiBi slopes": this.alibi_slopes is not None,
            "it caps its logits": bool(this.logits_soft_cap),
            "it has attention sinks": this.sinks is not None,
            "it shares the KV cache of another layer": this.kv_sharing_target_layer_name is not None,
            **self.platform_reasons(),
        }
        return [reason for reason, holds in reasons.items() if holds]

    def platform_reasons(self) -> dict[str, bool]:
        """Further reasons, of this platform, and whether each holds."""
        return {}

    def cache_differs(self) -> bool:
        """Whether the KV cache holds another floating-point type than the model computes in."""
        this: Any = self
        stored = getattr(torch, this.kv_cache_dtype, None)  # "auto" and None follow the model
        return isinstance(stored, torch.dtype) and stored != self._vllm_config.model_config.dtype

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Find out which layer this is, decide whether it runs sparse and set it up. vLLM calls it before it sizes
        the KV cache, which the logit cache must be part of."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        if self._runtime is not None:
            return
        name = find_layer_name(self._vllm_config, self)
        if name is None:
            return
        layer = self._vllm_config.compilation_config.static_forward_context[name]
        if _compat.is_draft_layer(self._vllm_config, name, layer):
            return  # stock throughout, and no part of the served model's density
        self._runtime = runtime = self._runtime_class.of(self._vllm_config)
        runtime.known_layers[name] = None
        reasons = self.unsupported_reasons()
        if getattr(layer, "head_size_v", layer.head_size) != layer.head_size:
            reasons.append(f"its keys have {layer.head_size} channels, its values {layer.head_size_v}")
        builder = layer.get_attn_backend().get_builder_cls()
        if builder is not self._backend.get_builder_cls():
            # Chunked local attention, static sinks: requests cut up, or longer than the host knows.
            reasons.append(f"vLLM puts {builder.__name__} before the backend, which changes its requests")
        index = _compat.layer_index(name)
        if index is None:
            runtime.explain_stock([*reasons, "its name carries no layer index"])
            return
        self._layer_index = index
        runtime.note_layer(index)
        if not reasons and (choice := runtime.reason_for_stock(index, self.heads)):
            reasons.append(choice)
            self._stock_kind = runtime.kind_of_choice(index)
        if reasons:
            runtime.explain_stock(reasons, index)
            return
        logits = None
        if runtime.keeps_logits:
            logits = LogitCache(self.heads.num_kv_heads, self._backend, self._forget)
            _compat.attach_side_layer(self._vllm_config, name + SUFFIX, logits)
        self._sparse = runtime.layers[name] = self.set_up(
            layer, runtime.new_layer(index, self.heads, logits), act_dtype
        )

    def set_up(self, layer: Any, sparse: SparseLayer, act_dtype: torch.dtype) -> SparseLayer:
        """The layer with its tensors where and how the platform wants them; called once, while weights are loaded."""
        return sparse

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values; whatever was known about those slots no longer holds."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
        if self._sparse is not None and isinstance(logits := self._sparse.logits, LogitCache):
            logits.check(kv_cache)
            logits.invalidate(slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of a step; shapes as in the stock backend. Writes into ``output`` and returns it.

        Dense rows go to the stock kernel in contiguous runs, sparse ones to ``attend_sparse``.
        """
        stock = super().forward  # type: ignore[misc]
        runtime, sparse = self._runtime, self._sparse
        call = Call(layer, query, kv_cache, attn_metadata, output)
        if runtime is not None and sparse is not None:
            self.prepare(runtime, sparse, call)
        step: SparseStep[Any] | None = getattr(attn_metadata, "vsprefill", None)
        if step is None or runtime is None:
            stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            return output
        plan, heads = step.plan, self.heads.num_kv_heads
        if sparse is None or not step.rounds or not self.takes(runtime, call):
            stock(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            pairs = heads * plan.prefill_pairs
            chunks = plan.dense_chunks + len(plan.sparse)
            reason = self._stock_kind if sparse is None else QUERY_TYPE
            runtime.recorder.fall_back(self._layer_index, reason, len(plan.sparse))
            runtime.record(self._layer_index, LayerCounts(pairs, pairs, dense_chunks=chunks, given=pairs))
            return output

        def run_dense(run: DenseRun) -> None:
            rows = slice(run.row_start, run.row_end)
            new_key, new_value = (None if new is None else new[rows] for new in (key, value))
            stock(layer, query[rows], new_key, new_value, kv_cache, run.metadata, output[rows], *args, **kwargs)

        for run in step.dense_runs:
            run_dense(run)
        given = heads * plan.dense_prefill_pairs
        counts = LayerCounts(given, heads * plan.prefill_pairs, dense_chunks=plan.dense_chunks, given=given)
        counts += self.attend_sparse(runtime, sparse, step, call, run_dense)
        runtime.record(self._layer_index, counts)
        return output

    def prepare(self, runtime: RuntimeT, sparse: SparseLayer, call: Call) -> None:
        """Called before every step of a layer that runs sparse, and in vLLM's profiling run."""

    def takes(self, runtime: RuntimeT, call: Call) -> bool:
        """Whether the kernels can use these queries and this cache."""
        return True

    def attend_sparse(
        self,
        runtime: RuntimeT,
        sparse: SparseLayer,
        step: SparseStep[Any],
        call: Call,
        run_dense: Callable[[DenseRun], None],
    ) -> LayerCounts:
        """Compute the rows of the step's rounds; ``run_dense`` gives those to the stock kernel for which that is
        cheaper. Returns what the host knows about the work done, beside the dense runs."""
        raise NotImplementedError
