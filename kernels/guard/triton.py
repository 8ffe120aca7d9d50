# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Decides on the device which requests sparse attention would not pay for; the host never waits for the answer.

The answer takes the form of two small tensors: the bounds of the query rows for a call of the dense kernel (none where
sparse attention runs) and the end of the rows for ``attend`` (their start where the dense kernel does the work).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_tensor
from ..launch import launch, next_power_of_2
from ..merge.triton import RANK, Index, check_index
from ..paged import Batch, check_device

DENSE_PAIRS, DENSE_CHUNKS = 0, 1
"""Entries of the counters."""


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
    # [BH], the numbers of list entries: ranks of the context's end
    b_columns = tl.load(p_rank + i_head * rank_width + (n + RANK - 1) // RANK, mask=m_h, other=0)
    i_last = n // BLOCK_K + 2
    b_granules = tl.load(p_granule_rank + i_head * granule_width + (i_last + RANK - 1) // RANK, mask=m_h, other=0)
    pairs = rows.to(tl.int64) * (2 * n.to(tl.int64) - rows + 1) // 2
    share = pairs.to(tl.float32) / (rows.to(tl.float32) * n.to(tl.float32))
    b_keys = tl.where(m_h, share * b_columns.to(tl.float32) + b_granules.to(tl.float32) * BLOCK_K + fixed, 0.0)
    keys = tl.sum(b_keys, 0) / HEADS
    density = tl.minimum(keys * rows.to(tl.float32) / pairs.to(tl.float32), 1.0)
    dense = density > limit
    tl.store(p_dense_rows + 2 * i_r, 0)
    tl.store(p_dense_rows + 2 * i_r + 1, tl.where(dense, rows, 0))
    tl.store(p_sparse_end + i_r, tl.where(dense, row_start, row_end))
    if COUNT:
        tl.atomic_add(p_counts, tl.where(dense, pairs * HEADS, 0))
        tl.atomic_add(p_counts + 1, tl.where(dense, 1, 0).to(tl.int64))


def _check(
    index: Index, batch: Batch, max_density: float, dense_rows: Tensor, sparse_end: Tensor, counts: Tensor | None
) -> None:
    """Checks every argument of ``guard``."""
    check_index(index, batch, index.rank.shape[1], index.rank.device)
    if not 0.0 < max_density <= 1.0:
        raise ValueError(f"max_density must be > 0 and <= 1, got {max_density!r}")
    outputs: list[tuple[str, Tensor | None, torch.dtype, int]] = [
        ("dense_rows", dense_rows, torch.int32, 2 * batch.num_requests),
        ("sparse_end", sparse_end, torch.int32, batch.num_requests),
        ("counts", counts, torch.int64, 2),
    ]
    for name, value, dtype, least in outputs:
        if value is None:
            continue
        check_tensor(name, value, 1, (dtype,))
        if value.shape[0] < least or not value.is_contiguous() or value.device != index.rank.device:
            raise ValueError(
                f"{name} must be contiguous with {least} entries on {index.rank.device}, got shape "
                f"{tuple(value.shape)} on {value.device}"
            )
    check_device("index", index.rank)


def guard(
    index: Index,
    batch: Batch,
    max_density: float,
    *,
    dense_rows: Tensor,
    sparse_end: Tensor,
    counts: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Sorts the requests of a batch by ``naive.expected_density`` of their selections.

    Args:
        index: from ``build_index``, for the same batch.
        batch: which rows belong to which request.
        max_density: above this share the dense kernel runs.
        dense_rows: int32 ``[2 * requests]``, written: 0 and, for every request, how many of its rows the dense kernel
            computes: all or none. Two entries are the ``cu_seqlens_q`` of a call for one request.
        sparse_end: int32 ``[requests]``, written: ``row_start`` where the dense kernel runs, else ``row_end``.
        counts: int64 ``[2]``; (row, key) pairs of all KV heads of the dense requests, and their number, are added.
        checked: an earlier call with tensors of these shapes, strides, types and devices has passed the checks.

    Raises:
        ValueError: wrong dtype, shape or device, or a density outside (0, 1]; names the argument.
    """
    heads = index.rank.shape[1]
    if not checked:
        _check(index, batch, max_density, dense_rows, sparse_end, counts)
    if batch.num_requests == 0:
        return
    pattern = index.pattern
    launch(
        _guard_kernel, (batch.num_requests,),
        (
            batch.row_start, batch.row_end, batch.seq_len, index.rank, index.granule_rank, dense_rows, sparse_end,
            counts, float(max_density), float(pattern.window + pattern.block_q + pattern.block_k),
            index.rank.shape[2], index.granule_rank.shape[2],
        ),
        num_warps=1, HEADS=heads, BH=next_power_of_2(heads), BLOCK_K=pattern.block_k, RANK=RANK,
        COUNT=counts is not None,
    )  # fmt: skip


__all__ = ["DENSE_CHUNKS", "DENSE_PAIRS", "guard"]
