# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much of a chunk's causal attention a selection would compute, without computing it.

An estimate in whole tiles: a query tile computes its window, its own positions, every granule along a diagonal beyond
the window, and the columns below it. Columns are taken to lie evenly over the context, so that a row sees the share of
them that it sees of the context; granules count in full.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Selection, SparsePattern


def num_sinks(pattern: SparsePattern) -> int:
    """Sinks, rounded up to granules."""
    return -(-pattern.sinks // pattern.block_k) * pattern.block_k


def granules_of(diagonals: Tensor, pattern: SparsePattern, seq_len: int) -> int:
    """Relative granules beyond the window that a set of diagonals touches, of a full tile.

    Granule ``r`` lies ``r * block_k`` positions before the tile's first one, rounded to granules, and holds a key at
    distance ``d`` from one of the tile's rows iff ``r * block_k - block_k < d < r * block_k + block_q``.
    """
    block_q, block_k = pattern.block_q, pattern.block_k
    near = (max(pattern.window, 1) + block_k - 2) // block_k  # the last one that the window reaches
    hit = torch.zeros(max(seq_len + 2 * block_k, 1) // block_k + 1, dtype=torch.bool, device=diagonals.device)
    diagonals = diagonals[diagonals < seq_len].long()
    last = (diagonals + block_k - 1) // block_k
    for step in range((block_q + block_k - 2) // block_k + 1):
        granule = last - step
        inside = (granule > near) & (granule * block_k + block_q > diagonals)
        hit[granule[inside]] = True
    return int(hit.sum())


def expected_keys(num_columns: float, num_granules: float, pattern: SparsePattern, share: float) -> float:
    """Keys that a row of a chunk computes on average.

    Args:
        num_columns: columns and sinks of the selection.
        num_granules: granules along diagonals beyond the window.
        pattern: window and tiles.
        share: of the context, what a row sees on average.
    """
    return share * num_columns + num_granules * pattern.block_k + pattern.window + pattern.block_q + pattern.block_k


def causal_pairs(rows: int, seq_len: int) -> int:
    """(query, key) pairs of the last ``rows`` rows of a context."""
    return rows * (2 * seq_len - rows + 1) // 2


def expected_density(selection: Selection, pattern: SparsePattern, rows: int, seq_len: int) -> float:
    """Share of a chunk's causal pairs that a selection costs, the mean over KV heads, at most 1.

    Args:
        selection: of one sequence.
        pattern: tiles, window, sinks.
        rows: of the chunk, the last ones of the context.
        seq_len: tokens in view.
    """
    pairs = causal_pairs(rows, seq_len)
    share = pairs / (rows * seq_len)
    sinks = num_sinks(pattern)
    keys = 0.0
    heads = len(selection.num_columns)
    for head in range(heads):
        columns = selection.columns[head, : int(selection.num_columns[head])]
        diagonals = selection.diagonals[head, : int(selection.num_diagonals[head])]
        merged = int(((columns >= sinks) & (columns < seq_len)).sum()) + min(sinks, seq_len)
        keys += expected_keys(merged, granules_of(diagonals, pattern, seq_len), pattern, share)
    return min(1.0, keys / heads * rows / pairs)


def upper_bound(
    pattern: SparsePattern, rows: int, seq_len: int, max_columns: int | None, max_diagonals: int | None
) -> float:
    """What ``expected_density`` is at most, known before anything is selected."""
    pairs = causal_pairs(rows, seq_len)
    columns = seq_len if max_columns is None else min(max_columns + num_sinks(pattern), seq_len)
    granules = seq_len // pattern.block_k + 2
    if max_diagonals is not None:
        granules = min(granules, max_diagonals * ((pattern.block_q + pattern.block_k - 2) // pattern.block_k + 1))
    return min(1.0, expected_keys(columns, granules, pattern, pairs / (rows * seq_len)) * rows / pairs)
