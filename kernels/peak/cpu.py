# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Largest and total attention probability of each column in memory that grows with the context, not its square."""

from __future__ import annotations

import torch
from torch import Tensor

from .naive import Reduce, check_weights

# Rows of one step. A step holds float32 [Hkv, group, ROWS, n] once and a half: 64 rows of a 131072-token context with
# 32 query heads take 1 GiB.
ROWS = 64


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
