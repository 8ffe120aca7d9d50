# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"
"""Attention to windows and the lists of tiles over a paged cache, for CUDA devices.

One program computes some of a tile's positions with all query heads of one KV head packed into rows (21 positions x 6
heads = 126 of 128 rows), so that a group shares its loads. Its keys, each visited once, in this order:

1. key blocks that end with the program's last position, the only ones that need the causal mask; after the first of
   them every row has a finite maximum;
2. the rest of the window downwards and then the tile's list, as if they were one list: only its last key block can be
   a part of one and needs a mask.

On devices of capability 9.0 ``attend_tiles`` hands calls to ``hopper.py``, for the shapes it has.
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
from ..launch import cdiv, launch, next_power_of_2, raised_by_compiler
from ..paged import FP8_DTYPES, Batch, PagedKV, is_interpreted, key_offsets
from ..settings import Settings, capability, padded, settings
from ..tile_index import TileIndex

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
def _slots(p_table, p_slots, o_j, window, base, BLOCK_SIZE: tl.constexpr):
    """Slots of keys ``o_j`` of the ``window`` keys below ``base``, downwards, and the list behind them."""
    m_window = o_j < window
    b_pos = base - 1 - o_j
    p_block = p_table + tl.where(m_window, b_pos, 0) // BLOCK_SIZE
    p_slot = p_slots + tl.where(m_window, 0, o_j - window)
    # [BN], blocks of the cache for the window, slots for the list
    b_found = tl.load(tl.where(m_window, p_block, p_slot))
    return tl.where(m_window, b_found * BLOCK_SIZE + b_pos % BLOCK_SIZE, b_found)


@triton.jit(do_not_specialize=["num_tiles", "width", "reach", "stride_table"])
def _attend_tiles_kernel(
    p_q, p_cache, p_out, p_visited, p_table, p_row_start, p_row_end, p_seq_len, p_starts, p_counts, p_slots,
    p_k_scale, p_v_scale, scale, stride_q_row, stride_q_head, stride_out_row, stride_out_head,
    stride_block, stride_head, stride_token, stride_table, num_tiles, width, reach,
    GROUP: tl.constexpr, POSITIONS: tl.constexpr, PARTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LINEAR: tl.constexpr, K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, COUNT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``POSITIONS`` positions of a tile of one KV head of one request; a tile has ``PARTS`` such parts."""
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    hi = tl.load(p_seq_len + i_r)
    lo = hi - (row_end - row_start)
    # The latest tiles take longest where the sequence is short, so they come first.
    i_t = num_tiles - 1 - tl.program_id(0) // PARTS
    tile = (lo // BLOCK_Q + i_t) * BLOCK_Q
    i_p = tile + tl.program_id(0) % PARTS * POSITIONS
    # Rows of positions [lo, end) are stored, those of this program among them.
    end = tl.minimum(hi, tl.minimum(tile + BLOCK_Q, i_p + POSITIONS))
    if i_p >= end or end <= lo:
        return
    first = row_end - hi
    place = i_h.to(tl.int64) * width + row_start // BLOCK_Q + 2 * i_r + i_t
    count = tl.load(p_counts + place)
    # A tile without a list attends to everything.
    start = tl.where(count < 0, 0, tl.maximum(tile - reach + 1, 0) // BLOCK_K * BLOCK_K)
    count = tl.maximum(count, 0)
    p_slots += tl.load(p_starts + place)
    p_kv = p_cache + i_h.to(tl.int64) * stride_head
    p_table += i_r.to(tl.int64) * stride_table
    v_scale = 1.0
    if K_SCALE:
        scale *= tl.load(p_k_scale)
    if V_SCALE:
        v_scale = tl.load(p_v_scale)

    o_d = tl.arange(0, BD)
    o_n = tl.arange(0, BN)
    o_m = tl.arange(0, BM)
    b_head = i_h * GROUP + o_m % GROUP
    # [BM], positions of the rows; the others are computed with zero queries and not stored
    b_i = i_p + o_m // GROUP
    m_i = (b_i >= lo) & (b_i < end)
    b_q = load_queries(p_q, b_i, m_i, b_head, first, stride_q_row, stride_q_head, o_d, D, BD)
    b_acc = tl.zeros([BM, BD], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    queries, lanes = (b_q,), ((b_acc, b_max, b_sum),)

    # 1. The own positions, and the window below them as far as it shares a key block with them
    OWN: tl.constexpr = (POSITIONS + BN - 1) // BN * BN
    base = i_p + POSITIONS - OWN
    for i_n in range(0, OWN, BN):
        b_pos = base + i_n + o_n
        m_pos = (b_pos >= start) & (b_pos < end)
        b_offset = key_offsets(p_table, tl.where(m_pos, b_pos, i_p), stride_block, stride_token, BLOCK_SIZE)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        b_bias = tl.where(m_pos[None, :] & (b_pos[None, :] <= b_i[:, None]), 0.0, float("-inf"))
        lanes = softmax_step(queries, lanes, b_k, b_v, (b_bias,), scale, True, UPCAST, 1)

    # 2. The rest of the window, and the list
    window = tl.maximum(base - start, 0)
    num_keys = window + count
    num_plain = num_keys // BN * BN
    for i_n in range(0, num_plain, BN):
        b_slot = _slots(p_table, p_slots, i_n + o_n, window, base, BLOCK_SIZE)
        b_offset = slot_offsets(b_slot, stride_block, stride_token, BLOCK_SIZE, LINEAR)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        lanes = softmax_step(queries, lanes, b_k, b_v, (0.0,), scale, False, UPCAST, 1)
    if num_plain < num_keys:
        # Lanes without a key read the last one again.
        o_j = num_plain + o_n
        b_slot = _slots(p_table, p_slots, tl.minimum(o_j, num_keys - 1), window, base, BLOCK_SIZE)
        b_offset = slot_offsets(b_slot, stride_block, stride_token, BLOCK_SIZE, LINEAR)
        b_k, b_v = load_kv(p_kv, b_offset, o_d, D, BD, queries[0].dtype)
        b_bias = tl.where(o_j < num_keys, 0.0, float("-inf"))[None, :]
        lanes = softmax_step(queries, lanes, b_k, b_v, (b_bias,), scale, True, UPCAST, 1)

    store_rows(
        p_out, None, lanes[0], v_scale, b_i, m_i, b_head, first, stride_out_row, stride_out_head, 0, 0, o_d, D, BD,
        False,
    )  # fmt: skip
    if COUNT:
        # Each stored row, once per position, not per head: its window and own keys, and the list.
        b_count = (b_i - start + 1).to(tl.int64) + count
        tl.atomic_add(p_visited + i_r, tl.sum(tl.where(m_i & (o_m % GROUP == 0), b_count, 0), 0))


class Parts(NamedTuple):
    """How a tile is divided among programs.

    Attributes:
        num_parts: programs of a tile.
        positions: of a program, with all heads of a group.
        rows: of its matrix products, a power of two.
    """

    num_parts: int
    positions: int
    rows: int


def parts_of(group: int, block_q: int, config: Settings) -> Parts:
    """Parts of a tile, as even as can be."""
    num_parts = cdiv(block_q, max(config.block_m // group, 1))
    positions = cdiv(block_q, num_parts)
    return Parts(num_parts, positions, max(next_power_of_2(positions * group), 16))


def without_hopper(q: Tensor, kv: PagedKV, index: TileIndex) -> str | None:
    """Why the version for compute capability 9.0 does not run a call, None if it does."""
    if _no_hopper is not None:
        return _no_hopper
    if capability(q.device) != 90:
        return "it is for compute capability 9.0"
    reason: str | None = _hopper.unsupported(q, kv, index)
    return reason


def attend_tiles(
    q: Tensor,
    kv: PagedKV,
    index: TileIndex,
    batch: Batch,
    *,
    scale: float,
    out: Tensor | None = None,
    visited: Tensor | None = None,
    config: Settings | None = None,
) -> Tensor:
    """As ``paged.attend_tiles``; never waits for the device.

    Args:
        config: tile sizes; None for those of the table, or the version for compute capability 9.0 where it runs.
    """
    global _no_hopper
    if out is None:
        out = torch.empty_like(q)
    if batch.num_requests == 0 or batch.max_rows == 0:
        return out
    if config is None and without_hopper(q, kv, index) is None:
        try:
            found: Tensor = _hopper.attend_tiles(q, kv, index, batch, scale=scale, out=out, visited=visited)
            return found
        except Exception as error:
            # The language is young: a Triton may lack some of it. All other errors are ours and must be seen.
            if not raised_by_compiler(error):
                raise
            _no_hopper = f"this Triton does not compile it: {error}"
            logger.warning("VSPREFILL: the kernel for Hopper does not run, a slower one does: %s", _no_hopper)
    size, num_kv_heads, pattern = kv.head_size, kv.num_kv_heads, index.pattern
    config = config or settings("attend_tiles", size, q.device, q.element_size())
    group = q.shape[1] // num_kv_heads
    num_parts, positions, rows = parts_of(group, pattern.block_q, config)
    # Rows may start anywhere in a tile.
    num_tiles = cdiv(batch.max_rows - 1, pattern.block_q) + 1
    fp8, strides = kv.cache.dtype in FP8_DTYPES, kv.cache.stride()
    launch(
        _attend_tiles_kernel, (num_tiles * num_parts, num_kv_heads, batch.num_requests),
        (
            q, kv.cache, out, visited, kv.block_table, batch.row_start, batch.row_end, batch.seq_len,
            index.starts, index.counts, index.slots, kv.k_scale, kv.v_scale, scale / math.log(2),
            q.stride(0), q.stride(1), out.stride(0), out.stride(1), *strides[:3], kv.block_table.stride(0),
            num_tiles, index.starts.shape[1], pattern.reach,
        ),
        config.num_warps, config.num_stages,
        GROUP=group, POSITIONS=positions, PARTS=num_parts, BLOCK_Q=pattern.block_q, BLOCK_K=pattern.block_k, BM=rows,
        BN=config.block_n, D=size, BD=padded(size), BLOCK_SIZE=kv.block_size,
        LINEAR=strides[0] == kv.block_size * strides[2], K_SCALE=fp8 and kv.k_scale is not None,
        V_SCALE=fp8 and kv.v_scale is not None, COUNT=visited is not None,
        UPCAST=is_interpreted() and q.dtype == torch.bfloat16,
    )  # fmt: skip
    return out
