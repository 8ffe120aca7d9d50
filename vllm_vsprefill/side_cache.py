# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Index logits beside the KV cache: two numbers per cache slot and KV head.

The cache is a pseudo attention layer. vLLM counts it into its memory budget, allocates it with the KV cache and gives
it the same block ids, so a block that the prefix cache hands to another request brings its logits along.

A slot is *missing* until somebody scores it, and becomes missing again whenever its key and value are overwritten
(:meth:`LogitCache.invalidate`, called with every write). So no logit outlives the token it was computed from: a block
that changes hands, a decoded token, a request resumed after preemption all read as missing and are scored on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_vsprefill.kernels.forget import paged

SUFFIX = ".vsprefill_logits"
"""Appended to the attention layer's name. Without a digit: vLLM reads the layer index off the name."""


class LogitCache(nn.Module, AttentionLayerBase):
    """Per-slot logits of one attention layer.

    Args:
        num_kv_heads: KV heads of this rank.
        backend: attention backend of the real layer; the cache asks for the same block sizes and layouts.
        forget: marks slots of ``[num_slots, 2 * num_kv_heads]`` as missing, with the kernel of the platform.
    """

    def __init__(
        self,
        num_kv_heads: int,
        backend: type[AttentionBackend],
        forget: Callable[[torch.Tensor, torch.Tensor], None] = paged.forget,
    ) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self._forget = forget
        self.kv_cache: torch.Tensor = torch.empty(0)
        self._backend = side_backend(backend)
        self._checked: torch.Tensor | None = None
        self._checked_mapping: torch.dtype | None = None

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Backend whose metadata builder does nothing."""
        return self._backend

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """One float32 row of ``2 * num_kv_heads`` values per slot, no value part."""
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=2 * self.num_kv_heads,
            head_size_v=0,
            dtype=torch.float32,
        )

    @property
    def slots(self) -> torch.Tensor:
        """View ``[num_slots, 2 * num_kv_heads]`` of the cache that vLLM bound."""
        cache = self.kv_cache[0] if isinstance(self.kv_cache, (list, tuple)) else self.kv_cache
        return cache.view(-1, 2 * self.num_kv_heads)

    def check(self, kv_cache: torch.Tensor) -> None:
        """Make sure that slots here are the slots of the layer's KV cache, ``[num_blocks, H, block, 2 * D]``.

        vLLM may lay caches of different kinds out together; written by the wrong slots, this one would destroy others.

        Raises:
            RuntimeError: they are not; says how to start the server instead.
        """
        own = self.kv_cache[0] if isinstance(self.kv_cache, (list, tuple)) else self.kv_cache
        if own is self._checked or own is None or own.numel() == 0 or kv_cache.numel() == 0:
            return
        wanted = kv_cache.shape[0] * kv_cache.shape[2] * 2 * self.num_kv_heads
        if own.numel() != wanted or not own.is_contiguous():
            raise RuntimeError(
                f"VSPREFILL: vLLM laid out the index logits with shape {tuple(own.shape)} and strides {own.stride()} "
                f"beside a KV cache of shape {tuple(kv_cache.shape)}; their slots do not match. Start the server with "
                "the option estimator 'priced', which needs no such cache, or without the draft model."
            )
        self._checked = own

    def invalidate(self, slot_mapping: torch.Tensor) -> None:
        """Mark slots as missing. ``slot_mapping``: int64 ``[num_tokens]``; negative entries are padding."""
        if self.kv_cache is None or len(self.kv_cache) == 0:  # profiling runs before the cache exists
            return
        if self._checked_mapping != slot_mapping.dtype:  # once: what vLLM hands over does not change its type
            paged.check_forget(self.slots, slot_mapping)
            self._checked_mapping = slot_mapping.dtype
        self._forget(self.slots, slot_mapping)


_side_backends: dict[type[AttentionBackend], type[AttentionBackend]] = {}


def side_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """Subclass of ``backend`` for the cache: same block sizes and layout, a builder that builds nothing."""
    if backend not in _side_backends:
        parent: Any = backend
        parent_builder: Any = backend.get_builder_cls()

        class SideBuilder(parent_builder):
            """Builds no metadata: nothing attends to the logits."""

            def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
                # Not the parent's: it sets up kernels for heads that this cache does not have.
                self.kv_cache_spec = kv_cache_spec
                self.layer_names = layer_names
                self.vllm_config = vllm_config
                self.device = device

            def build(self, *args: Any, **kwargs: Any) -> Any:
                return None

        class SideBackend(parent):
            """Names the pseudo layer's cache to vLLM."""

            @staticmethod
            def get_builder_cls() -> Any:
                return SideBuilder

            @staticmethod
            def get_kv_cache_shape(
                num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *args: Any, **kwargs: Any
            ) -> tuple[int, ...]:
                # Asked for by vLLM before 0.29; later ones read the shape off the spec.
                return (num_blocks, num_kv_heads, block_size, head_size)

            @classmethod
            def get_supported_head_sizes(cls) -> list[int]:
                return []

        SideBackend.__qualname__ = f"SideBackend[{backend.__qualname__}]"
        _side_backends[backend] = SideBackend
    return _side_backends[backend]
