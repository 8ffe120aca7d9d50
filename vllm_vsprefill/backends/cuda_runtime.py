# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the layers of one model share on a CUDA device, and how much memory that is."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_vsprefill.backends.cuda_counts import CountsReader
from vllm_vsprefill.backends.cuda_probe import Probe
from vllm_vsprefill.kernels.paged import PagedKV
from vllm_vsprefill.prefill.buffers import DeviceBuffers, RoundBuffers, Shape
from vllm_vsprefill.prefill.cuda import CudaPrefill, Round
from vllm_vsprefill.prefill.cuda_tiles import CudaTilePrefill
from vllm_vsprefill.prefill.layer import SparseLayer
from vllm_vsprefill.prefill.tiles import TileBuffers, TileShape, Tiling
from vllm_vsprefill.recall_check import ROWS
from vllm_vsprefill.runtime import Runtime, cache_kinds

logger = init_logger("vllm.vsprefill")

AnyCudaPrefill = CudaPrefill | CudaTilePrefill


class CudaRuntime(Runtime):
    """Owns the prefill with its buffers, and the reader that brings its counters to the host."""

    def __init__(self, vllm_config: Any) -> None:
        super().__init__(vllm_config)
        self._config = vllm_config
        self.probe: Probe | None = None
        self._on_device: tuple[AnyCudaPrefill, CountsReader] | None = None

    def prefill_on(self, device: torch.device) -> AnyCudaPrefill:
        """The prefill of a model whose layers are all known. Allocated on first use: in vLLM's profiling run, so that
        the KV cache is sized with it in mind, or later where there was none."""
        if self._on_device is None:
            layers, limit = list(self.layers.values()), self.options.max_density
            prefill: AnyCudaPrefill
            if self.lists_by_tile:
                prefill = CudaTilePrefill(self.price, self._allocate_tiles(device), max_density=limit)
            else:
                prefill = CudaPrefill(self.budgets, self._allocate(device), max_density=limit)
            self.probe = Probe(len(layers), layers[0].heads.num_kv_heads, device)
            reader = CountsReader(self.recorder, [layer.index for layer in layers], self.probe, self.recall_check)
            self._on_device = prefill, reader
            if self._announced:  # without a profiling run, they come after the start-up message
                logger.info_once("VSPREFILL: %s.", self._workspaces(prefill.buffers))
        return self._on_device[0]

    def look_at_recall(
        self, layer: SparseLayer, query: torch.Tensor, kv: PagedKV, requests: Round, *, scale: float
    ) -> None:
        """Add up the recall of what a layer has chosen, on the device."""
        prefill = self.prefill_on(query.device)
        assert self.recall_check is not None
        assert isinstance(prefill, CudaPrefill)
        self.recall_check.mark()
        prefill.recall(layer, query, kv, requests, scale=scale)

    @property
    def is_warm(self) -> bool:
        """Whether the kernels have been compiled."""
        return self._on_device is not None and self._on_device[0].is_warm

    def memory(self) -> list[str]:
        workspaces = [] if self._on_device is None else [self._workspaces(self._on_device[0].buffers)]
        return super().memory() + workspaces

    @staticmethod
    def _workspaces(buffers: RoundBuffers) -> str:
        return f"workspaces for {buffers.requests} sparse requests at a time: {buffers.num_bytes / 2**20:.0f} MiB"

    def publish(self) -> None:
        """Queue the counts of the device behind the step's work; without any, publish those of the host."""
        if self._on_device is None:
            super().publish()
        else:
            prefill, reader = self._on_device
            recall = prefill.buffers.recall if isinstance(prefill, CudaPrefill) else None
            reader.enqueue(prefill.buffers.counts, recall)

    def drain(self) -> None:
        """Wait for the device and publish all counts so far."""
        self.publish()
        if self._on_device is not None:
            self._on_device[1].drain()

    def _allocate_tiles(self, device: torch.device) -> TileBuffers:
        scheduler, model = self._config.scheduler_config, self._config.model_config
        heads = next(iter(self.layers.values())).heads
        fixed = "block_q" in self.options.model_fields_set
        tiling = Tiling(self.pattern, heads, model.max_model_len, fixed=fixed)
        if tiling.patterns[0][0].parts < self.pattern.parts:
            logger.warning_once(
                "VSPREFILL: tiles have one part, not the %d of tile_parts: too many heads a KV head, or channels.",
                self.pattern.parts,
            )  # fmt: skip
        return TileBuffers.allocate(
            TileShape(heads, model.dtype, model.max_model_len, len(self.layers), self.options.sampled_rows),
            tiling,
            max_num_seqs=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
            device=device,
        )

    def _allocate(self, device: torch.device) -> DeviceBuffers:
        layers = list(self.layers.values())
        scheduler = self._config.scheduler_config
        num_heads, num_kv_heads, head_size = layers[0].heads
        slots = 0
        if any(layer.weights is not None and layer.logits is None for layer in layers) and device.type == "cuda":
            share = min_layers_of_a_slot(self._config, len(layers))
            slots = max_slots(self._config.cache_config, device, share * num_kv_heads * 2 * head_size)
        return DeviceBuffers.allocate(
            Shape(
                num_heads,
                num_kv_heads,
                self._config.model_config.max_model_len,
                len(layers),
                self.options.sampled_rows if any(layer.weights is None for layer in layers) else None,
                None if self.recall_check is None else ROWS,
            ),
            self.pattern,
            max_num_seqs=scheduler.max_num_seqs,
            max_tokens=scheduler.max_num_batched_tokens,
            device=device,
            slots=slots,
        )


def min_layers_of_a_slot(vllm_config: Any, sparse: int) -> int:
    """How many layers at least share a slot number, of ``sparse`` ones: the more, the fewer slots fit into memory.

    Caches of several kinds share one pool of blocks, in groups of as many layers as the rarest kind has.
    """
    kinds = Counter(cache_kinds(vllm_config.compilation_config.static_forward_context.values()))
    return min(sparse, *kinds.values()) if kinds else sparse


def max_slots(cache_config: Any, device: torch.device, values_per_token: int) -> int:
    """Slots that the KV cache cannot exceed, asked for before vLLM has sized it."""
    size = 1 if str(cache_config.cache_dtype).startswith("fp8") else 2
    share = cache_config.gpu_memory_utilization * torch.cuda.get_device_properties(device).total_memory
    max_bytes = getattr(cache_config, "kv_cache_memory_bytes", None) or share
    return int(max_bytes) // (values_per_token * size) + 1
