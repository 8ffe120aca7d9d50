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

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch
from ..paged import FP8_DTYPES, Batch, PagedKV, is_interpreted
from ..settings import Settings, multiprocessors, padded, settings
from ..types import IndexerLayerWeights
from .paged import LIMIT, MissingSlots

BLOCK = 1024  # positions a program looks through for missing logits


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
    """As ``paged.score_slots``.

    Args:
        config: tile sizes; None for those of the table.
    """
    num_tokens = slot_mapping.shape[0]
    if num_tokens == 0:
        return
    config = config or table_settings(kv, weights)
    _launch(kv, weights, logits, slot_mapping, num_tokens, None, config)


def score_missing(
    kv: PagedKV,
    batch: Batch,
    weights: IndexerLayerWeights,
    logits: Tensor,
    missing: MissingSlots,
    *,
    config: Settings | None = None,
) -> None:
    """As ``paged.score_missing``. A slot that two requests share may be scored twice, with the same result.

    Args:
        config: tile sizes; None for those of the table.
    """
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
