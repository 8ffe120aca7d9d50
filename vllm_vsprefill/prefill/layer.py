# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the prefill has to know about one attention layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from vllm_vsprefill.kernels.types import IndexerLayerWeights


class Heads(NamedTuple):
    """Heads of a layer on this rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.num_heads} query heads on {self.num_kv_heads} KV heads of {self.head_size} channels"


class SlotLogits(Protocol):
    """Index logits kept beside a KV cache."""

    @property
    def slots(self) -> Tensor:
        """float32 ``[slots, 2 * num_kv_heads]``: column and diagonal of head 0, of head 1, ...; NaN where missing."""


@dataclass(frozen=True, slots=True, eq=False)
class SparseLayer:
    """An attention layer that runs sparse.

    Attributes:
        index: layer index in the model.
        place: among the layers of this worker that run sparse, from 0; its line in the counters on a device.
        heads: its shape on this rank.
        weights: this rank's indexer weights, as the kernels want them, or None for the training-free estimator.
        tau: float64 ``[2, num_kv_heads]``, thresholds of columns and of diagonals.
        logits: index logits beside the KV cache, or None where they are computed anew for every chunk.
    """

    index: int
    place: int
    heads: Heads
    weights: IndexerLayerWeights | None
    tau: Tensor
    logits: SlotLogits | None = None
