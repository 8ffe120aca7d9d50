# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Counters of a device on their way to the read-out, without the forward pass ever waiting for them."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any, NamedTuple

import torch

from vllm_vsprefill.backends.cuda_probe import Probe
from vllm_vsprefill.kernels.guard.paged import DENSE_CHUNKS, DENSE_PAIRS
from vllm_vsprefill.prefill.buffers import MAX_REQUESTS
from vllm_vsprefill.recall_check import RecallCheck
from vllm_vsprefill.stats import LayerCounts, Recorder

PUBLISH_INTERVAL = 0.1
"""Seconds between two writes of the counts at least."""


class _Item(NamedTuple):
    event: Any
    counts: torch.Tensor
    host: dict[int, LayerCounts]
    prompt: int
    seen: torch.Tensor | None
    covered: torch.Tensor | None


class CountsReader:
    """Brings the counters of a device to the recorder.

    The forward pass queues a copy behind the step's work; a thread waits for it and publishes. Counts that the host
    knows by itself are taken down at the same moment, so both belong to the same step.

    Args:
        recorder: of this worker.
        layer_indices: index in the model of each line of the counters.
        probe: what looks closer at some steps, or None.
        check: what looks at the recall of the first steps, or None.
    """

    def __init__(
        self,
        recorder: Recorder,
        layer_indices: list[int],
        probe: Probe | None = None,
        check: RecallCheck | None = None,
    ) -> None:
        self._recorder = recorder
        self._check = check
        self._probe = probe
        self._indices = layer_indices
        self._queue: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def enqueue(self, counts: torch.Tensor, recall: torch.Tensor | None = None) -> None:
        """Queue a copy of the counters as they are after the work queued so far.

        Args:
            counts: ``RoundBuffers.counts``.
            recall: ``DeviceBuffers.recall``, if there is any.
        """
        on_device = counts.device.type == "cuda"
        event = None
        copy = _queue_copy(counts)
        numbers = None if self._probe is None else self._probe.take()
        seen = None if numbers is None else _queue_copy(numbers)
        covered = None
        if recall is not None and self._check is not None and self._check.take():
            covered = _queue_copy(recall)
        if on_device:
            event = torch.cuda.Event(blocking=True)
            event.record()
        self._queue.put(_Item(event, copy, self._recorder.snapshot(), self._recorder.prompt, seen, covered))
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
            if self._probe is not None and item.seen is not None:
                for place, look in self._probe.read(item.seen).items():
                    self._recorder.look(self._indices[place], look)
            if self._check is not None and item.covered is not None:
                lines = zip(self._indices, item.covered.tolist(), strict=True)
                self._check.read({layer: (total, number) for layer, (total, number, *_) in lines})
        self._recorder.write()
        return True

    def _totals(self, item: _Item) -> dict[int, LayerCounts]:
        totals = dict(item.host)
        for layer, line in zip(self._indices, item.counts.tolist(), strict=True):
            pairs, chunks = line[MAX_REQUESTS + DENSE_PAIRS], line[MAX_REQUESTS + DENSE_CHUNKS]
            found = LayerCounts(sum(line[:MAX_REQUESTS]) + pairs, 0, -chunks, chunks, chunks)
            totals[layer] = totals.get(layer, LayerCounts()) + found
        return totals

    def _run(self, device: torch.device) -> None:
        if device.type == "cuda":
            # A new thread is on the first GPU, where waiting for another one's event makes a context: half a GiB.
            torch.cuda.set_device(device)
        while True:
            self.drain(self._queue.get())
            time.sleep(PUBLISH_INTERVAL)


def _queue_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host that is complete when the work queued so far is."""
    # PyTorch's cache of pinned memory does not hand out a block again before its copies are done.
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor, non_blocking=True)
