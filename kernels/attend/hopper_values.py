# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, call-arg"
"""What the functions of ``hopper.py`` pass on: the piece, its plan, views of the index and the cache, and the rings.

Named as in FlashAttention 3 and CUTLASS where those have the thing: a ``Pipeline`` is a ring of places in shared memory
with its barriers, a ``PipelineState`` says which place is next and in which round. Prefixes of names are explained in
``hopper.py``.
"""

from __future__ import annotations

import typing

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier
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
class Shape:
    """What is known at compile time. ``PACK`` is ``GROUP`` as a power of two, ``POSITIONS`` those of a consumer."""

    HEADS: gl.constexpr
    GROUP: gl.constexpr
    PACK: gl.constexpr
    POSITIONS: gl.constexpr
    BLOCK_Q: gl.constexpr
    BLOCK_K: gl.constexpr
    RANK: gl.constexpr
    D: gl.constexpr
    KEYS: gl.constexpr
    STAGES: gl.constexpr


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
class IndexView:
    """The lists of all KV heads of all requests, or, after ``of``, of one."""

    p_columns: gl.tensor
    p_slots: gl.tensor
    p_rank: gl.tensor
    p_granules: gl.tensor
    p_granule_rank: gl.tensor
    p_near: gl.tensor
    p_flags: gl.tensor
    width: gl.tensor
    rank_width: gl.tensor
    granule_width: gl.tensor
    granule_rank_width: gl.tensor
    window: gl.tensor
    sinks: gl.tensor

    @gluon.jit
    def of(self, piece, shape):
        """The lists of the head of ``piece``."""
        i_head = (piece.i_r * shape.HEADS + piece.i_h).to(gl.int64)
        return IndexView(
            p_columns=self.p_columns + i_head * self.width,
            p_slots=self.p_slots + i_head * self.width,
            p_rank=self.p_rank + i_head * self.rank_width,
            p_granules=self.p_granules + i_head * self.granule_width,
            p_granule_rank=self.p_granule_rank + i_head * self.granule_rank_width,
            p_near=self.p_near + i_head * self.granule_width,
            p_flags=self.p_flags + (i_head + piece.i_r * shape.HEADS) * self.width,
            width=self.width,
            rank_width=self.rank_width,
            granule_width=self.granule_width,
            granule_rank_width=self.granule_rank_width,
            window=self.window,
            sinks=self.sinks,
        )

    @gluon.jit
    def granules(self, o_f, b_lanes, BLOCK_K: gl.constexpr):
        """Relative granules of lanes ``o_f``, -1 for none."""
        return gl.load(self.p_granules + o_f // BLOCK_K, mask=o_f < b_lanes, other=-1)


@aggregate
class Plan:
    """Where the tiles of a piece start, and how many tiles and keys of which kind it has.

    ``tile`` and ``length``: the pattern's tile around a consumer's positions; ``start``: where its window starts;
    ``lanes``: keys of its granules; ``base``: the first key of the own tile. Of tiles, ``num_window`` are plain ones of
    the window and ``num_plain`` of columns; ``num_rest``, with a bias, are the ragged end of the window, ``num_bias``
    all with a bias; ``num_diagonal`` hold granules and ``num_mixed`` of those are followed by a plain one.
    ``num_columns`` counts keys, those of plain tiles too.
    """

    tile: gl.tensor
    length: gl.tensor
    start: gl.tensor
    lanes: gl.tensor
    num_columns: gl.tensor
    tile2: gl.tensor
    length2: gl.tensor
    start2: gl.tensor
    lanes2: gl.tensor
    num_columns2: gl.tensor
    base: gl.tensor
    num_window: gl.tensor
    num_plain: gl.tensor
    num_rest: gl.tensor
    num_bias: gl.tensor
    num_diagonal: gl.tensor
    num_mixed: gl.tensor

    @gluon.jit
    def early(self):
        """How many plain tiles come before the diagonals."""
        return self.num_window + self.num_plain - self.num_mixed


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
