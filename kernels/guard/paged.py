# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which requests of a round sparse attention would not pay for: the plain references, and the checks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_tensor
from ..index import Index, check_index
from ..paged import Batch, check_device
from ..reference import selection_of
from ..tile_index import TileIndex, check_tiles
from ..types import SparsePattern
from . import naive

DENSE_PAIRS, DENSE_CHUNKS = 0, 1
"""Entries of the counters."""


def check_guard(
    index: Index, batch: Batch, max_density: float, dense_rows: Tensor, sparse_end: Tensor, counts: Tensor | None
) -> None:
    """Checks every argument of ``guard``.

    Raises:
        ValueError: wrong dtype, shape or device, or a density outside (0, 1]; names the argument.
    """
    check_index(index, batch, index.rank.shape[1], index.rank.device)
    _check_outputs(index.rank.device, batch, max_density, dense_rows, sparse_end, counts)
    check_device("index", index.rank)


def check_guard_tiles(
    index: TileIndex, batch: Batch, max_density: float, dense_rows: Tensor, sparse_end: Tensor, counts: Tensor | None
) -> None:
    """Checks every argument of ``guard_tiles``.

    Raises:
        ValueError: wrong dtype, shape or device, or a density outside (0, 1]; names the argument.
    """
    density = check_tensor("index.density", index.density, 2, (torch.float32,))
    check_tiles(index, batch, density.shape[1], density.device)
    if density.shape[0] < batch.num_requests or not density.is_contiguous():
        raise ValueError(f"index.density must be contiguous with {batch.num_requests} rows, got {tuple(density.shape)}")
    _check_outputs(density.device, batch, max_density, dense_rows, sparse_end, counts)
    check_device("index", density)


def _check_outputs(
    device: torch.device, batch: Batch, max_density: float, dense_rows: Tensor, sparse_end: Tensor,
    counts: Tensor | None,
) -> None:  # fmt: skip
    """Checks the limit and what is written."""
    if not 0.0 < max_density <= 1.0:
        raise ValueError(f"max_density must be > 0 and <= 1, got {max_density!r}")
    outputs: list[tuple[str, Tensor | None, torch.dtype, int]] = [
        ("dense_rows", dense_rows, torch.int32, 2 * batch.num_requests),
        ("sparse_end", sparse_end, torch.int32, batch.num_requests),
        ("counts", counts, torch.int64, 2),
    ]
    for name, value, dtype, minimum in outputs:
        if value is None:
            continue
        check_tensor(name, value, 1, (dtype,))
        if value.shape[0] < minimum or not value.is_contiguous() or value.device != device:
            raise ValueError(
                f"{name} must be contiguous with {minimum} entries on {device}, got shape {tuple(value.shape)} on "
                f"{value.device}"
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
    """Sorts the requests of a batch by ``naive.expected_density`` of their selections.

    Args:
        index: from ``build_index``, for the same batch.
        batch: which rows belong to which request.
        max_density: above this share the dense kernel runs.
        dense_rows: int32 ``[2 * requests]``, written: 0 and, for every request, how many of its rows the dense kernel
            computes: all or none. Two entries are the ``cu_seqlens_q`` of a call for one request.
        sparse_end: int32 ``[requests]``, written: ``row_start`` where the dense kernel runs, else ``row_end``.
        counts: int64 ``[2]``; (row, key) pairs of all KV heads of the dense requests, and their number, are added.
    """
    pattern = index.pattern

    def dense(request: int, rows: int, seq_len: int) -> bool:
        return naive.expected_density(selection_of(index, request, seq_len), pattern, rows, seq_len) > max_density

    _sort(batch, index.rank.shape[1], dense, dense_rows, sparse_end, counts)


def guard_tiles(
    index: TileIndex,
    batch: Batch,
    max_density: float,
    *,
    dense_rows: Tensor,
    sparse_end: Tensor,
    counts: Tensor | None = None,
) -> None:
    """Sorts the requests of a batch by the mean over heads of the density that ``price`` expects.

    Args:
        index: ``density`` as ``price`` wrote it for the same batch.
        batch: which rows belong to which request.
        max_density: above this share the dense kernel runs.
        dense_rows, sparse_end, counts: as for ``guard``.
    """

    def dense(request: int, rows: int, seq_len: int) -> bool:
        return not float(index.density[request].double().mean()) <= max_density

    _sort(batch, index.density.shape[1], dense, dense_rows, sparse_end, counts)


def _sort(
    batch: Batch, heads: int, dense: Callable[[int, int, int], bool], dense_rows: Tensor, sparse_end: Tensor,
    counts: Tensor | None,
) -> None:  # fmt: skip
    """Writes the decisions; ``dense`` says for a request, its rows and its length whether the dense kernel runs."""
    bounds = zip(batch.row_start.tolist(), batch.row_end.tolist(), batch.seq_len.tolist(), strict=True)
    for i, (start, end, n) in enumerate(bounds):
        rows = end - start
        sent = rows > 0 and dense(i, rows, n)
        dense_rows[2 * i], dense_rows[2 * i + 1] = 0, rows if sent else 0
        sparse_end[i] = start if sent else end
        if counts is not None and sent:
            counts[DENSE_PAIRS] += heads * SparsePattern.causal_pairs(rows, n)
            counts[DENSE_CHUNKS] += 1
