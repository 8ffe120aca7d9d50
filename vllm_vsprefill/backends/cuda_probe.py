# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A closer look at some steps on a device: times by events, and what was chosen. Nothing waits for it in the step.

Only the first round of a step is looked at, and of what was chosen its first request. What the device knows is copied
within the device into buffers that exist already; the thread that brings the counters reads it when the step is over.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from vllm_vsprefill.backends.step import SparseStep
from vllm_vsprefill.kernels.tile_index import EVERYTHING, TileIndex
from vllm_vsprefill.metrics import Look
from vllm_vsprefill.plan import RequestRows
from vllm_vsprefill.prefill.buffers import DeviceBuffers, RoundBuffers
from vllm_vsprefill.prefill.cuda import Round

EVERY = 8
"""After a step that was looked at, so many prefills pass until another is."""

_CHOOSE, _CHOSEN, _ATTEND, _ATTENDED = range(4)


class _HostMark:
    """Stands for an event where the device is the host (the kernels' interpreter)."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _HostMark) -> float:
        return 1e3 * (end.at - self.at)


class Probe:
    """Looks at one step at a time, all of its layers.

    Args:
        num_layers: layers that run sparse.
        num_kv_heads: KV heads of each.
        device: where they run.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, device: torch.device) -> None:
        self._heads = num_kv_heads
        self._on_device = device.type == "cuda"
        self._marks: list[list[Any]] = [[self._mark() for _ in range(4)] for _ in range(num_layers)]
        # By layer: columns and diagonals of each head, then slots without logits. Or, where every tile has a list of
        # its own: keys before its window that a tile of each head attends to; last, rows that the guard sent away.
        self._numbers = torch.zeros(num_layers, 2 * num_kv_heads + 1, dtype=torch.int32, device=device)
        # By layer, tokens of the round that have logits; None where every tile has a list of its own.
        self._seen: dict[int, int | None] = {}
        self._pause = 0
        self._is_read = True

    def _mark(self) -> Any:
        return torch.cuda.Event(enable_timing=True) if self._on_device else _HostMark()

    @property
    def is_due(self) -> bool:
        """Whether the layers shall use it in this step."""
        return self._pause == 0 and self._is_read

    def before_choosing(self, place: int) -> None:
        """A layer begins; ``place`` as in ``SparseLayer``."""
        self._marks[place][_CHOOSE].record()

    def after_choosing(
        self, place: int, buffers: RoundBuffers, step: SparseStep[Any], tail: int, *, scores: bool
    ) -> None:
        """Note what a layer has chosen, before anything else uses the workspaces.

        Args:
            place: of the layer, as in ``SparseLayer``.
            buffers: where it has chosen.
            step: the step.
            tail: dense last rows of every chunk.
            scores: whether the layer has an indexer.
        """
        self._marks[place][_CHOSEN].record()
        first: Round = step.rounds[0].batches
        numbers, heads = self._numbers[place], self._heads
        if first.tiles is not None:
            self._seen[place] = None
            numbers[:heads].copy_(_keys_of_tiles(first.tiles, step.plan.sparse[0]))
            if first.guarded is None:
                numbers[2 * heads :].zero_()
            else:
                numbers[2 * heads :].copy_(buffers.dense_rows[1:2])
            return
        assert isinstance(buffers, DeviceBuffers)
        work, requests = buffers.work, step.plan.sparse[: first.whole.num_requests]
        flags = work.index.flags[0, :, :, : requests[0].seq_len]
        torch.sum(flags, dim=2, dtype=torch.int32, out=numbers[: 2 * heads].view(2, heads))
        if scores:
            numbers[2 * heads :].copy_(work.missing.held)
        self._seen[place] = sum(rows.seq_len + tail for rows in requests) if scores else 0

    def before_attending(self, place: int) -> None:
        """A layer begins to attend."""
        self._marks[place][_ATTEND].record()

    def after_attending(self, place: int) -> None:
        """A layer has attended."""
        self._marks[place][_ATTENDED].record()

    def take(self) -> torch.Tensor | None:
        """End a step; its numbers on the device if it was looked at, to be copied from and then handed to ``read``."""
        if not self.is_due:
            self._pause = max(self._pause - 1, 0)
            return None
        if not self._seen:
            return None  # nothing ran sparse
        self._is_read, self._pause = False, EVERY - 1
        return self._numbers

    def read(self, numbers: torch.Tensor) -> dict[int, Look]:
        """What was seen, by place of the layer, once the device is done with the step; called by another thread.

        ``numbers``: a copy, on the host, of what ``take`` returned.
        """
        looks = {}
        for place, tokens in self._seen.items():
            marks, found, heads = self._marks[place], numbers[place].tolist(), self._heads
            seconds = (
                marks[_CHOOSE].elapsed_time(marks[_CHOSEN]) / 1e3,
                marks[_ATTEND].elapsed_time(marks[_ATTENDED]) / 1e3,
            )
            if tokens is None:
                keys = None if found[-1] else sum(found[:heads]) / heads
                looks[place] = Look(*seconds, tile_keys=keys)
                continue
            scored = min(found[-1], tokens)  # a slot that two requests share may be scored twice
            looks[place] = Look(
                *seconds,
                sum(found[:heads]) / heads,
                sum(found[heads : 2 * heads]) / heads,
                tokens - scored,
                scored,
            )
        self._seen = {}
        self._is_read = True
        return looks


def _keys_of_tiles(index: TileIndex, rows: RequestRows) -> torch.Tensor:
    """Keys before its window that a tile of a round's first request attends to, mean of its tiles, rounded down.

    Returns:
        int64 ``[Hkv]``, on the device; means nothing where the guard has sent the request away.
    """
    pattern, first = index.pattern, rows.seq_len - rows.rows
    tiles = pattern.tiles(rows.rows, rows.seq_len)
    place = index.place(rows.row_start, 0, first, tiles[0])
    counts = index.counts[:, place : place + len(tiles)]
    starts = torch.arange(tiles.start, tiles.stop, device=counts.device) * pattern.block_q
    starts = (starts - pattern.reach + 1).clamp_(min=0) // pattern.block_k * pattern.block_k
    return torch.where(counts == EVERYTHING, starts, counts).sum(1) // len(tiles)
