# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""True attention mass along columns and diagonals: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_query_key, check_scale


def check_mass(q: Tensor, k: Tensor, scale: float, row_start: int, row_end: int | None) -> int:
    """Checks every argument of ``mass_sums``; returns the end of the row range."""
    check_query_key(q, k)
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows but k has {k.shape[0]} positions; both must cover the sequence")
    check_scale(scale)
    end = q.shape[0] if row_end is None else row_end
    if not 0 <= row_start < end <= q.shape[0]:
        raise ValueError(
            f"row_start and row_end must satisfy 0 <= row_start < row_end <= {q.shape[0]}, "
            f"got {row_start} and {row_end}"
        )
    return end


def mass_sums(
    q: Tensor, k: Tensor, *, scale: float, row_start: int = 0, row_end: int | None = None
) -> tuple[Tensor, Tensor]:
    """Mean attention mass per column and per distance: what the VSIndexer learns to predict.

    With ``p[g, i, j]`` the causal softmax of ``scale * q_i . k_j`` of query head ``g``, averaged over the rows ``i``
    of the range and the query heads of the group, ``columns[h, j]`` is the sum of ``p[g, i, j]`` and
    ``diagonals[h, d]`` that of ``p[g, i, i - d]``. Computed in float64 over the whole ``[rows, n]`` matrix.

    Args:
        q: ``[n, Hq, D]``.
        k: ``[n, Hkv, D]``, same dtype and device.
        scale: factor on ``q . k`` before the softmax.
        row_start: first row of the range.
        row_end: one past the last row; None for the end of the sequence.

    Returns:
        ``(columns, diagonals)``, float32 ``[Hkv, n]`` each, every row sums to one.

    Raises:
        ValueError: dtype, shape or device mismatch, or an empty or impossible range.
    """
    end = check_mass(q, k, scale, row_start, row_end)
    n, num_kv_heads, _ = k.shape
    group = q.shape[1] // num_kv_heads
    position = torch.arange(n, device=q.device)
    rows = position[row_start:end]
    distance = rows.unsqueeze(1) - position
    causal = distance >= 0
    columns = torch.empty(num_kv_heads, n, dtype=torch.float32, device=q.device)
    diagonals = torch.empty_like(columns)
    for head in range(num_kv_heads):
        queries = q[row_start:end, head * group : (head + 1) * group].double()
        logits = torch.einsum("tgd,nd->gtn", queries, k[:, head].double()) * scale
        probs = torch.softmax(logits.masked_fill_(~causal, float("-inf")), dim=-1).mean(dim=0) / len(rows)
        columns[head] = probs.sum(dim=0)
        along = torch.zeros(n, dtype=probs.dtype, device=q.device)
        diagonals[head] = along.index_add_(0, distance[causal], probs[causal])
    return columns, diagonals
