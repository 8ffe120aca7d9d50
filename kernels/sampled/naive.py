# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Training-free estimate of columns and diagonals: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_query_key, check_scale


def sampled_rows(num_rows_total: int, num_rows: int) -> list[int]:
    """The rows of a chunk that stand for it: evenly strided, ascending, the last row always among them.

    Raises:
        ValueError: ``num_rows`` is not a positive int.
    """
    if isinstance(num_rows, bool) or not isinstance(num_rows, int) or num_rows < 1:
        raise ValueError(f"num_rows must be a positive int, got {num_rows!r}")
    count = min(num_rows, num_rows_total)
    return [num_rows_total * (i + 1) // count - 1 for i in range(count)]


def sampled(q: Tensor, k: Tensor, *, scale: float, num_rows: int) -> tuple[Tensor, Tensor]:
    """Columns and diagonals as seen by a few of the chunk's own queries.

    The sums of ``mass_sums`` over ``num_rows`` rows of the chunk only (``sampled_rows``: evenly strided, the last
    one included; all rows if the chunk has no more).

    Args:
        q: ``[T, Hq, D]``, the chunk's queries.
        k: ``[n, Hkv, D]``, the whole sequence, ``n >= T``; same dtype and device.
        scale: factor on ``q . k`` before the softmax.
        num_rows: rows to look at.

    Returns:
        ``(p_columns, p_diagonals)``, float32 ``[Hkv, n]`` each, every row sums to one.

    Raises:
        ValueError: dtype, shape or device mismatch; the message names the argument.
    """
    check_query_key(q, k)
    check_scale(scale)
    chunk_len, num_heads, _ = q.shape
    n, num_kv_heads, _ = k.shape
    rows = torch.tensor(sampled_rows(chunk_len, num_rows), device=q.device)
    distance = (rows + n - chunk_len).unsqueeze(1) - torch.arange(n, device=q.device)
    causal = distance >= 0
    # [Hkv, group, R, D] x [Hkv, 1, D, n]
    queries = q[rows].unflatten(1, (num_kv_heads, num_heads // num_kv_heads)).permute(1, 2, 0, 3).float()
    logits = torch.matmul(queries, k.permute(1, 2, 0).float().unsqueeze(1)) * scale
    probs = torch.softmax(logits.masked_fill_(~causal, float("-inf")), dim=-1).mean(dim=1) / len(rows)
    p_diagonals = torch.zeros(num_kv_heads, n, dtype=torch.float32, device=q.device)
    for i in range(len(rows)):
        last = int(distance[i, 0])
        p_diagonals[:, : last + 1] += probs[:, i, : last + 1].flip(-1)
    return probs.sum(dim=1), p_diagonals
