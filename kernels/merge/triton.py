# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Union of columns, diagonals, window and sinks in a form that every query tile can read, for CUDA devices.

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
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..index import BLOCK, RANK, Index
from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV


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
