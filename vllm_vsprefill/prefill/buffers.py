# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Device memory that all layers of a model share: workspaces of the kernels, and counters. Allocated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_vsprefill.kernels.gathered import GatheredLogits, allocate_gathered
from vllm_vsprefill.kernels.index import Index, allocate_index
from vllm_vsprefill.kernels.recall.paged import RecallWorkspace, allocate_recall
from vllm_vsprefill.kernels.sampled.paged import SampledWorkspace, allocate_sampled
from vllm_vsprefill.kernels.score.paged import MissingSlots, allocate_missing
from vllm_vsprefill.kernels.select.paged import SelectWorkspace, allocate_select
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.plan import MIN_ROWS

ROUND_BYTES = 128 * 2**20
"""What workspaces may take together; as many requests run at a time as fit, the others of a step in further rounds."""

MAX_REQUESTS = 8
"""Requests of one round at most: a step of a few thousand tokens rarely holds more chunks worth selecting for."""


class Shape(NamedTuple):
    """What decides how large the buffers are.

    Attributes:
        num_heads: query heads.
        num_kv_heads: KV heads.
        max_seq_len: tokens of the longest sequence.
        num_layers: layers that run sparse.
        sampled_rows: rows that the training-free estimator looks at; None: it is not used.
        recall_rows: rows whose true attention is compared with what is chosen; None: none.
    """

    num_heads: int
    num_kv_heads: int
    max_seq_len: int
    num_layers: int
    sampled_rows: int | None
    recall_rows: int | None = None


@dataclass(frozen=True, slots=True)
class Workspaces:
    """Scratch of the kernels for the requests of a round; ``sampled`` only for the training-free estimator, ``recall``
    only where it is looked at."""

    gathered: GatheredLogits
    select: SelectWorkspace
    index: Index
    missing: MissingSlots
    sampled: SampledWorkspace | None
    recall: RecallWorkspace | None

    @classmethod
    def allocate(cls, requests: int, shape: Shape, pattern: SparsePattern, device: torch.device) -> Workspaces:
        """Uninitialised, but for what kernels want to be zero."""
        heads, longest = shape.num_kv_heads, shape.max_seq_len
        sampled = None
        if shape.sampled_rows is not None:
            sampled = allocate_sampled(requests, shape.num_heads, heads, longest, shape.sampled_rows, device)
        recall = None
        if shape.recall_rows is not None:
            recall = allocate_recall(requests, shape.num_heads, heads, shape.recall_rows, device)
        return cls(
            allocate_gathered(requests, heads, longest, device),
            allocate_select(requests, heads, longest, device),
            allocate_index(requests, heads, longest, pattern, device),
            allocate_missing(requests, longest, device),
            sampled,
            recall,
        )

    def tensors(self) -> list[Tensor]:
        """All of them."""
        parts = (self.gathered, self.select, self.index, self.missing, self.sampled or (), self.recall or ())
        return [item for part in parts for item in part if isinstance(item, Tensor)]


def bytes_per_request(shape: Shape, pattern: SparsePattern) -> int:
    """Workspace of one request in a round."""
    with torch.device("meta"):
        return _bytes(Workspaces.allocate(1, shape, pattern, torch.device("meta")).tensors())


def requests_per_round(shape: Shape, pattern: SparsePattern, max_num_seqs: int, max_tokens: int) -> int:
    """How many requests run at a time: what fits into ``ROUND_BYTES``, at least one, and no more than can occur."""
    fit = ROUND_BYTES // max(bytes_per_request(shape, pattern), 1)
    return max(1, min(fit, MAX_REQUESTS, max_num_seqs, max_tokens // MIN_ROWS))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class RoundBuffers:
    """Buffers of one model on one device, whatever chooses the keys.

    Attributes:
        requests: requests of a round.
        dense_rows, sparse_end: int32 ``[2 * requests]`` and ``[requests]``, written by ``guard``.
        counts: int64 ``[layers, 16]``: visited pairs by request of a round, then pairs and chunks that ``guard`` sent
            to the stock kernel.
        queries: ``[tokens, num_heads, head_size]``, queries of a step in the model's type where they arrive quantised.
    """

    requests: int
    dense_rows: Tensor
    sparse_end: Tensor
    counts: Tensor
    queries: Tensor

    def workspaces(self) -> list[Tensor]:
        """Scratch of the kernels."""
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """Device memory held."""
        return _bytes([value for value in vars(self).values() if isinstance(value, Tensor)] + self.workspaces())

    def visited(self, place: int) -> Tensor:
        """Counters that ``attend`` adds to, of the layer with this ``SparseLayer.place``."""
        return self.counts[place, :MAX_REQUESTS]

    def guarded(self, place: int) -> Tensor:
        """Counters that ``guard`` adds to, of the layer with this ``SparseLayer.place``."""
        return self.counts[place, MAX_REQUESTS:]

    def reserve_queries(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Make room for ``unquantised`` queries of up to this shape."""
        if self.queries.dtype != dtype or self.queries.shape[1:] != shape[1:] or self.queries.shape[0] < shape[0]:
            self.queries = torch.empty(shape, dtype=dtype, device=self.counts.device)

    def unquantised(self, query: Tensor, dtype: torch.dtype) -> Tensor:
        """Queries ``[rows, num_heads, head_size]`` in another type; valid until the next call."""
        rows, heads, size = query.shape
        self.reserve_queries((rows, heads, size), dtype)
        return self.queries[:rows].copy_(query)


def round_buffers(num_layers: int, device: torch.device) -> dict[str, Tensor]:
    """The tensors of ``RoundBuffers``, by name, for so many layers."""

    def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    return {
        "dense_rows": zeros(2 * MAX_REQUESTS),
        "sparse_end": zeros(MAX_REQUESTS),
        "counts": zeros(num_layers, 2 * MAX_REQUESTS, dtype=torch.int64),
        "queries": torch.empty(0, device=device),
    }


@dataclass
class DeviceBuffers(RoundBuffers):
    """Buffers where columns and diagonals are chosen for whole chunks.

    Attributes:
        work: workspaces of the kernels.
        logits: float32 ``[slots, 2 * num_kv_heads]``, those of one layer where they cannot be kept beside the KV cache.
        recall: float32 ``[layers, 4]``: recall of what was chosen, summed, and the number of what was summed; none of
            either where it is not looked at. Padded, for Triton compiles a kernel anew for a pointer that is not
            aligned.
    """

    work: Workspaces
    logits: Tensor
    recall: Tensor

    @classmethod
    def allocate(
        cls,
        shape: Shape,
        pattern: SparsePattern,
        *,
        max_num_seqs: int,
        max_tokens: int,
        device: torch.device,
        slots: int = 0,
    ) -> DeviceBuffers:
        """Buffers for ``requests_per_round`` requests, and for logits of so many slots."""
        requests = requests_per_round(shape, pattern, max_num_seqs, max_tokens)
        return cls(
            requests,
            work=Workspaces.allocate(requests, shape, pattern, device),
            logits=torch.empty(slots, 2 * shape.num_kv_heads, dtype=torch.float32, device=device),
            recall=torch.zeros(0 if shape.recall_rows is None else shape.num_layers, 4, device=device),
            **round_buffers(shape.num_layers, device),
        )

    def workspaces(self) -> list[Tensor]:
        """Scratch of the kernels."""
        return self.work.tensors()

    def covered(self, place: int) -> Tensor:
        """What ``recall`` adds to, of the layer with this ``SparseLayer.place``: sum and number."""
        return self.recall[place, :2]

    def missing_logits(self, slots: int) -> Tensor:
        """Logits for so many slots of the cache, all missing; valid until the next call."""
        if self.logits.shape[0] < slots:
            self.logits = self.logits.new_empty(slots, self.logits.shape[1])
        return self.logits[:slots].fill_(float("nan"))
