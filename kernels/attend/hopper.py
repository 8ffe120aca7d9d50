# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, call-arg"
"""Sparse attention over a paged cache for compute capability 9.0, with warp specialisation.

The same operation as ``triton.py`` beside it, in Gluon, where matrix products and copies into shared memory are issued
by hand.

**Who does what.** A program has three warp groups. One, the producer, follows the index and copies rows of keys and
values into rings of places in shared memory; two consumers own 64 rows each (16 positions x 4 heads, say). There are as
many programs as multiprocessors, and each computes many pieces of 128 rows, one after the other. All warp groups work
out by themselves which piece is next and how many tiles of which kind it has (its plan); the producer runs ahead into
it while the consumers finish the one before. The counters of the rings go on from piece to piece.

**What a consumer computes.** With ``s = scale / ln(2) * q . k``, a row's output is ``sum(2**s * v) / sum(2**s)``.
The sums are taken tile by tile, relative to the largest logit ``m`` so far: where a tile raises it to ``m'``, what was
summed before is multiplied by ``2**(m - m')`` (online softmax, Milakov and Gimelshein 2018). The product of a tile's
logits runs beside the product of the weights and values of the tile before it (``softmax_step``), as in
FlashAttention 3.

**In which order.** Keys of a piece come in this order, each once:

1. the tile that ends with the program's own positions, the only one that needs the causal mask;
2. plain tiles, of which both consumers see every key: the rest of the window, then columns below it, but for those
   of 4.;
3. tiles with a bias of 0 or -inf per key and consumer: the ragged end of the window, then the last columns;
4. granules of diagonals without what is a column, too, half a tile for each consumer, since each has diagonal keys of
   its own: twice the bytes a product, so that each such tile is followed by a plain one;
5. the diagonals for which there is no plain tile, one product after the other: the copies bound them.

**How things are called.** What the functions pass on is declared in ``hopper_values.py`` and, with the functions that
need nothing of the index, in ``../hopper_shared.py``. Prefixes: ``b_`` a tensor in registers, ``s_`` in shared memory,
``p_`` a pointer, ``o_`` offsets, ``m_`` a mask, ``l_`` a layout, ``i_`` an index. A name with a ``2`` belongs to the
second consumer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ..hopper_shared import (
    Cache,
    Output,
    PipelineState,
    Queries,
    Requests,
    Softmax,
    aligned,
    last_product,
    logits,
    num_pairs,
    own_tile,
    piece_of,
    pipelines,
    send,
    send_bias,
    send_queries,
    softmax_step,
    softmax_steps,
    store_rows,
    weigh,
)
from ..index import RANK, Index
from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV
from ..settings import multiprocessors
from .hopper_values import IndexView, Plan, Shape

ROWS = 64  # of a consumer: the least that a warp group multiplies
KEYS = 128  # of a tile
MAX_GROUP = 64
REGISTERS = (208, 88)


# Pieces and plans, which every warp group works out for itself


@gluon.jit
def _tile_of(i_p, n, window, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr):
    """Start and length of the pattern's tile around position ``i_p``, and where its window starts."""
    tile = i_p // BLOCK_Q * BLOCK_Q
    length = gl.minimum(BLOCK_Q, n - tile)
    start = gl.maximum(tile - window + 1, 0) // BLOCK_K * BLOCK_K
    return tile, length, start


@gluon.jit
def _plan(piece, index, shape):
    """The plan of a piece, whose head's lists are ``index``."""
    KEYS: gl.constexpr = shape.KEYS
    BLOCK_K: gl.constexpr = shape.BLOCK_K
    RANK: gl.constexpr = shape.RANK
    i_p, hi = piece.i_p, piece.hi
    tile, length, start = _tile_of(i_p, hi, index.window, shape.BLOCK_Q, BLOCK_K)
    # A second tile behind the end of the sequence sees the last position only and is not stored.
    tile2, length2, start2 = _tile_of(i_p + shape.POSITIONS, hi, index.window, shape.BLOCK_Q, BLOCK_K)
    two = tile2 < hi
    base = i_p + 2 * shape.POSITIONS - KEYS
    num_window = gl.maximum(base - start2, 0) // KEYS
    num_rest = gl.maximum(base - num_window * KEYS - start + KEYS - 1, 0) // KEYS
    # Granules before position 0 do not exist: of the ascending list only entries up to here matter.
    p_granule_rank = index.p_granule_rank
    lanes = gl.where(start > 0, gl.load(p_granule_rank + tile // BLOCK_K // RANK + 1) * BLOCK_K, 0)
    lanes2 = gl.load(p_granule_rank + gl.where(two, tile2, tile) // BLOCK_K // RANK + 1) * BLOCK_K
    lanes2 = gl.where(two & (start2 > 0), lanes2, 0)
    num_diagonal = (gl.maximum(lanes, lanes2) + KEYS // 2 - 1) // (KEYS // 2)
    num_plain = gl.load(index.p_rank + start // RANK) // KEYS
    num_columns = gl.load(index.p_rank + (gl.where(two, start2, start) + RANK - 1) // RANK)
    return Plan(
        tile=tile,
        length=length,
        start=start,
        lanes=lanes,
        num_columns=num_columns,
        tile2=tile2,
        length2=length2,
        start2=start2,
        lanes2=lanes2,
        num_columns2=gl.where(two, num_columns, 0),
        base=base,
        num_window=num_window,
        num_plain=num_plain,
        num_rest=num_rest,
        num_bias=num_rest + gl.maximum(num_columns - num_plain * KEYS + KEYS - 1, 0) // KEYS,
        num_diagonal=num_diagonal,
        num_mixed=gl.minimum(num_diagonal, num_window + num_plain),
    )


# Consumers


@gluon.jit
def _consume(tiles, biases, pieces, rings, output, piece, plan, scale, WHICH: gl.constexpr, shape):
    """A consumer's 64 rows of a piece; returns the states of the rings."""
    i_p, start = piece.i_p, plan.start
    if WHICH == 1:
        i_p += shape.POSITIONS
        start = plan.start2
    HALF: gl.constexpr = shape.KEYS // 2
    s_q = rings.queries.places.index(WHICH)

    # 1. The own tile
    rings.queries.consumer_wait(pieces)
    b_p, softmax = own_tile(tiles, s_q, rings, i_p, start, plan.base, piece, scale, WHICH, shape)
    tiles = tiles.next()

    # 2., 3. Tiles of both consumers
    tiles, biases, b_p, softmax = softmax_steps(
        tiles, biases, plan.early(), s_q, rings, b_p, softmax, scale, WHICH, False
    )
    tiles, biases, b_p, softmax = softmax_steps(
        tiles, biases, plan.num_bias, s_q, rings, b_p, softmax, scale, WHICH, True
    )

    # 4. Half tiles of the own diagonals, in turns with tiles of both
    for _ in range(plan.num_mixed):
        s_half = rings.bias.places.index(2 * biases.stage() + WHICH).slice(WHICH * HALF, HALF)
        b_ph, softmax = softmax_step(
            tiles, biases, s_q, rings.keys.at(tiles).slice(WHICH * HALF, HALF), rings.values.at(tiles.before()), s_half,
            rings, b_p, softmax, scale, True,
        )  # fmt: skip
        tiles = tiles.next()
        biases = biases.next()
        b_p, softmax = softmax_step(
            tiles, biases, s_q, rings.keys.at(tiles), rings.values.at(tiles.before()).slice(WHICH * HALF, HALF), s_half,
            rings, b_ph, softmax, scale, False,
        )  # fmt: skip
        tiles = tiles.next()
    softmax = last_product(tiles, rings, b_p, softmax)

    # 5. The other diagonals
    for _ in range(plan.num_diagonal - plan.num_mixed):
        s_half = rings.bias.places.index(2 * biases.stage() + WHICH).slice(WHICH * HALF, HALF)
        s_keys = rings.keys.at(tiles).slice(WHICH * HALF, HALF)
        s_values = rings.values.at(tiles).slice(WHICH * HALF, HALF)
        rings.keys.consumer_wait(tiles)
        b_s = warpgroup_mma_wait(0, deps=[logits(s_q, s_keys)])
        rings.keys.consumer_release(tiles)
        rings.bias.consumer_wait(biases)
        b_ph, b_factor, b_max, b_sum = weigh(b_s, softmax, s_half, scale, True, s_q.dtype)
        rings.bias.consumer_release(biases)
        rings.values.consumer_wait(tiles)
        b_o = warpgroup_mma(b_ph, s_values, softmax.b_acc * b_factor, is_async=True)
        b_acc = warpgroup_mma_wait(0, deps=[b_o])
        rings.values.consumer_release(tiles)
        softmax = Softmax(b_acc=b_acc, row_max=b_max, row_sum=b_sum)
        tiles = tiles.next()
        biases = biases.next()
    rings.queries.consumer_release(pieces)
    store_rows(output, softmax, piece, i_p, shape, s_q.dtype)
    return tiles, biases


@gluon.jit
def _consumer(rings, batch, index, output, scale, num_tiles, total, WHICH: gl.constexpr, shape):
    """One of the two that compute: its rows of every piece of the program."""
    tiles = PipelineState(count=gl.to_tensor(0), STAGES=shape.STAGES)
    biases = PipelineState(count=gl.to_tensor(0), STAGES=shape.STAGES)
    pieces = PipelineState(count=gl.to_tensor(0), STAGES=1)
    for i_w in range(gl.program_id(0), total, gl.num_programs(0)):
        piece = piece_of(i_w, batch, num_tiles, shape)
        if piece.i_p < piece.hi:
            plan = _plan(piece, index.of(piece, shape), shape)
            tiles, biases = _consume(tiles, biases, pieces, rings, output, piece, plan, scale, WHICH, shape)
            pieces = pieces.next()


# Producer


@gluon.jit
def _send_early(tiles, b_block, cache, rings, index, plan, o_n, shape):
    """2. The window, downwards, and plain columns, but for those that diagonals take turns with. ``b_block`` holds the
    blocks of the first tile."""
    KEYS: gl.constexpr = shape.KEYS
    for i_w in range(gl.minimum(plan.num_window, plan.early())):
        b_pos = plan.base - (i_w + 1) * KEYS + o_n
        b_slot = cache.slot_in(b_block, b_pos)
        b_block = cache.block(gl.maximum(b_pos - KEYS, 0))
        tiles = send(tiles, b_slot, cache, rings)
    b_next = gl.load(index.p_slots + o_n, mask=o_n < plan.num_columns, other=0)
    for i_c in range(plan.early() - plan.num_window):
        b_slot = b_next
        o_c = (i_c + 1) * KEYS + o_n
        b_next = gl.load(index.p_slots + o_c, mask=o_c < plan.num_columns, other=0)
        tiles = send(tiles, b_slot, cache, rings)
    return tiles


@gluon.jit
def _send_rest(tiles, biases, cache, rings, piece, plan, o_n, shape):
    """3. The ragged end of the window. Lanes without a key read an own one."""
    rest_end = plan.base - plan.num_window * shape.KEYS
    for i_n in range(plan.num_rest):
        b_pos = plan.start + i_n * shape.KEYS + o_n
        m_pos = b_pos < rest_end
        b_slot = cache.slot(gl.where(m_pos, b_pos, piece.i_p))
        biases = send_bias(biases, m_pos, m_pos & (b_pos >= plan.start2), rings)
        tiles = send(tiles, b_slot, cache, rings)
    return tiles, biases


@gluon.jit
def _columns_from(o_c, index, num_columns, own_slot):
    """Slots and positions of columns ``o_c``, an own slot where there is none."""
    m_c = o_c < num_columns
    b_slot = gl.load(index.p_slots + o_c, mask=m_c, other=own_slot)
    return b_slot, gl.load(index.p_columns + o_c, mask=m_c, other=0)


@gluon.jit
def _send_last_columns(tiles, biases, cache, rings, index, piece, plan, o_n, COUNT: gl.constexpr, shape):
    """3. The last columns; also returns how many of them each thread gave each consumer."""
    KEYS: gl.constexpr = shape.KEYS
    l_n: gl.constexpr = o_n.type.layout
    own_slot = cache.slot(piece.i_p)
    b_count = gl.zeros([KEYS], gl.int32, layout=l_n)
    b_count2 = gl.zeros([KEYS], gl.int32, layout=l_n)
    b_next, b_next_pos = _columns_from(plan.num_plain * KEYS + o_n, index, plan.num_columns, own_slot)
    for i_c in range(plan.num_plain * KEYS, plan.num_columns, KEYS):
        b_slot, b_pos = b_next, b_next_pos
        o_c = i_c + o_n
        m_one = (o_c < plan.num_columns) & (b_pos < plan.start)
        m_two = (o_c < plan.num_columns2) & (b_pos < plan.start2)
        b_next, b_next_pos = _columns_from(o_c + KEYS, index, plan.num_columns, own_slot)
        tiles = send(tiles, b_slot, cache, rings)
        biases = send_bias(biases, m_one, m_two, rings)
        if COUNT:
            b_count += m_one.to(gl.int32)
            b_count2 += m_two.to(gl.int32)
    return tiles, biases, b_count, b_count2


@gluon.jit
def _plain(i_t, cache, index, plan, o_n, KEYS: gl.constexpr):
    """Of plain tile ``i_t``, or the last one: blocks of the cache for one of the window, slots for one of columns."""
    p_block = cache.p_table + gl.maximum(plan.base - (i_t + 1) * KEYS + o_n, 0) // cache.BLOCK_SIZE
    p_slot = index.p_slots + gl.maximum(gl.minimum(i_t - plan.num_window, plan.num_plain - 1), 0) * KEYS + o_n
    return gl.load(gl.where(i_t < plan.num_window, p_block, p_slot))


@gluon.jit
def _diagonal_keys(b_granule, o_f, b_tile, cache, index, i_p, BLOCK_K: gl.constexpr):
    """Positions of lanes along diagonals, an own one where there is none, and what is known of them: block of the
    cache, distance to the nearest diagonal, nonzero for a column."""
    b_pos = b_tile - b_granule * BLOCK_K + o_f % BLOCK_K
    m_pos = (b_granule >= 0) & (b_pos >= index.sinks)
    b_near = gl.load(index.p_near + b_granule, mask=m_pos, other=255)
    b_flag = gl.load(index.p_flags + b_pos, mask=m_pos, other=1)
    b_pos = gl.where(m_pos, b_pos, i_p)
    return b_pos, cache.block(b_pos), b_near, b_flag


@gluon.jit
def _send_diagonals(tiles, biases, cache, rings, index, piece, plan, o_n, COUNT: gl.constexpr, shape):
    """4., 5. Diagonals, in turns with plain tiles while there are any. The first half of a tile of diagonals belongs to
    the first consumer, the second to the other. Also returns how many keys each thread gave."""
    KEYS: gl.constexpr = shape.KEYS
    HALF: gl.constexpr = KEYS // 2
    BLOCK_K: gl.constexpr = shape.BLOCK_K
    o_h = o_n % HALF
    b_tile = gl.where(o_n < HALF, plan.tile, plan.tile2)
    b_lanes = gl.where(o_n < HALF, plan.lanes, plan.lanes2)
    b_reach = gl.where(o_n < HALF, plan.length, plan.length2) + BLOCK_K - 2
    b_ahead = index.granules(o_h, b_lanes, BLOCK_K)
    b_pos, b_block, b_near, b_flag = _diagonal_keys(b_ahead, o_h, b_tile, cache, index, piece.i_p, BLOCK_K)
    b_ahead = index.granules(HALF + o_h, b_lanes, BLOCK_K)
    b_wide = _plain(plan.early(), cache, index, plan, o_n, KEYS)
    l_n: gl.constexpr = o_n.type.layout
    b_count = gl.zeros([KEYS], gl.int32, layout=l_n)
    for i_g in range(plan.num_diagonal):
        b_slot = cache.slot_in(b_block, b_pos)
        m_key = (b_near.to(gl.int32) <= b_reach) & (b_flag == 0)
        o_f = (i_g + 1) * HALF + o_h
        b_pos, b_block, b_near, b_flag = _diagonal_keys(b_ahead, o_f, b_tile, cache, index, piece.i_p, BLOCK_K)
        b_ahead = index.granules(HALF + o_f, b_lanes, BLOCK_K)
        tiles = send(tiles, b_slot, cache, rings)
        biases = send_bias(biases, m_key, m_key, rings)
        if COUNT:
            b_count += m_key.to(gl.int32)
        if i_g < plan.num_mixed:
            i_t = plan.early() + i_g
            b_slot = cache.slot_in(b_wide, plan.base - (i_t + 1) * KEYS + o_n)
            b_slot = gl.where(i_t < plan.num_window, b_slot, b_wide)
            b_wide = _plain(i_t + 1, cache, index, plan, o_n, KEYS)
            tiles = send(tiles, b_slot, cache, rings)
    return tiles, biases, b_count


@gluon.jit
def _produce(
    tiles, biases, pieces, rings, queries, cache, p_visited, index, piece, plan, COUNT: gl.constexpr, shape
):  # fmt: skip
    """Copies what the consumers need for a piece, in their order; returns the states of the rings.

    A thread looks up one key of a tile and works out its offset; the offsets then change hands, so that the threads
    that copy a row lie side by side. What a tile needs from the index is asked for while the tile before it is copied:
    the loads depend on each other, and waiting for them would take longer than the consumers need for a tile.
    """
    KEYS: gl.constexpr = shape.KEYS
    HALF: gl.constexpr = KEYS // 2
    l_n: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_n = gl.arange(0, KEYS, layout=l_n)

    # 1. The own tile; keys before the sequence or behind it are the first own one, the consumers leave them out.
    b_pos = plan.base + o_n
    b_slot = cache.slot(gl.where((b_pos >= 0) & (b_pos < piece.hi), b_pos, piece.i_p))
    b_block = cache.block(gl.maximum(plan.base - KEYS + o_n, 0))
    tiles = send(tiles, b_slot, cache, rings)
    send_queries(pieces, queries, rings, piece, shape)

    tiles = _send_early(tiles, b_block, cache, rings, index, plan, o_n, shape)
    tiles, biases = _send_rest(tiles, biases, cache, rings, piece, plan, o_n, shape)
    tiles, biases, b_count, b_count2 = _send_last_columns(
        tiles, biases, cache, rings, index, piece, plan, o_n, COUNT, shape
    )
    tiles, biases, b_count_h = _send_diagonals(tiles, biases, cache, rings, index, piece, plan, o_n, COUNT, shape)

    if COUNT:
        # Each stored position: its window and own keys, and what was counted above.
        visited = gl.sum(b_count + gl.where(o_n < HALF, b_count_h, 0), 0) + plan.num_plain * KEYS
        visited2 = gl.sum(b_count2 + gl.where(o_n < HALF, 0, b_count_h), 0) + plan.num_plain * KEYS
        total = num_pairs(piece, piece.i_p, plan.start, visited, shape.POSITIONS)
        total += num_pairs(piece, piece.i_p + shape.POSITIONS, plan.start2, visited2, shape.POSITIONS)
        gl.atomic_add(p_visited + piece.i_r, total)
    return tiles, biases


@gluon.jit
def _producer(rings, batch, index, queries, cache, p_visited, num_tiles, total, COUNT: gl.constexpr, shape):
    """The warp group that copies, for every piece of the program."""
    tiles = PipelineState(count=gl.to_tensor(0), STAGES=shape.STAGES)
    biases = PipelineState(count=gl.to_tensor(0), STAGES=shape.STAGES)
    pieces = PipelineState(count=gl.to_tensor(0), STAGES=1)
    for i_w in range(gl.program_id(0), total, gl.num_programs(0)):
        piece = piece_of(i_w, batch, num_tiles, shape)
        if piece.i_p < piece.hi:
            lists = index.of(piece, shape)
            plan = _plan(piece, lists, shape)
            tiles, biases = _produce(
                tiles, biases, pieces, rings, queries, cache.of(piece), p_visited, lists, piece, plan, COUNT, shape
            )
            pieces = pieces.next()


# The kernel


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
    """Every so many of all pieces of ``2 * POSITIONS`` positions."""
    shape = Shape(
        HEADS=HEADS, GROUP=GROUP, PACK=PACK, POSITIONS=POSITIONS, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, RANK=RANK, D=D,
        KEYS=KEYS, STAGES=STAGES,
    )  # fmt: skip
    batch = Requests(p_row_start=p_row_start, p_row_end=p_row_end, p_seq_len=p_seq_len)
    index = IndexView(
        p_columns=p_columns, p_slots=p_slots, p_rank=p_rank, p_granules=p_granules, p_granule_rank=p_granule_rank,
        p_near=p_near, p_flags=p_flags, width=width, rank_width=rank_width, granule_width=granule_width,
        granule_rank_width=granule_rank_width, window=window, sinks=sinks,
    )  # fmt: skip
    queries = Queries(p_q=p_q, stride_row=stride_q_row, stride_head=stride_q_head)
    cache = Cache(
        p_kv=p_cache, p_table=p_table, stride_block=stride_block, stride_head=stride_head, stride_token=stride_token,
        stride_table=stride_table, BLOCK_SIZE=BLOCK_SIZE, LINEAR=LINEAR, D=D,
    )  # fmt: skip
    output = Output(
        p_out=p_out, p_lse=p_lse, stride_row=stride_out_row, stride_head=stride_out_head, stride_lse_row=stride_lse_row,
        stride_lse_head=stride_lse_head, LSE=LSE,
    )  # fmt: skip
    rings = pipelines(p_q.dtype.element_ty, shape)
    gl.warp_specialize(
        [
            (_consumer, (rings, batch, index, output, scale, num_tiles, total, 0, shape)),
            (_consumer, (rings, batch, index, output, scale, num_tiles, total, 1, shape)),
            (_producer, (rings, batch, index, queries, cache, p_visited, num_tiles, total, COUNT, shape)),
        ],
        [4, 4],
        [REGS[0], REGS[1]],
    )


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
        _attend_kernel, (min(total, multiprocessors(q.device)),),
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
