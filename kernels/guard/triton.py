# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Decides on the device which requests sparse attention would not pay for; the host never waits for the answer.

The answer takes the form of two small tensors: the bounds of the query rows for a call of the dense kernel (none where
sparse attention runs) and the end of the rows for ``attend`` (their start where the dense kernel does the work).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..index import RANK, Index
from ..launch import launch, next_power_of_2
from ..paged import Batch
from ..tile_index import TileIndex


@triton.jit(do_not_specialize=["limit", "fixed", "rank_width", "granule_width"])
def _guard_kernel(
    p_row_start, p_row_end, p_seq_len, p_rank, p_granule_rank, p_dense_rows, p_sparse_end, p_counts, limit, fixed,
    rank_width, granule_width, HEADS: tl.constexpr, BH: tl.constexpr, BLOCK_K: tl.constexpr, RANK: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """One request."""
    i_r = tl.program_id(0)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    rows = row_end - row_start
    if rows <= 0:
        tl.store(p_dense_rows + 2 * i_r, 0)
        tl.store(p_dense_rows + 2 * i_r + 1, 0)
        tl.store(p_sparse_end + i_r, row_end)
        return
    o_h = tl.arange(0, BH)
    m_h = o_h < HEADS
    i_head = (i_r * HEADS + o_h).to(tl.int64)
    # [BH], the numbers of list entries: ranks of the sequence's end
    b_columns = tl.load(p_rank + i_head * rank_width + (n + RANK - 1) // RANK, mask=m_h, other=0)
    i_last = n // BLOCK_K + 2
    b_granules = tl.load(p_granule_rank + i_head * granule_width + (i_last + RANK - 1) // RANK, mask=m_h, other=0)
    pairs = rows.to(tl.int64) * (2 * n.to(tl.int64) - rows + 1) // 2
    share = pairs.to(tl.float32) / (rows.to(tl.float32) * n.to(tl.float32))
    b_keys = tl.where(m_h, share * b_columns.to(tl.float32) + b_granules.to(tl.float32) * BLOCK_K + fixed, 0.0)
    keys = tl.sum(b_keys, 0) / HEADS
    density = tl.minimum(keys * rows.to(tl.float32) / pairs.to(tl.float32), 1.0)
    _write(density > limit, i_r, row_start, row_end, pairs, p_dense_rows, p_sparse_end, p_counts, HEADS, COUNT)


@triton.jit
def _write(
    dense, i_r, row_start, row_end, pairs, p_dense_rows, p_sparse_end, p_counts, HEADS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The decision about one request."""
    tl.store(p_dense_rows + 2 * i_r, 0)
    tl.store(p_dense_rows + 2 * i_r + 1, tl.where(dense, row_end - row_start, 0))
    tl.store(p_sparse_end + i_r, tl.where(dense, row_start, row_end))
    if COUNT:
        tl.atomic_add(p_counts, tl.where(dense, pairs * HEADS, 0))
        tl.atomic_add(p_counts + 1, tl.where(dense, 1, 0).to(tl.int64))


@triton.jit(do_not_specialize=["limit"])
def _guard_tiles_kernel(
    p_row_start, p_row_end, p_seq_len, p_density, p_dense_rows, p_sparse_end, p_counts, limit,
    HEADS: tl.constexpr, BH: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """One request."""
    i_r = tl.program_id(0)
    row_start, row_end = tl.load(p_row_start + i_r), tl.load(p_row_end + i_r)
    n = tl.load(p_seq_len + i_r)
    rows = row_end - row_start
    if rows <= 0:
        tl.store(p_dense_rows + 2 * i_r, 0)
        tl.store(p_dense_rows + 2 * i_r + 1, 0)
        tl.store(p_sparse_end + i_r, row_end)
        return
    o_h = tl.arange(0, BH)
    # [BH]
    b_density = tl.load(p_density + (i_r * HEADS).to(tl.int64) + o_h, mask=o_h < HEADS, other=0.0)
    density = tl.sum(b_density, 0) / HEADS
    pairs = rows.to(tl.int64) * (2 * n.to(tl.int64) - rows + 1) // 2
    # What is no number is dense.
    _write(
        (density > limit) | (density != density),
        i_r,
        row_start,
        row_end,
        pairs,
        p_dense_rows,
        p_sparse_end,
        p_counts,
        HEADS,
        COUNT,
    )


def guard(
    index: Index,
    batch: Batch,
    max_density: float,
    *,
    dense_rows: Tensor,
    sparse_end: Tensor,
    counts: Tensor | None = None,
) -> None:
    """As ``paged.guard``, computed in float32."""
    if batch.num_requests == 0:
        return
    pattern, heads = index.pattern, index.rank.shape[1]
    launch(
        _guard_kernel, (batch.num_requests,),
        (
            batch.row_start, batch.row_end, batch.seq_len, index.rank, index.granule_rank, dense_rows, sparse_end,
            counts, float(max_density), float(pattern.near_keys),
            index.rank.shape[2], index.granule_rank.shape[2],
        ),
        num_warps=1, HEADS=heads, BH=next_power_of_2(heads), BLOCK_K=pattern.block_k, RANK=RANK,
        COUNT=counts is not None,
    )  # fmt: skip


def guard_tiles(
    index: TileIndex,
    batch: Batch,
    max_density: float,
    *,
    dense_rows: Tensor,
    sparse_end: Tensor,
    counts: Tensor | None = None,
) -> None:
    """As ``paged.guard_tiles``, computed in float32."""
    if batch.num_requests == 0:
        return
    heads = index.density.shape[1]
    launch(
        _guard_tiles_kernel, (batch.num_requests,),
        (
            batch.row_start, batch.row_end, batch.seq_len, index.density, dense_rows, sparse_end, counts,
            float(max_density),
        ),
        num_warps=1, HEADS=heads, BH=next_power_of_2(heads), COUNT=counts is not None,
    )  # fmt: skip
