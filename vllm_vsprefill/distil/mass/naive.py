# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""True attention along columns and diagonals: the plain reference."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vllm_vsprefill.kernels.checks import check_query_key, check_scale

Reduce = Literal["max", "sum"]


def check_mass(q: Tensor, k: Tensor, scale: float, row_start: int, row_end: int | None) -> int:
    """Checks every argument of ``mass_sums``; returns the end of the range of rows."""
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


def check_weights(
    q: Tensor, k: Tensor, scale: float, reduce: str, min_distance: int, row_start: int, row_end: int | None
) -> int:
    """Checks every argument of ``column_weights``; returns the end of the row range."""
    end = check_mass(q, k, scale, row_start, row_end)
    if reduce not in ("max", "sum"):
        raise ValueError(f"reduce must be 'max' or 'sum', got {reduce!r}")
    if isinstance(min_distance, bool) or not isinstance(min_distance, int) or min_distance < 0:
        raise ValueError(f"min_distance must be a non-negative int, got {min_distance!r}")
    return end


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
    """What the rows of a range give each column: the largest probability, or the mean mass.

    With ``p[g, i, j]`` the causal softmax of ``scale * q_i . k_j`` of query head ``g``, over the rows ``i`` of the
    range with ``i - j >= min_distance`` and the query heads of the group: the largest ``p[g, i, j]`` (``max``), or
    their sum divided by the number of all rows of the range and of query heads (``sum``, which for ``min_distance`` 0
    are the columns of ``mass_sums``). A column that no such row sees gets 0. Computed in float64 over the whole
    ``[rows, n]`` matrix.

    A key that only a few rows ask for has a large maximum and a small sum; what every row looks at a little has it the
    other way round. Keys nearer than ``min_distance`` are those that a local window keeps in any case.

    Args:
        q: ``[n, Hq, D]``.
        k: ``[n, Hkv, D]``, same dtype and device.
        scale: factor on ``q . k`` before the softmax.
        reduce: ``max`` or ``sum``.
        min_distance: nearest distance that counts, in positions.
        row_start: first row of the range.
        row_end: one past the last row; None for the end of the sequence.

    Returns:
        float32 ``[Hkv, n]``.

    Raises:
        ValueError: dtype, shape or device mismatch, an empty or impossible range, an unknown reduction or a negative
            distance.
    """
    end = check_weights(q, k, scale, reduce, min_distance, row_start, row_end)
    n, num_kv_heads, _ = k.shape
    group = q.shape[1] // num_kv_heads
    position = torch.arange(n, device=q.device)
    distance = position[row_start:end].unsqueeze(1) - position
    out = torch.empty(num_kv_heads, n, dtype=torch.float32, device=q.device)
    for head in range(num_kv_heads):
        queries = q[row_start:end, head * group : (head + 1) * group].double()
        logits = torch.einsum("tgd,nd->gtn", queries, k[:, head].double()) * scale
        probs = torch.softmax(logits.masked_fill_(distance < 0, float("-inf")), dim=-1)
        probs = probs.masked_fill_(distance < min_distance, 0.0)
        out[head] = probs.amax(dim=(0, 1)) if reduce == "max" else probs.sum(dim=(0, 1)) / (group * (end - row_start))
    return out
