# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Selection by cumulative threshold without sorting, for CUDA devices.

A radix select on the logits themselves; the softmax is never written out. With ``max`` the largest logit of a head,
``u = (max - logit) * 2**18`` as an integer below 2**24 orders the tokens: 3.8e-6 in the logit is what float32 resolves
at 32, and what lies 64 below the maximum (1e-28 of its probability) counts as equally unlikely. Two passes over
histograms of 4096 bins, 12 bits each, find the ``u`` at which the threshold is reached; tokens equal to it are taken
from the lowest position (smallest distance) up.

A bin holds the number of its tokens and their mass in one 64-bit integer, so that one atomic addition counts both, and
sums do not depend on the order of additions. The mass is relative to the bin's own upper edge, which keeps full
precision in every bin: ``count << 42 | sum of (1 - exp(-(distance to the edge))) * 2**26``.

A list is what is ranked: the logits of one head of one request for columns, or for diagonals.

Kernels: gather logits from the cache slots and block maxima; histogram; cut; finer histogram; cut; count ties; write
flags. Nothing depends on values on the host.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..gathered import BLOCK, GatheredLogits
from ..index import Index
from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV
from ..types import UNLIMITED, Budgets
from .paged import BINS, COPIES, NO_CAP, SelectWorkspace

# In kernels: a distance ``u`` from the maximum is in steps of 2**-18; its upper 12 bits are a coarse bin, its lower a
# fine one. Of what a bin holds, the count begins at bit 42, and the mass below it is in steps of 2**-26.
STEPS = tl.constexpr(262144.0)
UNLIKELY = tl.constexpr(16777215)  # the largest distance: all that are too unlikely to tell apart
FINE_BINS = tl.constexpr(4096)
COUNT_SHIFT = tl.constexpr(42)
ONE_TOKEN = tl.constexpr(1 << 42)
MASS_BITS = tl.constexpr((1 << 42) - 1)
MASS_STEPS = tl.constexpr(67108864.0)


@triton.jit(do_not_specialize=["stride_table", "width"])
def _gather_kernel(
    p_cache, p_table, p_seq_len, p_logits, p_max, stride_slot, stride_table, width,
    HEADS: tl.constexpr, LISTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Logits ``[slot, 2 * HEADS]`` of one block of positions into lists ``[2, HEADS, C]``, and their maxima."""
    i_b, i_r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(p_seq_len + i_r)
    if i_b * BLOCK >= n:
        return
    o_list = tl.arange(0, LISTS)
    # Column 2 * h + kind of the cache is list kind * HEADS + h here.
    b_list = (o_list % 2) * HEADS + o_list // 2
    b_max = tl.full([LISTS], float("-inf"), tl.float32)
    for i_s in range(0, BLOCK, SUB):
        o_c = i_b * BLOCK + i_s + tl.arange(0, SUB)
        m_c = o_c < n
        b_block = tl.load(p_table + i_r * stride_table + o_c // BLOCK_SIZE, mask=m_c, other=0).to(tl.int64)
        b_slot = b_block * BLOCK_SIZE + o_c % BLOCK_SIZE
        m_l = m_c[:, None] & (o_list < 2 * HEADS)[None, :]
        # [SUB, LISTS]
        b_l = tl.load(p_cache + b_slot[:, None] * stride_slot + o_list[None, :], mask=m_l, other=float("-inf"))
        b_l = b_l.to(tl.float32)
        # A NaN counts as the largest logit: a broken estimate is kept first and never hidden.
        b_l = tl.where(b_l != b_l, 1e30, tl.minimum(b_l, 1e30))
        b_max = tl.maximum(b_max, tl.max(b_l, 0))
        tl.store(p_logits + (i_r * 2 * HEADS + b_list)[None, :] * width + o_c[:, None], b_l, mask=m_l)
    tl.store(p_max + (i_r * 2 * HEADS + b_list) * (width // BLOCK) + i_b, b_max, mask=o_list < 2 * HEADS)


@triton.jit
def _order(p_logits, p_max, i_list, o_c, n, width, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """``u`` of positions ``o_c`` of one list; ``UNLIKELY`` for all that are too unlikely to tell apart."""
    o_b = tl.arange(0, BLOCKS)
    # [BLOCKS]
    b_max = tl.load(p_max + i_list * (width // BLOCK) + o_b, mask=o_b * BLOCK < n, other=float("-inf"))
    b_l = tl.load(p_logits + i_list * width + o_c, mask=o_c < n, other=float("-inf"))
    b_u = tl.minimum((tl.max(b_max, 0) - b_l) * STEPS, 16777215.0)
    # Infinite logits: their distance from an infinite maximum is no number.
    m_number = b_u == b_u
    return tl.where(m_number, b_u, 0.0).to(tl.int32)


@triton.jit(do_not_specialize=["width"])
def _histogram_kernel(
    p_logits, p_max, p_seq_len, p_bins, p_cuts, width,
    HEADS: tl.constexpr, FINE: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Adds a block of tokens to the bins of one list: the upper 12 bits of ``u``, or the lower within the cut's bin."""
    i_b, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(p_seq_len + i_list // (2 * HEADS))
    if i_b * BLOCK >= n:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    b_u = _order(p_logits, p_max, i_list, o_c, n, width, BLOCK, BLOCKS)
    m_counted = (o_c < n) & (b_u < UNLIKELY)
    if FINE:
        m_cut_bin = b_u // FINE_BINS == tl.load(p_cuts + i_list * 4)
        m_counted = m_counted & m_cut_bin
        b_bin = b_u % FINE_BINS
        b_entry = tl.full([BLOCK], ONE_TOKEN, tl.int64)
    else:
        b_bin = b_u // FINE_BINS
        b_lost = 1.0 - tl.exp((b_u % FINE_BINS).to(tl.float32) * (-1.0 / STEPS))
        b_entry = (b_lost * MASS_STEPS + 0.5).to(tl.int64) + ONE_TOKEN
    p_list = p_bins + ((i_list * 2 + FINE) * COPIES + i_b % COPIES) * BINS
    tl.atomic_add(p_list + b_bin, b_entry, mask=m_counted, sem="relaxed")


@triton.jit(do_not_specialize=["min_0", "min_1", "max_0", "max_1"])
def _cut_kernel(
    p_bins, p_seq_len, p_tau, p_cuts, p_above, p_mass, min_0, min_1, max_0, max_1,
    HEADS: tl.constexpr, FINE: tl.constexpr, BINS: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """Finds the bin in which a list's set ends: as many tokens as reach tau, at least and at most so many."""
    i_list = tl.program_id(0).to(tl.int64)
    n = tl.load(p_seq_len + i_list // (2 * HEADS)).to(tl.int64)
    i_kind = (i_list // HEADS) % 2
    tau = tl.load(p_tau + i_list % (2 * HEADS))
    minimum = tl.where(i_kind == 0, min_0, min_1).to(tl.int64)
    maximum = tl.minimum(tl.where(i_kind == 0, max_0, max_1).to(tl.int64), n)
    o_b = tl.arange(0, BINS)
    b_packed = tl.zeros([BINS], tl.int64)
    for i_copy in range(COPIES):
        # [BINS]
        b_packed += tl.load(p_bins + ((i_list * 2 + FINE) * COPIES + i_copy) * BINS + o_b)
    b_count = b_packed >> COUNT_SHIFT
    b_lost = (b_packed & MASS_BITS).to(tl.float64) * (1.0 / MASS_STEPS)
    if FINE:
        coarse = tl.load(p_cuts + i_list * 4)
        edge = (coarse * FINE_BINS + o_b).to(tl.float64) * (1.0 / STEPS)
        before, mass_before = tl.load(p_above + i_list), tl.load(p_mass + i_list * 2 + 1)
    else:
        coarse = 0
        edge = o_b.to(tl.float64) * (1.0 / 64.0)
        before, mass_before = tl.zeros([], tl.int64), tl.zeros([], tl.float64)
    b_mass = (b_count.to(tl.float64) - b_lost) * tl.exp(-edge)
    # Sums in a tree: their rounding, 1e-15, decides nothing but exact ties between a sum and the threshold.
    b_sum = mass_before + tl.cumsum(b_mass, 0)
    b_seen = before + tl.cumsum(b_count, 0)
    if FINE:
        total = tl.load(p_mass + i_list * 2)
    else:
        total = tl.sum(b_mass, 0)
        tl.store(p_mass + i_list * 2, total)
    goal = tau * total
    # A set ends with the bin whose tokens, and those before it, reach tau and the minimum, or the maximum; with
    # tau >= 1 at the maximum only, with tau <= 0 at the minimum.
    everything, minimal = tau >= 1.0, tau <= 0.0
    m_threshold, m_minimum, m_maximum = b_sum >= goal, b_seen >= minimum, b_seen >= maximum
    m_minimal = b_seen >= tl.minimum(minimum, maximum)
    m_end = (m_threshold & m_minimum) | m_maximum
    m_end = tl.where(everything, m_maximum, tl.where(minimal, m_minimal, m_end))
    found = tl.min(tl.where(m_end, o_b, BINS), 0)
    m_before = o_b < found
    seen = before + tl.sum(tl.where(m_before, b_count, 0), 0)
    mass = mass_before + tl.sum(tl.where(m_before, b_mass, 0.0), 0)
    if FINE:
        # Tokens of one fine bin are equally likely: as many of them as the threshold still needs.
        weight = tl.exp(-(coarse * FINE_BINS + found).to(tl.float64) * (1.0 / STEPS))
        need = tl.ceil(tl.minimum((goal - mass) / weight, n.to(tl.float64))).to(tl.int64)
        need = tl.where(everything, n, tl.where(minimal, 0, need))
        # No bin completes the set: nothing but unlikely tokens is left, for the minimum or all of them.
        incomplete, reached = found == BINS, (mass >= goal) & (tau < 1.0)
        u = tl.where(incomplete, UNLIKELY, coarse * FINE_BINS + found)
        need = tl.where(incomplete, tl.where(reached, 0, n), tl.maximum(need, 1))
        take = tl.minimum(tl.maximum(seen + need, minimum), maximum) - seen
        empty = minimal & (minimum == 0)
        take = tl.where(maximum == 0, 0, tl.where(empty, 0, take))
        tl.store(p_cuts + i_list * 4 + 1, u)
        tl.store(p_cuts + i_list * 4 + 2, take.to(tl.int32))
    else:
        tl.store(p_cuts + i_list * 4, found)
        tl.store(p_above + i_list, seen)
        tl.store(p_mass + i_list * 2 + 1, mass)


@triton.jit(do_not_specialize=["width"])
def _tie_kernel(
    p_logits, p_max, p_seq_len, p_cuts, p_ties, width,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Counts the tokens of a block that are equal to the cut."""
    i_b, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = tl.load(p_seq_len + i_list // (2 * HEADS))
    if i_b * BLOCK >= n:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    b_u = _order(p_logits, p_max, i_list, o_c, n, width, BLOCK, BLOCKS)
    m_tie = (o_c < n) & (b_u == tl.load(p_cuts + i_list * 4 + 1))
    tl.store(p_ties + i_list * (width // BLOCK) + i_b, tl.sum(m_tie.to(tl.int32), 0))


@triton.jit(do_not_specialize=["width", "flag_width"])
def _flag_kernel(
    p_logits, p_max, p_seq_len, p_cuts, p_ties, p_flags, p_bins, width, flag_width,
    HEADS: tl.constexpr, ROOM: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Marks the members of the set: at their position (columns) or their distance from the end (diagonals).

    Clears the list's ``ROOM`` bins for the next call, which saves that call a launch.
    """
    i_b, i_list = tl.program_id(0), tl.program_id(1).to(tl.int64)
    for i_bin in range(i_b * BLOCK, ROOM, tl.num_programs(0) * BLOCK):
        tl.store(p_bins + i_list * ROOM + i_bin + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.int64))
    n = tl.load(p_seq_len + i_list // (2 * HEADS))
    if i_b * BLOCK >= n:
        return
    diagonals = (i_list // HEADS) % 2 == 1
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < n
    b_u = _order(p_logits, p_max, i_list, o_c, n, width, BLOCK, BLOCKS)
    cut, take = tl.load(p_cuts + i_list * 4 + 1), tl.load(p_cuts + i_list * 4 + 2)
    m_tie = m_c & (b_u == cut)
    o_b = tl.arange(0, BLOCKS)
    # [BLOCKS]
    b_ties = tl.load(p_ties + i_list * (width // BLOCK) + o_b, mask=o_b * BLOCK < n, other=0)
    # How many equal tokens are preferred to this one: lower positions; for diagonals those behind it.
    b_upto = tl.sum(tl.where(o_b < i_b, b_ties, 0), 0) + tl.cumsum(m_tie.to(tl.int32), 0)
    b_rank = tl.where(diagonals, tl.sum(b_ties, 0) - b_upto, b_upto - 1)
    m_likelier, m_preferred = m_c & (b_u < cut), m_tie & (b_rank < take)
    m_kept = (m_likelier | m_preferred) & (take > 0)
    b_place = tl.where(diagonals, n - 1 - o_c, o_c)
    tl.store(p_flags + i_list * flag_width + b_place, m_kept.to(tl.uint8), mask=m_c)


def gather(logits: Tensor, kv: PagedKV, batch: Batch, gathered: GatheredLogits) -> None:
    """As ``paged.gather``."""
    if batch.num_requests == 0:
        return
    heads = kv.num_kv_heads
    launch(
        _gather_kernel, (cdiv(batch.max_seq_len, BLOCK), batch.num_requests),
        (
            logits, kv.block_table, batch.seq_len, gathered.logits, gathered.block_max, logits.stride(0),
            kv.block_table.stride(0), gathered.logits.shape[3],
        ),
        HEADS=heads, LISTS=next_power_of_2(2 * heads), BLOCK_SIZE=kv.block_size, BLOCK=BLOCK, SUB=256,
    )  # fmt: skip


def select(
    gathered: GatheredLogits,
    batch: Batch,
    tau: Tensor,
    index: Index,
    workspace: SelectWorkspace,
    *,
    budgets: Budgets = UNLIMITED,
) -> None:
    """As ``paged.select``, but for differences of 4e-6 in the logits, which count as ties, and a sum within rounding
    of the threshold."""
    if batch.num_requests == 0:
        return
    min_columns, max_columns, min_diagonals, max_diagonals = budgets
    limits = (
        min_columns, min_diagonals, NO_CAP if max_columns is None else max_columns,
        NO_CAP if max_diagonals is None else max_diagonals,
    )  # fmt: skip
    room = gathered.logits
    heads, width = room.shape[2:]
    grid = (cdiv(batch.max_seq_len, BLOCK), batch.num_requests * 2 * heads)
    blocks = next_power_of_2(width // BLOCK)
    lists = (room, gathered.block_max, batch.seq_len)
    for fine in (False, True):
        launch(
            _histogram_kernel, grid, (*lists, workspace.bins, workspace.cuts, width),
            HEADS=heads, FINE=fine, BINS=BINS, COPIES=COPIES, BLOCK=BLOCK, BLOCKS=blocks,
        )  # fmt: skip
        launch(
            _cut_kernel, (grid[1],),
            (workspace.bins, batch.seq_len, tau, workspace.cuts, workspace.above, workspace.mass, *limits),
            num_warps=8, HEADS=heads, FINE=fine, BINS=BINS, COPIES=COPIES,
        )  # fmt: skip
    launch(_tie_kernel, grid, (*lists, workspace.cuts, workspace.ties, width), HEADS=heads, BLOCK=BLOCK, BLOCKS=blocks)
    launch(
        _flag_kernel, grid,
        (*lists, workspace.cuts, workspace.ties, index.flags, workspace.bins, width, index.flags.shape[3]),
        HEADS=heads, ROOM=2 * COPIES * BINS, BLOCK=BLOCK, BLOCKS=blocks,
    )  # fmt: skip
