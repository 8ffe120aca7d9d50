# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Training-free estimate of columns and diagonals over a paged cache, for CUDA devices.

Two passes over the context with a few of the chunk's own rows: the first gives their log-sum-exp, parts of the context
in parallel; in the second a program owns a block of keys and takes all rows. Column sums are its own. Its
probabilities along diagonals belong to distances that other programs share; they are added as integers (2**-30 of the
whole), so that the result does not depend on the order. The logarithms of the sums go where the gathered logits of the
VSIndexer would lie, in the same form: a softmax over them gives the sums back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_scale, check_tensor
from ..paged import FP8_DTYPES, QUERY_DTYPES, Batch, PagedKV, check_device, check_paged, is_interpreted
from ..select.triton import BLOCK, SelectWorkspace
from ..settings import Settings, padded, settings
from . import naive

SPLITS = 32  # parts of the context in the first pass


class SampledWorkspace(NamedTuple):
    """Scratch of ``sampled``, allocated once.

    Attributes:
        partial: float32 ``[2, requests, Hkv, SPLITS, rows]``, maximum and sum of each part, base 2.
        diagonals: int32 ``[requests, Hkv, C]``.
        num_rows: rows to look at.
    """

    partial: Tensor
    diagonals: Tensor
    num_rows: int


def allocate_sampled(
    num_requests: int, num_query_heads: int, num_kv_heads: int, max_context: int, num_rows: int,
    device: torch.device | str,
) -> SampledWorkspace:  # fmt: skip
    """Room for estimates of ``num_rows`` rows a request.

    Raises:
        ValueError: ``num_rows`` is not a positive int.
    """
    naive.sampled_rows(1, num_rows)
    rows = triton.cdiv(num_rows, 128) * 128 * triton.next_power_of_2(num_query_heads // num_kv_heads)
    width = triton.cdiv(max_context, BLOCK) * BLOCK
    return SampledWorkspace(
        torch.empty(2, num_requests, num_kv_heads, SPLITS, rows, dtype=torch.float32, device=device),
        torch.empty(num_requests, num_kv_heads, width, dtype=torch.int32, device=device),
        num_rows,
    )


@triton.jit
def _sampled_rows(
    p_q, row_start, row_end, n, i_h, i_m, num_rows, stride_row, stride_head, o_d,
    GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of the chosen rows: queries, positions (-1 for none); rows ``T * (i + 1) // count - 1`` of the chunk."""
    o_m = i_m * BM + tl.arange(0, BM)
    total = row_end - row_start
    count = tl.minimum(num_rows, total)
    b_i = o_m // PACK
    m_m = (b_i < count) & (o_m % PACK < GROUP)
    b_row = (total.to(tl.int64) * (b_i + 1) // tl.maximum(count, 1)).to(tl.int32) - 1
    p_q += (row_start + b_row).to(tl.int64)[:, None] * stride_row + o_d[None, :]
    p_q += (i_h * GROUP + o_m % PACK).to(tl.int64)[:, None] * stride_head
    b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    return b_q, tl.where(m_m, n - total + b_row, -1)


@triton.jit
def _paged_keys(
    p_k, p_table, b_j, m_j, stride_block, stride_token, o_d,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, UPCAST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Keys ``[BN, BD]`` at positions ``b_j``, zero outside ``m_j``."""
    b_block = tl.load(p_table + b_j // BLOCK_SIZE, mask=m_j, other=0).to(tl.int64)
    b_offset = b_block * stride_block + (b_j % BLOCK_SIZE).to(tl.int64) * stride_token
    b_k = tl.load(p_k + b_offset[:, None] + o_d[None, :], mask=m_j[:, None] & (o_d < D)[None, :], other=0.0).to(dtype)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    return b_k


@triton.jit(do_not_specialize=["num_rows", "stride_table", "rows"])
def _partial_kernel(
    p_q, p_cache, p_table, p_row_start, p_row_end, p_context, p_partial, p_k_scale, scale, num_rows,
    stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, stride_partial, rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, FP8: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of one tile of rows over one part of the context."""
    i_m, i_s = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_context + i_r)
    if row_end <= row_start:
        return
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    b_q, b_i = _sampled_rows(
        p_q, row_start, row_end, n, i_h, i_m, num_rows, stride_q_row, stride_q_head, o_d, GROUP, PACK, BM, D, UPCAST
    )
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    if FP8:
        scale *= tl.load(p_k_scale)
    part = tl.cdiv(tl.cdiv(n, SPLITS), BN) * BN
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for i_n in range(i_s * part, tl.minimum((i_s + 1) * part, n), BN):
        b_j = i_n + o_n
        b_k = _paged_keys(
            p_k, p_table, b_j, b_j < n, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_s = (b_j[None, :] <= b_i[:, None]) & (b_j < n)[None, :]
        b_next = tl.maximum(b_max, tl.max(tl.where(m_s, b_s, -1e30), 1))
        b_p = tl.where(m_s, tl.math.exp2(b_s - b_next[:, None]), 0.0)
        b_sum = b_sum * tl.math.exp2(b_max - b_next) + tl.sum(b_p, 1)
        b_max = b_next
    i_out = ((i_r * HEADS + i_h).to(tl.int64) * SPLITS + i_s) * rows + i_m * BM + tl.arange(0, BM)
    tl.store(p_partial + i_out, b_max)
    tl.store(p_partial + stride_partial + i_out, b_sum)


@triton.jit(do_not_specialize=["num_rows", "stride_table", "rows", "width"])
def _sum_kernel(
    p_q, p_cache, p_table, p_row_start, p_row_end, p_context, p_partial, p_logits, p_diagonals, p_k_scale, scale,
    num_rows, stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, stride_partial, rows,
    width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, FP8: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Column sums of one block of keys, as logarithms, and its part of the diagonal sums."""
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_context + i_r)
    o_n = tl.arange(0, BN)
    b_j = tl.program_id(0) * BN + o_n
    if row_end <= row_start:
        return
    if tl.program_id(0) * BN >= n:
        return
    o_d, o_s = tl.arange(0, BD), tl.arange(0, SPLITS)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    if FP8:
        scale *= tl.load(p_k_scale)
    b_k = _paged_keys(
        p_k, p_table, b_j, b_j < n, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
    )
    unit = 1073741824.0 / (tl.minimum(num_rows, row_end - row_start) * GROUP).to(tl.float32)
    b_column = tl.zeros([BN], tl.float32)
    for i_m in range(TILES):
        b_q, b_i = _sampled_rows(
            p_q, row_start, row_end, n, i_h, i_m, num_rows, stride_q_row, stride_q_head, o_d, GROUP, PACK, BM, D, UPCAST
        )
        o_m = i_m * BM + tl.arange(0, BM)
        p_part = p_partial + (i_head * SPLITS + o_s[:, None]) * rows + o_m[None, :]
        # [SPLITS, BM]
        b_max = tl.load(p_part)
        b_sum = tl.load(p_part + stride_partial)
        b_top = tl.max(b_max, 0)
        b_lse = b_top + tl.math.log2(tl.sum(b_sum * tl.math.exp2(b_max - b_top[None, :]), 0))
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_s = (b_j[None, :] <= b_i[:, None]) & (b_j < n)[None, :]
        b_p = tl.where(m_s, tl.math.exp2(b_s - b_lse[:, None]), 0.0)
        b_column += tl.sum(b_p, 0)
        # [BM // PACK, BN], the group's heads added
        b_row = tl.sum(tl.reshape(b_p, [BM // PACK, PACK, BN]), 1)
        b_at = tl.max(tl.reshape(b_i, [BM // PACK, PACK]), 1)[:, None] - b_j[None, :]
        b_unit = (b_row * unit + 0.5).to(tl.int32)
        m_at = (b_at >= 0) & (b_j < n)[None, :] & (b_unit > 0)
        tl.atomic_add(p_diagonals + i_head * width + b_at, b_unit, mask=m_at, sem="relaxed")
    p_row = p_logits + (i_r * 2 * HEADS + i_h).to(tl.int64) * width
    tl.store(p_row + b_j, tl.log(b_column), mask=b_j < n)


@triton.jit(do_not_specialize=["width"])
def _finish_kernel(p_context, p_logits, p_diagonals, p_max, width, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Diagonal sums as logarithms, each at the position that speaks for its distance, and block maxima of both."""
    i_b, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_context + i_r)
    if i_b * BLOCK >= n:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    i_row = (i_r * 2 * HEADS + i_h).to(tl.int64)
    b_sum = tl.load(p_diagonals + (i_r * HEADS + i_h).to(tl.int64) * width + n - 1 - o_c, mask=o_c < n, other=0)
    b_slash = tl.log(b_sum.to(tl.float32))
    b_vertical = tl.load(p_logits + i_row * width + o_c, mask=o_c < n, other=float("-inf"))
    tl.store(p_logits + (i_row + HEADS) * width + o_c, b_slash, mask=o_c < n)
    tl.store(p_max + i_row * (width // BLOCK) + i_b, tl.max(b_vertical, 0))
    tl.store(p_max + (i_row + HEADS) * (width // BLOCK) + i_b, tl.max(b_slash, 0))


def sampled(
    q: Tensor,
    kv: PagedKV,
    batch: Batch,
    workspace: SampledWorkspace,
    into: SelectWorkspace,
    *,
    scale: float,
    config: Settings | None = None,
) -> None:
    """Estimates columns and diagonals of every request from a few of its own rows, for ``select_gathered``.

    A softmax over ``into.logits[r, 0, h, :n]`` is ``p_columns`` of ``naive.sampled``, one over
    ``into.logits[r, 1, h, :n]``, reversed, ``p_distances``, the latter with a resolution of 2**-30.

    Args:
        q: ``[rows, Hq, D]``, contiguous channels.
        kv: the cache, of the same dtype or fp8.
        batch: which rows belong to which request. Requests without rows are left out.
        workspace: from ``allocate_sampled``.
        into: from ``allocate_select``; its logits and maxima are written.
        scale: factor on ``q . k`` before the softmax.
        config: tile sizes; None for those of the table.

    Raises:
        ValueError: dtype, shape, stride or device mismatch; names the argument.
    """
    check_tensor("q", q, 3, QUERY_DTYPES)
    if q.stride(2) != 1:
        raise ValueError(f"q must have contiguous channels, got strides {q.stride()}")
    check_paged(kv, batch, q.device, q.dtype)
    heads, size = kv.num_kv_heads, kv.head_size
    if size != q.shape[2]:
        raise ValueError(f"cache has head size {size} but q has {q.shape[2]}")
    if q.shape[1] == 0 or q.shape[1] % heads:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of the {heads} KV heads of cache")
    check_scale(scale)
    room = into.logits
    if room.device != q.device or room.shape[0] < batch.num_requests or room.shape[2] != heads:
        raise ValueError(f"into is for {tuple(room.shape)} on {room.device}, too small for this batch")
    if room.shape[3] < batch.max_context or workspace.diagonals.shape[2] != room.shape[3]:
        raise ValueError("workspace and into must be for the same contexts, of max_context tokens at least")
    if workspace.diagonals.shape[0] < batch.num_requests or workspace.diagonals.shape[1] != heads:
        raise ValueError(f"workspace is for {tuple(workspace.diagonals.shape[:2])} requests and heads, too small")
    group = q.shape[1] // heads
    pack = triton.next_power_of_2(group)
    config = config or settings("sampled", size, q.device, q.element_size())
    block_m = max(config.block_m, pack)
    tiles = triton.cdiv(workspace.num_rows * pack, block_m)
    rows = workspace.partial.shape[4]
    if tiles * block_m > rows:
        raise ValueError(f"workspace has room for {rows} rows of a KV head, {tiles * block_m} are needed")
    check_device("q", q)
    if batch.num_requests == 0:
        return
    workspace.diagonals[: batch.num_requests].zero_()
    fp8 = kv.cache.dtype in FP8_DTYPES
    k_scale = torch.ones(1, device=q.device) if fp8 and kv.k_scale is None else kv.k_scale
    strides = kv.cache.stride()
    common = (
        workspace.num_rows, q.stride(0), q.stride(1), strides[0], strides[1], strides[2], kv.block_table.stride(0),
        workspace.partial.stride(0), rows,
    )  # fmt: skip
    shape = {
        "HEADS": heads, "GROUP": group, "PACK": pack, "BM": block_m, "BN": config.block_n, "D": size,
        "BD": padded(size), "BLOCK_SIZE": kv.block_size, "SPLITS": SPLITS, "TILES": tiles, "FP8": fp8,
        "UPCAST": is_interpreted() and q.dtype == torch.bfloat16, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
    places = (q, kv.cache, kv.block_table, batch.row_start, batch.row_end, batch.context_len, workspace.partial)
    log2_scale = scale / math.log(2)
    _partial_kernel[(tiles * SPLITS, heads, batch.num_requests)](*places, k_scale, log2_scale, *common, **shape)
    _sum_kernel[(triton.cdiv(batch.max_context, config.block_n), heads, batch.num_requests)](
        *places, room, workspace.diagonals, k_scale, log2_scale, *common, room.shape[3], **shape
    )
    _finish_kernel[(triton.cdiv(batch.max_context, BLOCK), heads, batch.num_requests)](
        batch.context_len, room, workspace.diagonals, into.block_max, room.shape[3], HEADS=heads, BLOCK=BLOCK
    )
