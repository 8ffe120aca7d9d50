# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Device memory that all layers of a model share: workspaces of the kernels, and counters.

Allocated once, during vLLM's profiling run, so that the KV cache is sized with it in mind.
"""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_vsprefill.kernels.gathered import GatheredLogits, allocate_gathered
from vllm_vsprefill.kernels.guard.paged import DENSE_CHUNKS, DENSE_PAIRS
from vllm_vsprefill.kernels.index import Index, allocate_index
from vllm_vsprefill.kernels.sampled.paged import SampledWorkspace, allocate_sampled
from vllm_vsprefill.kernels.score.paged import MissingSlots, allocate_missing
from vllm_vsprefill.kernels.select.paged import SelectWorkspace, allocate_select
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.plan import MIN_ROWS
from vllm_vsprefill.stats import LayerCounts, Recorder

ROUND_BYTES = 128 * 2**20
"""What workspaces may take together; as many requests run at a time as fit, the others of a step in further rounds."""

MOST_REQUESTS = 8
"""Requests of one round at most: a step of a few thousand tokens rarely holds more chunks worth selecting for."""

PUBLISH_INTERVAL = 0.1
"""Seconds between two writes of the counts at least."""


class Shape(NamedTuple):
    """What decides how large the buffers are."""

    num_heads: int
    num_kv_heads: int
    max_seq_len: int
    num_layers: int
    sampled_rows: int | None
    """None: the trained indexer is used."""


def bytes_per_request(shape: Shape, pattern: SparsePattern) -> int:
    """Workspace of one request in a round."""
    with torch.device("meta"):
        tensors = _allocate(1, shape, pattern, torch.device("meta"))
    return sum(value.numel() * value.element_size() for part in tensors for value in _tensors(part))


def requests_per_round(shape: Shape, pattern: SparsePattern, max_num_seqs: int, max_tokens: int) -> int:
    """How many requests run at a time: what fits into ``ROUND_BYTES``, at least one, and no more than can occur."""
    fit = ROUND_BYTES // max(bytes_per_request(shape, pattern), 1)
    return max(1, min(fit, MOST_REQUESTS, max_num_seqs, max_tokens // MIN_ROWS))


def _allocate(
    requests: int, shape: Shape, pattern: SparsePattern, device: torch.device
) -> tuple[GatheredLogits, SelectWorkspace, Index, MissingSlots, SampledWorkspace | None]:
    heads, longest = shape.num_kv_heads, shape.max_seq_len
    sampled = None
    if shape.sampled_rows is not None:
        sampled = allocate_sampled(requests, shape.num_heads, heads, longest, shape.sampled_rows, device)
    return (
        allocate_gathered(requests, heads, longest, device),
        allocate_select(requests, heads, longest, device),
        allocate_index(requests, heads, longest, pattern, device),
        allocate_missing(requests, longest, device),
        sampled,
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    return [item for item in value or () if isinstance(item, torch.Tensor)]


@dataclass
class DeviceBuffers:
    """Buffers of one model on one device.

    Attributes:
        requests: requests of a round.
        gathered, select, index, missing, sampled: workspaces of the kernels; ``sampled`` only for the training-free
            estimator.
        dense_rows, sparse_end: int32 ``[2 * requests]`` and ``[requests]``, written by ``guard``.
        counts: int64 ``[layers, 16]``: visited pairs by request of a round, then pairs and chunks that ``guard`` sent
            to the stock kernel.
        scratch: float32 ``[slots, 2 * num_kv_heads]``, logits of one layer where they cannot be kept beside the KV
            cache, or None where they can.
        query: ``[tokens, num_heads, head_size]``, queries of a step in the model's type where they arrive quantised.
        warmed: whether the kernels have been compiled.
    """

    shape: Shape
    requests: int
    gathered: GatheredLogits
    select: SelectWorkspace
    index: Index
    missing: MissingSlots
    sampled: SampledWorkspace | None
    dense_rows: torch.Tensor
    sparse_end: torch.Tensor
    counts: torch.Tensor
    scratch: torch.Tensor | None = None
    query: torch.Tensor | None = None
    warmed: bool = False

    @classmethod
    def allocate(
        cls, shape: Shape, pattern: SparsePattern, *, max_num_seqs: int, max_tokens: int, device: torch.device
    ) -> DeviceBuffers:
        """Buffers for ``requests_per_round`` requests."""
        requests = requests_per_round(shape, pattern, max_num_seqs, max_tokens)
        gathered, select, index, missing, sampled = _allocate(requests, shape, pattern, device)
        return cls(
            shape,
            requests,
            gathered,
            select,
            index,
            missing,
            sampled,
            torch.zeros(2 * MOST_REQUESTS, dtype=torch.int32, device=device),
            torch.zeros(MOST_REQUESTS, dtype=torch.int32, device=device),
            torch.zeros(shape.num_layers, 2 * MOST_REQUESTS, dtype=torch.int64, device=device),
        )

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        tensors = [self.dense_rows, self.sparse_end, self.counts, *_tensors(self.gathered)]
        tensors += [*_tensors(self.select), *_tensors(self.index), *_tensors(self.missing), *_tensors(self.sampled)]
        tensors += [value for value in (self.scratch, self.query) if value is not None]
        return sum(value.numel() * value.element_size() for value in tensors)

    def visited(self, layer: int) -> torch.Tensor:
        """Counters of one layer that ``attend`` adds to."""
        return self.counts[layer, :MOST_REQUESTS]

    def guarded(self, layer: int) -> torch.Tensor:
        """Counters of one layer that ``guard`` adds to."""
        return self.counts[layer, MOST_REQUESTS:]


class _Item(NamedTuple):
    event: Any
    counts: torch.Tensor
    host: dict[int, LayerCounts]
    prompt: int


class CountsReader:
    """Brings the counters of a device to the recorder without the forward pass ever waiting for it.

    The forward pass queues a copy behind the step's work; a thread waits for it and publishes. Counts that the host
    knows by itself are taken down at the same moment, so both belong to the same step.

    Args:
        recorder: of this worker.
        layer_indices: index in the model of each row of the counters.
    """

    def __init__(self, recorder: Recorder, layer_indices: list[int]) -> None:
        self._recorder = recorder
        self._indices = layer_indices
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def enqueue(self, counts: torch.Tensor) -> None:
        """Queue a copy of the counters as they are after the work queued so far."""
        on_device = counts.device.type == "cuda"
        event = None
        # PyTorch's cache of pinned memory does not hand out a block again before its copies are done.
        copy = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=on_device)
        copy.copy_(counts, non_blocking=True)
        if on_device:
            event = torch.cuda.Event(blocking=True)
            event.record()
        self._queue.put(_Item(event, copy, self._recorder.snapshot(), self._recorder.prompt))
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(counts.device,), name="vsprefill-counts", daemon=True
            )
            self._thread.start()

    def drain(self, first: _Item | None = None) -> bool:
        """Publish what has been queued; whether there was anything. Waits for the device."""
        items = [] if first is None else [first]
        while not self._queue.empty():
            items.append(self._queue.get())
        if not items:
            return False
        if items[-1].event is not None:
            items[-1].event.synchronize()  # the copies before it were made before it
        for item in items:
            self._recorder.advance(self._totals(item), item.prompt)
        self._recorder.write()
        return True

    def _totals(self, item: _Item) -> dict[int, LayerCounts]:
        totals = dict(item.host)
        for layer, row in zip(self._indices, item.counts.tolist(), strict=True):
            pairs, chunks = row[MOST_REQUESTS + DENSE_PAIRS], row[MOST_REQUESTS + DENSE_CHUNKS]
            found = LayerCounts(sum(row[:MOST_REQUESTS]) + pairs, 0, -chunks, chunks)
            totals[layer] = totals.get(layer, LayerCounts()) + found
        return totals

    def _run(self, device: torch.device) -> None:
        if device.type == "cuda":
            # A new thread is on the first GPU, where waiting for another one's event makes a context: half a GiB.
            torch.cuda.set_device(device)
        while True:
            self.drain(self._queue.get())
            time.sleep(PUBLISH_INTERVAL)
