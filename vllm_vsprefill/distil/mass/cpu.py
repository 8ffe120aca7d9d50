# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""True attention along columns and diagonals in memory that grows with the sequence, not its square."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_vsprefill.distil.mass.naive import Reduce, check_mass, check_weights

# Rows of one step. A step holds float32 [Hkv, group, ROWS, n] twice: 64 rows of a sequence of 131072 tokens with 32
# query heads take 1 GiB each.
ROWS = 64


def diagonal_sums(probs: Tensor, first_row: int) -> Tensor:
    """Sums of ``probs`` along its diagonals.

    Args:
        probs: ``[..., R, m]``; row ``r`` is the query at position ``first_row + r``, zero above the causal diagonal,
            and ``m == first_row + R``.

    Returns:
        ``[..., m]``; entry ``d`` is the sum over ``r`` of ``probs[..., r, first_row + r - d]``.
    """
    *lead, num_rows, width = probs.shape
    # Reversed and with R zeros appended, row r holds distance d at column d + R - 1 - r. In the flat buffer that is
    # place (R - 1) + r * (m + R - 1) + d: cut R - 1 places later into rows one shorter, distance d is column d.
    skewed = probs.new_zeros((*lead, num_rows, width + num_rows))
    skewed[..., num_rows:] = probs
    flat = skewed.flip(-1).flatten(-2)
    start, step = num_rows - 1, width + num_rows - 1
    rows = flat[..., start : start + num_rows * step].unflatten(-1, (num_rows, step))
    return torch.sum(rows[..., :width], dim=-2)


def mass_sums(
    q: Tensor, k: Tensor, *, scale: float, row_start: int = 0, row_end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as ``naive.mass_sums``; takes ``ROWS`` rows at a time, in float32, sums in float64."""
    end = check_mass(q, k, scale, row_start, row_end)
    n, num_kv_heads, _ = k.shape
    group = q.shape[1] // num_kv_heads
    columns = torch.zeros(num_kv_heads, n, dtype=torch.float64, device=q.device)
    diagonals = torch.zeros_like(columns)
    # [Hkv, D, n]
    keys = k.permute(1, 2, 0).float()
    for first in range(row_start, end, ROWS):
        last = min(first + ROWS, end)
        num_rows = last - first
        # [Hkv, group * R, D]
        queries = q[first:last].unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3).float().flatten(1, 2)
        logits = torch.bmm(queries, keys[..., :last]).mul_(scale).view(num_kv_heads, group, num_rows, last)
        future = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device).triu_(1)
        logits[..., first:].masked_fill_(future, float("-inf"))
        probs = torch.softmax(logits, dim=-1).sum(dim=1)
        columns[:, :last] += probs.sum(dim=1)
        diagonals[:, :last] += diagonal_sums(probs, first)
    total = float((end - row_start) * group)
    return (columns / total).float(), (diagonals / total).float()


def column_weights(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    reduce: Reduce = "max",
    min_distance: int = 0,
    row_start: int = 0,
    row_end: int | None = None,
) -> Tensor:
    """Same contract as ``naive.column_weights``; takes ``ROWS`` rows at a time, in float32, sums in float64."""
    end = check_weights(q, k, scale, reduce, min_distance, row_start, row_end)
    n, num_kv_heads, _ = k.shape
    group = q.shape[1] // num_kv_heads
    dtype = torch.float32 if reduce == "max" else torch.float64
    out = torch.zeros(num_kv_heads, n, dtype=dtype, device=q.device)
    # [Hkv, D, n]
    keys = k.permute(1, 2, 0).float()
    for first in range(row_start, end, ROWS):
        last = min(first + ROWS, end)
        width = last - min_distance  # columns that the last row of the step counts
        if width <= 0:
            continue
        num_rows = last - first
        # [Hkv, group * R, D]
        queries = q[first:last].unflatten(1, (num_kv_heads, group)).permute(1, 2, 0, 3).float().flatten(1, 2)
        logits = torch.bmm(queries, keys[..., :last]).mul_(scale).view(num_kv_heads, group, num_rows, last)
        distance = torch.arange(first, last, device=q.device).unsqueeze(1) - torch.arange(last, device=q.device)
        probs = torch.softmax(logits.masked_fill_(distance < 0, float("-inf")), dim=-1)[..., :width]
        probs = probs.masked_fill(distance[:, :width] < min_distance, 0.0)
        if reduce == "max":
            torch.maximum(out[:, :width], probs.amax(dim=(1, 2)), out=out[:, :width])
        else:
            out[:, :width] += probs.sum(dim=(1, 2))
    return out if reduce == "max" else (out / (group * (end - row_start))).float()
