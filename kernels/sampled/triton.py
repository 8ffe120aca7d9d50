# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Training-free estimate of columns and diagonals over a paged cache, for CUDA devices.

Two passes over the sequence with a few of the chunk's own rows: the first gives their log-sum-exp, splits of the
sequence in parallel; in the second a program owns a few blocks of keys and takes a tile of rows. Column sums are its
own. Its probabilities along diagonals belong to diagonals that other programs share: they are written out, a tile of
rows and a few heads at a time, and added along diagonals by a third kernel, which reads them in one order. The
logarithms of the sums go where the gathered logits of the VSIndexer would lie, in the same form: a softmax over them
gives the sums back.
"""

from __future__ import annotations

import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gathered import BLOCK, GatheredLogits
from ..launch import cdiv, launch, next_power_of_2
from ..paged import FP8_DTYPES, Batch, PagedKV, is_interpreted, paged_rows
from ..settings import Settings, padded, settings
from .paged import MAX_ROWS, SPLITS, SampledWorkspace

SPAN = 8  # blocks of keys of a program in the second pass, so that its rows are loaded once for all of them
UNIT = 1024.0  # factor on stored probabilities, which keeps those above 6e-8 normal numbers of float16


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


@triton.jit(do_not_specialize=["num_rows", "stride_table", "rows"])
def _partial_kernel(
    p_q, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_partial, p_k_scale, scale, num_rows,
    stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, stride_partial, rows,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, FP8: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of one tile of rows over one split of the sequence."""
    i_m, i_s = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
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
    split = tl.cdiv(tl.cdiv(n, SPLITS), BN) * BN
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for i_n in range(i_s * split, tl.minimum((i_s + 1) * split, n), BN):
        b_j = i_n + o_n
        b_k = paged_rows(
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


@triton.jit(do_not_specialize=["num_rows", "stride_table", "rows", "width", "i_r", "i_m", "first_head"])
def _sum_kernel(
    p_q, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_partial, p_logits, p_bands, p_k_scale, scale,
    num_rows, stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, stride_partial, rows,
    width, i_r, i_m, first_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, TILES: tl.constexpr, FP8: tl.constexpr,
    UPCAST: tl.constexpr, UNIT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Probabilities of tile ``i_m`` of the rows on ``SPAN`` blocks of keys, and the keys' column sums so far."""
    i_band = tl.program_id(1)
    i_h = first_head + i_band
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    first = tl.program_id(0) * SPAN * BN
    if row_end <= row_start:
        return
    if first >= n:
        return
    o_d, o_s, o_n = tl.arange(0, BD), tl.arange(0, SPLITS), tl.arange(0, BN)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    if FP8:
        scale *= tl.load(p_k_scale)
    b_q, b_i = _sampled_rows(
        p_q, row_start, row_end, n, i_h, i_m, num_rows, stride_q_row, stride_q_head, o_d, GROUP, PACK, BM, D, UPCAST
    )
    p_part = p_partial + (i_head * SPLITS + o_s[:, None]) * rows + i_m * BM + tl.arange(0, BM)[None, :]
    # [SPLITS, BM]
    b_max = tl.load(p_part)
    b_sum = tl.load(p_part + stride_partial)
    b_top = tl.max(b_max, 0)
    b_lse = b_top + tl.math.log2(tl.sum(b_sum * tl.math.exp2(b_max - b_top[None, :]), 0))
    p_band = p_bands + (i_band * (BM // PACK) + tl.arange(0, BM // PACK)).to(tl.int64)[:, None] * width
    p_column = p_logits + (i_r * 2 * HEADS + i_h).to(tl.int64) * width
    for i_n in range(first, tl.minimum(first + SPAN * BN, n), BN):
        b_j = i_n + o_n
        b_k = paged_rows(
            p_k, p_table, b_j, b_j < n, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_q.dtype.element_ty
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        m_s = (b_j[None, :] <= b_i[:, None]) & (b_j < n)[None, :]
        b_p = tl.where(m_s, tl.math.exp2(b_s - b_lse[:, None]), 0.0)
        # [BM // PACK, BN], the group's heads added
        b_row = tl.sum(tl.reshape(b_p, [BM // PACK, PACK, BN]), 1)
        tl.store(p_band + b_j[None, :], (b_row * UNIT).to(tl.float16), mask=(b_j < n)[None, :])
        b_column = tl.sum(b_row, 0)
        if i_m > 0:
            b_column += tl.load(p_column + b_j, mask=b_j < n, other=0.0)
        tl.store(p_column + b_j, tl.where(i_m == TILES - 1, tl.log(b_column), b_column), mask=b_j < n)


@triton.jit(do_not_specialize=["num_rows", "width", "i_r", "i_m", "first_head"])
def _diagonal_kernel(
    p_bands, p_row_start, p_row_end, p_seq_len, p_diagonals, num_rows, width, i_r, i_m, first_head,
    HEADS: tl.constexpr, POSITIONS: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Adds the rows of a tile along a block of diagonals to the sums of the tiles before."""
    i_band = tl.program_id(1)
    total = tl.load(p_row_end + i_r) - tl.load(p_row_start + i_r)
    n = tl.load(p_seq_len + i_r)
    o_c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= n:
        return
    count = tl.minimum(num_rows, total)
    p_diagonals += (i_r * HEADS + first_head + i_band).to(tl.int64) * width
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_p in range(tl.minimum(count - i_m * POSITIONS, POSITIONS)):
        row = (total.to(tl.int64) * (i_m * POSITIONS + i_p + 1) // count).to(tl.int32) - 1
        b_j = n - total + row - o_c
        # [BLOCK]
        b_sum += tl.load(
            p_bands + (i_band * POSITIONS + i_p).to(tl.int64) * width + b_j, mask=(b_j >= 0) & (b_j < n), other=0.0
        ).to(tl.float32)
    b_sum *= 1.0 / UNIT
    if i_m > 0:
        b_sum += tl.load(p_diagonals + o_c, mask=o_c < n, other=0.0)
    tl.store(p_diagonals + o_c, b_sum, mask=o_c < n)


@triton.jit(do_not_specialize=["width"])
def _finish_kernel(p_seq_len, p_logits, p_diagonals, p_max, width, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Diagonal sums as logarithms, each at the position that speaks for its distance, and block maxima of both."""
    i_b, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_seq_len + i_r)
    if i_b * BLOCK >= n:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    i_list = (i_r * 2 * HEADS + i_h).to(tl.int64)
    b_sum = tl.load(p_diagonals + (i_r * HEADS + i_h).to(tl.int64) * width + n - 1 - o_c, mask=o_c < n, other=0.0)
    b_slash = tl.log(b_sum)
    b_column = tl.load(p_logits + i_list * width + o_c, mask=o_c < n, other=float("-inf"))
    tl.store(p_logits + (i_list + HEADS) * width + o_c, b_slash, mask=o_c < n)
    tl.store(p_max + i_list * (width // BLOCK) + i_b, tl.max(b_column, 0))
    tl.store(p_max + (i_list + HEADS) * (width // BLOCK) + i_b, tl.max(b_slash, 0))


def sampled(
    q: Tensor,
    kv: PagedKV,
    batch: Batch,
    workspace: SampledWorkspace,
    gathered: GatheredLogits,
    *,
    scale: float,
    config: Settings | None = None,
) -> None:
    """As ``paged.sampled``, but that diagonals are sums of probabilities rounded to float16.

    Args:
        config: tile sizes; None for those of the table.

    Raises:
        ValueError: ``config`` does not fit the workspace.
    """
    heads, size, room = kv.num_kv_heads, kv.head_size, gathered.logits
    group = q.shape[1] // heads
    pack = next_power_of_2(group)
    config = config or settings("sampled", size, q.device, q.element_size())
    block_m = max(config.block_m, pack)
    tiles = cdiv(workspace.num_rows * pack, block_m)
    rows = workspace.partial.shape[4]
    if tiles * block_m > rows:
        raise ValueError(f"workspace has room for {rows} rows of a KV head, {tiles * block_m} are needed")
    if block_m > MAX_ROWS and block_m > pack:
        raise ValueError(f"config has tiles of {block_m} rows, at most {MAX_ROWS} are possible")
    if batch.num_requests == 0:
        return
    fp8 = kv.cache.dtype in FP8_DTYPES
    k_scale = torch.ones(1, device=q.device) if fp8 and kv.k_scale is None else kv.k_scale
    strides, width = kv.cache.stride(), room.shape[3]
    common = (
        workspace.num_rows, q.stride(0), q.stride(1), strides[0], strides[1], strides[2], kv.block_table.stride(0),
        workspace.partial.stride(0), rows,
    )  # fmt: skip
    shape = {
        "HEADS": heads, "GROUP": group, "PACK": pack, "BM": block_m, "BN": config.block_n, "D": size,
        "BD": padded(size), "BLOCK_SIZE": kv.block_size, "SPLITS": SPLITS, "TILES": tiles, "FP8": fp8,
        "UPCAST": is_interpreted() and q.dtype == torch.bfloat16,
    }  # fmt: skip
    places = (q, kv.cache, kv.block_table, batch.row_start, batch.row_end, batch.seq_len, workspace.partial)
    log2_scale = scale / math.log(2)
    depth = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    launch(
        _partial_kernel, (tiles * SPLITS, heads, batch.num_requests), (*places, k_scale, log2_scale, *common),
        **depth, **shape,
    )  # fmt: skip
    turn = workspace.bands.shape[0]
    for i_r, i_m, head in itertools.product(range(batch.num_requests), range(tiles), range(0, heads, turn)):
        grid_h, which = min(turn, heads - head), (width, i_r, i_m, head)
        launch(
            _sum_kernel, (cdiv(batch.max_seq_len, SPAN * config.block_n), grid_h),
            (*places, room, workspace.bands, k_scale, log2_scale, *common, *which),
            **depth, **shape, UNIT=UNIT, SPAN=SPAN,
        )  # fmt: skip
        launch(
            _diagonal_kernel, (cdiv(batch.max_seq_len, BLOCK), grid_h),
            (workspace.bands, *places[3:6], workspace.diagonals, workspace.num_rows, *which),
            HEADS=heads, POSITIONS=block_m // pack, BLOCK=BLOCK, UNIT=UNIT,
        )  # fmt: skip
    launch(
        _finish_kernel, (cdiv(batch.max_seq_len, BLOCK), heads, batch.num_requests),
        (batch.seq_len, room, workspace.diagonals, gathered.block_max, width), HEADS=heads, BLOCK=BLOCK,
    )  # fmt: skip
