# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What an attention layer with VSPREFILL does on every platform: find itself, decide, set itself up."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionType

from vllm_vsprefill import _compat
from vllm_vsprefill.runtime import LayerState, Runtime, find_layer_name
from vllm_vsprefill.side_cache import SUFFIX, LogitCache


@dataclasses.dataclass(frozen=True, slots=True)
class DenseRun:
    """Rows next to each other in the batch that the stock kernel computes in one call."""

    row_start: int
    row_end: int
    metadata: Any


class DecoderBackendMixin:
    """Comes before the stock backend class: what VSPREFILL does not take over from it."""

    # Every write to the cache must pass by do_kv_cache_update, which marks the slots. An attribute, as in vLLM: a
    # method of that name would read as true.
    supports_kv_cache_update_bypass: bool = False

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


class SparseLayerMixin:
    """Comes before the stock implementation class of one layer."""

    supports_dcp: bool = False
    supports_pcp: bool = False

    _backend: ClassVar[Any]
    """Backend class of the layer; the logit cache asks for the same block sizes and layout."""
    _forget: Any
    """Marks cache slots as missing on this platform."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._vllm_config: Any = get_current_vllm_config()
        self._runtime: Runtime | None = None
        self._state: LayerState | None = None
        self._layer_index = -1

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
        self._runtime = runtime = Runtime.of(self._vllm_config)
        runtime.known_layers.add(name)
        reasons = self.unsupported_reasons()
        if getattr(layer, "head_size_v", layer.head_size) != layer.head_size:
            reasons.append(f"its keys have {layer.head_size} channels, its values {layer.head_size_v}")
        builder = layer.get_attn_backend().get_builder_cls()
        if builder is not self._backend.get_builder_cls():
            # Chunked local attention, static sinks: requests cut up, or longer than the host knows.
            reasons.append(f"vLLM puts {builder.__name__} before the backend, which changes its requests")
        index = _compat.layer_index(name)
        if index is None:
            reasons.append("its name carries no layer index")
        elif not reasons and (choice := runtime.reason_for_stock(index)):
            reasons.append(choice)
        if index is not None:
            self._layer_index = index
            runtime.note_layer(index)
        if reasons:
            runtime.explain_stock(reasons)
            return
        cache = None
        if runtime.keeps_logits:
            this: Any = self
            cache = LogitCache(this.num_kv_heads, self._backend, self._forget)
            _compat.attach_side_layer(self._vllm_config, name + SUFFIX, cache)
        assert index is not None
        self._state = runtime.add_layer(name, index, cache)
        self.set_up(layer, self._state, act_dtype)

    def set_up(self, layer: Any, state: LayerState, act_dtype: torch.dtype) -> None:
        """Prepare a layer that runs sparse; called once, while weights are loaded."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Write keys and values; whatever was known about those slots no longer holds."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]
        if self._state is not None and self._state.logits is not None:
            self._state.logits.check(kv_cache)
            self._state.logits.invalidate(slot_mapping)
