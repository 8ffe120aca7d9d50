# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, call-arg"
"""What the attention kernels for compute capability 9.0 share: values that functions pass on, the consumers' softmax,
the producer's copies.

Named as in FlashAttention 3 and CUTLASS where those have the thing: a ``Pipeline`` is a ring of places in shared memory
with its barriers, a ``PipelineState`` says which place is next and in which round. Prefixes of names are explained in
``attend/hopper.py``, which tells who does what.

A ``shape`` is an aggregate of the kernel's own, with these constants at least: ``HEADS`` (KV heads), ``GROUP`` (query
heads of each), ``PACK`` (rows of a position), ``POSITIONS`` (of a consumer), ``D``, ``KEYS`` (of a tile), ``STAGES``.
"""

from __future__ import annotations

import typing

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
from triton.language.core import _aggregate, base_value

# Its name from Triton 3.6 on, and a later one
load_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


def aggregate(cls):
    """Makes a class with annotated fields a value that kernels pass on; its constructor takes them by name.

    Triton 3.6 has aggregates, but neither a constructor made for them nor annotations that are evaluated later. A field
    may be a constant where Triton makes one of an argument: of None, and of a stride that is 1.
    """
    cls.__annotations__ = typing.get_type_hints(cls)
    names = tuple(cls.__annotations__)

    def init(self, **values):
        for name in names:
            value = values.pop(name)
            setattr(self, name, value if isinstance(value, base_value) else gl.constexpr(value))
        if values:
            raise TypeError(f"{cls.__name__} has no {', '.join(values)}")

    # Nothing that a kernel's hash has to cover: fields are given by name.
    vars(init)["__triton_builtin__"] = True
    cls.__init__ = init
    return _aggregate(cls)


@aggregate
class Requests:
    """Which rows belong to which request: pointers to ``[requests]`` each."""

    p_row_start: gl.tensor
    p_row_end: gl.tensor
    p_seq_len: gl.tensor


@aggregate
class Piece:
    """Two consumers' positions of one KV head of one request.

    ``i_p`` is the first position, ``[lo, hi)`` those of the request that have rows, ``first`` the row of position 0,
    were it in the query tensor.
    """

    i_h: gl.tensor
    i_r: gl.tensor
    i_p: gl.tensor
    lo: gl.tensor
    hi: gl.tensor
    first: gl.tensor


@aggregate
class PipelineState:
    """How many tiles have passed through a ring: which place is next, and in an even or odd round."""

    count: gl.tensor
    STAGES: gl.constexpr

    @gluon.jit
    def stage(self):
        return self.count % self.STAGES

    @gluon.jit
    def phase(self):
        return (self.count // self.STAGES) & 1

    @gluon.jit
    def next(self):
        return PipelineState(count=self.count + 1, STAGES=self.STAGES)

    @gluon.jit
    def before(self):
        return PipelineState(count=self.count - 1, STAGES=self.STAGES)


@aggregate
class Pipeline:
    """A ring of places in shared memory that the producer fills and the consumers free, with two barriers a place."""

    places: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.jit
    def at(self, state):
        return self.places.index(state.stage())

    @gluon.jit
    def producer_acquire(self, state):
        stage, phase = state.stage(), state.phase() ^ 1
        mbarrier.wait(self.empty.index(stage), phase)

    @gluon.jit
    def producer_copy(self, state, p_from):
        """Starts to copy rows; the barrier counts every thread of the producer once its copies are done."""
        s_to, full = self.at(state), self.full.index(state.stage())
        load_rows(s_to, p_from)
        async_copy.mbarrier_arrive(full, increment_count=False)

    @gluon.jit
    def consumer_wait(self, state):
        mbarrier.wait(self.full.index(state.stage()), state.phase())

    @gluon.jit
    def consumer_release(self, state):
        mbarrier.arrive(self.empty.index(state.stage()))


@aggregate
class Pipelines:
    """All rings of a program: one place of queries ``[2, 64, D]``; tiles of keys and values ``[KEYS, D]``, whose states
    are the same; biases ``[KEYS]``, of which a place has two neighbouring ones."""

    queries: Pipeline
    keys: Pipeline
    values: Pipeline
    bias: Pipeline


@aggregate
class Cache:
    """The paged cache: of all KV heads of all requests, or, after ``of``, of one."""

    p_kv: gl.tensor
    p_table: gl.tensor
    stride_block: gl.tensor | gl.constexpr
    stride_head: gl.tensor | gl.constexpr
    stride_token: gl.tensor | gl.constexpr
    stride_table: gl.tensor | gl.constexpr
    BLOCK_SIZE: gl.constexpr
    LINEAR: gl.constexpr
    D: gl.constexpr

    @gluon.jit
    def of(self, piece):
        """The cache as the head of ``piece`` sees it."""
        return Cache(
            p_kv=self.p_kv + piece.i_h.to(gl.int64) * self.stride_head,
            p_table=self.p_table + piece.i_r.to(gl.int64) * self.stride_table,
            stride_block=self.stride_block,
            stride_head=self.stride_head,
            stride_token=self.stride_token,
            stride_table=self.stride_table,
            BLOCK_SIZE=self.BLOCK_SIZE,
            LINEAR=self.LINEAR,
            D=self.D,
        )

    @gluon.jit
    def block(self, b_pos):
        """Blocks of positions inside the sequence."""
        return gl.load(self.p_table + b_pos // self.BLOCK_SIZE)

    @gluon.jit
    def slot_in(self, b_block, b_pos):
        """Slots of positions, whose blocks are known."""
        return b_block * self.BLOCK_SIZE + b_pos % self.BLOCK_SIZE

    @gluon.jit
    def slot(self, b_pos):
        """Slots of positions inside the sequence."""
        return self.slot_in(self.block(b_pos), b_pos)

    @gluon.jit
    def rows(self, b_slot):
        """Pointers ``[keys, D]`` to the keys in slots, of which each thread holds one; values lie ``D`` behind."""
        l_kv: gl.constexpr = gl.BlockedLayout([1, 8], [256 // self.D, self.D // 8], [4, 1], [1, 0])
        if self.LINEAR:
            b_offset = b_slot.to(gl.int64) * self.stride_token
        else:
            b_offset = (b_slot // self.BLOCK_SIZE).to(gl.int64) * self.stride_block
            b_offset += (b_slot % self.BLOCK_SIZE).to(gl.int64) * self.stride_token
        b_offset = gl.convert_layout(b_offset, gl.SliceLayout(1, l_kv))
        o_d = gl.expand_dims(gl.arange(0, self.D, layout=gl.SliceLayout(0, l_kv)), 0)
        return gl.expand_dims(self.p_kv + b_offset, 1) + o_d


@aggregate
class Queries:
    """Where queries are read."""

    p_q: gl.tensor
    stride_row: gl.tensor | gl.constexpr
    stride_head: gl.tensor | gl.constexpr


@aggregate
class Output:
    """Where outputs and, if asked for, the log-sum-exp go."""

    p_out: gl.tensor
    p_lse: gl.tensor | gl.constexpr
    stride_row: gl.tensor | gl.constexpr
    stride_head: gl.tensor | gl.constexpr
    stride_lse_row: gl.tensor | gl.constexpr
    stride_lse_head: gl.tensor | gl.constexpr
    LSE: gl.constexpr


@aggregate
class Softmax:
    """The online softmax of a consumer's rows: the largest logit so far, and relative to it the sums of weights and of
    weighted values. ``row_max`` and ``row_sum`` have the layout of the rows of ``b_acc``, whatever a tile's length.
    """

    b_acc: gl.tensor
    row_max: gl.tensor
    row_sum: gl.tensor


# Pieces, which every warp group works out for itself


@gluon.jit
def piece_of(i_w, batch, num_tiles, shape):
    """Number ``i_w`` of all pieces. One whose first position lies behind the sequence is empty, as are all of a request
    without rows: it has none that could be read in place of a missing one."""
    i_h = i_w // num_tiles % shape.HEADS
    i_r = i_w // num_tiles // shape.HEADS
    row_end, hi = gl.load(batch.p_row_end + i_r), gl.load(batch.p_seq_len + i_r)
    lo = hi - (row_end - gl.load(batch.p_row_start + i_r))
    # The latest tiles take longest where the sequence is short, so they come first.
    both: gl.constexpr = 2 * shape.POSITIONS
    i_p = lo // both * both + (num_tiles - 1 - i_w % num_tiles) * both
    i_p = gl.where(lo < hi, i_p, hi)
    return Piece(i_h=i_h, i_r=i_r, i_p=i_p, lo=lo, hi=hi, first=row_end - hi)


# Consumers


@gluon.jit
def online_softmax(b_s, b_max, b_sum, b_bias, scale, BIAS: gl.constexpr):
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
def weigh(b_s, softmax, s_bias, scale, BIAS: gl.constexpr, DTYPE: gl.constexpr):
    """Weights of a tile of logits for the product with its values, the factor on the output so far, the new maximum and
    the new sum."""
    l_s: gl.constexpr = b_s.type.layout
    l_o: gl.constexpr = softmax.b_acc.type.layout
    b_max = gl.convert_layout(softmax.row_max, gl.SliceLayout(1, l_s))
    b_sum = gl.convert_layout(softmax.row_sum, gl.SliceLayout(1, l_s))
    if BIAS:
        b_bias = gl.expand_dims(s_bias.load(gl.SliceLayout(0, l_s)).to(gl.float32), 0)
        b_w, b_max, b_sum, b_alpha = online_softmax(b_s, b_max, b_sum, b_bias, scale, True)
    else:
        b_w, b_max, b_sum, b_alpha = online_softmax(b_s, b_max, b_sum, 0.0, scale, False)
    b_p = gl.convert_layout(b_w.to(DTYPE), gl.DotOperandLayout(0, l_o, 2))
    b_factor = gl.expand_dims(gl.convert_layout(b_alpha, gl.SliceLayout(1, l_o)), 1)
    b_max = gl.convert_layout(b_max, gl.SliceLayout(1, l_o))
    b_sum = gl.convert_layout(b_sum, gl.SliceLayout(1, l_o))
    return b_p, b_factor, b_max, b_sum


@gluon.jit
def logits(s_q, s_keys):
    """Starts the product of queries and keys."""
    LENGTH: gl.constexpr = s_keys.shape[0]
    l_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LENGTH, 16])
    b_zero = gl.zeros([64, LENGTH], gl.float32, l_s)
    return warpgroup_mma(s_q, s_keys.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.jit
def softmax_step(tiles, biases, s_q, s_keys, s_values, s_row, rings, b_p, softmax, scale, BIAS: gl.constexpr):
    """The logits of the next tile, whose keys are ``s_keys``, beside the product of the weights ``b_p`` and values
    ``s_values`` of the tile before it; returns the weights of the tile and the softmax without its values. ``s_row`` is
    the bias of the tile, if it has one."""
    rings.keys.consumer_wait(tiles)
    b_s = logits(s_q, s_keys)
    rings.values.consumer_wait(tiles.before())
    b_o = warpgroup_mma(b_p, s_values, softmax.b_acc, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    rings.keys.consumer_release(tiles)
    if BIAS:
        rings.bias.consumer_wait(biases)
    b_p, b_factor, b_max, b_sum = weigh(b_s, softmax, s_row, scale, BIAS, s_q.dtype)
    if BIAS:
        rings.bias.consumer_release(biases)
    b_acc = warpgroup_mma_wait(0, deps=[b_o])
    rings.values.consumer_release(tiles.before())
    return b_p, Softmax(b_acc=b_acc * b_factor, row_max=b_max, row_sum=b_sum)


@gluon.jit
def softmax_steps(
    tiles, biases, count, s_q, rings, b_p, softmax, scale, WHICH: gl.constexpr, BIAS: gl.constexpr
):  # fmt: skip
    """``count`` tiles of both consumers."""
    for _ in range(count):
        b_p, softmax = softmax_step(
            tiles, biases, s_q, rings.keys.at(tiles), rings.values.at(tiles.before()),
            rings.bias.places.index(2 * biases.stage() + WHICH), rings, b_p, softmax, scale, BIAS,
        )  # fmt: skip
        tiles = tiles.next()
        if BIAS:
            biases = biases.next()
    return tiles, biases, b_p, softmax


@gluon.jit
def own_tile(tiles, s_q, rings, i_p, start, base, piece, scale, WHICH: gl.constexpr, shape):
    """Weights of the own tile, whose first key is ``base``, under the causal mask and from ``start`` on; and the
    softmax that begins with it."""
    KEYS: gl.constexpr = shape.KEYS
    rings.keys.consumer_wait(tiles)
    b_s = warpgroup_mma_wait(0, deps=[logits(s_q, rings.keys.at(tiles))])
    rings.keys.consumer_release(tiles)
    l_s: gl.constexpr = b_s.type.layout
    l_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.D, 16])
    l_m: gl.constexpr = gl.SliceLayout(1, l_o)
    # [1, KEYS], [64, 1]
    b_pos = gl.expand_dims(base + gl.arange(0, KEYS, layout=gl.SliceLayout(0, l_s)), 0)
    b_i = gl.expand_dims(i_p + gl.arange(0, 64, layout=gl.SliceLayout(1, l_s)) // shape.PACK, 1)
    # Rows behind the sequence's end, which are not stored, see its last position: no row is without a key.
    m_s = (b_pos <= gl.minimum(b_i, piece.hi - 1)) & (b_pos >= gl.minimum(start, piece.hi - 1))
    b_s = gl.where(m_s, b_s, float("-inf"))
    b_max = gl.full([64], float("-inf"), gl.float32, layout=l_m)
    b_sum = gl.zeros([64], gl.float32, layout=l_m)
    b_acc = gl.zeros([64, shape.D], gl.float32, layout=l_o)
    softmax = Softmax(b_acc=b_acc, row_max=b_max, row_sum=b_sum)
    b_p, _, b_max, b_sum = weigh(b_s, softmax, rings.bias.places.index(WHICH), scale, False, s_q.dtype)
    return b_p, Softmax(b_acc=b_acc, row_max=b_max, row_sum=b_sum)


@gluon.jit
def last_product(tiles, rings, b_p, softmax):
    """The softmax with the values of the tile before ``tiles``, whose weights are ``b_p``."""
    rings.values.consumer_wait(tiles.before())
    b_o = warpgroup_mma(b_p, rings.values.at(tiles.before()), softmax.b_acc, is_async=True)
    b_acc = warpgroup_mma_wait(0, deps=[b_o])
    rings.values.consumer_release(tiles.before())
    return Softmax(b_acc=b_acc, row_max=softmax.row_max, row_sum=softmax.row_sum)


@gluon.jit
def store_rows(output, softmax, piece, i_p, shape, DTYPE: gl.constexpr):
    """Normalises and writes the rows of a consumer, whose first position is ``i_p``."""
    PACK: gl.constexpr = shape.PACK
    l_o: gl.constexpr = softmax.b_acc.type.layout
    # [64], [64, D]
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, l_o))
    b_row = i_p + o_m // PACK
    m_row = (b_row >= piece.lo) & (b_row < piece.hi) & (o_m % PACK < shape.GROUP)
    if shape.POSITIONS * PACK < 64:
        m_row = m_row & (o_m < shape.POSITIONS * PACK)  # the others are positions of the next consumer
    b_head = (piece.i_h * shape.GROUP + o_m % PACK).to(gl.int64)
    b_row = (piece.first + b_row).to(gl.int64)
    o_d = gl.expand_dims(gl.arange(0, shape.D, layout=gl.SliceLayout(0, l_o)), 0)
    b_out = softmax.b_acc * gl.expand_dims(1.0 / softmax.row_sum, 1)
    p_row = gl.expand_dims(output.p_out + b_row * output.stride_row + b_head * output.stride_head, 1)
    gl.store(p_row + o_d, b_out.to(DTYPE), mask=gl.expand_dims(m_row, 1))
    if output.LSE:
        b_lse = (softmax.row_max + gl.log2(softmax.row_sum)) * 0.6931471805599453
        p_lse = output.p_lse + b_row * output.stride_lse_row + b_head * output.stride_lse_head
        gl.store(p_lse, b_lse, mask=m_row)


# The producer


@gluon.jit
def send(tiles, b_slot, cache, rings):
    """Keys and values in slots as one tile of both consumers; returns the state for the next."""
    p_k = cache.rows(b_slot)
    rings.keys.producer_acquire(tiles)
    rings.keys.producer_copy(tiles, p_k)
    rings.values.producer_acquire(tiles)
    rings.values.producer_copy(tiles, p_k + cache.D)
    return tiles.next()


@gluon.jit
def send_bias(biases, m_one, m_two, rings):
    """0 for keys that a consumer sees, -inf for others; returns the state for the next."""
    rings.bias.producer_acquire(biases)
    stage = biases.stage()
    rings.bias.places.index(2 * stage).store(gl.where(m_one, 0.0, float("-inf")).to(gl.float16))
    rings.bias.places.index(2 * stage + 1).store(gl.where(m_two, 0.0, float("-inf")).to(gl.float16))
    mbarrier.arrive(rings.bias.full.index(stage))
    return biases.next()


@gluon.jit
def send_queries(pieces, queries, rings, piece, shape):
    """Queries of both consumers. Where no row is stored, a row of the request or a head of the group is read again."""
    D: gl.constexpr = shape.D
    PACK: gl.constexpr = shape.PACK
    l_q: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    o_m = gl.arange(0, 64, layout=gl.SliceLayout(1, l_q))
    o_d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, l_q)), 0)
    b_head = (piece.i_h * shape.GROUP + gl.minimum(o_m % PACK, shape.GROUP - 1)).to(gl.int64)
    rings.queries.producer_acquire(pieces)
    for i in gl.static_range(2):
        b_row = gl.minimum(gl.maximum(piece.i_p + i * shape.POSITIONS + o_m // PACK, piece.lo), piece.hi - 1)
        b_offset = (piece.first + b_row).to(gl.int64) * queries.stride_row + b_head * queries.stride_head
        load_rows(rings.queries.places.index(i), gl.expand_dims(queries.p_q + b_offset, 1) + o_d)
    async_copy.mbarrier_arrive(rings.queries.full.index(pieces.stage()), increment_count=False)


@gluon.jit
def num_pairs(piece, i_p, start, visited, POSITIONS: gl.constexpr):
    """Pairs of the stored positions from ``i_p`` up, each with ``visited`` keys below its window."""
    first, end = gl.maximum(piece.lo, i_p), gl.minimum(piece.hi, i_p + POSITIONS)
    count = gl.maximum(end - first, 0).to(gl.int64)
    return count * (visited - start + 1) + count * (first + end - 1) // 2


# Shared memory


@gluon.jit
def pipeline(places, STAGES: gl.constexpr):
    """A ring around ``places``; its barriers are not ready yet."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    return Pipeline(places=places, full=full, empty=empty)


@gluon.jit
def pipelines(DTYPE: gl.constexpr, shape):
    """Shared memory of a program, and its barriers: every thread of the producer reports its copies, and one thread a
    bias; each consumer frees a place."""
    D: gl.constexpr = shape.D
    KEYS: gl.constexpr = shape.KEYS
    STAGES: gl.constexpr = shape.STAGES
    l_one: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], DTYPE)
    l_tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([KEYS, D], DTYPE)
    s_q = gl.allocate_shared_memory(DTYPE, [2, 64, D], l_one)
    s_k = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], l_tile)
    s_v = gl.allocate_shared_memory(DTYPE, [STAGES, KEYS, D], l_tile)
    s_bias = gl.allocate_shared_memory(gl.float16, [2 * STAGES, KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    keys = pipeline(s_k, STAGES)
    values = pipeline(s_v, STAGES)
    bias = pipeline(s_bias, STAGES)
    queries = pipeline(s_q, 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(keys.full.index(i), count=128)
        mbarrier.init(values.full.index(i), count=128)
        mbarrier.init(keys.empty.index(i), count=2)
        mbarrier.init(values.empty.index(i), count=2)
        mbarrier.init(bias.full.index(i), count=1)
        mbarrier.init(bias.empty.index(i), count=2)
    mbarrier.init(queries.full.index(0), count=128)
    mbarrier.init(queries.empty.index(0), count=2)
    fence_async_shared()
    return Pipelines(queries=queries, keys=keys, values=values, bias=bias)


def aligned(*tensors: Tensor) -> bool:
    """Whether rows of 16-bit values can be copied 16 bytes at a time."""
    return all(
        tensor.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tensor.stride()[:-1]) for tensor in tensors
    )
