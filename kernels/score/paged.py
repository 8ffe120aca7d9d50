# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Logits of tokens in cache slots: the plain reference, prepared weights, the workspace and the checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_tensor
from ..paged import FP8_DTYPES, QUERY_DTYPES, Batch, PagedKV, check_device, check_paged
from ..reference import cache_slots
from ..types import IndexerLayerWeights
from . import naive

# Larger logits are cut off, so that a softmax stays finite; a NaN becomes this, as NaN marks a missing one.
LIMIT = 1e30


class MissingSlots(NamedTuple):
    """Scratch of ``score_missing``, allocated once.

    Attributes:
        slots: int64 ``[requests * max_seq_len]``, in no particular order.
        held: int32 ``[1]``, how many of them hold.
    """

    slots: Tensor
    held: Tensor


def allocate_missing(num_requests: int, max_seq_len: int, device: torch.device | str) -> MissingSlots:
    """Room for every slot of ``num_requests`` sequences of up to ``max_seq_len`` tokens."""
    return MissingSlots(
        torch.empty(num_requests * max_seq_len, dtype=torch.int64, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )


def prepare_weights(weights: IndexerLayerWeights, dtype: torch.dtype) -> IndexerLayerWeights:
    """Weights as the kernels want them: the first layer in the dtype of the keys, the rest float32.

    Contiguous but for the second layer, in which each output's weights lie together.
    """
    return IndexerLayerWeights(
        weights.w1.to(dtype).contiguous(), weights.b1.float().contiguous(), weights.w2.float().mT.contiguous().mT,
        weights.b2.float().contiguous(),
    )  # fmt: skip


def _check(kv: PagedKV, weights: IndexerLayerWeights, logits: Tensor) -> None:
    """Checks what both entries share."""
    heads, size = kv.num_kv_heads, kv.head_size
    w1 = check_tensor("weights.w1", weights.w1, 3, QUERY_DTYPES)
    hidden = w1.shape[2]
    shapes = {"w1": (heads, 2 * size, hidden), "b1": (heads, hidden), "w2": (heads, hidden, 2), "b2": (heads, 2)}
    for name, shape in shapes.items():
        value = check_tensor(f"weights.{name}", getattr(weights, name), len(shape), QUERY_DTYPES)
        if tuple(value.shape) != shape:
            raise ValueError(f"weights.{name} has shape {tuple(value.shape)}, expected {shape}")
        if value.device != kv.cache.device:
            raise ValueError(f"weights.{name} is on {value.device} but cache is on {kv.cache.device}")
        if name != "w2" and not value.is_contiguous():
            raise ValueError(f"weights.{name} must be contiguous")
    if kv.cache.dtype not in FP8_DTYPES and w1.dtype != kv.cache.dtype:
        raise ValueError(f"weights.w1 has dtype {w1.dtype} but cache has {kv.cache.dtype}")
    if hidden % 16 or hidden == 0:
        raise ValueError(f"weights.w1 must have a multiple of 16 hidden units, got {hidden}")
    check_tensor("logits", logits, 2, (torch.float32, torch.bfloat16))
    if logits.shape[1] != 2 * heads or logits.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows of {2 * heads}, got shape {tuple(logits.shape)}")
    if logits.device != kv.cache.device:
        raise ValueError(f"logits is on {logits.device} but cache is on {kv.cache.device}")
    check_device("cache", kv.cache)


def check_score_slots(kv: PagedKV, slot_mapping: Tensor, weights: IndexerLayerWeights, logits: Tensor) -> None:
    """Checks every argument of ``score_slots``.

    Raises:
        ValueError: wrong dtype, shape, stride or device; names the argument.
    """
    _check(kv, weights, logits)
    check_tensor("slot_mapping", slot_mapping, 1, (torch.int64,))
    if slot_mapping.device != kv.cache.device or not slot_mapping.is_contiguous():
        raise ValueError(f"slot_mapping must be contiguous and on {kv.cache.device}")


def score_slots(kv: PagedKV, slot_mapping: Tensor, weights: IndexerLayerWeights, logits: Tensor) -> None:
    """Scores the tokens in given cache slots, as ``naive.score`` does, and stores their logits.

    Args:
        kv: the cache; its block table is not looked at.
        slot_mapping: int64 ``[tokens]``, slots; negative ones are padding and skipped.
        weights: from ``prepare_weights``.
        logits: float32 or bfloat16 ``[slots, 2 * Hkv]``, contiguous rows: column and diagonal of head 0, head 1, ...
            Rows of the given slots are written, NaN as 1e30.
    """
    slots = slot_mapping[slot_mapping >= 0]
    both = kv.cache[slots // kv.block_size, :, slots % kv.block_size]
    k, v = both[..., : kv.head_size].float(), both[..., kv.head_size :].float()
    if kv.k_scale is not None and kv.v_scale is not None:
        k, v = k * kv.k_scale, v * kv.v_scale
    found = naive.score(k, v, weights).nan_to_num(nan=LIMIT, posinf=LIMIT, neginf=-LIMIT)
    logits[slots] = found.flatten(1).to(logits.dtype)


def check_score_missing(
    kv: PagedKV, batch: Batch, weights: IndexerLayerWeights, logits: Tensor, missing: MissingSlots
) -> None:
    """Checks every argument of ``score_missing``.

    Raises:
        ValueError: wrong dtype, shape, stride or device; names the argument.
    """
    _check(kv, weights, logits)
    device = kv.cache.device
    check_paged(kv, batch, device)
    check_tensor("missing.slots", missing.slots, 1, (torch.int64,))
    check_tensor("missing.held", missing.held, 1, (torch.int32,))
    if missing.slots.device != device or missing.held.device != device:
        raise ValueError(f"missing is on {missing.slots.device}, expected {device}")
    if missing.slots.shape[0] < batch.num_requests * batch.max_seq_len:
        raise ValueError(
            f"missing has room for {missing.slots.shape[0]} slots, not for {batch.num_requests} sequences of "
            f"{batch.max_seq_len}"
        )


def score_missing(
    kv: PagedKV, batch: Batch, weights: IndexerLayerWeights, logits: Tensor, missing: MissingSlots
) -> None:
    """Scores the tokens of every request whose logits are missing (NaN); the others cost one read of their logit.

    So prefix hits, decoded tokens and whatever else was never scored need no bookkeeping on the host.

    Args:
        kv: the cache.
        batch: the requests; rows are not looked at.
        weights: from ``prepare_weights``.
        logits: as for ``score_slots``.
        missing: from ``allocate_missing``.
    """
    for i, n in enumerate(batch.seq_len.tolist()):
        slots = cache_slots(kv, i, n)
        score_slots(kv, slots[logits[slots, 0].isnan()], weights, logits)
