# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, call-arg"
"""What the functions of ``hopper.py`` pass on beside the values of ``../hopper_shared.py``: constants, the index, and
the plan of a piece. Prefixes of names are explained in ``hopper.py``."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..hopper_shared import aggregate


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
