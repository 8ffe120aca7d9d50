# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much of the true attention a selection covers: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_query_key, check_scale, check_selection
from ..rows import check_num_rows, spread_rows
from ..types import Selection, SparsePattern


def probabilities(q: Tensor, k: Tensor, positions: Tensor, scale: float) -> Tensor:
    """True attention of some rows of one KV head.

    Args:
        q: ``[R, group, D]``, the rows' queries.
        k: ``[n, D]``, keys of the whole sequence, or as far as the last of the rows sees it.
        positions: int64 ``[R]``, of the rows.
        scale: factor on ``q . k`` before the softmax.

    Returns:
        float32 ``[group, R, n]``; zero behind a row.
    """
    causal = torch.arange(k.shape[0], device=k.device) <= positions[:, None]
    logits = torch.einsum("rgd,nd->grn", q.float(), k.float()) * scale
    return logits.masked_fill_(~causal, float("-inf")).softmax(-1)


def check_recall(
    q: Tensor, k: Tensor, selection: Selection, pattern: SparsePattern, scale: float, num_rows: int
) -> None:
    """Checks every argument of ``recall``."""
    check_query_key(q, k)
    check_selection(selection, k.shape[1], q.device)
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
    check_scale(scale)
    check_num_rows(num_rows)


def recall(
    q: Tensor, k: Tensor, selection: Selection, pattern: SparsePattern, *, scale: float, num_rows: int
) -> Tensor:
    """Share of the attention of a few rows that lies on the keys that ``attend`` computes for them.

    Args:
        q: ``[T, Hq, D]``, the chunk's queries.
        k: ``[n, Hkv, D]``, the whole sequence, ``n >= T``; same dtype and device.
        selection: columns and diagonals per KV head.
        pattern: tile, granule, window and sinks; dense rows are not looked at, nor are there any.
        scale: factor on ``q . k`` before the softmax.
        num_rows: rows to look at (``spread_rows``).

    Returns:
        float32 ``[Hkv]``, the mean over rows and query heads.

    Raises:
        ValueError: dtype, shape or device mismatch; the message names the argument.
    """
    check_recall(q, k, selection, pattern, scale, num_rows)
    chunk_len, n, heads = q.shape[0], k.shape[0], k.shape[1]
    rows = torch.tensor(spread_rows(chunk_len, num_rows), device=q.device)
    positions = rows + n - chunk_len
    found = torch.empty(heads, dtype=torch.float32, device=q.device)
    for head, queries in enumerate(q[rows].unflatten(1, (heads, -1)).unbind(1)):
        columns = selection.columns[head, : int(selection.num_columns[head])]
        diagonals = selection.diagonals[head, : int(selection.num_diagonals[head])]
        kept = torch.zeros(len(rows), n, dtype=torch.bool, device=q.device)
        for row, position in enumerate(positions.tolist()):
            start = position // pattern.block_q * pattern.block_q
            kept[row, pattern.tile_keys(columns, diagonals, start, min(start + pattern.block_q, n))] = True
        found[head] = (probabilities(queries, k[:, head], positions, scale) * kept).sum(-1).mean()
    return found
