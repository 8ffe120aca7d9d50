# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Keys that the tiles of a round list, over a paged cache, for CUDA devices.

Three kernels: mean queries; what they pay to sinks and window; and one pass over the keys. In that pass a program holds
a block of keys and goes through the tiles that may list them, one mean query of each after the other, of all parts and
query heads of the group: the largest score of these is then a maximum of registers, groups need no padding, and the
scattered cache is read once. 32 marks become a word within four lanes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV, is_interpreted, paged_rows, priors
from ..settings import Settings, padded
from ..tile_index import TileIndex
from .paged import RankWorkspace

ROWS = 16  # of a tile, added at once
NEAR_ROWS = 64  # of the second kernel: tiles times heads of the group
NEAR_SPAN = 256  # positions that its tiles cover together, about: they share the keys of their windows
NEAR_KEYS = 64
LONG = 128  # positions of a tile from which on a chunk has few
LOG2E = math.log2(math.e)


@triton.jit
def _tiles_of(p_row_start, p_row_end, p_seq_len, i_r, BLOCK_Q: tl.constexpr):
    """First row, rows, keys, first tile, number of tiles and place of the first tile of a request."""
    row_start = tl.load(p_row_start + i_r)
    rows, n = tl.load(p_row_end + i_r) - row_start, tl.load(p_seq_len + i_r)
    tile = (n - rows) // BLOCK_Q
    count = tl.where(rows > 0, (n - 1) // BLOCK_Q - tile + 1, 0)
    return row_start, rows, n, tile, count, row_start // BLOCK_Q + 2 * i_r


@triton.jit
def _no_bits(p_bars, i_r, i_h, HEADS: tl.constexpr):
    """Whether a head lists all keys or none."""
    return tl.abs(tl.load(p_bars + i_r * HEADS + i_h)) == float("inf")


@triton.jit(do_not_specialize=["room"])
def _means_kernel(
    p_q, p_means, p_bars, p_row_start, p_row_end, p_seq_len, stride_row, stride_head, room,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The mean query of one part of a tile and query head; zeros where the part has no rows."""
    i_t, i_q, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_h, i_p = i_q // PARTS, i_q % PARTS
    row_start, rows, n, tile, count, place = _tiles_of(p_row_start, p_row_end, p_seq_len, i_r, BLOCK_Q)
    if i_t >= count:
        return
    if _no_bits(p_bars, i_r, i_h // GROUP, HEADS):
        return
    low = (tile + i_t) * BLOCK_Q - (n - rows)
    start = tl.maximum(low + i_p * PART, 0)
    end = tl.minimum(low + tl.minimum((i_p + 1) * PART, BLOCK_Q), rows)
    o_d = tl.arange(0, BD)
    b_sum = tl.zeros([ROWS, BD], tl.float32)
    for i in range(start, end, ROWS):
        o_m = i + tl.arange(0, ROWS)
        p_row = p_q + (row_start + o_m).to(tl.int64)[:, None] * stride_row + i_h.to(tl.int64) * stride_head
        # [ROWS, BD]
        b_q = tl.load(p_row + o_d[None, :], mask=(o_m < end)[:, None] & (o_d < D)[None, :], other=0.0)
        b_sum += b_q.to(tl.float32)
    b_mean = tl.sum(b_sum, 0) / tl.maximum(end - start, 1).to(tl.float32)
    p_mean = p_means + (i_q.to(tl.int64) * room + place + i_t) * D
    tl.store(p_mean + o_d, b_mean.to(p_means.dtype.element_ty), mask=o_d < D)


@triton.jit(do_not_specialize=["stride_table", "room", "reach", "sinks"])
def _near_kernel(
    p_means, p_near, p_bars, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_k_scale, log2_scale,
    stride_block, stride_head, stride_token, stride_table, room, reach, sinks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, PACK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr, UPCAST: tl.constexpr, LOG2E: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over sinks and window of ``BM // PACK`` neighbouring tiles; huge for a part without rows.

    ``GROUP``: mean queries of a tile and KV head, which are the parts of every query head of its group.
    """
    i_t, i_h, i_r = tl.program_id(0) * (BM // PACK), tl.program_id(1), tl.program_id(2)
    _, rows, n, tile, count, place = _tiles_of(p_row_start, p_row_end, p_seq_len, i_r, BLOCK_Q)
    if i_t >= count:
        return
    if _no_bits(p_bars, i_r, i_h, HEADS):
        return
    o_d, o_n, o_m = tl.arange(0, BD), tl.arange(0, BN), tl.arange(0, BM)
    b_t = i_t + o_m // PACK
    m_m = (b_t < count) & (o_m % PACK < GROUP)
    b_place = (i_h * GROUP + o_m % PACK).to(tl.int64) * room + place + b_t
    # [BM, BD]
    b_q = tl.load(p_means + b_place[:, None] * D + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_start = tl.maximum((tile + b_t) * BLOCK_Q - reach + 1, 0) // BLOCK_K * BLOCK_K
    b_end = tl.minimum((tile + b_t + 1) * BLOCK_Q, n)
    p_k = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    if SCALED:
        log2_scale *= tl.load(p_k_scale)
    b_max = tl.full([BM], -1e30, tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    window = tl.maximum((tile + i_t) * BLOCK_Q - reach + 1, 0) // BLOCK_K * BLOCK_K
    end = tl.minimum((tile + i_t + BM // PACK) * BLOCK_Q, n)
    # Sinks before the first window, then everything from there: steps of one loop.
    few = tl.cdiv(tl.minimum(sinks, window), BN)
    for i in range(few + tl.cdiv(end - window, BN)):
        b_j = tl.where(i < few, i * BN, window + (i - few) * BN) + o_n
        m_j = b_j < tl.where(i < few, tl.minimum(sinks, window), end)
        b_k = paged_rows(
            p_k, p_table, b_j, m_j, stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_means.dtype.element_ty
        )
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * log2_scale
        m_s = ((b_j < sinks)[None, :] | (b_j[None, :] >= b_start[:, None])) & (b_j[None, :] < b_end[:, None])
        m_s &= m_j[None, :]
        b_s = tl.where(m_s, b_s, float("-inf"))
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.math.exp2(b_max - b_next) + tl.sum(tl.math.exp2(b_s - b_next[:, None]), 1)
        b_max = b_next
    b_near = (b_max + tl.math.log2(tl.where(m_m, b_sum, 1.0))) / LOG2E
    if PARTS > 1:
        b_low = (tile + b_t) * BLOCK_Q + o_m % PACK % PARTS * PART
        b_high = tl.minimum(tl.minimum(b_low + PART, (tile + b_t + 1) * BLOCK_Q), n)
        b_near = tl.where(tl.maximum(b_low, n - rows) < b_high, b_near, 1e30)
    tl.store(p_near + b_place, b_near, mask=m_m)


@triton.jit(do_not_specialize=["stride_table", "room", "tiles", "words", "reach", "stride_prior", "stride_prior_head"])
def _marks_kernel(
    p_means, p_near, p_bars, p_cache, p_table, p_row_start, p_row_end, p_seq_len, p_bits, p_k_scale, scale,
    stride_block, stride_head, stride_token, stride_table, room, tiles, words, reach, p_prior, stride_prior,
    stride_prior_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALED: tl.constexpr, UPCAST: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """Words of one block of keys for all tiles that may list one of them. ``GROUP``: as for ``_near_kernel``."""
    i_n, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _, _, n, tile, count, place = _tiles_of(p_row_start, p_row_end, p_seq_len, i_r, BLOCK_Q)
    # No window of an earlier tile begins behind the first key of the block.
    first = tl.maximum((i_n * BN + reach) // BLOCK_Q - tile, 0) // BM
    if first * BM >= count:
        return
    if _no_bits(p_bars, i_r, i_h, HEADS):
        return
    bar = tl.load(p_bars + i_r * HEADS + i_h)
    o_d, o_m, o_w = tl.arange(0, BD), tl.arange(0, BM), tl.arange(0, BN // 32)
    b_j = i_n * BN + tl.arange(0, BN)
    b_k = paged_rows(
        p_cache + i_h.to(tl.int64) * stride_head, p_table + i_r.to(tl.int64) * stride_table, b_j, b_j < n,
        stride_block, stride_token, o_d, D, BLOCK_SIZE, UPCAST, p_means.dtype.element_ty,
    )  # fmt: skip
    if PRIOR:
        p_prior += i_r.to(tl.int64) * stride_prior + i_h.to(tl.int64) * stride_prior_head
        # [BN]
        b_bar = bar - tl.load(p_prior + b_j, mask=b_j < n, other=0.0)
    b_k = tl.trans(b_k)
    if SCALED:
        scale *= tl.load(p_k_scale)
    b_one = tl.full([BN], 1, tl.int32) << (tl.arange(0, BN) % 32)
    p_out = p_bits + (i_h.to(tl.int64) * tiles + place) * words + i_n * (BN // 32) + o_w[None, :]
    b_max = tl.full([BM, BN], float("-inf"), tl.float32)
    for i in range(first * GROUP, tl.cdiv(count, BM) * GROUP):
        i_g = i % GROUP
        b_t = i // GROUP * BM + o_m
        m_t = b_t < count
        b_place = (i_h * GROUP + i_g).to(tl.int64) * room + place + b_t
        # [BM, BD]
        b_q = tl.load(p_means + b_place[:, None] * D + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
        b_near = tl.load(p_near + b_place, mask=m_t, other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_s = tl.dot(b_q, b_k, input_precision="ieee") * scale - b_near[:, None]
        b_max = tl.maximum(b_max, b_s)
        if i_g == GROUP - 1:
            if PRIOR:
                b_mark = tl.where(b_max >= b_bar[None, :], b_one[None, :], 0)
            else:
                b_mark = tl.where(b_max >= bar, b_one[None, :], 0)
            b_word = tl.sum(tl.reshape(b_mark, [BM, BN // 32, 32]), 2)
            tl.store(p_out + b_t.to(tl.int64)[:, None] * words, b_word, mask=m_t[:, None])
            b_max = tl.full([BM, BN], float("-inf"), tl.float32)


def means_and_near(
    q: Tensor, kv: PagedKV, batch: Batch, index: TileIndex, workspace: RankWorkspace, *, scale: float
) -> None:
    """Mean queries, and what they pay to sinks and window. Arguments are as for ``rank``."""
    heads, size, pattern = kv.num_kv_heads, kv.head_size, index.pattern
    room, block_q, parts = workspace.near.shape[1], pattern.block_q, pattern.parts
    group = q.shape[1] // heads * parts  # mean queries of a tile
    tiles = cdiv(batch.max_rows - 1, block_q) + 1  # of a request, at most
    rounds = batch.row_start, batch.row_end, batch.seq_len
    launch(
        _means_kernel, (tiles, q.shape[1] * parts, batch.num_requests),
        (q, workspace.means, index.bars, *rounds, q.stride(0), q.stride(1), room),
        HEADS=heads, GROUP=q.shape[1] // heads, PARTS=parts, PART=pattern.part_positions, BLOCK_Q=block_q, ROWS=ROWS,
        D=size, BD=padded(size),
    )  # fmt: skip
    pack = next_power_of_2(group)
    wide = q.element_size() > 2
    block_m = max(16, pack, min(16 if wide else NEAR_ROWS, pack * next_power_of_2(max(NEAR_SPAN // block_q, 1))))
    launch(
        _near_kernel, (cdiv(tiles, block_m // pack), heads, batch.num_requests),
        (
            workspace.means, workspace.near, index.bars, kv.cache, kv.block_table, *rounds, kv.k_scale,
            scale * LOG2E, *kv.cache.stride()[:3], kv.block_table.stride(0), room, pattern.reach, pattern.sink_keys,
        ),
        num_stages=1 if wide else 2,
        HEADS=heads, GROUP=group, PARTS=parts, PART=pattern.part_positions, PACK=pack, BM=block_m,
        BN=NEAR_KEYS // 2 if wide else NEAR_KEYS, D=size,
        BD=padded(size), BLOCK_Q=block_q, BLOCK_K=pattern.block_k, BLOCK_SIZE=kv.block_size,
        SCALED=kv.k_scale is not None, UPCAST=is_interpreted() and q.dtype == torch.bfloat16, LOG2E=LOG2E,
    )  # fmt: skip


def marks_settings(head_size: int, element_size: int, block_q: int) -> Settings:
    """Tiles of ``marks``: three programs of a multiprocessor of capability 9.0 take turns with heads of 128.

    Where tiles are long there are few of them, and the loop over them is too short for a third stage to pay.
    """
    if element_size > 2:
        return Settings(32, 64, 4, 1) if head_size <= 128 else Settings(16, 32, 4, 1)
    if head_size > 128:
        return Settings(64, 64, 4, 2)
    return Settings(64, 128, 4, 3 if block_q < LONG else 2)


def marks(
    q: Tensor, kv: PagedKV, batch: Batch, index: TileIndex, workspace: RankWorkspace, *, scale: float,
    prior: Tensor | None = None, config: Settings | None = None,
) -> None:  # fmt: skip
    """Bits, after ``means_and_near``. Arguments are as for ``rank``."""
    heads, size, bits = kv.num_kv_heads, kv.head_size, index.bits
    config = config or marks_settings(size, q.element_size(), index.pattern.block_q)
    launch(
        _marks_kernel, (cdiv(batch.max_seq_len, config.block_n), heads, batch.num_requests),
        (
            workspace.means, workspace.near, index.bars, kv.cache, kv.block_table, batch.row_start, batch.row_end,
            batch.seq_len, bits, kv.k_scale, scale, *kv.cache.stride()[:3], kv.block_table.stride(0),
            workspace.near.shape[1], bits.shape[1], bits.shape[2], index.pattern.reach, *priors(prior),
        ),
        num_warps=config.num_warps, num_stages=config.num_stages,
        HEADS=heads, GROUP=q.shape[1] // heads * index.pattern.parts, BM=config.block_m, BN=config.block_n, D=size,
        BD=padded(size), BLOCK_Q=index.pattern.block_q, BLOCK_SIZE=kv.block_size, SCALED=kv.k_scale is not None,
        UPCAST=is_interpreted() and q.dtype == torch.bfloat16, PRIOR=prior is not None,
    )  # fmt: skip


def rank(
    q: Tensor, kv: PagedKV, batch: Batch, index: TileIndex, workspace: RankWorkspace, *, scale: float,
    prior: Tensor | None = None, config: Settings | None = None,
) -> None:  # fmt: skip
    """As ``paged.rank``, but that means are rounded to the model's type with an fp8 cache, too.

    Args:
        config: query tiles and keys of a program of ``marks``; 4,096 keys at most. None for those of
            ``marks_settings``.
    """
    if batch.num_requests == 0 or batch.max_rows == 0:
        return
    means_and_near(q, kv, batch, index, workspace, scale=scale)
    marks(q, kv, batch, index, workspace, scale=scale, prior=prior, config=config)
