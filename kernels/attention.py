# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
"""Steps of attention over a paged cache that Triton kernels share: loading, the online softmax, storing,
and the rows that stand for a chunk."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_kv(p_kv, b_offset, o_d, D: tl.constexpr, BD: tl.constexpr, dtype: tl.constexpr):
    """Keys and values ``[BN, BD]`` at offsets ``b_offset`` of one head.

    Nothing is masked by key, which would cost a store to shared memory and a predicate per copy: lanes without a key
    read one of the tile's own positions (finite, unlike an unused slot) and their weights are zero.
    """
    p_k = p_kv + b_offset[:, None] + o_d[None, :]
    # [BN, BD]
    if D != BD:
        m_d = (o_d < D)[None, :]
        b_k = tl.load(p_k, mask=m_d, other=0.0)
        b_v = tl.load(p_k + D, mask=m_d, other=0.0)
    else:
        b_k = tl.load(p_k)
        b_v = tl.load(p_k + D)
    return b_k.to(dtype), b_v.to(dtype)


@triton.jit
def online_softmax(b_s, b_max, b_sum, b_bias, scale, BIAS: tl.constexpr):
    """Weights of a tile of raw logits, the new maximum and sum, and the factor on what was summed before."""
    if BIAS:
        b_s = b_s * scale + b_bias
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.math.exp2(b_s - b_next[:, None])
    else:
        b_next = tl.maximum(b_max, tl.max(b_s, 1) * scale)
        b_p = tl.math.exp2(b_s * scale - b_next[:, None])
    b_alpha = tl.math.exp2(b_max - b_next)
    return b_p, b_next, b_sum * b_alpha + tl.sum(b_p, 1), b_alpha


@triton.jit
def softmax_step(
    queries, lanes, b_k, b_v, biases, scale, BIAS: tl.constexpr, UPCAST: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """One key tile of the online softmax in base 2, for each lane.

    ``queries`` and ``biases`` have an entry per lane; a bias is 0 or -inf and broadcasts to ``[BM, BN]``. ``lanes``
    holds the output, maximum and sum of each, and is returned anew. All logits come first: the product of the second
    lane runs while the weights of the first are computed.
    """
    if UPCAST:
        b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
    logits = ()
    for i in tl.static_range(LANES):
        b_q = queries[i].to(tl.float32) if UPCAST else queries[i]
        # [BM, BN]
        logits += (tl.dot(b_q, tl.trans(b_k), input_precision="ieee"),)
    after = ()
    for i in tl.static_range(LANES):
        b_acc, b_max, b_sum = lanes[i]
        b_p, b_max, b_sum, b_alpha = online_softmax(logits[i], b_max, b_sum, biases[i], scale, BIAS)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision="ieee")
        after += ((b_acc, b_max, b_sum),)
    return after


@triton.jit
def slot_offsets(b_slot, stride_block, stride_token, BLOCK_SIZE: tl.constexpr, LINEAR: tl.constexpr):
    """64-bit offsets of cache slots."""
    if LINEAR:
        b_offset = b_slot.to(tl.int64) * stride_token
    else:
        b_offset = (b_slot // BLOCK_SIZE).to(tl.int64) * stride_block
        b_offset += (b_slot % BLOCK_SIZE).to(tl.int64) * stride_token
    return b_offset


@triton.jit
def load_queries(p_q, b_pos, m_row, b_head, first, stride_row, stride_head, o_d, D: tl.constexpr, BD: tl.constexpr):
    """Query rows ``[BM, BD]``; ``first`` is the row of position 0, were it in the query tensor."""
    b_offset = (first + b_pos).to(tl.int64) * stride_row + b_head.to(tl.int64) * stride_head
    m_q = m_row[:, None]
    if D != BD:
        m_q = m_q & (o_d[None, :] < D)
    return tl.load(p_q + b_offset[:, None] + o_d[None, :], mask=m_q, other=0.0)


@triton.jit
def store_rows(
    p_out, p_lse, lane, v_scale, b_pos, m_row, b_head, first, stride_row, stride_head,
    stride_lse_row, stride_lse_head, o_d, D: tl.constexpr, BD: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Normalises and writes rows and, if asked for, their log-sum-exp (natural logarithm)."""
    b_acc, b_max, b_sum = lane
    b_out = b_acc * (v_scale / b_sum)[:, None]
    b_offset = (first + b_pos).to(tl.int64) * stride_row + b_head.to(tl.int64) * stride_head
    m_out = m_row[:, None]
    if D != BD:
        m_out = m_out & (o_d[None, :] < D)
    tl.store(p_out + b_offset[:, None] + o_d[None, :], b_out.to(p_out.dtype.element_ty), mask=m_out)
    if LSE:
        b_lse = (b_max + tl.math.log2(b_sum)) * 0.6931471805599453
        b_offset = (first + b_pos).to(tl.int64) * stride_lse_row + b_head.to(tl.int64) * stride_lse_head
        tl.store(p_lse + b_offset, b_lse, mask=m_row)


@triton.jit
def spread_position(b_i, row_start, row_end, n, num_rows):
    """Position of the row ``b_i`` of those that stand for a chunk, -1 where there is none: ``rows.spread_rows``."""
    total = row_end - row_start
    count = tl.minimum(num_rows, total)
    step = tl.maximum(total // count, 1)
    b_row = (total.to(tl.int64) * b_i // count).to(tl.int32) + b_i * 37 % step
    return tl.where(b_i < count, n - total + tl.minimum(b_row, total - 1), -1)


@triton.jit
def window_start(b_pos, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, REACH: tl.constexpr):
    """First key of the window of the tile around a position: ``SparsePattern.window_start``; 0 where there is none."""
    b_start = tl.maximum(tl.maximum(b_pos, 0) // BLOCK_Q * BLOCK_Q - REACH + 1, 0)
    return b_start // BLOCK_K * BLOCK_K
