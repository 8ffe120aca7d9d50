# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""How much each KV head keeps, decided on the device over a paged cache, for CUDA devices.

Kernels, one after the other: mean queries of the sampled rows' tiles and what they pay to the keys that are kept in any
case; how many keys lie in each bin of scores, splits of the sequence in parallel; the ladder of bars from that; the
outputs of the sampled rows for every step of the ladder, splits in parallel again; errors, from the splits put
together; the choice.

Eight outputs for each row would cost eight products with the values. Only the squares of their differences are needed,
and these are well estimated by a few random projections: the values are multiplied by a matrix of random signs first,
which leaves ``SKETCH - 1`` channels of them, and a channel of ones beside these brings the sums of probabilities. All
eight together cost about as much as one product with the values. Every tile of rows has signs of its own, so that their
errors average out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile_index
from ..attention import spread_position, window_start
from ..launch import cdiv, launch, next_power_of_2
from ..paged import FP8_DTYPES, Batch, PagedKV, is_interpreted, paged_rows, priors
from ..settings import Settings, padded, settings
from ..tile_index import TileIndex
from .naive import BINS, HIGHEST, LOWEST, SIZES, rows_of
from .paged import CHUNK_ROWS, MAX_ROWS, SKETCH, STEPS, PriceWorkspace

BINS_PER_UNIT = BINS / (HIGHEST - LOWEST)
COUNT_KEYS = 8192  # of a row, that are counted at most
MEAN_ELEMENTS = 16384  # of queries that a program loads at a time
assert SIZES == (0, *(64 << step for step in range(1, STEPS - 1)))  # as _ladder_kernel works them out


@triton.jit
def _rows(num_rows, n, FULL_KEYS: tl.constexpr, DOUBLINGS: tl.constexpr):
    """``naive.rows_of``."""
    for i in tl.static_range(DOUBLINGS):
        num_rows = tl.where(n > (FULL_KEYS << i), num_rows // 2, num_rows)
    return tl.maximum(num_rows, 1)


@triton.jit
def _splits(
    count,
    rows,
    PACK: tl.constexpr,
    BM: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Tiles of rows, splits of the sequence and room for the rows of one: fewer rows leave room for more splits."""
    tiles = tl.cdiv(count * PACK, BM)
    room = tl.cdiv(count * PACK, CHUNK_ROWS) * CHUNK_ROWS
    return tiles, tl.minimum(SPLITS * rows // room, PROGRAMS // tiles), room


@triton.jit
def _mean_queries(
    p_means, p_near, i_head, i_m, count, rows, o_d,
    LOWEST: tl.constexpr, BINS_PER_UNIT: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of mean queries, and what to subtract from their logits, in bins.

    ``PACK``, ``BM`` and ``rows`` count mean queries, here and in ``_bins``: those of all parts.
    """
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < count * PACK
    # [BM, BD]
    b_c = tl.load(
        p_means + (i_head * rows + o_m)[:, None] * D + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0
    )
    if UPCAST:
        b_c = b_c.to(tl.float32)
    b_near = tl.load(p_near + i_head * rows + o_m, mask=m_m, other=0.0)
    return b_c, (b_near + LOWEST) * BINS_PER_UNIT


@triton.jit
def _bins(
    b_c, b_unit, b_k, b_j, m_j, b_start, p_prior, scale, SINKS: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BINS: tl.constexpr, BINS_PER_UNIT: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """Scores of a block of keys for a tile of rows, ``[BM // PACK, BN]``, in bins, and which may be listed."""
    b_t = tl.dot(b_c, tl.trans(b_k), input_precision="ieee") * (scale * BINS_PER_UNIT) - b_unit[:, None]
    b_t = tl.max(tl.reshape(b_t, [BM // PACK, PACK, BN]), 1)
    if PRIOR:
        # [BN]
        b_t += (tl.load(p_prior + b_j, mask=m_j, other=0.0) * BINS_PER_UNIT)[None, :]
    # In the last bin is all that lies above it.
    return tl.minimum(b_t, BINS - 0.5), (b_j[None, :] >= SINKS) & (b_j[None, :] < b_start[:, None])


@triton.jit(do_not_specialize=["num_rows", "stride_table", "rows"])
def _mean_kernel(
    p_q, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_means, p_near, p_counts, p_k_scale, scale, num_rows,
    stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, REACH: tl.constexpr,
    SINKS: tl.constexpr, BINS: tl.constexpr, BR: tl.constexpr, FP8: tl.constexpr, UPCAST: tl.constexpr,
    FULL_KEYS: tl.constexpr,
    DOUBLINGS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Mean queries of a part of the tile of one sampled row, and the log-sum-exp over the tile's sinks and window.

    ``BM``: heads of the group, padded to what a product takes.
    """
    i_i, i_p = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    if row_end <= row_start:
        return
    num_rows = _rows(num_rows, n, FULL_KEYS, DOUBLINGS)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    if tl.program_id(0) == 0:
        o_b = tl.arange(0, BINS)
        tl.store(p_counts + i_head * BINS + o_b, tl.zeros([BINS], tl.int32))
    position = spread_position(i_i, row_start, row_end, n, num_rows)
    if position < 0:
        return
    o_d, o_n, o_r, o_m = tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, BR), tl.arange(0, BM)
    first = n - (row_end - row_start)
    start = position // BLOCK_Q * BLOCK_Q
    high = tl.minimum(start + BLOCK_Q, n)
    part, end = tl.maximum(start + i_p * PART, first), tl.minimum(start + (i_p + 1) * PART, high)
    m_m = o_m < tl.where(part < end, GROUP, 0)
    p_head = p_q + (i_h * GROUP + o_m).to(tl.int64)[None, :, None] * stride_q_head + o_d[None, None, :]
    b_sum = tl.zeros([BM, BD], tl.float32)
    for i_q in range(part, end, BR):
        b_row = (row_start + i_q - first + o_r).to(tl.int64)[:, None, None] * stride_q_row
        m_q = (i_q + o_r < end)[:, None, None] & m_m[None, :, None] & (o_d < D)[None, None, :]
        # [BR, BM, BD]
        b_sum += tl.sum(tl.load(p_head + b_row, mask=m_q, other=0.0).to(tl.float32), 0)
    b_c = (b_sum / tl.maximum(end - part, 1).to(tl.float32)).to(p_q.dtype.element_ty)
    b_place = (i_head * rows + i_i * PACK) * PARTS + i_p * PACK + o_m
    tl.store(p_means + b_place[:, None] * D + o_d[None, :], b_c, mask=(o_m < PACK)[:, None] & (o_d < D)[None, :])
    if UPCAST:
        b_c = b_c.to(tl.float32)
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    if FP8:
        scale *= tl.load(p_k_scale)
    window = window_start(position, BLOCK_Q, BLOCK_K, REACH)
    sinks = tl.minimum(SINKS, window)  # those in front of the window
    b_max = tl.full([BM], -1e30, tl.float32)
    b_total = tl.zeros([BM], tl.float32)
    blocks = tl.cdiv(sinks, BN)
    for i_n in range(blocks + tl.cdiv(high - window, BN)):
        b_j = tl.where(i_n < blocks, i_n * BN, window + (i_n - blocks) * BN) + o_n
        m_j = b_j < tl.where(i_n < blocks, sinks, high)
        b_k = paged_rows(
            p_k, p_table, b_j, m_j, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
        )
        b_s = tl.where(m_j[None, :], tl.dot(b_c, tl.trans(b_k), input_precision="ieee") * scale, -1e30)
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_total = b_total * tl.math.exp2(b_max - b_next) + tl.sum(tl.math.exp2(b_s - b_next[:, None]), 1)
        b_max = b_next
    # A head that only pads the group has no score, and neither has a part without rows.
    b_near = tl.where(m_m, (b_max + tl.math.log2(b_total)) * 0.6931471805599453, 1e30)
    tl.store(p_near + b_place, b_near, mask=o_m < PACK)


@triton.jit(do_not_specialize=["num_rows", "stride_table", "rows", "stride_prior", "stride_prior_head"])
def _count_kernel(
    p_q, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_means, p_near, p_counts, p_k_scale, scale, num_rows,
    stride_block, stride_head, stride_token, stride_table, rows, p_prior, stride_prior, stride_prior_head,
    HEADS: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, REACH: tl.constexpr, SINKS: tl.constexpr,
    BINS: tl.constexpr, LOWEST: tl.constexpr, BINS_PER_UNIT: tl.constexpr, SPLITS: tl.constexpr, PROGRAMS: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, COUNT_KEYS: tl.constexpr,
    FP8: tl.constexpr, UPCAST: tl.constexpr, FULL_KEYS: tl.constexpr,
    DOUBLINGS: tl.constexpr, PARTS: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """How many of a split's keys lie in each bin, for one tile of rows.

    Of a sequence beyond ``COUNT_KEYS`` keys every so manieth is counted, for so many; others for each tile of rows.
    """
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    if row_end <= row_start:
        return
    num_rows = _rows(num_rows, n, FULL_KEYS, DOUBLINGS)
    count = tl.minimum(num_rows, row_end - row_start)
    tiles, splits, _ = _splits(count, rows, PACK, BM, CHUNK_ROWS, PROGRAMS, SPLITS)
    i_m, i_s = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    RT: tl.constexpr = BM // PACK
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    b_start = window_start(
        spread_position(i_m * RT + tl.arange(0, RT), row_start, row_end, n, num_rows), BLOCK_Q, BLOCK_K, REACH
    )
    high = tl.max(b_start, 0)
    stride = tl.cdiv(n, COUNT_KEYS)
    split = tl.cdiv(tl.cdiv(tl.cdiv(high, stride), splits), BN) * BN
    low, last = i_s * split, tl.minimum((i_s + 1) * split, tl.cdiv(high, stride))
    if low >= last:
        return
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    b_c, b_unit = _mean_queries(
        p_means,
        p_near,
        i_head,
        i_m,
        count,
        rows * PARTS,
        o_d,
        LOWEST,
        BINS_PER_UNIT,
        PACK * PARTS,
        BM * PARTS,
        D,
        UPCAST,
    )
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    if FP8:
        scale *= tl.load(p_k_scale)
    if PRIOR:
        p_prior += i_r.to(tl.int64) * stride_prior + i_h.to(tl.int64) * stride_prior_head
    b_counts = tl.zeros([BINS], tl.int32)
    for i_n in range(low, last, BN):
        # One of every ``stride`` neighbours, not always at the same place among them
        b_j = (i_n + o_n) * stride + ((i_n + o_n) * 37 + i_m) % stride
        b_k = paged_rows(
            p_k, p_table, b_j, b_j < high, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST,
            p_q.dtype.element_ty,
        )  # fmt: skip
        b_t, m_t = _bins(
            b_c, b_unit, b_k, b_j, b_j < high, b_start, p_prior, scale, SINKS, PACK * PARTS, BM * PARTS, BN, BINS,
            BINS_PER_UNIT, PRIOR,
        )  # fmt: skip
        m_t = m_t & (b_j < high)[None, :] & (b_t >= 0.0)
        # What is not counted goes to the first bin and is taken off it again.
        b_bin = tl.reshape(tl.where(m_t, b_t, 0.0).to(tl.int32), [RT * BN])
        b_counts += tl.histogram(b_bin, BINS)
        b_counts -= tl.where(tl.arange(0, BINS) == 0, RT * BN - tl.sum(tl.sum(m_t.to(tl.int32), 1), 0), 0)
    o_b = tl.arange(0, BINS)
    tl.atomic_add(p_counts + i_head * BINS + o_b, b_counts * stride, mask=b_counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def _ladder_kernel(
    p_counts, p_row_start, p_row_end, p_seq_len, p_bars, p_density, num_rows,
    HEADS: tl.constexpr, BR: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, REACH: tl.constexpr,
    SINKS: tl.constexpr, BINS: tl.constexpr, STEPS: tl.constexpr, FULL_KEYS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
):  # fmt: skip
    """The ladder of one head, and how much each of its steps keeps. ``BR``: sampled rows, padded."""
    i_h, i_r = tl.program_id(0), tl.program_id(1)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    if row_end <= row_start:
        return
    num_rows = _rows(num_rows, n, FULL_KEYS, DOUBLINGS)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    o_b, o_s = tl.arange(0, BINS), tl.arange(0, STEPS)
    b_counts = tl.load(p_counts + i_head * BINS + o_b)
    b_above = tl.sum(b_counts, 0) - tl.cumsum(b_counts, 0) + b_counts
    b_size = tl.where(o_s == 0, 0, 64 << o_s) * tl.minimum(num_rows, row_end - row_start)
    for i in tl.static_range(DOUBLINGS):
        b_size = tl.where(n > (FULL_KEYS << i), b_size * 2, b_size)
    b_bar = tl.sum((b_above[None, :] > b_size[:, None]).to(tl.int32), 1)
    tl.store(p_bars + i_head * STEPS + o_s, b_bar)
    b_pos = spread_position(tl.arange(0, BR), row_start, row_end, n, num_rows)
    b_open = tl.maximum(window_start(b_pos, BLOCK_Q, BLOCK_K, REACH) - SINKS, 0)
    seen = tl.sum(b_pos + 1, 0)
    may = tl.sum(tl.where(b_pos >= 0, b_open, 0), 0)
    b_listed = tl.sum(tl.where(o_b[None, :] >= b_bar[:, None], b_counts[None, :], 0), 1)
    b_listed = tl.minimum(b_listed, may)  # counts of a part of the keys may tell of more
    b_kept = tl.where(o_s == STEPS - 1, seen, seen - may + b_listed)
    tl.store(p_density + i_head * STEPS + o_s, b_kept.to(tl.float32) / seen.to(tl.float32))


@triton.jit
def _signs(i_m, o_d, o_c, D: tl.constexpr, SKETCH: tl.constexpr):
    """Random signs ``[BD, SKETCH]`` of a tile of rows, times 1/4; zero in the last channel."""
    b_x = (i_m * 4096 + o_d[:, None] * SKETCH + o_c[None, :]).to(tl.uint32)
    # A mixing function: every bit of the number decides about the lowest one.
    b_x = (b_x ^ (b_x >> 16)) * 0x7FEB352D
    b_x = (b_x ^ (b_x >> 15)) * 0x2C1B3C6D
    b_x = (b_x ^ (b_x >> 12)) * 0x297A2D39
    b_x = b_x ^ (b_x >> 15)
    b_r = tl.where((b_x & 1) == 1, 0.25, -0.25)
    return tl.where((o_d < D)[:, None] & (o_c < SKETCH - 1)[None, :], b_r, 0.0)


@triton.jit
def _add(b_o, b_p, b_t, bar, b_w):
    """Adds to an output what a step keeps: keys in bins from ``bar`` on."""
    return tl.dot(tl.where(b_t >= bar, b_p, 0.0).to(b_w.dtype), b_w, b_o, input_precision="ieee")


@triton.jit(
    do_not_specialize=["num_rows", "stride_table", "rows", "first_request", "stride_prior", "stride_prior_head"]
)
def _output_kernel(
    p_q, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_means, p_near, p_bars, p_maxima, p_sums, p_k_scale,
    scale, num_rows, stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, rows,
    first_request, p_prior, stride_prior, stride_prior_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, REACH: tl.constexpr,
    SINKS: tl.constexpr, BINS: tl.constexpr, LOWEST: tl.constexpr, BINS_PER_UNIT: tl.constexpr, STEPS: tl.constexpr,
    SKETCH: tl.constexpr, SPLITS: tl.constexpr, PROGRAMS: tl.constexpr, CHUNK_ROWS: tl.constexpr, FP8: tl.constexpr,
    UPCAST: tl.constexpr, FULL_KEYS: tl.constexpr,
    DOUBLINGS: tl.constexpr, PARTS: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """Sketched outputs of one tile of rows over one split of the sequence, for every step of the ladder."""
    i_h, i_turn = tl.program_id(1), tl.program_id(2)
    i_r = first_request + i_turn
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    if row_end <= row_start:
        return
    num_rows = _rows(num_rows, n, FULL_KEYS, DOUBLINGS)
    count = tl.minimum(num_rows, row_end - row_start)
    tiles, splits, room = _splits(count, rows, PACK, BM, CHUNK_ROWS, PROGRAMS, SPLITS)
    i_m, i_s = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    split = tl.cdiv(tl.cdiv(n, splits), BN) * BN
    if (i_s >= splits) | (i_s * split >= n):
        return
    RT: tl.constexpr = BM // PACK
    o_d, o_n, o_m, o_c = tl.arange(0, BD), tl.arange(0, BN), i_m * BM + tl.arange(0, BM), tl.arange(0, SKETCH)
    b_pos = spread_position(o_m // PACK, row_start, row_end, n, num_rows)
    b_pos = tl.where(o_m % PACK < GROUP, b_pos, -1)
    b_start = window_start(
        spread_position(i_m * RT + tl.arange(0, RT), row_start, row_end, n, num_rows), BLOCK_Q, BLOCK_K, REACH
    )
    p_row = p_q + (row_start + b_pos - (n - (row_end - row_start))).to(tl.int64)[:, None] * stride_q_row
    p_row += (i_h * GROUP + o_m % PACK).to(tl.int64)[:, None] * stride_q_head + o_d[None, :]
    # [BM, BD]
    b_q = tl.load(p_row, mask=(b_pos >= 0)[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    b_c, b_unit = _mean_queries(
        p_means,
        p_near,
        i_head,
        i_m,
        count,
        rows * PARTS,
        o_d,
        LOWEST,
        BINS_PER_UNIT,
        PACK * PARTS,
        BM * PARTS,
        D,
        UPCAST,
    )
    p_bars += i_head * STEPS
    bar1, bar2, bar3 = tl.load(p_bars + 1), tl.load(p_bars + 2), tl.load(p_bars + 3)
    bar4, bar5, bar6 = tl.load(p_bars + 4), tl.load(p_bars + 5), tl.load(p_bars + 6)
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    if FP8:
        # The factor on values is the same for all heads: it cancels.
        scale *= tl.load(p_k_scale)
    if PRIOR:
        p_prior += i_r.to(tl.int64) * stride_prior + i_h.to(tl.int64) * stride_prior_head
    log2_scale = scale * 1.4426950408889634
    b_r = _signs(i_m, o_d, o_c, D, SKETCH).to(b_q.dtype)
    b_max = tl.full([BM], -1e30, tl.float32)
    b_o0 = tl.zeros([BM, SKETCH], tl.float32)
    b_o1 = tl.zeros([BM, SKETCH], tl.float32)
    b_o2 = tl.zeros([BM, SKETCH], tl.float32)
    b_o3 = tl.zeros([BM, SKETCH], tl.float32)
    b_o4 = tl.zeros([BM, SKETCH], tl.float32)
    b_o5 = tl.zeros([BM, SKETCH], tl.float32)
    b_o6 = tl.zeros([BM, SKETCH], tl.float32)
    b_o7 = tl.zeros([BM, SKETCH], tl.float32)
    for i_n in range(i_s * split, tl.minimum((i_s + 1) * split, tl.max(b_pos, 0) + 1), BN):
        b_j = i_n + o_n
        m_j = b_j < n
        b_k = paged_rows(
            p_k, p_table, b_j, m_j, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
        )
        b_v = paged_rows(
            p_k + D, p_table, b_j, m_j, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
        )
        b_t, m_t = _bins(
            b_c, b_unit, b_k, b_j, m_j, b_start, p_prior, scale, SINKS, PACK * PARTS, BM * PARTS, BN, BINS,
            BINS_PER_UNIT, PRIOR,
        )  # fmt: skip
        # All that every step keeps lies above all bins, what has no score below them.
        b_t = tl.where(m_t, tl.where(b_t >= 0.0, b_t, -1.0), 2.0 * BINS)
        b_t = tl.reshape(tl.broadcast_to(b_t[:, None, :], [RT, PACK, BN]), [BM, BN])
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * log2_scale
        b_s = tl.where(b_j[None, :] <= b_pos[:, None], b_s, -1e30)
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.where(b_s > -1e30, tl.math.exp2(b_s - b_next[:, None]), 0.0)
        b_decay = tl.math.exp2(b_max - b_next)[:, None]
        b_max = b_next
        b_w = tl.where((o_c == SKETCH - 1)[None, :], 1.0, tl.dot(b_v, b_r, input_precision="ieee")).to(b_q.dtype)
        b_o0 = _add(b_o0 * b_decay, b_p, b_t, BINS, b_w)
        b_o1 = _add(b_o1 * b_decay, b_p, b_t, bar1, b_w)
        b_o2 = _add(b_o2 * b_decay, b_p, b_t, bar2, b_w)
        b_o3 = _add(b_o3 * b_decay, b_p, b_t, bar3, b_w)
        b_o4 = _add(b_o4 * b_decay, b_p, b_t, bar4, b_w)
        b_o5 = _add(b_o5 * b_decay, b_p, b_t, bar5, b_w)
        b_o6 = _add(b_o6 * b_decay, b_p, b_t, bar6, b_w)
        b_o7 = _add(b_o7 * b_decay, b_p, b_t, -2, b_w)
    b_place = (i_turn * HEADS + i_h).to(tl.int64) * (SPLITS * rows) + i_s * room + o_m
    m_m = o_m < room
    tl.store(p_maxima + b_place, b_max, mask=m_m)
    p_sum = p_sums + b_place[:, None] * (STEPS * SKETCH) + o_c[None, :]
    tl.store(p_sum, b_o0, mask=m_m[:, None])
    tl.store(p_sum + SKETCH, b_o1, mask=m_m[:, None])
    tl.store(p_sum + 2 * SKETCH, b_o2, mask=m_m[:, None])
    tl.store(p_sum + 3 * SKETCH, b_o3, mask=m_m[:, None])
    tl.store(p_sum + 4 * SKETCH, b_o4, mask=m_m[:, None])
    tl.store(p_sum + 5 * SKETCH, b_o5, mask=m_m[:, None])
    tl.store(p_sum + 6 * SKETCH, b_o6, mask=m_m[:, None])
    tl.store(p_sum + 7 * SKETCH, b_o7, mask=m_m[:, None])


@triton.jit(do_not_specialize=["num_rows", "rows", "first_request"])
def _error_kernel(
    p_maxima, p_sums, p_row_start, p_row_end, p_seq_len, p_errors, num_rows, rows, first_request,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, CHUNK_ROWS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
    STEPS: tl.constexpr, SKETCH: tl.constexpr, SPLITS: tl.constexpr, PROGRAMS: tl.constexpr, FULL_KEYS: tl.constexpr,
    DOUBLINGS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Squared errors of each step, of ``CHUNK_ROWS`` rows, from all splits. ``BM``,
    ``BN``: as of ``_output_kernel``."""
    i_c, i_h, i_turn = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_r = first_request + i_turn
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    if row_end <= row_start:
        return
    num_rows = _rows(num_rows, n, FULL_KEYS, DOUBLINGS)
    count = tl.minimum(num_rows, row_end - row_start)
    if i_c * CHUNK_ROWS >= count * PACK:
        return
    o_m, o_x = i_c * CHUNK_ROWS + tl.arange(0, CHUNK_ROWS), tl.arange(0, STEPS * SKETCH)
    _, splits, room = _splits(count, rows, PACK, BM, CHUNK_ROWS, PROGRAMS, SPLITS)
    split = tl.cdiv(tl.cdiv(n, splits), BN) * BN
    splits = tl.cdiv(n, split)
    b_place = (i_turn * HEADS + i_h).to(tl.int64) * (SPLITS * rows) + o_m
    o_p = tl.arange(0, AT_ONCE)
    # [AT_ONCE, CHUNK_ROWS]
    b_top = tl.full([AT_ONCE, CHUNK_ROWS], -1e30, tl.float32)
    for i_s in range(0, splits, AT_ONCE):
        m_s = (i_s + o_p < splits)[:, None]
        b_top = tl.maximum(
            b_top, tl.load(p_maxima + b_place[None, :] + (i_s + o_p)[:, None] * room, mask=m_s, other=-1e30)
        )
    b_max = tl.max(b_top, 0)
    b_sums = tl.zeros([AT_ONCE, CHUNK_ROWS, STEPS * SKETCH], tl.float32)
    for i_s in range(0, splits, AT_ONCE):
        m_s = (i_s + o_p < splits)[:, None]
        b_split = b_place[None, :] + (i_s + o_p)[:, None] * room
        b_share = tl.math.exp2(tl.load(p_maxima + b_split, mask=m_s, other=-1e30) - b_max[None, :])
        b_part = tl.load(
            p_sums + b_split[:, :, None] * (STEPS * SKETCH) + o_x[None, None, :], mask=m_s[:, :, None], other=0.0
        )
        b_sums += b_part * b_share[:, :, None]
    b_sum = tl.sum(b_sums, 0)
    o_s, o_k = tl.arange(0, STEPS), tl.arange(0, SKETCH)
    b_sum = tl.reshape(b_sum, [CHUNK_ROWS, STEPS, SKETCH])
    m_k = (o_k == SKETCH - 1)[None, None, :]
    b_mass = tl.sum(tl.where(m_k, b_sum, 0.0), 2)
    # A step whose keys all vanish beside the others has no output.
    b_out = tl.where(m_k, 0.0, b_sum) / tl.maximum(b_mass, 1e-30)[:, :, None]
    b_true = tl.sum(tl.where((o_s == STEPS - 1)[None, :, None], b_out, 0.0), 1)
    b_error = b_out - b_true[:, None, :]
    # In place of the last step's error, which is 0, the square of the output
    b_error = tl.where((o_s == STEPS - 1)[None, :, None], b_out, b_error)
    m_m = (o_m < count * PACK) & (o_m % PACK < GROUP)
    b_square = tl.where(m_m[:, None], tl.sum(b_error * b_error, 2), 0.0)
    i_out = ((i_r * HEADS + i_h).to(tl.int64) * (rows // CHUNK_ROWS) + i_c) * STEPS
    tl.store(p_errors + i_out + o_s, tl.sum(b_square, 0))


@triton.jit(do_not_specialize=["num_rows", "chunks", "price"])
def _choose_kernel(
    p_errors, p_density, p_bars, p_row_start, p_row_end, p_seq_len, p_bar, p_chosen, num_rows, chunks, price,
    HEADS: tl.constexpr, BH: tl.constexpr, PACK: tl.constexpr, CHUNK_ROWS: tl.constexpr, BINS: tl.constexpr,
    LOWEST: tl.constexpr, BINS_PER_UNIT: tl.constexpr, STEPS: tl.constexpr, FULL_KEYS: tl.constexpr,
    DOUBLINGS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The cheapest step for every head of one request."""
    i_r = tl.program_id(0)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    if row_end <= row_start:
        return
    num_rows = _rows(num_rows, tl.load(p_seq_len + i_r), FULL_KEYS, DOUBLINGS)
    o_h, o_s = tl.arange(0, BH), tl.arange(0, STEPS)
    m_h = o_h < HEADS
    b_head = (i_r * HEADS + o_h).to(tl.int64)[:, None]
    o_c = tl.arange(0, AT_ONCE)
    chunks_used = tl.cdiv(tl.minimum(num_rows, row_end - row_start) * PACK, CHUNK_ROWS)
    b_errors = tl.zeros([BH, AT_ONCE, STEPS], tl.float32)
    for i_c in range(0, chunks_used, AT_ONCE):
        b_place = (b_head * chunks + (i_c + o_c)[None, :])[:, :, None] * STEPS + o_s[None, None, :]
        b_errors += tl.load(
            p_errors + b_place, mask=m_h[:, None, None] & (i_c + o_c < chunks_used)[None, :, None], other=0.0
        )
    b_error = tl.sum(b_errors, 1)
    b_last = (o_s == STEPS - 1)[None, :]
    total = tl.maximum(tl.sum(tl.sum(tl.where(b_last, b_error, 0.0), 1), 0), 1e-30)
    b_density = tl.load(p_density + b_head * STEPS + o_s[None, :], mask=m_h[:, None], other=0.0)
    b_cost = tl.where(b_last, 0.0, b_error / total) + price * b_density
    # Of equal steps the last; all if there is a NaN anywhere, and then `total` has made NaN of all.
    wrong = tl.sum((b_cost != b_cost).to(tl.int32), 1) > 0
    b_least = tl.min(b_cost, 1)
    b_step = tl.max(tl.where(b_cost <= b_least[:, None], o_s[None, :], 0), 1)
    b_step = tl.where(wrong, STEPS - 1, b_step)
    m_s = o_s[None, :] == b_step[:, None]
    b_bin = tl.load(p_bars + b_head * STEPS + o_s[None, :], mask=m_h[:, None], other=0)
    b_bin = tl.sum(tl.where(m_s, b_bin, 0), 1)
    b_bar = tl.where(b_bin == BINS, float("inf"), LOWEST + b_bin.to(tl.float32) / BINS_PER_UNIT)
    b_bar = tl.where(b_step == STEPS - 1, float("-inf"), b_bar)
    tl.store(p_bar + i_r * HEADS + o_h, b_bar, mask=m_h)
    tl.store(p_chosen + i_r * HEADS + o_h, tl.sum(tl.where(m_s, b_density, 0.0), 1), mask=m_h)


def price(
    q: Tensor,
    kv: PagedKV,
    batch: Batch,
    index: TileIndex,
    workspace: PriceWorkspace,
    *,
    scale: float,
    price: float,
    prior: Tensor | None = None,
    config: Settings | None = None,
) -> None:
    """As ``paged.price``, but that errors are estimates: of equal steps the last, and everything where one is NaN.

    Args:
        config: tile sizes; None for those of the table.

    Raises:
        ValueError: ``config`` does not fit the workspace.
    """
    if batch.num_requests == 0:
        return
    heads, size, pattern = kv.num_kv_heads, kv.head_size, index.pattern
    group = q.shape[1] // heads
    pack, depth = next_power_of_2(group), padded(size)
    config = config or settings("price", size, q.device, q.element_size())
    num_rows, parts, rows = workspace.num_rows, workspace.parts, workspace.maxima.shape[3]
    # Tiles as large as the rows of the longest sequence fill
    filled = next_power_of_2(rows_of(num_rows, batch.max_seq_len) * pack)
    block_m = max(min(config.block_m, max(filled, 64)), pack)
    if block_m > MAX_ROWS:
        raise ValueError(f"config has tiles of {block_m} rows, at most {MAX_ROWS} are possible")
    turn, _, splits = workspace.maxima.shape[:3]
    tiles = cdiv(num_rows * pack, block_m)
    fp8 = kv.cache.dtype in FP8_DTYPES
    k_scale = torch.ones(1, device=q.device) if fp8 and kv.k_scale is None else kv.k_scale
    block, head, token = kv.cache.stride()[:3]
    strides = (block, head, token, kv.block_table.stride(0), rows)
    bounds = (batch.row_start, batch.row_end, batch.seq_len)
    places = (q, kv.cache, kv.block_table, *bounds, workspace.means, workspace.near)
    few = {"FULL_KEYS": tile_index.FULL_KEYS, "DOUBLINGS": tile_index.DOUBLINGS}
    tile = {
        "BLOCK_Q": pattern.block_q, "BLOCK_K": pattern.block_k, "REACH": pattern.reach, "SINKS": pattern.sink_keys,
        "BINS": BINS, **few,
    }  # fmt: skip
    shape = {
        "HEADS": heads, "PACK": pack, "BN": config.block_n, "D": size, "BD": depth, "BLOCK_SIZE": kv.block_size,
        "FP8": fp8, "UPCAST": is_interpreted() and q.dtype == torch.bfloat16, **tile,
    }  # fmt: skip
    bins: dict[str, Any] = {"LOWEST": LOWEST, "BINS_PER_UNIT": BINS_PER_UNIT}
    run = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    padded_heads = max(pack, 16)
    # A few programs with long chains of loads: large blocks where they are small enough
    mean_n = 128 if depth * q.element_size() <= 256 else config.block_n
    launch(
        _mean_kernel, (num_rows * parts, heads, batch.num_requests),
        (*places, workspace.counts, k_scale, scale / math.log(2), num_rows, q.stride(0), q.stride(1), *strides),
        num_stages=config.num_stages, GROUP=group, BM=padded_heads, PARTS=parts, PART=pattern.part_positions,
        BR=max(1, min(MEAN_ELEMENTS // (padded_heads * depth), next_power_of_2(pattern.block_q))), **{**shape,
        "BN": mean_n},
    )  # fmt: skip
    launch(
        _count_kernel, (tiles * splits, heads, batch.num_requests),
        (*places, workspace.counts, k_scale, scale, num_rows, *strides, *priors(prior)),
        **run, BM=block_m, PARTS=parts, COUNT_KEYS=COUNT_KEYS, SPLITS=splits, PROGRAMS=tiles * splits,
        CHUNK_ROWS=CHUNK_ROWS, PRIOR=prior is not None, **bins, **shape,
    )  # fmt: skip
    launch(
        _ladder_kernel, (heads, batch.num_requests),
        (workspace.counts, *bounds, workspace.bars, workspace.density, num_rows),
        HEADS=heads, BR=next_power_of_2(num_rows), STEPS=STEPS, **tile,
    )  # fmt: skip
    partial = (workspace.maxima, workspace.sums)
    for first in range(0, batch.num_requests, turn):
        count = min(turn, batch.num_requests - first)
        launch(
            _output_kernel, (tiles * splits, heads, count),
            (
                *places, workspace.bars, *partial, k_scale, scale, num_rows, q.stride(0), q.stride(1), *strides, first,
                *priors(prior),
            ),
            **run, GROUP=group, BM=block_m, PARTS=parts, STEPS=STEPS, SKETCH=SKETCH, SPLITS=splits,
            PROGRAMS=tiles * splits, CHUNK_ROWS=CHUNK_ROWS, PRIOR=prior is not None, **bins, **shape,
        )  # fmt: skip
        launch(
            _error_kernel, (cdiv(num_rows * pack, CHUNK_ROWS), heads, count),
            (*partial, *bounds, workspace.errors, num_rows, rows, first),
            HEADS=heads, GROUP=group, PACK=pack, CHUNK_ROWS=CHUNK_ROWS, BM=block_m, BN=config.block_n,
            STEPS=STEPS, SKETCH=SKETCH, SPLITS=splits, PROGRAMS=tiles * splits, AT_ONCE=4, **few,
        )  # fmt: skip
    launch(
        _choose_kernel, (batch.num_requests,),
        (
            workspace.errors, workspace.density, workspace.bars, *bounds, index.bars, index.density, num_rows,
            rows // CHUNK_ROWS, float(price),
        ),
        HEADS=heads, BH=next_power_of_2(heads), PACK=pack, CHUNK_ROWS=CHUNK_ROWS, BINS=BINS, STEPS=STEPS, AT_ONCE=16,
        **few, **bins,
    )  # fmt: skip
