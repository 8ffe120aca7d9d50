# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
"""Sparse attention over a paged cache, for CUDA devices.

One program computes a few query positions with all query heads of one KV head packed into the rows of a tile (32
positions x 4 heads = 128 rows), so a group shares its index and its loads. Its keys, each visited once, in this order:

1. its own positions, the only ones that need the causal mask; after them every row has a finite maximum;
2. the rest of the local window, a contiguous range;
3. granules of the diagonals beyond the window: positions follow from the relative granules of the index by adding the
   tile's start, and any number of granules fills the lanes of one key tile;
4. columns below the window, by cache slot, without those that step 3 visited.

With ``lanes == 2`` the rows are two halves with matrix products of their own, so that the product of one runs beside
the softmax of the other. The halves may be two neighbouring query tiles of the pattern: they share window and column
tiles but have their own diagonal keys. With small query tiles (16 positions x 4 heads) the union along scattered
diagonals stays small while most of the work still serves all rows.

On devices of capability 9.0 ``attend`` hands calls without dense last rows to ``hopper.py``, for the shapes it has.

Dense last rows, if the call has them, are programs whose window reaches back to position 0. One program then walks the
whole sequence, so with a long one it is better to leave those rows to a kernel that splits the keys.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import load_kv, load_queries, slot_offsets, softmax_step, store_rows
from ..index import RANK, Index
from ..launch import cdiv, next_power_of_2, raised_by_compiler
from ..paged import FP8_DTYPES, Batch, PagedKV, is_interpreted, key_offsets
from ..settings import Settings, capability, padded, settings

logger = logging.getLogger("vllm.vsprefill")

_hopper: Any = None
_no_hopper: str | None = "kernels are interpreted"
if not is_interpreted():
    try:
        from . import hopper as _hopper

        _no_hopper = None
    except ImportError as error:
        _no_hopper = f"this Triton has no Gluon: {error}"
        logger.debug("%s", _no_hopper)


@triton.jit
def _diagonals(
    queries, lanes, p_kv, p_table, p_granules, p_granule_rank, p_near, tile, length, live, scale,
    stride_block, stride_token, o_d, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, BLOCK_SIZE: tl.constexpr, RANK: tl.constexpr, UPCAST: tl.constexpr, COUNT: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Granules of one query tile that starts at ``tile`` and has ``length`` positions; none unless ``live``. ``lanes``
    are those of the tile."""
    o_n = tl.arange(0, BN)
    # Granules before position 0 do not exist: of the ascending list only entries up to here matter.
    i_rank = tile // BLOCK_K // RANK
    num_lanes = tl.where(live, tl.load(p_granule_rank + i_rank + 1) * BLOCK_K, 0)
    num_whole = tl.where(live, tl.load(p_granule_rank + i_rank) * BLOCK_K // BN, 0)
    num_whole = tl.where(length < BLOCK_Q, 0, num_whole)
    for i_f in range(0, num_whole * BN, BN):
        o_f = i_f + o_n
        # [BN]
        b_pos = tile - tl.load(p_granules + o_f // BLOCK_K) * BLOCK_K + o_f % BLOCK_K
        b_offset = key_offsets(p_table, b_pos, stride_block, stride_token, BLOCK_SIZE)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        lanes = softmax_step(queries, lanes, b_k, b_v, (0.0, 0.0), scale, False, UPCAST, LANES)
    visited = num_whole * BN
    for i_f in range(num_whole * BN, num_lanes, BN):
        o_f = i_f + o_n
        m_f = o_f < num_lanes
        # [BN]
        b_granule = tl.load(p_granules + o_f // BLOCK_K, mask=m_f, other=0)
        b_pos = tile - b_granule * BLOCK_K + o_f % BLOCK_K
        b_near = tl.load(p_near + b_granule, mask=m_f, other=255)
        m_f = m_f & (b_pos >= 0) & (b_near.to(tl.int32) <= length + BLOCK_K - 2)
        b_offset = key_offsets(p_table, tl.where(m_f, b_pos, tile), stride_block, stride_token, BLOCK_SIZE)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        b_bias = tl.where(m_f, 0.0, float("-inf"))[None, :]
        lanes = softmax_step(queries, lanes, b_k, b_v, (b_bias, b_bias), scale, True, UPCAST, LANES)
        if COUNT:
            visited += tl.sum(m_f.to(tl.int32), 0)
    return lanes, visited


@triton.jit
def _open(p_near, b_pos, m_pos, tile, length, start, BLOCK_K: tl.constexpr):
    """Which columns a tile still has to visit: below its window ``start`` and in none of its granules."""
    m_pos = m_pos & (b_pos < start)
    # [BN]
    b_near = tl.load(p_near + (tile // BLOCK_K - b_pos // BLOCK_K), mask=m_pos, other=255)
    return m_pos & (b_near.to(tl.int32) > length + BLOCK_K - 2)


@triton.jit
def _tile_of(i_p, n, window, dense, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Start and length of the pattern's tile around position ``i_p``, and where its window starts."""
    tile = i_p // BLOCK_Q * BLOCK_Q
    length = tl.minimum(BLOCK_Q, n - tile)
    start = tl.where(dense, 0, tl.maximum(tile - window + 1, 0) // BLOCK_K * BLOCK_K)
    return tile, length, start


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_dense", "dense_last", "window", "width", "rank_width", "granule_width", "granule_rank_width",
        "stride_table",
    ]
)  # fmt: skip
def _attend_kernel(
    p_q, p_cache, p_out, p_lse, p_visited, p_table, p_row_start, p_row_end, p_seq_len,
    p_columns, p_slots, p_rank, p_granules, p_granule_rank, p_near, p_k_scale, p_v_scale, scale,
    stride_q_row, stride_q_head, stride_out_row, stride_out_head, stride_lse_row, stride_lse_head,
    stride_block, stride_head, stride_token, stride_table,
    width, rank_width, granule_width, granule_rank_width, num_tiles, num_dense, dense_last, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr, POSITIONS: tl.constexpr, LANES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, LINEAR: tl.constexpr, RANK: tl.constexpr, FP8: tl.constexpr, LSE: tl.constexpr,
    COUNT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``LANES * POSITIONS`` positions of one KV head of one request. ``PACK`` is ``GROUP`` as a power of two."""
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    num_rows = row_end - row_start
    dense_from = tl.maximum(n - dense_last, n - num_rows)
    # Dense programs take longest, so they come first; then the latest tiles.
    dense = tl.program_id(0) < num_dense
    if dense:
        lo, hi, i_t = dense_from, n, tl.program_id(0)
    else:
        lo, hi, i_t = n - num_rows, dense_from, num_tiles - 1 - (tl.program_id(0) - num_dense)
    # Rows of positions [lo, hi) are stored.
    i_p = lo // (LANES * POSITIONS) * (LANES * POSITIONS) + i_t * (LANES * POSITIONS)
    if i_p >= hi or lo >= hi:
        return
    first = row_end - n
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    p_kv = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    p_columns += i_head * width
    p_slots += i_head * width
    p_rank += i_head * rank_width
    p_granules += i_head * granule_width
    p_near += i_head * granule_width
    p_granule_rank += i_head * granule_rank_width
    v_scale = 1.0
    if FP8:
        scale *= tl.load(p_k_scale)
        v_scale = tl.load(p_v_scale)

    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    o_m = tl.arange(0, POSITIONS * PACK)
    b_head = i_h * GROUP + o_m % PACK
    # [BM], positions of the rows; rows outside [lo, hi) are computed with zero queries and not stored
    b_i = i_p + o_m // PACK
    m_i = (b_i >= lo) & (b_i < hi) & (o_m % PACK < GROUP)
    b_q = load_queries(p_q, b_i, m_i, b_head, first, stride_q_row, stride_q_head, o_d, D, BD)
    tile, length, start = _tile_of(i_p, n, window, dense, BLOCK_Q, BLOCK_K)
    b_acc = tl.zeros([POSITIONS * PACK, BD], tl.float32)
    b_max = tl.full([POSITIONS * PACK], float("-inf"), tl.float32)
    b_sum = tl.zeros([POSITIONS * PACK], tl.float32)
    # Of each lane: queries, and what was summed so far.
    queries, lanes = (b_q,), ((b_acc, b_max, b_sum),)
    if LANES == 2:
        b_i2 = b_i + POSITIONS
        m_i2 = (b_i2 >= lo) & (b_i2 < hi) & (o_m % PACK < GROUP)
        b_q2 = load_queries(p_q, b_i2, m_i2, b_head, first, stride_q_row, stride_q_head, o_d, D, BD)
        queries, lanes = (b_q, b_q2), ((b_acc, b_max, b_sum), (b_acc, b_max, b_sum))
        # A second tile behind the end of the sequence is computed like an empty one at its place and not stored.
        tile2, length2, start2 = _tile_of(i_p + POSITIONS, n, window, dense, BLOCK_Q, BLOCK_K)
    else:
        b_i2, m_i2 = b_i, m_i
        tile2, length2, start2 = tile, length, start
    visited, visited2 = 0, 0

    # 1. The program's own positions. Two lanes fit into one key tile, so that both see a key of their own at once.
    own_end = tl.minimum(i_p + LANES * POSITIONS, n)
    for i_n in range(i_p, own_end, BN):
        b_pos = i_n + o_n
        m_pos = b_pos < own_end
        b_offset = key_offsets(p_table, tl.where(m_pos, b_pos, i_p), stride_block, stride_token, BLOCK_SIZE)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        m_s = m_pos[None, :] & (b_pos[None, :] <= b_i[:, None])
        b_bias = tl.where(m_s, 0.0, float("-inf"))
        b_bias2 = b_bias
        if LANES == 2:
            # The last comparison keeps rows behind the sequence's end finite: they see their tile's last key.
            m_s = m_pos[None, :] & (b_pos[None, :] <= b_i2[:, None]) & (b_pos[None, :] >= tl.minimum(start2, n - 1))
            b_bias2 = tl.where(m_s, 0.0, float("-inf"))
        lanes = softmax_step(queries, lanes, b_k, b_v, (b_bias, b_bias2), scale, True, UPCAST, LANES)

    # 2. The window, from the own positions downwards: whole tiles that both lanes see, then the ragged end.
    num_whole = tl.maximum(i_p - start2, 0) // BN
    for i_w in range(num_whole):
        b_pos = i_p - (i_w + 1) * BN + o_n
        b_offset = key_offsets(p_table, b_pos, stride_block, stride_token, BLOCK_SIZE)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        lanes = softmax_step(queries, lanes, b_k, b_v, (0.0, 0.0), scale, False, UPCAST, LANES)
    rest_end = i_p - num_whole * BN
    for i_n in range(start, rest_end, BN):
        b_pos = i_n + o_n
        m_pos = b_pos < rest_end
        b_offset = key_offsets(p_table, tl.where(m_pos, b_pos, i_p), stride_block, stride_token, BLOCK_SIZE)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        b_bias = tl.where(m_pos, 0.0, float("-inf"))[None, :]
        b_bias2 = b_bias
        if LANES == 2:
            b_bias2 = tl.where(m_pos & (b_pos >= start2), 0.0, float("-inf"))[None, :]
        lanes = softmax_step(queries, lanes, b_k, b_v, (b_bias, b_bias2), scale, True, UPCAST, LANES)

    # 3. Diagonals: each lane its own, or both lanes those of the tile that they share.
    if LANES == 1 or BLOCK_Q >= 2 * POSITIONS:
        lanes, visited = _diagonals(
            queries, lanes, p_kv, p_table, p_granules, p_granule_rank, p_near, tile, length, start > 0, scale,
            stride_block, stride_token, o_d, BLOCK_Q, BLOCK_K, BN, D, BD, BLOCK_SIZE, RANK, UPCAST, COUNT, LANES,
        )  # fmt: skip
        visited2 = visited
    else:
        one, visited = _diagonals(
            (queries[0],), (lanes[0],), p_kv, p_table, p_granules, p_granule_rank, p_near, tile, length, start > 0,
            scale, stride_block, stride_token, o_d, BLOCK_Q, BLOCK_K, BN, D, BD, BLOCK_SIZE, RANK, UPCAST, COUNT, 1,
        )  # fmt: skip
        # A tile behind the end of the context has no granules.
        live2 = tl.where(tile2 < n, start2, 0) > 0
        two, visited2 = _diagonals(
            (queries[1],), (lanes[1],), p_kv, p_table, p_granules, p_granule_rank, p_near, tile2, length2, live2,
            scale, stride_block, stride_token, o_d, BLOCK_Q, BLOCK_K, BN, D, BD, BLOCK_SIZE, RANK, UPCAST, COUNT, 1,
        )  # fmt: skip
        lanes = (one[0], two[0])

    # 4. Columns below the window. Where no diagonal can cover one, whole tiles need no mask.
    last = tl.where(tile2 < n, start2, start)
    num_columns = tl.load(p_rank + (last + RANK - 1) // RANK)
    num_columns2 = tl.where(tile2 < n, num_columns, 0)
    num_plain = tl.where(tl.load(p_granule_rank + tile2 // BLOCK_K // RANK + 1) == 0, 1, 0)
    num_plain *= tl.load(p_rank + start // RANK) // BN
    own_slot = tl.load(p_table + i_p // BLOCK_SIZE) * BLOCK_SIZE + i_p % BLOCK_SIZE
    for i_c in range(0, num_plain * BN, BN):
        # [BN]
        b_slot = tl.load(p_slots + i_c + o_n)
        b_offset = slot_offsets(b_slot, stride_block, stride_token, BLOCK_SIZE, LINEAR)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        lanes = softmax_step(queries, lanes, b_k, b_v, (0.0, 0.0), scale, False, UPCAST, LANES)
    for i_c in range(num_plain * BN, num_columns, BN):
        o_c = i_c + o_n
        m_c = o_c < num_columns
        # [BN]
        b_slot = tl.load(p_slots + o_c, mask=m_c, other=own_slot)
        b_offset = slot_offsets(b_slot, stride_block, stride_token, BLOCK_SIZE, LINEAR)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        b_pos = tl.load(p_columns + o_c, mask=m_c, other=0)
        m_open = _open(p_near, b_pos, m_c, tile, length, start, BLOCK_K)
        m_open2 = m_open
        if LANES == 2 and BLOCK_Q < 2 * POSITIONS:
            m_open2 = _open(p_near, b_pos, o_c < num_columns2, tile2, length2, start2, BLOCK_K)
        b_bias = tl.where(m_open, 0.0, float("-inf"))[None, :]
        b_bias2 = tl.where(m_open2, 0.0, float("-inf"))[None, :]
        lanes = softmax_step(queries, lanes, b_k, b_v, (b_bias, b_bias2), scale, True, UPCAST, LANES)
        if COUNT:
            visited += tl.sum(m_open.to(tl.int32), 0)
            visited2 += tl.sum(m_open2.to(tl.int32), 0)

    store_rows(
        p_out, p_lse, lanes[0], v_scale, b_i, m_i, b_head, first, stride_out_row, stride_out_head,
        stride_lse_row, stride_lse_head, o_d, D, BD, LSE,
    )  # fmt: skip
    if COUNT:
        # Each stored row, once per position, not per head: its window and own keys, and what was counted above.
        m_count = m_i & (o_m % PACK == 0)
        b_count = (b_i - start + 1).to(tl.int64) + visited + num_plain * BN
        total = tl.sum(tl.where(m_count, b_count, 0), 0)
        if LANES == 2:
            m_count = m_i2 & (o_m % PACK == 0)
            b_count = (b_i2 - start2 + 1).to(tl.int64) + visited2 + num_plain * BN
            total += tl.sum(tl.where(m_count, b_count, 0), 0)
        tl.atomic_add(p_visited + i_r, total)
    if LANES == 2:
        store_rows(
            p_out, p_lse, lanes[1], v_scale, b_i2, m_i2, b_head, first, stride_out_row, stride_out_head,
            stride_lse_row, stride_lse_head, o_d, D, BD, LSE,
        )  # fmt: skip


class Packing(NamedTuple):
    """How query rows fill the tiles of a program."""

    pack: int
    positions: int
    lanes: int


def packing(group: int, block_q: int, config: Settings) -> Packing:
    """Heads (as a power of two), positions of a lane, lanes.

    A lane never leaves a tile of the pattern. Two lanes are two tiles where one fills at most half the rows, and both
    fit into one key tile (see step 1 of the kernel); or the halves of a larger tile, which costs fewer registers at a
    time than one large matrix product.
    """
    pack = next_power_of_2(group)
    positions = min(block_q, max(config.block_m // pack, 1))
    if config.lanes == 2 and positions * pack == config.block_m and positions > 1 and config.block_m >= 32:
        return Packing(pack, positions // 2, 2)
    while positions * pack < 16:  # the least a matrix product takes; block_q is at least 16
        positions *= 2
    two = config.lanes == 2 and 2 * positions * pack <= config.block_m and 2 * positions <= config.block_n
    return Packing(pack, positions, 2 if two else 1)


def without_hopper(q: Tensor, kv: PagedKV, index: Index, dense_last: int) -> str | None:
    """Why the version for compute capability 9.0 does not run a call, None if it does."""
    if _no_hopper is not None:
        return _no_hopper
    if capability(q.device) != 90:
        return "it is for compute capability 9.0"
    reason: str | None = _hopper.unsupported(q, kv, index, dense_last)
    return reason


def attend(
    q: Tensor,
    kv: PagedKV,
    index: Index,
    batch: Batch,
    *,
    scale: float,
    dense_last: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    visited: Tensor | None = None,
    config: Settings | None = None,
) -> Tensor:
    """As ``paged.attend``; never waits for the device.

    Args:
        config: tile sizes; None for those of the table, or the version for compute capability 9.0 where it runs.
    """
    global _no_hopper
    pattern = index.pattern
    dense_last = pattern.dense_last if dense_last is None else dense_last
    if out is None:
        out = torch.empty_like(q)
    if batch.num_requests == 0 or batch.max_rows == 0:
        return out
    size, num_kv_heads = kv.head_size, kv.num_kv_heads
    group = q.shape[1] // num_kv_heads
    if config is None and without_hopper(q, kv, index, dense_last) is None:
        try:
            found: Tensor = _hopper.attend(
                q, kv, index, batch, scale=scale, dense_last=dense_last, out=out, lse=lse, visited=visited
            )
            return found
        except Exception as error:
            # The language is young: a Triton may lack some of it. All other errors are ours and must be seen.
            if not raised_by_compiler(error):
                raise
            _no_hopper = f"this Triton does not compile it: {error}"
            logger.warning("VSPREFILL: the kernel for Hopper does not run, a slower one does: %s", _no_hopper)
    config = config or settings("attend", size, q.device, q.element_size())
    pack, positions, lanes = packing(group, pattern.block_q, config)
    # Rows may start anywhere in a tile.
    num_tiles = cdiv(batch.max_rows - 1, lanes * positions) + 1
    num_dense = cdiv(min(dense_last, batch.max_rows) - 1, lanes * positions) + 1 if dense_last else 0
    cache, fp8 = kv.cache, kv.cache.dtype in FP8_DTYPES
    one = None
    if fp8 and (kv.k_scale is None or kv.v_scale is None):
        one = torch.ones(1, device=q.device)
    strides = cache.stride()
    _attend_kernel[(num_tiles + num_dense, num_kv_heads, batch.num_requests)](
        q, cache, out, lse, visited, kv.block_table, batch.row_start, batch.row_end, batch.seq_len,
        index.columns, index.slots, index.rank, index.granules, index.granule_rank, index.near,
        one if kv.k_scale is None else kv.k_scale, one if kv.v_scale is None else kv.v_scale,
        scale / math.log(2),
        q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        *((0, 0) if lse is None else lse.stride()),
        strides[0], strides[1], strides[2], kv.block_table.stride(0),
        index.columns.shape[2], index.rank.shape[2], index.granules.shape[2], index.granule_rank.shape[2],
        num_tiles, num_dense, dense_last, pattern.reach,
        HEADS=num_kv_heads, GROUP=group, PACK=pack, POSITIONS=positions, LANES=lanes,
        BLOCK_Q=pattern.block_q, BLOCK_K=pattern.block_k, BN=config.block_n, D=size, BD=padded(size),
        BLOCK_SIZE=kv.block_size, LINEAR=strides[0] == kv.block_size * strides[2], RANK=RANK, FP8=fp8,
        LSE=lse is not None, COUNT=visited is not None,
        UPCAST=is_interpreted() and q.dtype == torch.bfloat16,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
