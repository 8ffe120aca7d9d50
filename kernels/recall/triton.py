# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""How much of the true attention the selections of a round cover, for CUDA devices.

One pass over the sequence with a few of the chunk's own rows, splits of it in parallel: the sum of the exponentials of
all keys, and of those that ``attend`` computes for the row's tile. Whether it does follows from the index as for
``attend``: a column's flag, sinks, window, or a diagonal near enough to the granule (``merge/triton.py``). A second
kernel puts the splits together.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import spread_position, window_start
from ..index import Index
from ..launch import cdiv, launch, next_power_of_2
from ..paged import FP8_DTYPES, Batch, PagedKV, is_interpreted, paged_rows
from ..settings import Settings, padded, settings
from .paged import MAX_ROWS, RecallWorkspace


@triton.jit(do_not_specialize=["num_rows", "stride_table", "rows", "width", "granule_width", "reach", "sinks"])
def _partial_kernel(
    p_q, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_flags, p_near, p_partial, p_k_scale, scale, num_rows,
    stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, stride_partial, rows, width,
    granule_width, reach, sinks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    TILES: tl.constexpr, FP8: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum, sum, and sum over kept keys, of one tile of rows over one split of the sequence."""
    i_m, i_s = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    if row_end <= row_start:
        return
    o_d, o_n = tl.arange(0, BD), tl.arange(0, BN)
    o_m = i_m * BM + tl.arange(0, BM)
    b_pos = spread_position(o_m // PACK, row_start, row_end, n, num_rows)
    b_pos = tl.where(o_m % PACK < GROUP, b_pos, -1)
    p_q += (row_end - n + b_pos).to(tl.int64)[:, None] * stride_q_row + o_d[None, :]
    p_q += (i_h * GROUP + o_m % PACK).to(tl.int64)[:, None] * stride_q_head
    # [BM, BD]
    b_q = tl.load(p_q, mask=(b_pos >= 0)[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_open = window_start(b_pos, BLOCK_Q, BLOCK_K, reach)
    b_tile = tl.maximum(b_pos, 0) // BLOCK_Q * BLOCK_Q
    # How far the nearest diagonal may lie behind the lower end of a granule's interval: the last tile is shorter.
    b_far = tl.minimum(n - b_tile, BLOCK_Q) + BLOCK_K - 2
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    p_flags += (i_r * 2 * HEADS + i_h).to(tl.int64) * width
    p_near += (i_r * HEADS + i_h).to(tl.int64) * granule_width
    if FP8:
        scale *= tl.load(p_k_scale)
    split = tl.cdiv(tl.cdiv(n, SPLITS), BN) * BN
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_kept = tl.zeros([BM], tl.float32)
    for i_n in range(i_s * split, tl.minimum((i_s + 1) * split, n), BN):
        b_j = i_n + o_n
        b_k = paged_rows(
            p_k, p_table, b_j, b_j < n, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_s = (b_j[None, :] <= b_pos[:, None]) & (b_j < n)[None, :]
        # [BN]
        b_flag = tl.load(p_flags + b_j, mask=b_j < n, other=0)
        b_granule = b_tile[:, None] // BLOCK_K - b_j[None, :] // BLOCK_K
        # [BM, BN]
        b_near = tl.load(p_near + b_granule, mask=m_s & (b_granule >= 0), other=255).to(tl.int32)
        m_kept = ((b_flag != 0) | (b_j < sinks))[None, :] | (b_j[None, :] >= b_open[:, None])
        m_kept = m_kept | ((b_near < 255) & (b_near <= b_far[:, None]))
        b_next = tl.maximum(b_max, tl.max(tl.where(m_s, b_s, -1e30), 1))
        b_p = tl.where(m_s, tl.math.exp2(b_s - b_next[:, None]), 0.0)
        b_alpha = tl.math.exp2(b_max - b_next)
        b_sum = b_sum * b_alpha + tl.sum(b_p, 1)
        b_kept = b_kept * b_alpha + tl.sum(tl.where(m_kept, b_p, 0.0), 1)
        b_max = b_next
    i_out = ((i_r * HEADS + i_h).to(tl.int64) * SPLITS + i_s) * rows + o_m
    tl.store(p_partial + i_out, b_max)
    tl.store(p_partial + stride_partial + i_out, b_sum)
    tl.store(p_partial + 2 * stride_partial + i_out, b_kept)


@triton.jit(do_not_specialize=["num_rows", "rows"])
def _total_kernel(
    p_partial, p_row_start, p_row_end, p_totals, num_rows, stride_partial, rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, SPLITS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Adds the mean over the rows of one KV head of one request."""
    i_h, i_r = tl.program_id(0), tl.program_id(1)
    count = tl.minimum(num_rows, tl.load(p_row_end + i_r) - tl.load(p_row_start + i_r))
    if count <= 0:
        return
    o_s = tl.arange(0, SPLITS)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    b_total = tl.zeros([BM], tl.float32)
    for i_m in range(TILES):
        o_m = i_m * BM + tl.arange(0, BM)
        p_part = p_partial + (i_head * SPLITS + o_s[:, None]) * rows + o_m[None, :]
        # [SPLITS, BM]
        b_max = tl.load(p_part)
        b_sum = tl.load(p_part + stride_partial)
        b_kept = tl.load(p_part + 2 * stride_partial)
        b_weight = tl.math.exp2(b_max - tl.max(b_max, 0)[None, :])
        m_m = (o_m // PACK < count) & (o_m % PACK < GROUP)
        b_whole = tl.where(m_m, tl.sum(b_sum * b_weight, 0), 1.0)
        b_total += tl.where(m_m, tl.sum(b_kept * b_weight, 0) / b_whole, 0.0)
    tl.atomic_add(p_totals, tl.sum(b_total, 0) / (count * GROUP))
    tl.atomic_add(p_totals + 1, 1.0)


def recall(
    q: Tensor,
    kv: PagedKV,
    batch: Batch,
    index: Index,
    workspace: RecallWorkspace,
    totals: Tensor,
    *,
    scale: float,
    config: Settings | None = None,
) -> None:
    """As ``paged.recall``.

    Args:
        config: tile sizes; None for those of ``sampled``, whose first pass this is but for the mask.

    Raises:
        ValueError: ``config`` does not fit the workspace.
    """
    heads, size, pattern = kv.num_kv_heads, kv.head_size, index.pattern
    group = q.shape[1] // heads
    pack = next_power_of_2(group)
    config = config or settings("sampled", size, q.device, q.element_size())
    block_m = max(config.block_m, pack)
    tiles = cdiv(workspace.num_rows * pack, block_m)
    splits, rows = workspace.partial.shape[3:]
    if tiles * block_m > rows:
        raise ValueError(f"workspace has room for {rows} rows of a KV head, {tiles * block_m} are needed")
    if block_m > MAX_ROWS and block_m > pack:
        raise ValueError(f"config has tiles of {block_m} rows, at most {MAX_ROWS} are possible")
    if batch.num_requests == 0:
        return
    fp8 = kv.cache.dtype in FP8_DTYPES
    k_scale = torch.ones(1, device=q.device) if fp8 and kv.k_scale is None else kv.k_scale
    strides, partial = kv.cache.stride(), workspace.partial
    shape = {"HEADS": heads, "GROUP": group, "PACK": pack, "BM": block_m}
    launch(
        _partial_kernel, (tiles * splits, heads, batch.num_requests),
        (
            q, kv.cache, kv.block_table, batch.row_start, batch.row_end, batch.seq_len, index.flags, index.near,
            partial, k_scale, scale / math.log(2), workspace.num_rows, q.stride(0), q.stride(1), strides[0],
            strides[1], strides[2], kv.block_table.stride(0), partial.stride(0), rows, index.flags.shape[3],
            index.near.shape[2], pattern.reach, pattern.sink_keys,
        ),
        num_warps=config.num_warps, num_stages=config.num_stages,
        **shape, BN=config.block_n, D=size, BD=padded(size), BLOCK_SIZE=kv.block_size, BLOCK_Q=pattern.block_q,
        BLOCK_K=pattern.block_k, SPLITS=splits, TILES=tiles, FP8=fp8,
        UPCAST=is_interpreted() and q.dtype == torch.bfloat16,
    )  # fmt: skip
    launch(
        _total_kernel, (heads, batch.num_requests),
        (partial, batch.row_start, batch.row_end, totals, workspace.num_rows, partial.stride(0), rows),
        **shape, SPLITS=splits, TILES=tiles,
    )  # fmt: skip
