# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Training-free estimate of columns and diagonals, a few rows at a time: the fast path for CPUs."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..checks import check_query_key, check_scale
from ..parallel import run_pieces
from .naive import sampled_rows

# Rows of one piece of work: its logits [ROWS, group, n] are 8 MiB at n = 131072, group 4, bfloat16. The product with
# fewer rows takes as long for each piece, with more there are too few pieces.
ROWS = 8


def sampled(q: Tensor, k: Tensor, *, scale: float, num_rows: int) -> tuple[Tensor, Tensor]:
    """Same contract as ``naive.sampled``.

    ``scale * q`` and its product with ``k`` are in the dtype of the inputs: with bfloat16 both carry its rounding
    (2**-9 of their size), which an estimate can bear. The rest is float32.
    """
    check_query_key(q, k)
    check_scale(scale)
    chunk_len, num_heads, size = q.shape
    n, num_kv_heads, _ = k.shape
    rows = sampled_rows(chunk_len, num_rows)
    # [R, Hkv, group, D]
    queries = q[rows].unflatten(1, (num_kv_heads, num_heads // num_kv_heads))

    def piece(head: int, first: int) -> Tensor:
        """Sums over ``ROWS`` rows: [2, n], columns and diagonals."""
        some = (queries[first : first + ROWS, head].float() * scale).to(k.dtype)
        # [rows, group, n]
        logits = (some.reshape(-1, size) @ k[:, head].T).view(*some.shape[:2], n)
        sums = torch.zeros(2, n, dtype=torch.float32, device=q.device)
        for row, scores in zip(rows[first : first + ROWS], logits, strict=True):
            seen = n - chunk_len + row + 1
            probs = torch.softmax(scores[:, :seen], dim=-1, dtype=torch.float32).mean(dim=0)
            sums[0, :seen] += probs
            sums[1, :seen] += probs.flip(0)
        return sums

    starts = range(0, len(rows), ROWS)
    found = run_pieces([partial(piece, head, first) for head in range(num_kv_heads) for first in starts])
    # [Hkv, pieces of a head, 2, n]
    sums = torch.stack(found).unflatten(0, (num_kv_heads, len(starts))).sum(dim=1) / len(rows)
    return sums[:, 0], sums[:, 1]
