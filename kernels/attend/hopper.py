# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Sparse attention over a paged cache for compute capability 9.0, with warp specialisation.

The same operation as ``triton.py`` beside it, in Gluon, where matrix products and copies into shared memory are issued
by hand. A program has three warp groups. One, the producer, follows the index and copies rows of keys and values into a
ring of stages in shared memory; two consumers own 64 rows each (16 positions x 4 heads, say) and run the online
softmax, each issuing the logits of a key tile before it weighs the values of the tile before.

There are as many programs as multiprocessors, and each computes many pieces of 128 rows, one after the other. All warp
groups work out by themselves which piece is next; the producer runs ahead into it while the consumers finish the one
before. The counters of the rings go on from piece to piece.

Keys of a piece come in this order, each once:

1. the tile that ends with the program's own positions, the only one that needs the causal mask;
2. plain tiles, of which both consumers see every key: the rest of the window, then columns below it, but for those
   of 4.;
3. tiles with a bias of 0 or -inf per key and consumer: the ragged end of the window, then the last columns;
4. granules of diagonals without what is a column, too, half a tile for each consumer, since each has diagonal keys of
   its own: twice the bytes a product, so that each such tile is followed by a plain one;
5. the diagonals for which there is no plain tile.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..index import RANK, Index
from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV

# Its name from Triton 3.6 on, and a later one
load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

ROWS = 64  # of a consumer: the least that a warp group multiplies
KEYS = 128  # of a tile
MAX_GROUP = 64
REGISTERS = (208, 88)


@gluon.jit
def _softmax(b_s, b_max, b_sum, b_bias, scale, BIAS: gl.constexpr):
    """Weights of a tile of raw logits, the new maximum and sum, and the factor on what was summed before."""
    if BIAS:
        b_s = b_s * scale + b_bias
        b_next = gl.maximum(b_max, gl.max(b_s, 1))
        b_p = gl.exp2(b_s - gl.expand_dims(b_next, 1))
    else:
        b_next = gl.maximum(b_max, gl.max(b_s, 1) * scale)
        b_p = gl.exp2(b_s * scale - gl.expand_dims(b_next, 1))
    b_alpha = gl.exp2(b_max - b_next)
    return b_p, b_next, b_sum * b_alpha + gl.sum(b_p, 1), b_alpha


@gluon.jit
def _weigh(b_s, b_acc, b_max, b_sum, s_bias, scale, BIAS: gl.constexpr, DTYPE: gl.constexpr):
    """Softmax of a tile of logits: weights for the product with the values, and the factor on the output so far.

    Maximum and sum have the layout of the output's rows, whatever the length of a tile.
    """
    l_s: gl.constexpr = b_s.type.layout
    l_o: gl.constexpr = b_acc.type.layout
    b_max = gl.convert_layout(b_max, gl.SliceLayout(1, l_s))
    b_sum = gl.convert_layout(b_sum, gl.SliceLayout(1, l_s))
    if BIAS:
        b_bias = gl.expand_dims(s_bias.load(gl.SliceLayout(0, l_s)).to(gl.float32), 0)
        b_w, b_max, b_sum, b_alpha = _softmax(b_s, b_max, b_sum, b_bias, scale, True)
    else:
        b_w, b_max, b_sum, b_alpha = _softmax(b_s, b_max, b_sum, 0.0, scale, False)
    b_p = gl.convert_layout(b_w.to(DTYPE), gl.DotOperandLayout(0, l_o, 2))
    b_factor = gl.expand_dims(gl.convert_layout(b_alpha, gl.SliceLayout(1, l_o)), 1)
    b_max = gl.convert_layout(b_max, gl.SliceLayout(1, l_o))
    b_sum = gl.convert_layout(b_sum, gl.SliceLayout(1, l_o))
    return b_p, b_factor, b_max, b_sum


@gluon.jit
def _step(
    it, ib, s_q, s_keys, s_values, s_row, bars, b_p, b_acc, b_max, b_sum, scale, BIAS: gl.constexpr,
    STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """The logits of tile ``it``, whose keys are ``s_keys``, beside the product of the weights ``b_p`` and values
    ``s_values`` of the tile before it; returns the weights of the tile. ``ib`` counts tiles with a bias, ``s_row``."""
    k_full, k_empty, v_full, v_empty, bias_full, bias_empty, _, _ = bars
    LENGTH: gl.constexpr = s_keys.shape[0]
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LENGTH, 16])
    stage, before, place = it % STAGES, (it - 1) % STAGES, ib % STAGES
    mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
    b_s = warpgroup_mma(
        s_q, s_keys.permute((1, 0)), gl.zeros([64, LENGTH], gl.float32, l_s), use_acc=False, is_async=True
    )
    mbarrier.wait(v_full.index(before), ((it - 1) // STAGES) & 1)
    b_o = warpgroup_mma(b_p, s_values, b_acc, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    mbarrier.arrive(k_empty.index(stage))
    if BIAS:
        mbarrier.wait(bias_full.index(place), (ib // STAGES) & 1)
    b_next, b_factor, b_max, b_sum = _weigh(b_s, b_acc, b_max, b_sum, s_row, scale, BIAS, DTYPE)
    if BIAS:
        mbarrier.arrive(bias_empty.index(place))
    b_acc = warpgroup_mma_wait(0, deps=[b_o])
    mbarrier.arrive(v_empty.index(before))
    return b_next, b_acc * b_factor, b_max, b_sum


@gluon.jit
def _tiles(
    it, ib, count, s_q, s_k, s_v, s_bias, bars, b_p, b_acc, b_max, b_sum, scale,
    WHICH: gl.constexpr, BIAS: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """``count`` tiles of both consumers."""
    for _ in range(count):
        b_p, b_acc, b_max, b_sum = _step(
            it, ib, s_q, s_k.index(it % STAGES), s_v.index((it - 1) % STAGES),
            s_bias.index(2 * (ib % STAGES) + WHICH), bars, b_p, b_acc, b_max, b_sum, scale, BIAS, STAGES, DTYPE,
        )  # fmt: skip
        it += 1
        if BIAS:
            ib += 1
    return it, ib, b_p, b_acc, b_max, b_sum


@gluon.jit
def _consume(
    it, ib, i_n, s_q, s_k, s_v, s_bias, bars, p_out, p_lse, scale, piece, plan,
    stride_out_row, stride_out_head, stride_lse_row, stride_lse_head,
    WHICH: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, POSITIONS: gl.constexpr, D: gl.constexpr,
    KEYS: gl.constexpr, STAGES: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """A consumer's 64 rows of piece number ``i_n`` of the program; returns the counters of the rings."""
    k_full, k_empty, v_full, v_empty, bias_full, bias_empty, q_full, q_empty = bars
    i_h, _, i_p, lo, hi, first = piece
    _, _, start, _, _, start2, _, _, base, num_window, num_plain, _, _, _, num_bias, num_diagonal, num_mixed = plan
    if WHICH == 1:
        i_p += POSITIONS
        start = start2
    DTYPE: gl.constexpr = s_q.dtype
    HALF: gl.constexpr = KEYS // 2
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    l_h: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    l_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    l_m: gl.constexpr = gl.SliceLayout(1, l_o)
    s_q = s_q.index(WHICH)

    # 1. The own tile
    stage = it % STAGES
    mbarrier.wait(q_full, i_n & 1)
    mbarrier.wait(k_full.index(stage), (it // STAGES) & 1)
    b_s = warpgroup_mma(
        s_q, s_k.index(stage).permute((1, 0)), gl.zeros([64, KEYS], gl.float32, l_s), use_acc=False, is_async=True
    )
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    mbarrier.arrive(k_empty.index(stage))
    # [1, KEYS], [64, 1]
    b_pos = gl.expand_dims(base + gl.arange(0, KEYS, layout=gl.SliceLayout(0, l_s)), 0)
    b_i = gl.expand_dims(i_p + gl.arange(0, 64, layout=gl.SliceLayout(1, l_s)) // PACK, 1)
    # Rows behind the context's end, which are not stored, see its last position: no row is without a key.
    m_s = (b_pos <= gl.minimum(b_i, hi - 1)) & (b_pos >= gl.minimum(start, hi - 1))
    b_s = gl.where(m_s, b_s, float("-inf"))
    b_max = gl.full([64], float("-inf"), gl.float32, layout=l_m)
    b_sum = gl.zeros([64], gl.float32, layout=l_m)
    b_acc = gl.zeros([64, D], gl.float32, layout=l_o)
    b_p, _, b_max, b_sum = _weigh(b_s, b_acc, b_max, b_sum, s_bias.index(WHICH), scale, False, DTYPE)
    it += 1

    # 2., 3. Tiles of both consumers
    it, ib, b_p, b_acc, b_max, b_sum = _tiles(
        it, ib, num_window + num_plain - num_mixed, s_q, s_k, s_v, s_bias, bars, b_p, b_acc, b_max, b_sum, scale,
        WHICH, False, STAGES, DTYPE,
    )  # fmt: skip
    it, ib, b_p, b_acc, b_max, b_sum = _tiles(
        it, ib, num_bias, s_q, s_k, s_v, s_bias, bars, b_p, b_acc, b_max, b_sum, scale, WHICH, True, STAGES, DTYPE
    )

    # 4. Half tiles of the own diagonals, in turns with tiles of both
    for _ in range(num_mixed):
        s_half = s_bias.index(2 * (ib % STAGES) + WHICH).slice(WHICH * HALF, HALF)
        b_ph, b_acc, b_max, b_sum = _step(
            it, ib, s_q, s_k.index(it % STAGES).slice(WHICH * HALF, HALF), s_v.index((it - 1) % STAGES), s_half, bars,
            b_p, b_acc, b_max, b_sum, scale, True, STAGES, DTYPE,
        )  # fmt: skip
        it += 1
        ib += 1
        b_p, b_acc, b_max, b_sum = _step(
            it, ib, s_q, s_k.index(it % STAGES), s_v.index((it - 1) % STAGES).slice(WHICH * HALF, HALF), s_half, bars,
            b_ph, b_acc, b_max, b_sum, scale, False, STAGES, DTYPE,
        )  # fmt: skip
        it += 1
    before = (it - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((it - 1) // STAGES) & 1)
    b_o = warpgroup_mma(b_p, s_v.index(before), b_acc, is_async=True)
    b_acc = warpgroup_mma_wait(0, deps=[b_o])
    mbarrier.arrive(v_empty.index(before))

    # 5. The other diagonals
    for _ in range(num_diagonal - num_mixed):
        stage, phase = it % STAGES, (it // STAGES) & 1
        place = ib % STAGES
        s_kh, s_vh = s_k.index(stage).slice(WHICH * HALF, HALF), s_v.index(stage).slice(WHICH * HALF, HALF)
        s_half = s_bias.index(2 * place + WHICH).slice(WHICH * HALF, HALF)
        mbarrier.wait(k_full.index(stage), phase)
        b_sh = warpgroup_mma(
            s_q, s_kh.permute((1, 0)), gl.zeros([64, HALF], gl.float32, l_h), use_acc=False, is_async=True
        )
        b_sh = warpgroup_mma_wait(0, deps=[b_sh])
        mbarrier.arrive(k_empty.index(stage))
        mbarrier.wait(bias_full.index(place), (ib // STAGES) & 1)
        b_ph, b_factor, b_max, b_sum = _weigh(b_sh, b_acc, b_max, b_sum, s_half, scale, True, DTYPE)
        mbarrier.arrive(bias_empty.index(place))
        mbarrier.wait(v_full.index(stage), phase)
        b_o = warpgroup_mma(b_ph, s_vh, b_acc * b_factor, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=[b_o])
        mbarrier.arrive(v_empty.index(stage))
        it += 1
        ib += 1
    mbarrier.arrive(q_empty)

    # [64], [64, D]
    o_m = gl.arange(0, 64, layout=l_m)
    b_row = i_p + o_m // PACK
    m_row = (b_row >= lo) & (b_row < hi) & (o_m % PACK < GROUP)
    b_head = (i_h * GROUP + o_m % PACK).to(gl.int64)
    b_row = (first + b_row).to(gl.int64)
    o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, l_o)), 0)
    b_out = b_acc * gl.expand_dims(1.0 / b_sum, 1)
    p_row = gl.expand_dims(p_out + b_row * stride_out_row + b_head * stride_out_head, 1)
    gl.store(p_row + o_d, b_out.to(DTYPE), mask=gl.expand_dims(m_row, 1))
    if LSE:
        b_lse = (b_max + gl.log2(b_sum)) * 0.6931471805599453
        gl.store(p_lse + b_row * stride_lse_row + b_head * stride_lse_head, b_lse, mask=m_row)
    return it, ib


@gluon.jit
def _consumer(
    s_q, s_k, s_v, s_bias, bars, batch, index, p_out, p_lse, scale, stride_out_row, stride_out_head, stride_lse_row,
    stride_lse_head, num_tiles, total, WHICH: gl.constexpr, SHAPE: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """One of the two that compute: its rows of every piece of the program."""
    it, ib, i_n = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for i_w in range(gl.program_id(0), total, gl.num_programs(0)):
        piece = _piece(i_w, batch, num_tiles, SHAPE)
        if piece[2] < piece[4]:
            plan = _plan(piece, index, KEYS, SHAPE)
            it, ib = _consume(
                it, ib, i_n, s_q, s_k, s_v, s_bias, bars, p_out, p_lse, scale, piece, plan, stride_out_row,
                stride_out_head, stride_lse_row, stride_lse_head, WHICH, SHAPE[1], SHAPE[2], SHAPE[3], D, KEYS, STAGES,
                LSE,
            )  # fmt: skip
            i_n += 1


@gluon.jit
def _rows(b_slot, p_kv, stride_block, stride_token, BLOCK_SIZE: gl.constexpr, LINEAR: gl.constexpr, D: gl.constexpr):
    """Pointers ``[keys, D]`` to the keys in cache slots ``b_slot``, of which each thread holds one."""
    l_kv: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    if LINEAR:
        b_offset = b_slot.to(gl.int64) * stride_token
    else:
        b_offset = (b_slot // BLOCK_SIZE).to(gl.int64) * stride_block
        b_offset += (b_slot % BLOCK_SIZE).to(gl.int64) * stride_token
    b_offset = gl.convert_layout(b_offset, gl.SliceLayout(1, l_kv))
    o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, l_kv)), 0)
    return gl.expand_dims(p_kv + b_offset, 1) + o_d


@gluon.jit
def _copy(s_to, p_from, bar):
    """Starts to copy rows into shared memory; ``bar`` counts every thread of the producer once its copies are done."""
    load_rows(s_to, p_from)
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def _send(it, p_k, s_k, s_v, bars, D: gl.constexpr, STAGES: gl.constexpr):
    """Keys and values of one tile of both consumers."""
    k_full, k_empty, v_full, v_empty, _, _, _, _ = bars
    stage, phase = it % STAGES, ((it // STAGES) & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), phase)
    _copy(s_k.index(stage), p_k, k_full.index(stage))
    mbarrier.wait(v_empty.index(stage), phase)
    _copy(s_v.index(stage), p_k + D, v_full.index(stage))


@gluon.jit
def _send_bias(i_bias, m_one, m_two, s_bias, bars, STAGES: gl.constexpr):
    """0 for keys that a consumer sees, -inf for others."""
    _, _, _, _, bias_full, bias_empty, _, _ = bars
    place = i_bias % STAGES
    mbarrier.wait(bias_empty.index(place), ((i_bias // STAGES) & 1) ^ 1)
    s_bias.index(2 * place).store(gl.where(m_one, 0.0, float("-inf")).to(gl.float16))
    s_bias.index(2 * place + 1).store(gl.where(m_two, 0.0, float("-inf")).to(gl.float16))
    mbarrier.arrive(bias_full.index(place))


@gluon.jit
def _slot(b_block, b_pos, BLOCK_SIZE: gl.constexpr):
    """Cache slots of positions, whose blocks of the cache are known."""
    return b_block * BLOCK_SIZE + b_pos % BLOCK_SIZE


@gluon.jit
def _slots(p_table, b_pos, BLOCK_SIZE: gl.constexpr):
    """Cache slots of positions inside the context."""
    return _slot(gl.load(p_table + b_pos // BLOCK_SIZE), b_pos, BLOCK_SIZE)


@gluon.jit
def _plain(p_table, p_slots, i_t, num_window, num_plain, base, o_n, KEYS: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Of plain tile ``i_t``, or the last one: blocks of the cache for one of the window, slots for one of columns."""
    p_block = p_table + gl.maximum(base - (i_t + 1) * KEYS + o_n, 0) // BLOCK_SIZE
    p_slot = p_slots + gl.maximum(gl.minimum(i_t - num_window, num_plain - 1), 0) * KEYS + o_n
    return gl.load(gl.where(i_t < num_window, p_block, p_slot))


@gluon.jit
def _granule(p_granules, o_f, lanes, BLOCK_K: gl.constexpr):
    """Relative granules of lanes ``o_f``, -1 for none."""
    return gl.load(p_granules + o_f // BLOCK_K, mask=o_f < lanes, other=-1)


@gluon.jit
def _diagonal_keys(
    p_near, p_flags, p_table, b_granule, o_f, tile, sinks, i_p, BLOCK_K: gl.constexpr, BLOCK_SIZE: gl.constexpr
):  # fmt: skip
    """Positions of lanes along diagonals, an own one where there is none, and what is known of them: block of the
    cache, distance to the nearest diagonal, nonzero for a column."""
    b_pos = tile - b_granule * BLOCK_K + o_f % BLOCK_K
    m_pos = (b_granule >= 0) & (b_pos >= sinks)
    b_near = gl.load(p_near + b_granule, mask=m_pos, other=255)
    b_flag = gl.load(p_flags + b_pos, mask=m_pos, other=1)
    b_pos = gl.where(m_pos, b_pos, i_p)
    return b_pos, gl.load(p_table + b_pos // BLOCK_SIZE), b_near, b_flag


@gluon.jit
def _send_queries(
    i_n, p_q, s_q, bars, piece, stride_row, stride_head,
    GROUP: gl.constexpr, PACK: gl.constexpr, POSITIONS: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Queries of both consumers. Where no row is stored, a row of the request or a head of the group is read again."""
    _, _, _, _, _, _, q_full, q_empty = bars
    i_h, _, i_p, lo, hi, first = piece
    l_q: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, l_q))
    o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, l_q)), 0)
    b_head = (i_h * GROUP + gl.minimum(o_m % PACK, GROUP - 1)).to(gl.int64)
    mbarrier.wait(q_empty, (i_n & 1) ^ 1)
    for i in gl.static_range(2):
        b_row = gl.minimum(gl.maximum(i_p + i * POSITIONS + o_m // PACK, lo), hi - 1)
        b_offset = (first + b_row).to(gl.int64) * stride_row + b_head * stride_head
        load_rows(s_q.index(i), gl.expand_dims(p_q + b_offset, 1) + o_d)
    async_copy.mbarrier_arrive(q_full, increment_count=False)


@gluon.jit
def _produce(
    it, ib, i_n, s_q, s_k, s_v, s_bias, bars, p_q, p_kv, p_table, p_visited, index, piece, plan,
    stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, width,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, POSITIONS: gl.constexpr, BLOCK_K: gl.constexpr,
    D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr, LINEAR: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """Copies what the consumers need for piece number ``i_n`` of the program, in their order; returns the counters.

    A thread looks up one key of a tile and works out its offset; the offsets then change hands, so that the threads
    that copy a row lie side by side. What a tile needs from the index is asked for while the tile before it is copied:
    the loads depend on each other, and waiting for them would take longer than the consumers need for a tile.
    """
    p_columns, p_slots, _, p_granules, _, p_near, p_flags, _, granule_width, _, _, sinks = index
    i_h, i_r, i_p, lo, hi, _ = piece
    (tile, length, start, tile2, length2, start2, lanes, lanes2, base, num_window, num_plain, num_rest, num_columns,
     num_columns2, _, num_diagonal, num_mixed) = plan  # fmt: skip
    i_head = (i_r * HEADS + i_h).to(gl.int64)
    p_kv += i_h.to(gl.int64) * stride_head
    p_table += i_r.to(gl.int64) * stride_table
    p_columns += i_head * width
    p_slots += i_head * width
    p_granules += i_head * granule_width
    p_near += i_head * granule_width
    p_flags += (i_head + i_r * HEADS) * width
    HALF: gl.constexpr = KEYS // 2
    l_n: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_n = gl.arange(0, KEYS, layout=l_n)

    # 1. The own tile; keys before the sequence or behind it are the first own one, the consumers leave them out.
    b_pos = base + o_n
    b_slot = _slots(p_table, gl.where((b_pos >= 0) & (b_pos < hi), b_pos, i_p), BLOCK_SIZE)
    b_next = gl.load(p_table + gl.maximum(base - KEYS + o_n, 0) // BLOCK_SIZE)
    _send(it, _rows(b_slot, p_kv, stride_block, stride_token, BLOCK_SIZE, LINEAR, D), s_k, s_v, bars, D, STAGES)
    it += 1
    _send_queries(i_n, p_q, s_q, bars, piece, stride_q_row, stride_q_head, GROUP, PACK, POSITIONS, D)

    # 2. The window, downwards, and plain columns, but for those that diagonals take turns with
    num_early = num_window + num_plain - num_mixed
    for i_w in range(gl.minimum(num_window, num_early)):
        b_pos = base - (i_w + 1) * KEYS + o_n
        b_slot = _slot(b_next, b_pos, BLOCK_SIZE)
        b_next = gl.load(p_table + gl.maximum(b_pos - KEYS, 0) // BLOCK_SIZE)
        _send(it, _rows(b_slot, p_kv, stride_block, stride_token, BLOCK_SIZE, LINEAR, D), s_k, s_v, bars, D, STAGES)
        it += 1
    b_next = gl.load(p_slots + o_n, mask=o_n < num_columns, other=0)
    for i_c in range(num_early - num_window):
        b_slot = b_next
        o_c = (i_c + 1) * KEYS + o_n
        b_next = gl.load(p_slots + o_c, mask=o_c < num_columns, other=0)
        _send(it, _rows(b_slot, p_kv, stride_block, stride_token, BLOCK_SIZE, LINEAR, D), s_k, s_v, bars, D, STAGES)
        it += 1

    # 3. The ragged end of the window and the last columns. Lanes without a key read an own one.
    rest_end = base - num_window * KEYS
    for i_n in range(num_rest):
        b_pos = start + i_n * KEYS + o_n
        m_pos = b_pos < rest_end
        b_slot = _slots(p_table, gl.where(m_pos, b_pos, i_p), BLOCK_SIZE)
        _send_bias(ib, m_pos, m_pos & (b_pos >= start2), s_bias, bars, STAGES)
        _send(it, _rows(b_slot, p_kv, stride_block, stride_token, BLOCK_SIZE, LINEAR, D), s_k, s_v, bars, D, STAGES)
        it += 1
        ib += 1
    own_slot = _slots(p_table, i_p, BLOCK_SIZE)
    b_count = gl.zeros([KEYS], gl.int32, layout=l_n)
    b_count2 = gl.zeros([KEYS], gl.int32, layout=l_n)
    o_c = num_plain * KEYS + o_n
    b_next = gl.load(p_slots + o_c, mask=o_c < num_columns, other=own_slot)
    b_next_pos = gl.load(p_columns + o_c, mask=o_c < num_columns, other=0)
    for i_c in range(num_plain * KEYS, num_columns, KEYS):
        b_slot, b_pos = b_next, b_next_pos
        o_c = i_c + o_n
        m_one = (o_c < num_columns) & (b_pos < start)
        m_two = (o_c < num_columns2) & (b_pos < start2)
        o_c += KEYS
        b_next = gl.load(p_slots + o_c, mask=o_c < num_columns, other=own_slot)
        b_next_pos = gl.load(p_columns + o_c, mask=o_c < num_columns, other=0)
        _send(it, _rows(b_slot, p_kv, stride_block, stride_token, BLOCK_SIZE, LINEAR, D), s_k, s_v, bars, D, STAGES)
        _send_bias(ib, m_one, m_two, s_bias, bars, STAGES)
        it += 1
        ib += 1
        if COUNT:
            b_count += m_one.to(gl.int32)
            b_count2 += m_two.to(gl.int32)

    # 4., 5. Diagonals: the first half of a tile belongs to the first consumer, the second to the other.
    o_h = o_n % HALF
    b_tile = gl.where(o_n < HALF, tile, tile2)
    b_lanes = gl.where(o_n < HALF, lanes, lanes2)
    b_reach = gl.where(o_n < HALF, length, length2) + BLOCK_K - 2
    b_ahead = _granule(p_granules, o_h, b_lanes, BLOCK_K)
    b_pos, b_block, b_near, b_flag = _diagonal_keys(
        p_near, p_flags, p_table, b_ahead, o_h, b_tile, sinks, i_p, BLOCK_K, BLOCK_SIZE
    )
    b_ahead = _granule(p_granules, HALF + o_h, b_lanes, BLOCK_K)
    b_wide = _plain(p_table, p_slots, num_early, num_window, num_plain, base, o_n, KEYS, BLOCK_SIZE)
    b_count_h = gl.zeros([KEYS], gl.int32, layout=l_n)
    for i_g in range(num_diagonal):
        b_slot = _slot(b_block, b_pos, BLOCK_SIZE)
        m_key = (b_near.to(gl.int32) <= b_reach) & (b_flag == 0)
        o_f = (i_g + 1) * HALF + o_h
        b_pos, b_block, b_near, b_flag = _diagonal_keys(
            p_near, p_flags, p_table, b_ahead, o_f, b_tile, sinks, i_p, BLOCK_K, BLOCK_SIZE
        )
        b_ahead = _granule(p_granules, HALF + o_f, b_lanes, BLOCK_K)
        _send(it, _rows(b_slot, p_kv, stride_block, stride_token, BLOCK_SIZE, LINEAR, D), s_k, s_v, bars, D, STAGES)
        _send_bias(ib, m_key, m_key, s_bias, bars, STAGES)
        it += 1
        ib += 1
        if COUNT:
            b_count_h += m_key.to(gl.int32)
        if i_g < num_mixed:
            i_t = num_early + i_g
            b_slot = gl.where(i_t < num_window, _slot(b_wide, base - (i_t + 1) * KEYS + o_n, BLOCK_SIZE), b_wide)
            b_wide = _plain(p_table, p_slots, i_t + 1, num_window, num_plain, base, o_n, KEYS, BLOCK_SIZE)
            _send(it, _rows(b_slot, p_kv, stride_block, stride_token, BLOCK_SIZE, LINEAR, D), s_k, s_v, bars, D, STAGES)
            it += 1

    if COUNT:
        # Each stored position: its window and own keys, and what was counted above.
        visited = gl.sum(b_count + gl.where(o_n < HALF, b_count_h, 0), 0) + num_plain * KEYS
        visited2 = gl.sum(b_count2 + gl.where(o_n < HALF, 0, b_count_h), 0) + num_plain * KEYS
        total = _pairs(lo, hi, i_p, start, visited, POSITIONS)
        total += _pairs(lo, hi, i_p + POSITIONS, start2, visited2, POSITIONS)
        gl.atomic_add(p_visited + i_r, total)
    return it, ib


@gluon.jit
def _producer(
    s_q, s_k, s_v, s_bias, bars, batch, index, p_q, p_kv, p_table, p_visited, stride_q_row, stride_q_head,
    stride_block, stride_head, stride_token, stride_table, width, num_tiles, total,
    SHAPE: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    LINEAR: gl.constexpr, COUNT: gl.constexpr,
):  # fmt: skip
    """The warp group that copies, for every piece of the program."""
    it, ib, i_n = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    for i_w in range(gl.program_id(0), total, gl.num_programs(0)):
        piece = _piece(i_w, batch, num_tiles, SHAPE)
        if piece[2] < piece[4]:
            plan = _plan(piece, index, KEYS, SHAPE)
            it, ib = _produce(
                it, ib, i_n, s_q, s_k, s_v, s_bias, bars, p_q, p_kv, p_table, p_visited, index, piece, plan,
                stride_q_row, stride_q_head, stride_block, stride_head, stride_token, stride_table, width,
                SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3], SHAPE[5], D, KEYS, STAGES, BLOCK_SIZE, LINEAR, COUNT,
            )  # fmt: skip
            i_n += 1


@gluon.jit
def _pairs(lo, hi, i_p, start, visited, POSITIONS: gl.constexpr):
    """Pairs of the stored positions from ``i_p`` up, each with ``visited`` keys below its window."""
    first, end = gl.maximum(lo, i_p), gl.minimum(hi, i_p + POSITIONS)
    count = gl.maximum(end - first, 0).to(gl.int64)
    return count * (visited - start + 1) + count * (first + end - 1) // 2


@gluon.jit
def _tile_of(i_p, n, window, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Start and length of the pattern's tile around position ``i_p``, and where its window starts."""
    tile = i_p // BLOCK_Q * BLOCK_Q
    length = gl.minimum(BLOCK_Q, n - tile)
    start = gl.maximum(tile - window + 1, 0) // BLOCK_K * BLOCK_K
    return tile, length, start


@gluon.jit
def _piece(i_w, batch, num_tiles, SHAPE: gl.constexpr):
    """Number ``i_w`` of all pieces: KV head, request, first position, range of positions that have rows, and the row
    of position 0. A piece whose first position lies behind the context is empty, as are those of a request without
    rows: it has none that could be read in place of a missing one."""
    HEADS: gl.constexpr = SHAPE[0]
    POSITIONS: gl.constexpr = SHAPE[3]
    p_row_start, p_row_end, p_seq_len = batch
    i_h = i_w // num_tiles % HEADS
    i_r = i_w // num_tiles // HEADS
    row_end, hi = gl.load(p_row_end + i_r), gl.load(p_seq_len + i_r)
    lo = hi - (row_end - gl.load(p_row_start + i_r))
    # The latest tiles take longest where the context is short, so they come first.
    i_p = lo // (2 * POSITIONS) * (2 * POSITIONS) + (num_tiles - 1 - i_w % num_tiles) * (2 * POSITIONS)
    i_p = gl.where(lo < hi, i_p, hi)
    return i_h, i_r, i_p, lo, hi, row_end - hi


@gluon.jit
def _plan(piece, index, KEYS: gl.constexpr, SHAPE: gl.constexpr):
    """Where the tiles of a piece start, and how many keys of which kind they have."""
    i_h, i_r, i_p, _, hi, _ = piece
    _, _, p_rank, _, p_granule_rank, _, _, rank_width, _, granule_rank_width, window, _ = index
    HEADS: gl.constexpr = SHAPE[0]
    POSITIONS: gl.constexpr = SHAPE[3]
    BLOCK_Q: gl.constexpr = SHAPE[4]
    BLOCK_K: gl.constexpr = SHAPE[5]
    RANK: gl.constexpr = SHAPE[6]
    i_head = (i_r * HEADS + i_h).to(gl.int64)
    p_rank += i_head * rank_width
    p_granule_rank += i_head * granule_rank_width
    tile, length, start = _tile_of(i_p, hi, window, BLOCK_Q, BLOCK_K)
    # A second tile behind the end of the context sees the last position only and is not stored.
    tile2, length2, start2 = _tile_of(i_p + POSITIONS, hi, window, BLOCK_Q, BLOCK_K)
    two = tile2 < hi
    base = i_p + 2 * POSITIONS - KEYS
    num_window = gl.maximum(base - start2, 0) // KEYS
    num_rest = gl.maximum(base - num_window * KEYS - start + KEYS - 1, 0) // KEYS
    # Granules before position 0 do not exist: of the ascending list only entries up to here matter.
    lanes = gl.where(start > 0, gl.load(p_granule_rank + tile // BLOCK_K // RANK + 1) * BLOCK_K, 0)
    lanes2 = gl.load(p_granule_rank + gl.where(two, tile2, tile) // BLOCK_K // RANK + 1) * BLOCK_K
    lanes2 = gl.where(two & (start2 > 0), lanes2, 0)
    num_diagonal = (gl.maximum(lanes, lanes2) + KEYS // 2 - 1) // (KEYS // 2)
    num_plain = gl.load(p_rank + start // RANK) // KEYS
    num_columns = gl.load(p_rank + (gl.where(two, start2, start) + RANK - 1) // RANK)
    num_columns2 = gl.where(two, num_columns, 0)
    num_bias = num_rest + gl.maximum(num_columns - num_plain * KEYS + KEYS - 1, 0) // KEYS
    num_mixed = gl.minimum(num_diagonal, num_window + num_plain)
    return (
        tile, length, start, tile2, length2, start2, lanes, lanes2, base, num_window, num_plain, num_rest,
        num_columns, num_columns2, num_bias, num_diagonal, num_mixed,
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=[
        "num_tiles", "total", "window", "width", "rank_width", "granule_width", "granule_rank_width", "stride_table",
        "sinks",
    ]
)  # fmt: skip
def _attend_kernel(
    p_q, p_cache, p_out, p_lse, p_visited, p_table, p_row_start, p_row_end, p_seq_len,
    p_columns, p_slots, p_rank, p_granules, p_granule_rank, p_near, p_flags, scale,
    stride_q_row, stride_q_head, stride_out_row, stride_out_head, stride_lse_row, stride_lse_head,
    stride_block, stride_head, stride_token, stride_table,
    width, rank_width, granule_width, granule_rank_width, num_tiles, total, window, sinks,
    HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, POSITIONS: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_K: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    LINEAR: gl.constexpr, RANK: gl.constexpr, LSE: gl.constexpr, COUNT: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """Every so many of all pieces of ``2 * POSITIONS`` positions. ``PACK`` is ``GROUP`` as a power of two."""
    SHAPE: gl.constexpr = (HEADS, GROUP, PACK, POSITIONS, BLOCK_Q, BLOCK_K, RANK)
    batch = (p_row_start, p_row_end, p_seq_len)
    index = (
        p_columns, p_slots, p_rank, p_granules, p_granule_rank, p_near, p_flags, rank_width, granule_width,
        granule_rank_width, window, sinks,
    )  # fmt: skip
    DTYPE: gl.constexpr = p_q.dtype.element_ty
    l_one: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], DTYPE)
    l_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    s_q = gl.allocate_shared_memory(DTYPE, [2, 64, D], l_one)
    s_k = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], l_tile)
    s_v = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], l_tile)
    s_bias = gl.allocate_shared_memory(gl.float16, [2 * STAGES, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bias_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    bias_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=128)
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
        mbarrier.init(bias_full.index(i), count=1)
        mbarrier.init(bias_empty.index(i), count=2)
    mbarrier.init(q_full, count=128)
    mbarrier.init(q_empty, count=2)
    fence_async_shared()
    bars = (k_full, k_empty, v_full, v_empty, bias_full, bias_empty, q_full, q_empty)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    s_q, s_k, s_v, s_bias, bars, batch, index, p_out, p_lse, scale, stride_out_row, stride_out_head,
                    stride_lse_row, stride_lse_head, num_tiles, total, 0, SHAPE, D, KEYS, STAGES, LSE,
                ),
            ),
            (
                _consumer,
                (
                    s_q, s_k, s_v, s_bias, bars, batch, index, p_out, p_lse, scale, stride_out_row, stride_out_head,
                    stride_lse_row, stride_lse_head, num_tiles, total, 1, SHAPE, D, KEYS, STAGES, LSE,
                ),
            ),
            (
                _producer,
                (
                    s_q, s_k, s_v, s_bias, bars, batch, index, p_q, p_cache, p_table, p_visited, stride_q_row,
                    stride_q_head, stride_block, stride_head, stride_token, stride_table, width, num_tiles, total,
                    SHAPE, D, KEYS, STAGES, BLOCK_SIZE, LINEAR, COUNT,
                ),
            ),
        ],
        [4, 4],
        [REGS[0], REGS[1]],
    )  # fmt: skip


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Of a device; 1 where it is only compiled for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def unsupported_shape(group: int, block_q: int, head_size: int, dtype: torch.dtype) -> str | None:
    """Why this version does not run a shape, None if it does: rows of a consumer must lie within a tile of the
    pattern."""
    if head_size not in (64, 128):
        return f"it takes heads of 64 and 128 channels, not {head_size}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16 queries, not {dtype}"
    pack = next_power_of_2(group)
    if pack > MAX_GROUP:
        return f"it takes at most {MAX_GROUP} query heads per KV head, not {group}"
    if ROWS // pack > block_q:
        return f"with {group} query heads per KV head it takes tiles of at least {ROWS // pack} rows, not {block_q}"
    return None


def aligned(*tensors: Tensor) -> bool:
    """Whether rows of 16-bit values can be copied 16 bytes at a time."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:-1]) for tensor in tensors
    )


def unsupported(q: Tensor, kv: PagedKV, index: Index, dense_last: int) -> str | None:
    """Why this version does not run a call on a device that it is for, None if it does."""
    if dense_last:
        return "it has no dense last rows"
    if kv.cache.dtype != q.dtype:
        return f"it takes a cache of the queries' type, {q.dtype}, not {kv.cache.dtype}"
    reason = unsupported_shape(q.shape[1] // kv.num_kv_heads, index.pattern.block_q, kv.head_size, q.dtype)
    if reason is None and not aligned(q, kv.cache):
        return "rows of queries or of the cache do not begin at multiples of 16 bytes"
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
    regs: tuple[int, int] = REGISTERS,
) -> Tensor:
    """As ``paged.attend``, for calls of which ``unsupported`` says nothing; never waits for the device.

    Args:
        regs: registers of a thread, of the second consumer and of the producer; the first consumer gets as many as the
            second.
    """
    if out is None:
        out = torch.empty_like(q)
    if batch.num_requests == 0 or batch.max_rows == 0:
        return out
    size, num_kv_heads, pattern = kv.head_size, kv.num_kv_heads, index.pattern
    group = q.shape[1] // num_kv_heads
    pack = next_power_of_2(group)
    positions = ROWS // pack
    num_tiles = cdiv(batch.max_rows - 1, 2 * positions) + 1
    total = num_tiles * num_kv_heads * batch.num_requests
    strides = kv.cache.stride()
    launch(
        _attend_kernel, (min(total, _multiprocessors(q.device)),),
        (
            q, kv.cache, out, lse, visited, kv.block_table, batch.row_start, batch.row_end, batch.seq_len,
            index.columns, index.slots, index.rank, index.granules, index.granule_rank, index.near, index.flags,
            scale / math.log(2), q.stride(0), q.stride(1), out.stride(0), out.stride(1),
            *((0, 0) if lse is None else lse.stride()), *strides[:3], kv.block_table.stride(0),
            index.columns.shape[2], index.rank.shape[2], index.granules.shape[2], index.granule_rank.shape[2],
            num_tiles, total, pattern.reach, pattern.sink_keys,
        ),
        HEADS=num_kv_heads, GROUP=group, PACK=pack, POSITIONS=positions, BLOCK_Q=pattern.block_q,
        BLOCK_K=pattern.block_k, D=size, KEYS=KEYS, STAGES=3 if size == 128 else 6, BLOCK_SIZE=kv.block_size,
        LINEAR=strides[0] == kv.block_size * strides[2], RANK=RANK, LSE=lse is not None, COUNT=visited is not None,
        REGS=regs,
    )  # fmt: skip
    return out
