# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, call-arg"
"""Attention to windows and the lists of tiles over a paged cache for compute capability 9.0, with warp specialisation.

The same operation as ``triton.py`` beside it, in Gluon. Who does what is as in ``attend/hopper.py``, which explains it:
a program has a producer, which copies rows of keys and values into rings in shared memory, and two consumers of 64 rows
each; it computes every so many of all pieces.

**Rows.** A consumer has as many positions as fit with all query heads of a group: 10 positions x 6 heads are 60 of its
64 rows. A piece is the positions of both consumers. It lies within a tile, so both see the same keys but for the causal
mask.

**In which order.** Keys of a piece come in this order, each once:

1. the tile that ends with the program's own positions, the only one that needs the causal mask;
2. the rest of the window downwards and then the list, as if they were one list. Its last tile has a bias of 0 or -inf
   per key, if it is a part of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hopper_shared import (
    Cache,
    Output,
    PipelineState,
    Queries,
    Requests,
    aggregate,
    aligned,
    last_product,
    num_pairs,
    own_tile,
    piece_of,
    pipelines,
    send,
    send_bias,
    send_queries,
    softmax_steps,
    store_rows,
)
from ..launch import cdiv, launch
from ..paged import Batch, PagedKV
from ..settings import multiprocessors
from ..tile_index import TileIndex

ROWS = 64  # of a consumer: the least that a warp group multiplies
KEYS = 128  # of a tile
REGISTERS = (208, 88)


@aggregate
class Shape:
    """What is known at compile time. ``PACK`` rows are a position, ``POSITIONS`` those of a consumer."""

    HEADS: gl.constexpr
    GROUP: gl.constexpr
    PACK: gl.constexpr
    POSITIONS: gl.constexpr
    BLOCK_Q: gl.constexpr
    BLOCK_K: gl.constexpr
    D: gl.constexpr
    KEYS: gl.constexpr
    STAGES: gl.constexpr


@aggregate
class Lists:
    """The lists of all tiles. ``width`` is the number of places of a head."""

    p_starts: gl.tensor
    p_counts: gl.tensor
    p_slots: gl.tensor
    width: gl.tensor
    reach: gl.tensor


@aggregate
class Plan:
    """The keys of a piece, and how many tiles they are.

    ``start``: the first key of the window; ``base``: the first of the own tile; ``window``: keys between them;
    ``count`` keys, whose slots are at ``p_slots``, are listed; ``num_keys`` are both together, ``num_plain`` whole
    tiles of them and ``num_rest``, 0 or 1, a part of one.
    """

    start: gl.tensor
    base: gl.tensor
    window: gl.tensor
    count: gl.tensor
    p_slots: gl.tensor
    num_keys: gl.tensor
    num_plain: gl.tensor
    num_rest: gl.tensor


@gluon.jit
def _plan(piece, lists, shape):
    """The plan of a piece."""
    KEYS: gl.constexpr = shape.KEYS
    BLOCK_Q: gl.constexpr = shape.BLOCK_Q
    i_t = piece.i_p // BLOCK_Q
    row_start = piece.first + piece.lo
    place = row_start // BLOCK_Q + 2 * piece.i_r + i_t - piece.lo // BLOCK_Q
    place = piece.i_h.to(gl.int64) * lists.width + place
    count = gl.load(lists.p_counts + place)
    # A tile without a list attends to everything.
    start = gl.maximum(i_t * BLOCK_Q - lists.reach + 1, 0) // shape.BLOCK_K * shape.BLOCK_K
    start = gl.where(count < 0, 0, start)
    count = gl.maximum(count, 0)
    base = piece.i_p + 2 * shape.POSITIONS - KEYS
    window = gl.maximum(base - start, 0)
    num_keys = window + count
    return Plan(
        start=start,
        base=base,
        window=window,
        count=count,
        p_slots=lists.p_slots + gl.load(lists.p_starts + place),
        num_keys=num_keys,
        num_plain=num_keys // KEYS,
        num_rest=(num_keys % KEYS + KEYS - 1) // KEYS,
    )


@gluon.jit
def _next_piece(i_first, total, batch, num_tiles, shape):
    """The piece of this program among those from number ``i_first`` on, one for each program, and whether there is one
    with a row. Every other time the programs take turns from behind: pieces get shorter within a head."""
    num, i_w = gl.num_programs(0), gl.program_id(0)
    i_w = i_first + gl.where(i_first // num % 2 == 0, i_w, num - 1 - i_w)
    piece = piece_of(gl.minimum(i_w, total - 1), batch, num_tiles, shape)
    return piece, (i_w < total) & (piece.i_p < piece.hi)


# Consumers


@gluon.jit
def _consume(tiles, biases, pieces, rings, output, piece, plan, scale, WHICH: gl.constexpr, shape):
    """A consumer's 64 rows of a piece; returns the states of the rings."""
    i_p = piece.i_p + WHICH * shape.POSITIONS
    s_q = rings.queries.places.index(WHICH)

    # 1. The own tile
    rings.queries.consumer_wait(pieces)
    b_p, softmax = own_tile(tiles, s_q, rings, i_p, plan.start, plan.base, piece, scale, WHICH, shape)
    tiles = tiles.next()

    # 2. The window and the list
    tiles, biases, b_p, softmax = softmax_steps(
        tiles, biases, plan.num_plain, s_q, rings, b_p, softmax, scale, WHICH, False
    )
    tiles, biases, b_p, softmax = softmax_steps(
        tiles, biases, plan.num_rest, s_q, rings, b_p, softmax, scale, WHICH, True
    )
    softmax = last_product(tiles, rings, b_p, softmax)
    rings.queries.consumer_release(pieces)
    store_rows(output, softmax, piece, i_p, shape, s_q.dtype)
    return tiles, biases


@gluon.jit
def _consumer(rings, batch, lists, output, scale, num_tiles, total, WHICH: gl.constexpr, shape):
    """One of the two that compute: its rows of every piece of the program."""
    tiles = PipelineState(count=gl.to_tensor(0), STAGES=shape.STAGES)
    biases = PipelineState(count=gl.to_tensor(0), STAGES=shape.STAGES)
    pieces = PipelineState(count=gl.to_tensor(0), STAGES=1)
    for i_first in range(0, total, gl.num_programs(0)):
        piece, there = _next_piece(i_first, total, batch, num_tiles, shape)
        if there:
            plan = _plan(piece, lists, shape)
            tiles, biases = _consume(tiles, biases, pieces, rings, output, piece, plan, scale, WHICH, shape)
            pieces = pieces.next()


# Producer


@gluon.jit
def _find(i_t, cache, plan, o_n, KEYS: gl.constexpr):
    """Where the keys of tile ``i_t`` behind the own one are: blocks of the cache for those of the window, slots for
    those of the list. Lanes without a key take the last one again."""
    o_j = gl.minimum(i_t * KEYS + o_n, plan.num_keys - 1)
    m_window = o_j < plan.window
    p_block = cache.p_table + gl.where(m_window, plan.base - 1 - o_j, 0) // cache.BLOCK_SIZE
    p_slot = plan.p_slots + gl.where(m_window, 0, o_j - plan.window)
    # Without any key nothing is read.
    return gl.load(gl.where(m_window, p_block, p_slot), mask=o_j >= 0, other=0)


@gluon.jit
def _slots(i_t, b_found, cache, plan, o_n, KEYS: gl.constexpr):
    """Slots of the keys of tile ``i_t``, from what ``_find`` found."""
    o_j = gl.minimum(i_t * KEYS + o_n, plan.num_keys - 1)
    return gl.where(o_j < plan.window, cache.slot_in(b_found, plan.base - 1 - o_j), b_found)


@gluon.jit
def _produce(
    tiles, biases, pieces, rings, queries, cache, p_visited, piece, plan, COUNT: gl.constexpr, shape
):  # fmt: skip
    """Copies what the consumers need for a piece, in their order; returns the states of the rings.

    Where the keys of a tile are is looked up while the tile before it is copied: the loads depend on each other, and
    waiting for them would take longer than the consumers need for a tile.
    """
    KEYS: gl.constexpr = shape.KEYS
    l_n: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    o_n = gl.arange(0, KEYS, layout=l_n)

    # 1. The own tile; keys before the sequence or behind it are the first own one, the consumers leave them out.
    b_pos = plan.base + o_n
    b_slot = cache.slot(gl.where((b_pos >= 0) & (b_pos < piece.hi), b_pos, piece.i_p))
    b_found = _find(0, cache, plan, o_n, KEYS)
    tiles = send(tiles, b_slot, cache, rings)
    send_queries(pieces, queries, rings, piece, shape)

    # 2. The window and the list
    for i_t in range(plan.num_plain):
        b_slot = _slots(i_t, b_found, cache, plan, o_n, KEYS)
        b_found = _find(i_t + 1, cache, plan, o_n, KEYS)
        tiles = send(tiles, b_slot, cache, rings)
    for _ in range(plan.num_rest):
        m_key = plan.num_plain * KEYS + o_n < plan.num_keys
        b_slot = _slots(plan.num_plain, b_found, cache, plan, o_n, KEYS)
        biases = send_bias(biases, m_key, m_key, rings)
        tiles = send(tiles, b_slot, cache, rings)

    if COUNT:
        pairs = num_pairs(piece, piece.i_p, plan.start, plan.count, 2 * shape.POSITIONS)
        gl.atomic_add(p_visited + piece.i_r, pairs)
    return tiles, biases


@gluon.jit
def _producer(rings, batch, lists, queries, cache, p_visited, num_tiles, total, COUNT: gl.constexpr, shape):
    """The warp group that copies, for every piece of the program."""
    tiles = PipelineState(count=gl.to_tensor(0), STAGES=shape.STAGES)
    biases = PipelineState(count=gl.to_tensor(0), STAGES=shape.STAGES)
    pieces = PipelineState(count=gl.to_tensor(0), STAGES=1)
    for i_first in range(0, total, gl.num_programs(0)):
        piece, there = _next_piece(i_first, total, batch, num_tiles, shape)
        if there:
            plan = _plan(piece, lists, shape)
            tiles, biases = _produce(
                tiles, biases, pieces, rings, queries, cache.of(piece), p_visited, piece, plan, COUNT, shape
            )
            pieces = pieces.next()


# The kernel


@gluon.jit(do_not_specialize=["num_tiles", "total", "width", "reach", "stride_table"])
def _attend_tiles_kernel(
    p_q, p_cache, p_out, p_visited, p_table, p_row_start, p_row_end, p_seq_len, p_starts, p_counts, p_slots, scale,
    stride_q_row, stride_q_head, stride_out_row, stride_out_head, stride_block, stride_head, stride_token, stride_table,
    num_tiles, total, width, reach,
    HEADS: gl.constexpr, GROUP: gl.constexpr, POSITIONS: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr,
    D: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, BLOCK_SIZE: gl.constexpr, LINEAR: gl.constexpr,
    COUNT: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """Every so many of all pieces of ``2 * POSITIONS`` positions."""
    shape = Shape(
        HEADS=HEADS, GROUP=GROUP, PACK=GROUP, POSITIONS=POSITIONS, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, D=D, KEYS=KEYS,
        STAGES=STAGES,
    )  # fmt: skip
    batch = Requests(p_row_start=p_row_start, p_row_end=p_row_end, p_seq_len=p_seq_len)
    lists = Lists(p_starts=p_starts, p_counts=p_counts, p_slots=p_slots, width=width, reach=reach)
    queries = Queries(p_q=p_q, stride_row=stride_q_row, stride_head=stride_q_head)
    cache = Cache(
        p_kv=p_cache, p_table=p_table, stride_block=stride_block, stride_head=stride_head, stride_token=stride_token,
        stride_table=stride_table, BLOCK_SIZE=BLOCK_SIZE, LINEAR=LINEAR, D=D,
    )  # fmt: skip
    output = Output(
        p_out=p_out, p_lse=None, stride_row=stride_out_row, stride_head=stride_out_head, stride_lse_row=0,
        stride_lse_head=0, LSE=False,
    )  # fmt: skip
    rings = pipelines(p_q.dtype.element_ty, shape)
    gl.warp_specialize(
        [
            (_consumer, (rings, batch, lists, output, scale, num_tiles, total, 0, shape)),
            (_consumer, (rings, batch, lists, output, scale, num_tiles, total, 1, shape)),
            (_producer, (rings, batch, lists, queries, cache, p_visited, num_tiles, total, COUNT, shape)),
        ],
        [4, 4],
        [REGS[0], REGS[1]],
    )


def piece_positions(group: int) -> int:
    """Positions of a piece, with so many query heads per KV head."""
    return 2 * (ROWS // group)


def unsupported_shape(group: int, block_q: int, head_size: int, dtype: torch.dtype) -> str | None:
    """Why this version does not run a shape, None if it does: a tile of the pattern must consist of whole pieces."""
    if head_size not in (64, 128):
        return f"it takes heads of 64 and 128 channels, not {head_size}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16 queries, not {dtype}"
    if group > ROWS:
        return f"it takes at most {ROWS} query heads per KV head, not {group}"
    if block_q % piece_positions(group):
        return (
            f"with {group} query heads per KV head it takes tiles of multiples of {piece_positions(group)} rows, "
            f"not {block_q}"
        )
    return None


def unsupported(q: Tensor, kv: PagedKV, index: TileIndex) -> str | None:
    """Why this version does not run a call on a device that it is for, None if it does."""
    if kv.cache.dtype != q.dtype:
        return f"it takes a cache of the queries' type, {q.dtype}, not {kv.cache.dtype}"
    reason = unsupported_shape(q.shape[1] // kv.num_kv_heads, index.pattern.block_q, kv.head_size, q.dtype)
    if reason is None and not aligned(q, kv.cache):
        return "rows of queries or of the cache do not begin at multiples of 16 bytes"
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
    regs: tuple[int, int] = REGISTERS,
) -> Tensor:
    """As ``paged.attend_tiles``, for calls of which ``unsupported`` says nothing; never waits for the device.

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
    # Rows may start anywhere in a piece.
    num_tiles = cdiv(batch.max_rows - 1, piece_positions(group)) + 1
    total = num_tiles * num_kv_heads * batch.num_requests
    strides = kv.cache.stride()
    launch(
        _attend_tiles_kernel, (min(total, multiprocessors(q.device)),),
        (
            q, kv.cache, out, visited, kv.block_table, batch.row_start, batch.row_end, batch.seq_len,
            index.starts, index.counts, index.slots, scale / math.log(2), q.stride(0), q.stride(1), out.stride(0),
            out.stride(1), *strides[:3], kv.block_table.stride(0), num_tiles, total, index.starts.shape[1],
            pattern.reach,
        ),
        HEADS=num_kv_heads, GROUP=group, POSITIONS=ROWS // group, BLOCK_Q=pattern.block_q, BLOCK_K=pattern.block_k,
        D=size, KEYS=KEYS, STAGES=3 if size == 128 else 6, BLOCK_SIZE=kv.block_size,
        LINEAR=strides[0] == kv.block_size * strides[2], COUNT=visited is not None, REGS=regs,
    )  # fmt: skip
    return out
