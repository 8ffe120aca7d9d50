# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""What single queries of a tile may find in a key that their mean does not, over a paged cache, for CUDA devices.

Three kernels: sums of outer products of queries around the mean of their part, splits of the queries in parallel; the
covariance from these; and one pass over the keys, each multiplied with the covariance and with itself. What is added in
which order depends on the shape of the round alone, so that a round brings the same numbers every time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV, is_interpreted, paged_rows
from ..settings import Settings, padded
from ..types import SparsePattern
from . import paged
from .paged import VarianceWorkspace

ELEMENTS = 16384  # of a covariance that a program multiplies with at a time
SUM_ROWS = 16  # of a covariance that a program adds up


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


@triton.jit(do_not_specialize=["splits"])
def _covariance_kernel(
    p_sums, p_covariance, p_row_start, p_row_end, p_seq_len, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, BLOCK_Q: tl.constexpr, ENOUGH: tl.constexpr,
    BU: tl.constexpr, BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``BR`` rows of the covariance of one request and KV head, from all splits."""
    i_m, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, low, n, tile, step, count = _looked_at(p_row_start, p_row_end, p_seq_len, i_r, BLOCK_Q, ENOUGH)
    if count == 0:
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


@triton.jit(do_not_specialize=["stride_table", "stride_prior", "stride_prior_head"])
def _prior_kernel(
    p_q, p_covariance, p_prior, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_k_scale, scale,
    stride_block, stride_head, stride_token, stride_table, stride_prior, stride_prior_head,
    HEADS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Half the variance of the logits of one block of keys."""
    i_n, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_seq_len + i_r)
    if (i_n * BN >= n) | (tl.load(p_row_end + i_r) <= tl.load(p_row_start + i_r)):
        return
    o_d, b_j = tl.arange(0, BD), i_n * BN + tl.arange(0, BN)
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    p_covariance += (i_r * HEADS + i_h).to(tl.int64) * (D * D)
    b_k = paged_rows(
        p_k, p_table, b_j, b_j < n, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
    )
    b_sum = tl.zeros([BN], tl.float32)
    for first in tl.static_range(0, BD, BC):
        o_c = first + tl.arange(0, BC)
        # [BD, BC]
        b_s = tl.load(
            p_covariance + o_d[:, None] * D + o_c[None, :], mask=(o_d < D)[:, None] & (o_c < D)[None, :], other=0.0
        )
        if UPCAST:
            b_s = b_s.to(tl.float32)
        b_y = tl.dot(b_k.to(b_s.dtype), b_s, input_precision="tf32")
        if BC != BD:
            b_c = paged_rows(
                p_k, p_table, b_j, b_j < n, stride_block, stride_token, o_c, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
            )
        else:
            b_c = b_k
        b_sum += tl.sum(b_y * b_c.to(tl.float32), 1)
    if SCALED:
        scale *= tl.load(p_k_scale)
    # Rounding can make it negative, and of what is not a number nothing is left.
    b_sum = tl.where(b_sum > 0.0, b_sum, 0.0) * (scale * scale * 0.5)
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
        "ENOUGH": paged.ENOUGH_ROWS, "BU": config.block_m // rows, "D": size, "BD": depth,
    }  # fmt: skip
    run = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(
        _sums_kernel, (splits * (depth // channels), heads, requests),
        (q, workspace.sums, *rounds, q.stride(0), q.stride(1), splits),
        **run, **tile, PART=pattern.part_positions, BP=rows, BC=channels, UPCAST=upcast,
    )  # fmt: skip
    launch(
        _covariance_kernel, (cdiv(size, SUM_ROWS), heads, requests),
        (workspace.sums, workspace.covariance, *rounds, splits),
        **tile, BR=SUM_ROWS,
    )  # fmt: skip
    launch(
        _prior_kernel, (cdiv(batch.max_seq_len, config.block_n), heads, requests),
        (
            q, workspace.covariance, prior, kv.cache, kv.block_table, *rounds, kv.k_scale, scale,
            *kv.cache.stride()[:3], kv.block_table.stride(0), *prior.stride()[:2],
        ),
        **run, HEADS=heads, BN=config.block_n, BC=channels, D=size, BD=depth, BLOCK_SIZE=kv.block_size,
        SCALED=kv.k_scale is not None, UPCAST=upcast,
    )  # fmt: skip
