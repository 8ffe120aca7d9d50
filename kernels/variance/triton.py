# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""What single queries of a tile may find in a key that their mean does not, over a paged cache, for CUDA devices.

Four kernels: sums of outer products of queries around the mean of their part, splits of the queries in parallel; the
covariance from these, and the mean of some keys; the mean result of some keys; and one pass over all keys, each without
the mean multiplied with the covariance and with itself. What is added in
which order depends on the shape of the round alone, so that a round brings the same numbers every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..attention import spread_position
from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV, is_interpreted, paged_rows
from ..settings import Settings, padded
from ..types import SparsePattern
from . import naive, paged
from .naive import CENTRE_KEYS, LEVEL_KEYS, MOST
from .paged import VarianceWorkspace

ELEMENTS = 16384  # of a covariance that a program multiplies with at a time
SUM_ROWS = 16  # of a covariance that a program adds up
MEAN_KEYS = 64  # added at a time


@triton.jit
def _looked_at(p_row_start, p_row_end, p_seq_len, i_r, BLOCK_Q: tl.constexpr, ENOUGH: tl.constexpr):
    """First row, first position, keys, first tile, and every how manieth tile is looked at, of how many."""
    row_start = tl.load(p_row_start + i_r)
    rows, n = tl.load(p_row_end + i_r) - row_start, tl.load(p_seq_len + i_r)
    tile, step = (n - rows) // BLOCK_Q, tl.maximum(rows // ENOUGH, 1)
    count = tl.where(rows > 0, ((n - 1) // BLOCK_Q - tile) // step + 1, 0)
    return row_start, n - rows, n, tile, step, count


@triton.jit
def _share(units, splits, BU: tl.constexpr):
    """Units of a split."""
    return tl.cdiv(tl.cdiv(units, BU), splits) * BU


@triton.jit
def _some(p_unit, b_size, first, stride_row, o_d, D: tl.constexpr, BP: tl.constexpr):
    """Queries ``[BU, BP, channels]`` of some units from their row ``first`` on, and which of them there are."""
    o_p = first + tl.arange(0, BP)
    m_p = (o_p[None, :] < b_size[:, None])[:, :, None]
    p_row = p_unit[:, None, None] + o_p.to(tl.int64)[None, :, None] * stride_row
    # [BU, BP, channels]
    b_q = tl.load(p_row + o_d[None, None, :], mask=m_p & (o_d < D)[None, None, :], other=0.0)
    return b_q.to(tl.float32), m_p


@triton.jit
def _mean(
    p_unit, b_size, stride_row, o_d, D: tl.constexpr, PART: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Mean queries ``[BU, BC]``."""
    b_sum = tl.zeros([BU, BC], tl.float32)
    for i in range(0, PART, BP):
        b_q, _ = _some(p_unit, b_size, i, stride_row, o_d, D, BP)
        b_sum += tl.sum(b_q, 1)
    return b_sum / tl.maximum(b_size, 1).to(tl.float32)[:, None]


@triton.jit
def _apart(
    p_unit, b_size, b_mean, first, stride_row, o_d, D: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr,
    BC: tl.constexpr, UPCAST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Queries ``[BU * BP, BC]`` without their mean, zero where there is none."""
    b_q, m_p = _some(p_unit, b_size, first, stride_row, o_d, D, BP)
    b_q = tl.reshape(tl.where(m_p, b_q - b_mean[:, None, :], 0.0), [BU * BP, BC]).to(dtype)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    return b_q


@triton.jit(do_not_specialize=["splits"])
def _sums_kernel(
    p_q, p_sums, p_row_start, p_row_end, p_seq_len, stride_row, stride_head, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_Q: tl.constexpr,
    ENOUGH: tl.constexpr, BU: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``BC`` rows of the sum of outer products over the queries of a split.

    A unit is a part of a tile and a query head of the group. A program takes ``BU`` units at a time, ``BP`` rows of
    each: a part of more rows in several steps, once for its mean and once for what is left without it.
    """
    i_s, i_c = tl.program_id(0) // (BD // BC), tl.program_id(0) % (BD // BC)
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, low, n, tile, step, count = _looked_at(p_row_start, p_row_end, p_seq_len, i_r, BLOCK_Q, ENOUGH)
    units = count * (PARTS * GROUP)
    share = _share(units, splits, BU)
    if i_s * share >= units:
        return
    o_d, o_c = tl.arange(0, BD), i_c * BC + tl.arange(0, BC)
    end = tl.minimum((i_s + 1) * share, units)
    b_sum = tl.zeros([BC, BD], tl.float32)
    for i in range(i_s * share, end, BU):
        b_u = i + tl.arange(0, BU)
        b_start = (tile + b_u // (PARTS * GROUP) * step) * BLOCK_Q
        b_from = b_start + b_u // GROUP % PARTS * PART
        b_to = tl.minimum(tl.minimum(b_from + PART, b_start + BLOCK_Q), n)
        b_from = tl.maximum(b_from, low)
        b_size = tl.where(b_u < end, tl.maximum(b_to - b_from, 0), 0)
        p_unit = p_q + (row_start + b_from - low).to(tl.int64) * stride_row
        p_unit += (i_h * GROUP + b_u % GROUP).to(tl.int64) * stride_head
        b_mean = _mean(p_unit, b_size, stride_row, o_d, D, PART, BU, BP, BD)
        if BC != BD:
            b_some = _mean(p_unit, b_size, stride_row, o_c, D, PART, BU, BP, BC)
        for first in range(0, PART, BP):
            b_x = _apart(p_unit, b_size, b_mean, first, stride_row, o_d, D, BU, BP, BD, UPCAST, p_q.dtype.element_ty)
            if BC != BD:
                b_y = _apart(
                    p_unit, b_size, b_some, first, stride_row, o_c, D, BU, BP, BC, UPCAST, p_q.dtype.element_ty
                )
            else:
                b_y = b_x
            # The digits of tf32 are enough of float32 queries.
            b_sum = tl.dot(tl.trans(b_y), b_x, b_sum, input_precision="tf32")
    p_sum = p_sums + ((i_r * HEADS + i_h) * splits + i_s).to(tl.int64) * (D * D)
    tl.store(p_sum + o_c[:, None] * D + o_d[None, :], b_sum, mask=(o_c < D)[:, None] & (o_d < D)[None, :])


@triton.jit(do_not_specialize=["splits", "stride_table"])
def _covariance_kernel(
    p_q, p_sums, p_centre, p_covariance, p_cache, p_table, p_row_start, p_row_end, p_seq_len, splits, stride_block,
    stride_head, stride_token, stride_table,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK_Q: tl.constexpr, ENOUGH: tl.constexpr,
    BU: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    UPCAST: tl.constexpr, CENTRE_KEYS: tl.constexpr,
):  # fmt: skip
    """``BR`` rows of the covariance of one request and KV head, from all splits; the last program: the mean key."""
    i_m, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, low, n, tile, step, count = _looked_at(p_row_start, p_row_end, p_seq_len, i_r, BLOCK_Q, ENOUGH)
    if count == 0:
        return
    if i_m == tl.num_programs(0) - 1:
        o_c, b_mean = tl.arange(0, BD), tl.zeros([BD], tl.float32)
        p_k = p_cache + i_h.to(tl.int64) * stride_head
        p_table += i_r.to(tl.int64) * stride_table
        for i in range(0, tl.minimum(CENTRE_KEYS, n), BN):
            b_j = spread_position(i + tl.arange(0, BN), 0, n, n, CENTRE_KEYS)
            b_k = paged_rows(
                p_k, p_table, b_j, b_j >= 0, stride_block, stride_token, o_c, D, BLOCK_SIZE, UPCAST,
                p_q.dtype.element_ty,
            )  # fmt: skip
            b_mean += tl.sum(b_k.to(tl.float32), 0)
        p_mean = p_centre + (i_r * HEADS + i_h).to(tl.int64) * D
        tl.store(p_mean + o_c, b_mean / tl.minimum(CENTRE_KEYS, n).to(tl.float32), mask=o_c < D)
        return
    units = count * (PARTS * GROUP)
    used = tl.cdiv(units, _share(units, splits, BU))
    o_m, o_d = i_m * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_x = (o_m < D)[:, None] & (o_d < D)[None, :]
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    b_place = o_m[:, None] * D + o_d[None, :]
    b_sum = tl.zeros([BR, BD], tl.float32)
    for i in range(used):
        # [BR, BD]
        b_sum += tl.load(p_sums + (i_head * splits + i) * (D * D) + b_place, mask=m_x, other=0.0)
    # All rows of the tiles, but for those before the chunk and behind the sequence
    last = tile + (count - 1) * step
    rows = count * BLOCK_Q - (low - tile * BLOCK_Q) - tl.maximum((last + 1) * BLOCK_Q - n, 0)
    b_sum /= (rows * GROUP).to(tl.float32)
    tl.store(p_covariance + i_head * (D * D) + b_place, b_sum.to(p_covariance.dtype.element_ty), mask=m_x)


@triton.jit
def _squares(
    p_k, p_table, p_centre, p_covariance, b_j, m_j, stride_block, stride_token, BC: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, UPCAST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Variance of ``q . k`` of a block of keys, float32, of one request and KV head."""
    o_d = tl.arange(0, BD)
    b_k = paged_rows(p_k, p_table, b_j, m_j, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, dtype)
    b_k = b_k.to(tl.float32) - tl.load(p_centre + o_d, mask=o_d < D, other=0.0)[None, :]
    b_sum = tl.zeros([b_j.shape[0]], tl.float32)
    for first in tl.static_range(0, BD, BC):
        o_c = first + tl.arange(0, BC)
        # [BD, BC]
        b_s = tl.load(
            p_covariance + o_d[:, None] * D + o_c[None, :], mask=(o_d < D)[:, None] & (o_c < D)[None, :], other=0.0
        )
        b_f = b_k.to(b_s.dtype)
        if UPCAST:
            b_f, b_s = b_f.to(tl.float32), b_s.to(tl.float32)
        b_y = tl.dot(b_f, b_s, input_precision="tf32")
        if BC != BD:
            b_c = paged_rows(p_k, p_table, b_j, m_j, stride_block, stride_token, o_c, D, BLOCK_SIZE, UPCAST, dtype)
            b_c = b_c.to(tl.float32) - tl.load(p_centre + o_c, mask=o_c < D, other=0.0)[None, :]
        else:
            b_c = b_k
        b_sum += tl.sum(b_y * b_c, 1)
    return b_sum


@triton.jit(do_not_specialize=["stride_table"])
def _level_kernel(
    p_q, p_centre, p_covariance, p_level, p_cache, p_table, p_row_start, p_row_end, p_seq_len, stride_block,
    stride_head, stride_token, stride_table,
    HEADS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, UPCAST: tl.constexpr, LEVEL_KEYS: tl.constexpr,
):  # fmt: skip
    """Sum of ``_squares`` over some of the keys that stand for all, of one request and KV head."""
    i_n, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_seq_len + i_r)
    if tl.load(p_row_end + i_r) <= tl.load(p_row_start + i_r):
        return
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    b_j = spread_position(i_n * BN + tl.arange(0, BN), 0, n, n, LEVEL_KEYS)
    b_sum = _squares(
        p_cache + i_h.to(tl.int64) * stride_head, p_table + i_r.to(tl.int64) * stride_table, p_centre + i_head * D,
        p_covariance + i_head * (D * D), b_j, b_j >= 0, stride_block, stride_token, BC, D, BD, BLOCK_SIZE, UPCAST,
        p_q.dtype.element_ty,
    )  # fmt: skip
    tl.store(p_level + i_head * (LEVEL_KEYS // BN) + i_n, tl.sum(tl.where(b_j >= 0, b_sum, 0.0), 0))


@triton.jit(do_not_specialize=["stride_table", "stride_prior", "stride_prior_head"])
def _prior_kernel(
    p_q, p_centre, p_covariance, p_level, p_prior, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_k_scale,
    scale, stride_block, stride_head, stride_token, stride_table, stride_prior, stride_prior_head,
    HEADS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr, UPCAST: tl.constexpr, MOST: tl.constexpr,
    LEVEL_KEYS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Half the variance of the logits of one block of keys, less the mean."""
    i_n, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_seq_len + i_r)
    if (i_n * BN >= n) | (tl.load(p_row_end + i_r) <= tl.load(p_row_start + i_r)):
        return
    b_j = i_n * BN + tl.arange(0, BN)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    b_sum = _squares(
        p_cache + i_h.to(tl.int64) * stride_head, p_table + i_r.to(tl.int64) * stride_table, p_centre + i_head * D,
        p_covariance + i_head * (D * D), b_j, b_j < n, stride_block, stride_token, BC, D, BD, BLOCK_SIZE, UPCAST,
        p_q.dtype.element_ty,
    )  # fmt: skip
    if SCALED:
        scale *= tl.load(p_k_scale)
    # [LEVELS]
    b_level = tl.load(p_level + i_head * LEVELS + tl.arange(0, LEVELS))
    level = tl.sum(b_level, 0) / tl.minimum(LEVEL_KEYS, n).to(tl.float32)
    b_sum = (b_sum - level) * (scale * scale * 0.5)
    # Of what is not a number nothing is left.
    b_sum = tl.where(b_sum == b_sum, tl.minimum(tl.maximum(b_sum, -MOST), MOST), 0.0)
    tl.store(
        p_prior + i_r.to(tl.int64) * stride_prior + i_h.to(tl.int64) * stride_prior_head + b_j, b_sum, mask=b_j < n
    )


def variance_settings(head_size: int, element_size: int) -> Settings:
    """Queries and keys of a program at a time, and warps."""
    if element_size > 2:
        return Settings(32, 64, 8, 1) if head_size <= 128 else Settings(16, 32, 8, 1)
    return Settings(64, 128, 8, 2) if head_size <= 128 else Settings(64, 64, 8, 2)


def variance(
    q: Tensor, kv: PagedKV, batch: Batch, pattern: SparsePattern, workspace: VarianceWorkspace, prior: Tensor, *,
    scale: float, config: Settings | None = None,
) -> None:  # fmt: skip
    """As ``paged.variance``, but that queries without their mean, and the covariance, are rounded.

    Args:
        config: queries and keys of a program at a time; None for those of ``variance_settings``.
    """
    if batch.num_requests == 0 or batch.max_rows == 0:
        return
    heads, size, requests = kv.num_kv_heads, kv.head_size, batch.num_requests
    depth, wide = padded(size), q.element_size() > 2
    config = config or variance_settings(size, q.element_size())
    splits = min(paged.MAX_SPLITS, workspace.sums.shape[0] // (heads * requests))
    channels = min(depth, ELEMENTS // depth // (2 if wide else 1))
    rows = min(next_power_of_2(pattern.part_positions), config.block_m)
    rounds = batch.row_start, batch.row_end, batch.seq_len
    upcast = is_interpreted() and not wide
    tile = {
        "HEADS": heads, "GROUP": q.shape[1] // heads, "PARTS": pattern.parts, "BLOCK_Q": pattern.block_q,
        "ENOUGH": naive.ENOUGH_ROWS, "BU": config.block_m // rows, "D": size, "BD": depth,
    }  # fmt: skip
    run = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    cache = (kv.cache, kv.block_table, *rounds)
    strides = (*kv.cache.stride()[:3], kv.block_table.stride(0))
    keys = {"HEADS": heads, "BC": channels, "D": size, "BD": depth, "BLOCK_SIZE": kv.block_size, "UPCAST": upcast}
    launch(
        _sums_kernel, (splits * (depth // channels), heads, requests),
        (q, workspace.sums, *rounds, q.stride(0), q.stride(1), splits),
        **run, **tile, PART=pattern.part_positions, BP=rows, BC=channels, UPCAST=upcast,
    )  # fmt: skip
    launch(
        _covariance_kernel, (cdiv(size, SUM_ROWS) + 1, heads, requests),
        (
            q, workspace.sums, workspace.centre, workspace.covariance, *cache, splits, *strides,
        ),
        num_stages=config.num_stages, **tile, BR=SUM_ROWS, BN=MEAN_KEYS, BLOCK_SIZE=kv.block_size, UPCAST=upcast,
        CENTRE_KEYS=CENTRE_KEYS,
    )  # fmt: skip
    launch(
        _level_kernel, (paged.LEVELS, heads, requests),
        (q, workspace.centre, workspace.covariance, workspace.level, *cache, *strides),
        num_warps=4, num_stages=1, **keys, BN=LEVEL_KEYS // paged.LEVELS, LEVEL_KEYS=LEVEL_KEYS,
    )  # fmt: skip
    launch(
        _prior_kernel, (cdiv(batch.max_seq_len, config.block_n), heads, requests),
        (
            q, workspace.centre, workspace.covariance, workspace.level, prior, *cache, kv.k_scale, scale, *strides,
            *prior.stride()[:2],
        ),
        **run, **keys, BN=config.block_n, SCALED=kv.k_scale is not None, MOST=MOST,
        LEVEL_KEYS=LEVEL_KEYS, LEVELS=paged.LEVELS,
    )  # fmt: skip
