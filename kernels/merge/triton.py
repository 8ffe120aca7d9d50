# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Union of columns, diagonals, window and sinks in a form that every query tile can read, or a list for each tile, for
CUDA devices.

The union of a tile is never written out (that would grow with tiles times keys). Two facts make one small index per
request and KV head enough for all tiles:

- With ``block_k`` dividing ``block_q``, which granules the diagonals of a tile touch depends on the tile only by a
  shift. Granule ``g`` of the tile that starts at ``t0`` belongs to it iff some selected distance lies in
  ``[r * block_k - block_k + 1, r * block_k + L - 1]`` with ``r = t0 // block_k - g`` and ``L`` the tile's length. So
  the *relative* granules ``r`` are listed once; close diagonals share granules in this list already, and each granule
  is in it once.
- ``near[r]``, how far the smallest selected distance lies behind the lower end of that interval, answers "is this key
  covered by a diagonal granule" with one load: iff ``near[r] <= L + block_k - 2``. The last, shorter tile of a
  sequence reads the same table.

Sinks are listed as columns: a tile drops a column iff its window or a granule covers it, and that is what must happen
to a sink, too. The Hopper kernel does it the other way round: it drops from the granules what is a column or a sink, by
the columns' flags, which have to stay as they are from ``build_index`` to ``attend``. Granules of the local window (a
contiguous range that is cheaper to address directly) are not listed.

The list of a tile comes from its bits: a program counts them, takes as much of the common room, and then takes the
lowest bit of every word at a time until none is left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..index import BLOCK, RANK, Index
from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV
from ..tile_index import EVERYTHING, TileIndex

LISTED_WORDS = 512  # bits of so many words become entries of a list at once


@triton.jit
def _merged(p_flags, i_list, o_c, n, sinks, width):
    """Whether positions are columns or sinks; ``i_list`` is the number of the head's flags of columns."""
    # [BLOCK]
    b_flag = tl.load(p_flags + i_list * width + o_c, mask=o_c < n, other=0)
    return ((b_flag != 0) | (o_c < sinks)) & (o_c < n)


@triton.jit(do_not_specialize=["sinks", "window_granules", "width", "granule_width"])
def _count_kernel(
    p_flags, p_near, p_counts, p_seq_len, sinks, window_granules, width, granule_width,
    HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes ``near`` and counts list entries, block by block."""
    i_b, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_seq_len + i_r)
    if i_b * BLOCK > n + BLOCK:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    i_flags = (i_r * 2 * HEADS + i_h).to(tl.int64)
    m_column = _merged(p_flags, i_flags, o_c, n, sinks, width)
    num_blocks = width // BLOCK
    tl.store(p_counts + i_flags * num_blocks + i_b, tl.sum(m_column.to(tl.int32), 0))
    if i_b * BLOCK < granule_width:
        b_near = tl.full([BLOCK], 255, tl.int32)
        p_distance = p_flags + (i_flags + HEADS) * width
        for w in range(BLOCK_Q + BLOCK_K - 1):
            o_d = o_c * BLOCK_K - BLOCK_K + 1 + w
            # [BLOCK]
            b_flag = tl.load(p_distance + o_d, mask=(o_d >= 0) & (o_d < n), other=0)
            b_near = tl.minimum(b_near, tl.where(b_flag != 0, w, 255))
        i_near = (i_r * HEADS + i_h).to(tl.int64) * granule_width
        tl.store(p_near + i_near + o_c, b_near.to(tl.uint8))
        m_granule = (b_near < 255) & (o_c > window_granules)
        tl.store(p_counts + (i_flags + HEADS) * num_blocks + i_b, tl.sum(m_granule.to(tl.int32), 0))


@triton.jit
def _before(p_counts, i_list, i_b, num_blocks, BLOCKS: tl.constexpr):
    """Sum of the counts of the blocks before ``i_b``."""
    o_b = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(p_counts + i_list * num_blocks + o_b, mask=o_b < i_b, other=0), 0)


@triton.jit(do_not_specialize=["stride_table", "sinks", "window_granules", "width", "granule_width"])
def _list_kernel(
    p_flags, p_near, p_counts, p_columns, p_slots, p_rank, p_granules, p_granule_rank, p_seq_len, p_table,
    stride_table, sinks, window_granules, width, granule_width,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Writes the lists and their rank tables."""
    i_b, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_seq_len + i_r)
    if i_b * BLOCK > n + BLOCK:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    i_flags = (i_r * 2 * HEADS + i_h).to(tl.int64)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    num_blocks = width // BLOCK
    m_column = _merged(p_flags, i_flags, o_c, n, sinks, width)
    b_one = m_column.to(tl.int32)
    b_place = _before(p_counts, i_flags, i_b, num_blocks, BLOCKS) + tl.cumsum(b_one, 0) - b_one
    tl.store(p_columns + i_head * width + b_place, o_c, mask=m_column)
    b_block = tl.load(p_table + i_r.to(tl.int64) * stride_table + o_c // BLOCK_SIZE, mask=m_column, other=0)
    tl.store(p_slots + i_head * width + b_place, b_block * BLOCK_SIZE + o_c % BLOCK_SIZE, mask=m_column)
    tl.store(p_rank + i_head * (width // RANK) + o_c // RANK, b_place, mask=o_c % RANK == 0)
    if i_b * BLOCK < granule_width:
        # [BLOCK]
        b_near = tl.load(p_near + i_head * granule_width + o_c)
        m_granule = (b_near < 255) & (o_c > window_granules)
        b_one = m_granule.to(tl.int32)
        b_place = _before(p_counts, i_flags + HEADS, i_b, num_blocks, BLOCKS) + tl.cumsum(b_one, 0) - b_one
        tl.store(p_granules + i_head * granule_width + b_place, o_c, mask=m_granule)
        tl.store(p_granule_rank + i_head * (granule_width // RANK) + o_c // RANK, b_place, mask=o_c % RANK == 0)


def build_index(index: Index, kv: PagedKV, batch: Batch) -> Index:
    """As ``paged.build_index``."""
    if batch.num_requests == 0:
        return index
    pattern, num_heads = index.pattern, kv.num_kv_heads
    width, granule_width = index.columns.shape[2], index.granules.shape[2]
    sinks, window_granules = pattern.sink_keys, pattern.window_granules
    grid = (cdiv(batch.max_seq_len, BLOCK) + 1, num_heads, batch.num_requests)
    launch(
        _count_kernel, grid,
        (
            index.flags, index.near, index.counts, batch.seq_len, sinks, window_granules, width, granule_width,
        ),
        HEADS=num_heads, BLOCK_Q=pattern.block_q, BLOCK_K=pattern.block_k, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        _list_kernel, grid,
        (
            index.flags, index.near, index.counts, index.columns, index.slots, index.rank, index.granules,
            index.granule_rank, batch.seq_len, kv.block_table, kv.block_table.stride(0), sinks, window_granules,
            width, granule_width,
        ),
        HEADS=num_heads, BLOCK_SIZE=kv.block_size, BLOCK=BLOCK, BLOCKS=next_power_of_2(width // BLOCK),
        RANK=RANK,
    )  # fmt: skip
    return index


@triton.jit
def _low_bits(b_count):
    """Words whose lowest ``b_count`` bits are set; any number."""
    b_few = tl.minimum(tl.maximum(b_count, 0), 31)
    return tl.where(b_count >= 32, -1, (tl.full(b_count.shape, 1, tl.int32) << b_few) - 1)


@triton.jit
def _bit_count(b_word):
    """How many bits are set in each word; what a shift brings in with the sign is masked."""
    b_word = b_word - ((b_word >> 1) & 0x55555555)
    b_word = (b_word & 0x33333333) + ((b_word >> 2) & 0x33333333)
    b_word = (b_word + (b_word >> 4)) & 0x0F0F0F0F
    b_word = b_word + (b_word >> 8)
    return (b_word + (b_word >> 16)) & 63


@triton.jit
def _listed(p_bits, o_w, window, sinks, marked):
    """Words of what a tile lists: sinks and keys marked in the words before ``marked``, all before its window."""
    b_first = o_w * 32
    # [WORDS]
    b_word = tl.load(p_bits + o_w, mask=b_first < marked, other=0)
    return (b_word | _low_bits(sinks - b_first)) & _low_bits(window - b_first)


@triton.jit
def _zero_kernel(p_used):
    """Nothing is taken."""
    tl.store(p_used, 0)


@triton.jit(do_not_specialize=["stride_table", "tiles", "words", "room", "reach", "sinks"])
def _tiles_kernel(
    p_bits, p_bars, p_starts, p_counts, p_slots, p_used, p_row_start, p_row_end, p_seq_len, p_table,
    stride_table, tiles, words, room, reach, sinks,
    HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr,
    EVERYTHING: tl.constexpr,
):  # fmt: skip
    """The list of one tile."""
    i_t, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_start, n = tl.load(p_row_start + i_r), tl.load(p_seq_len + i_r)
    rows = tl.load(p_row_end + i_r) - row_start
    tile = (n - rows) // BLOCK_Q + i_t
    if rows <= 0:
        return
    if tile * BLOCK_Q >= n:
        return
    i_place = i_h.to(tl.int64) * tiles + row_start // BLOCK_Q + 2 * i_r + i_t
    window = tl.maximum(tile * BLOCK_Q - reach + 1, 0) // BLOCK_K * BLOCK_K
    bar = tl.load(p_bars + i_r * HEADS + i_h)
    marked = tl.where(bar == float("inf"), 0, window)
    everything = bar == -float("inf")
    p_bits += i_place * words
    o_w = tl.arange(0, WORDS)
    end = tl.where(everything, 0, tl.maximum(marked, tl.minimum(window, sinks)))
    b_total = tl.zeros([WORDS], tl.int32)
    for i in range(0, tl.cdiv(end, 32), WORDS):
        b_total += _bit_count(_listed(p_bits, i + o_w, window, sinks, marked))
    total = tl.sum(b_total, 0)
    start = 0
    # Who sees that nothing is left takes nothing, so that the sum stays in range.
    if not everything:
        start = tl.atomic_add(p_used, 0)
        if start <= room:
            start = tl.atomic_add(p_used, total)
        everything = (start < 0) | (start > room - total)
    tl.store(p_starts + i_place, tl.where(everything, 0, start))
    tl.store(p_counts + i_place, tl.where(everything, EVERYTHING, total))
    if everything:
        return
    p_slots += start
    p_table += i_r.to(tl.int64) * stride_table
    for i in range(0, tl.cdiv(end, 32), WORDS):
        b_word = _listed(p_bits, i + o_w, window, sinks, marked)
        b_count = _bit_count(b_word)
        b_place = tl.cumsum(b_count, 0) - b_count
        for _ in range(tl.max(b_count, 0)):
            m_j = b_word != 0
            # The bits below the lowest one that is set say which one it is.
            b_rest = b_word & (b_word - 1)
            b_j = (i + o_w) * 32 + _bit_count((b_word ^ b_rest) - 1)
            b_block = tl.load(p_table + b_j // BLOCK_SIZE, mask=m_j, other=0)
            tl.store(p_slots + b_place, b_block * BLOCK_SIZE + b_j % BLOCK_SIZE, mask=m_j)
            b_place += 1
            b_word = b_rest
        p_slots += tl.sum(b_count, 0)


def build_tiles(index: TileIndex, kv: PagedKV, batch: Batch) -> TileIndex:
    """As ``paged.build_tiles``; in which order tiles take room is left to chance."""
    if batch.num_requests == 0:
        return index
    pattern, (num_heads, tiles, words) = index.pattern, index.bits.shape
    launch(_zero_kernel, (1,), (index.used,), num_warps=1)
    if batch.max_rows == 0:
        return index
    launch(
        _tiles_kernel, (cdiv(batch.max_rows - 1, pattern.block_q) + 1, num_heads, batch.num_requests),
        (
            index.bits, index.bars, index.starts, index.counts, index.slots, index.used, batch.row_start,
            batch.row_end, batch.seq_len, kv.block_table, kv.block_table.stride(0), tiles, words,
            index.slots.shape[0], pattern.reach, pattern.sink_keys,
        ),
        HEADS=num_heads, BLOCK_Q=pattern.block_q, BLOCK_K=pattern.block_k, BLOCK_SIZE=kv.block_size,
        WORDS=LISTED_WORDS, EVERYTHING=EVERYTHING,
    )  # fmt: skip
    return index
