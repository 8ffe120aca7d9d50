# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Per-token logits of the VSIndexer, from the cache into the per-slot logits, for CUDA devices.

Both linear layers in one kernel: a block of hidden units at a time is computed on the tensor cores, rectified and
added, weighted, to two sums per element, which are added up over the block's units once at the end. The hidden
activations never leave the registers and are never rounded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_tensor
from ..launch import cdiv, launch
from ..paged import FP8_DTYPES, QUERY_DTYPES, Batch, PagedKV, check_device, check_paged, is_interpreted
from ..settings import Settings, multiprocessors, padded, settings
from ..types import IndexerLayerWeights
from . import naive

BLOCK = 1024  # positions a program looks through for missing logits
LIMIT = (
    1e30  # larger logits are cut off, so that a softmax stays finite; a NaN becomes this, as NaN marks a missing one
)


@triton.jit(do_not_specialize=["num_tokens"])
def _score_kernel(
    p_cache, p_slot_mapping, p_count, p_w1, p_b1, p_w2, p_b2, p_logits, p_k_scale, p_v_scale,
    num_tokens, stride_block, stride_head, stride_token, stride_slot,
    stride_w1_head, stride_w1_in, stride_w2_head, stride_w2_in, stride_w2_out,
    HIDDEN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr, UPCAST: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Tiles of ``BM`` tokens of one KV head, given by slot; how many, the device knows if ``p_count`` is given."""
    i_h = tl.program_id(1).to(tl.int64)
    if p_count is not None:
        num_tokens = tl.load(p_count)
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    dtype = p_w1.dtype.element_ty
    for i_m in range(tl.program_id(0) * BM, num_tokens, tl.num_programs(0) * BM):
        o_m = i_m + tl.arange(0, BM)
        m_m = o_m < num_tokens
        # [BM]
        b_slot = tl.load(p_slot_mapping + o_m, mask=m_m, other=-1)
        m_m = m_m & (b_slot >= 0)
        b_slot = tl.where(m_m, b_slot, 0)
        b_offset = (b_slot // BLOCK_SIZE) * stride_block + (b_slot % BLOCK_SIZE) * stride_token
        p_k = p_cache + i_h * stride_head + b_offset[:, None] + o_d[None, :]
        m_k = m_m[:, None] & (o_d < D)[None, :]
        # [BM, BD]
        b_k = tl.load(p_k, mask=m_k, other=0.0)
        b_v = tl.load(p_k + D, mask=m_k, other=0.0)
        if FP8:
            b_k = (b_k.to(tl.float32) * tl.load(p_k_scale)).to(dtype)
            b_v = (b_v.to(tl.float32) * tl.load(p_v_scale)).to(dtype)
        if UPCAST:
            b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
        # [BD, BN]
        p_wk = p_w1 + i_h * stride_w1_head + o_d[:, None] * stride_w1_in + o_n[None, :]
        p_wv = p_wk + D * stride_w1_in
        p_out = p_w2 + i_h * stride_w2_head + o_n * stride_w2_in
        b_column = tl.zeros([BM, BN], tl.float32)
        b_slash = tl.zeros([BM, BN], tl.float32)
        for i_n in range(0, HIDDEN, BN):
            if D != BD:
                b_wk = tl.load(p_wk + i_n, mask=(o_d < D)[:, None], other=0.0)
                b_wv = tl.load(p_wv + i_n, mask=(o_d < D)[:, None], other=0.0)
            else:
                b_wk = tl.load(p_wk + i_n)
                b_wv = tl.load(p_wv + i_n)
            if UPCAST:
                b_wk, b_wv = b_wk.to(tl.float32), b_wv.to(tl.float32)
            # [BM, BN]
            b_h = tl.dot(b_k, b_wk, input_precision="ieee")
            b_h = tl.dot(b_v, b_wv, b_h, input_precision="ieee")
            # [BN]
            b_b1 = tl.load(p_b1 + i_h * HIDDEN + i_n + o_n).to(tl.float32)
            b_w2v = tl.load(p_out + i_n * stride_w2_in).to(tl.float32)
            b_w2s = tl.load(p_out + i_n * stride_w2_in + stride_w2_out).to(tl.float32)
            b_h = tl.maximum(b_h + b_b1[None, :], 0.0)
            b_column += b_h * b_w2v[None, :]
            b_slash += b_h * b_w2s[None, :]
        b_one = tl.sum(b_column, 1) + tl.load(p_b2 + 2 * i_h).to(tl.float32)
        b_two = tl.sum(b_slash, 1) + tl.load(p_b2 + 2 * i_h + 1).to(tl.float32)
        b_one = tl.where(b_one != b_one, LIMIT, tl.minimum(tl.maximum(b_one, -LIMIT), LIMIT))
        b_two = tl.where(b_two != b_two, LIMIT, tl.minimum(tl.maximum(b_two, -LIMIT), LIMIT))
        p_logit = p_logits + b_slot * stride_slot + 2 * i_h
        tl.store(p_logit, b_one.to(p_logits.dtype.element_ty), mask=m_m)
        tl.store(p_logit + 1, b_two.to(p_logits.dtype.element_ty), mask=m_m)


class MissingSlots(NamedTuple):
    """Scratch of ``score_missing``, allocated once.

    Attributes:
        slots: int64 ``[requests * max_seq_len]``, in no particular order.
        held: int32 ``[1]``, how many of them hold.
    """

    slots: Tensor
    held: Tensor


def allocate_missing(num_requests: int, max_seq_len: int, device: torch.device | str) -> MissingSlots:
    """Room for every slot of ``num_requests`` contexts of up to ``max_seq_len`` tokens."""
    return MissingSlots(
        torch.empty(num_requests * max_seq_len, dtype=torch.int64, device=device),
        torch.empty(1, dtype=torch.int32, device=device),
    )


@triton.jit(do_not_specialize=["stride_table"])
def _missing_kernel(
    p_logits, p_table, p_seq_len, p_slots, p_count, stride_table, stride_slot,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Collects the slots of a block of positions whose first logit is NaN."""
    i_b, i_r = tl.program_id(0), tl.program_id(1)
    n = tl.load(p_seq_len + i_r)
    if i_b * BLOCK >= n:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    b_block = tl.load(p_table + i_r.to(tl.int64) * stride_table + o_c // BLOCK_SIZE, mask=o_c < n, other=0)
    b_slot = b_block.to(tl.int64) * BLOCK_SIZE + o_c % BLOCK_SIZE
    # [BLOCK]
    b_logit = tl.load(p_logits + b_slot * stride_slot, mask=o_c < n, other=0.0)
    b_one = (b_logit != b_logit).to(tl.int32)
    total = tl.sum(b_one, 0)
    if total > 0:
        first = tl.atomic_add(p_count, total, sem="relaxed")
        tl.store(p_slots + first + tl.cumsum(b_one, 0) - b_one, b_slot, mask=b_one > 0)


def prepare_weights(weights: IndexerLayerWeights, dtype: torch.dtype) -> IndexerLayerWeights:
    """Weights as the kernel wants them: the first layer in the dtype of the keys, the rest float32.

    Contiguous but for the second layer, in which each output's weights lie together.
    """
    return IndexerLayerWeights(
        weights.w1.to(dtype).contiguous(), weights.b1.float().contiguous(), weights.w2.float().mT.contiguous().mT,
        weights.b2.float().contiguous(),
    )  # fmt: skip


def _check(kv: PagedKV, weights: IndexerLayerWeights, logits: Tensor) -> None:
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


def table_settings(kv: PagedKV, weights: IndexerLayerWeights) -> Settings:
    """The table's settings for a cache and weights.

    With one or two tiles of hidden units the compiler unrolls the loop over them and pipelines the loop over tokens
    instead, keys and values included, for which the shared memory has no room.
    """
    config = settings("score", kv.head_size, kv.cache.device, weights.w1.element_size())
    if weights.w1.shape[2] <= 2 * config.block_n:
        config = replace(config, block_m=min(config.block_m, 64), num_stages=1)
    return config


def _launch(
    kv: PagedKV, weights: IndexerLayerWeights, logits: Tensor, slots: Tensor, max_tokens: int, count: Tensor | None,
    config: Settings,
) -> None:  # fmt: skip
    """Scores ``slots``, of which there are ``max_tokens`` or, if given, as many as the device finds in ``count``."""
    hidden, size, device = weights.w1.shape[2], kv.head_size, kv.cache.device
    block_n = config.block_n
    while hidden % block_n:
        block_n //= 2
    fp8 = kv.cache.dtype in FP8_DTYPES
    one = torch.ones(1, device=device) if fp8 and (kv.k_scale is None or kv.v_scale is None) else None
    strides = kv.cache.stride()
    tiles = cdiv(max_tokens, config.block_m)
    if count is not None:
        # Enough programs to fill the device; each takes tiles until there are no more.
        tiles = min(tiles, max(1, 2 * multiprocessors(device) // kv.num_kv_heads))
    launch(
        _score_kernel, (tiles, kv.num_kv_heads),
        (
            kv.cache, slots, count, weights.w1, weights.b1, weights.w2, weights.b2, logits,
            one if kv.k_scale is None else kv.k_scale, one if kv.v_scale is None else kv.v_scale,
            max_tokens, *strides[:3], logits.stride(0), *weights.w1.stride()[:2], *weights.w2.stride(),
        ),
        num_warps=config.num_warps, num_stages=config.num_stages,
        HIDDEN=hidden, D=size, BD=padded(size), BLOCK_SIZE=kv.block_size, FP8=fp8,
        UPCAST=is_interpreted() and weights.w1.dtype == torch.bfloat16, LIMIT=LIMIT, BM=config.block_m, BN=block_n,
    )  # fmt: skip


def score_slots(
    kv: PagedKV,
    slot_mapping: Tensor,
    weights: IndexerLayerWeights,
    logits: Tensor,
    *,
    config: Settings | None = None,
) -> None:
    """Scores the tokens in given cache slots, as ``naive.score`` does, and stores their logits.

    Args:
        kv: the cache; its block table is not looked at.
        slot_mapping: int64 ``[tokens]``, slots; negative ones are padding and skipped.
        weights: from ``prepare_weights``.
        logits: float32 or bfloat16 ``[slots, 2 * Hkv]``, contiguous rows: column and diagonal of head 0, head 1, ...
            Rows of the given slots are written, NaN as 1e30.
        config: tile sizes; None for those of the table.

    Raises:
        ValueError: wrong dtype, shape, stride or device; names the argument.
    """
    _check(kv, weights, logits)
    check_tensor("slot_mapping", slot_mapping, 1, (torch.int64,))
    if slot_mapping.device != kv.cache.device or not slot_mapping.is_contiguous():
        raise ValueError(f"slot_mapping must be contiguous and on {kv.cache.device}")
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    config = config or table_settings(kv, weights)
    _launch(kv, weights, logits, slot_mapping, num_tokens, None, config)


def _check_missing(
    kv: PagedKV, batch: Batch, weights: IndexerLayerWeights, logits: Tensor, missing: MissingSlots
) -> None:
    """Checks every argument of ``score_missing``."""
    _check(kv, weights, logits)
    device = kv.cache.device
    check_paged(kv, batch, device)
    check_tensor("missing.slots", missing.slots, 1, (torch.int64,))
    check_tensor("missing.held", missing.held, 1, (torch.int32,))
    if missing.slots.device != device or missing.held.device != device:
        raise ValueError(f"missing is on {missing.slots.device}, expected {device}")
    if missing.slots.shape[0] < batch.num_requests * batch.max_seq_len:
        raise ValueError(
            f"missing has room for {missing.slots.shape[0]} slots, not for {batch.num_requests} contexts of "
            f"{batch.max_seq_len}"
        )


def score_missing(
    kv: PagedKV,
    batch: Batch,
    weights: IndexerLayerWeights,
    logits: Tensor,
    missing: MissingSlots,
    *,
    config: Settings | None = None,
    checked: bool = False,
) -> None:
    """Scores the tokens of every request whose logits are missing (NaN); the others cost one read of their logit.

    So prefix hits, decoded tokens and whatever else was never scored need no bookkeeping on the host. A slot that two
    requests share may be scored twice, with the same result.

    Args:
        kv: the cache.
        batch: the requests; rows are not looked at.
        weights: from ``prepare_weights``.
        logits: as for ``score_slots``.
        missing: from ``allocate_missing``.
        config: tile sizes; None for those of the table.
        checked: an earlier call with tensors of these shapes, strides, types and devices has passed the checks.

    Raises:
        ValueError: wrong dtype, shape, stride or device; names the argument.
    """
    if not checked:
        _check_missing(kv, batch, weights, logits, missing)
    if batch.num_requests == 0 or batch.max_seq_len == 0:
        return
    config = config or table_settings(kv, weights)
    missing.held.zero_()
    launch(
        _missing_kernel, (cdiv(batch.max_seq_len, BLOCK), batch.num_requests),
        (
            logits, kv.block_table, batch.seq_len, missing.slots, missing.held, kv.block_table.stride(0),
            logits.stride(0),
        ),
        BLOCK_SIZE=kv.block_size, BLOCK=BLOCK,
    )  # fmt: skip
    _launch(kv, weights, logits, missing.slots, batch.num_requests * batch.max_seq_len, missing.held, config)


def score_reference(kv: PagedKV, slot_mapping: Tensor, weights: IndexerLayerWeights, logits: Tensor) -> None:
    """What ``score_slots`` computes, by the plain reference."""
    slots = slot_mapping[slot_mapping >= 0]
    both = kv.cache[slots // kv.block_size, :, slots % kv.block_size]
    k, v = both[..., : kv.head_size].float(), both[..., kv.head_size :].float()
    if kv.k_scale is not None and kv.v_scale is not None:
        k, v = k * kv.k_scale, v * kv.v_scale
    found = naive.score(k, v, weights).nan_to_num(nan=LIMIT, posinf=LIMIT, neginf=-LIMIT)
    logits[slots] = found.flatten(1).to(logits.dtype)
