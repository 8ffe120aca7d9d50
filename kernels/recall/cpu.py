# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much of the true attention a selection covers: the fast version for CPUs."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..granules import tile_granules
from ..parallel import run_pieces
from ..rows import spread_rows
from ..types import Selection, SparsePattern
from .naive import check_recall


def recall(
    q: Tensor, k: Tensor, selection: Selection, pattern: SparsePattern, *, scale: float, num_rows: int
) -> Tensor:
    """Same contract as ``naive.recall``.

    ``scale * q`` and its product with ``k`` are in the dtype of the inputs, which the mean of many rows can bear. The
    rest is float32.
    """
    check_recall(q, k, selection, pattern, scale, num_rows)
    chunk_len, n, heads = q.shape[0], k.shape[0], k.shape[1]
    rows = spread_rows(chunk_len, num_rows)
    # [R, Hkv, group, D]
    queries = q[rows].unflatten(1, (heads, -1))
    positions = np.array(rows) + (n - chunk_len)
    starts = positions // pattern.block_q * pattern.block_q
    ends = np.minimum(starts + pattern.block_q, n)

    def piece(head: int) -> Tensor:
        """Recall of one KV head."""
        columns, diagonals = (
            items[head, : int(counts[head])].long()
            for items, counts in (
                (selection.columns, selection.num_columns),
                (selection.diagonals, selection.num_diagonals),
            )
        )
        granules = torch.from_numpy(tile_granules(diagonals.numpy(), starts, ends, pattern))
        some = (queries[:, head].float() * scale).to(k.dtype)
        # [R, group, n]
        logits = (some.flatten(0, 1) @ k[:, head].T).unflatten(0, some.shape[:2])
        total = torch.zeros((), dtype=torch.float32)
        for scores, touched, position in zip(logits, granules, positions.tolist(), strict=True):
            kept = touched.repeat_interleave(pattern.block_k)[: position + 1]
            kept[columns[columns <= position]] = True
            total += torch.softmax(scores[:, : position + 1], dim=-1, dtype=torch.float32)[:, kept].sum(-1).mean()
        return total / len(rows)

    return torch.stack(run_pieces([partial(piece, head) for head in range(heads)]))
