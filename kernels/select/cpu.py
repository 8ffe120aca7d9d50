# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Selection by cumulative threshold without ranking positions: the fast path for CPUs.

Only values are sorted, which SIMD sorts do many times faster than (value, position) pairs. The sorted values give the
size of the set and its smallest value; the members are then all larger values and, from the lowest position up, as
many equal ones as are missing.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..parallel import run_pieces
from ..types import UNLIMITED, Budgets, Selection
from . import naive


def _members(probs: npt.NDArray[np.floating], tau: float, minimum: int, maximum: int | None) -> npt.NDArray[np.int32]:
    """Positions of the set of one head, ascending; ``probs`` ``[n]`` holds no NaN."""
    n = len(probs)
    cap = n if maximum is None else min(maximum, n)
    if tau >= 1.0:
        count = n
    elif tau <= 0.0:
        count = 0
    else:
        ranked = np.sort(probs)[::-1]
        # Never below tau: the sum that rounding left short of it counts as everything.
        count = min(int(np.searchsorted(np.cumsum(ranked, dtype=np.float64), tau)) + 1, n)
    count = min(max(count, minimum), cap)
    if count == n:
        return np.arange(n, dtype=np.int32)
    if count == 0:
        return np.empty(0, dtype=np.int32)
    if not 0.0 < tau < 1.0:
        # The whole ranking is not needed, only the value at its cut.
        smallest = np.partition(probs, n - count)[n - count]
    else:
        smallest = ranked[count - 1]
    kept = probs >= smallest
    surplus = int(np.count_nonzero(kept)) - count
    if surplus:
        kept[np.flatnonzero(probs == smallest)[-surplus:]] = False
    return np.flatnonzero(kept).astype(np.int32)


def distributions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Same contract as ``naive.distributions``, for CPU tensors."""
    naive.check_distributions(logits)
    n, heads, _ = logits.shape
    columns, diagonals = torch.empty(2, heads, n, dtype=torch.float32)

    def piece(head: int, which: int) -> None:
        # Contiguous first: the logits of a head lie far apart.
        probs = torch.softmax(logits[:, head, which].float().contiguous(), dim=0)
        if which:
            diagonals[head] = probs.flip(0)
        else:
            columns[head] = probs

    run_pieces([partial(piece, head, which) for head in range(heads) for which in (0, 1)])
    return columns, diagonals


def _chosen(probs: Tensor, tau: float, minimum: int, maximum: int | None) -> npt.NDArray[np.int32]:
    """Positions chosen for one head from ``[n]``, ascending."""
    values = (probs if probs.dtype in (torch.float32, torch.float64) else probs.float()).numpy()
    # A NaN makes the sum NaN; so do infinities of both signs, which the reference handles as well.
    if math.isnan(float(values.sum())):
        limit = torch.tensor([tau], dtype=torch.float64)
        positions, count = naive.threshold(torch.from_numpy(values)[None], limit, minimum, maximum)
        reference: npt.NDArray[np.int32] = positions[0, : int(count[0])].numpy()
        return reference
    return _members(values, tau, minimum, maximum)


def _padded(heads: list[npt.NDArray[np.int32]], fill: int) -> tuple[Tensor, Tensor]:
    counts = [len(head) for head in heads]
    kept = torch.full((len(heads), max(counts, default=0)), fill, dtype=torch.int32)
    for target, head in zip(kept, heads, strict=True):
        target[: len(head)] = torch.from_numpy(head)
    return kept, torch.tensor(counts, dtype=torch.int32)


def select(
    p_columns: Tensor,
    p_diagonals: Tensor,
    *,
    tau_columns: Tensor | float,
    tau_diagonals: Tensor | float,
    budgets: Budgets = UNLIMITED,
) -> Selection:
    """Same contract and same result as ``naive.select``, for CPU tensors."""
    if isinstance(p_columns, Tensor) and p_columns.device.type != "cpu":
        raise ValueError(f"p_columns is on {p_columns.device}; this version runs on the CPU only")
    tau_c, tau_d = naive.check_select(p_columns, p_diagonals, tau_columns, tau_diagonals, budgets)
    min_columns, max_columns, min_diagonals, max_diagonals = budgets
    heads, n = p_columns.shape
    limits_c, limits_d = tau_c.tolist(), tau_d.tolist()
    pieces = [partial(_chosen, p_columns[h], limits_c[h], min_columns, max_columns) for h in range(heads)]
    pieces += [partial(_chosen, p_diagonals[h], limits_d[h], min_diagonals, max_diagonals) for h in range(heads)]
    chosen = run_pieces(pieces)
    return Selection(*_padded(chosen[:heads], n), *_padded(chosen[heads:], n))
