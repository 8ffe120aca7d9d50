# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much of a chunk's causal attention a selection would compute, without computing it.

An estimate in whole tiles: a query tile computes its window, its own positions, every granule along a diagonal beyond
the window, and the columns below it. Columns are taken to lie evenly over the sequence, so that a row sees the share
of them that it sees of the sequence; granules count in full.
"""

from __future__ import annotations

from ..types import Budgets, Selection, SparsePattern


def expected_density(selection: Selection, pattern: SparsePattern, rows: int, seq_len: int) -> float:
    """Share of a chunk's causal pairs that a selection costs, the mean over KV heads, at most 1.

    Args:
        selection: of one sequence.
        pattern: tiles, window, sinks.
        rows: of the chunk, the last ones of the sequence.
        seq_len: tokens in view.
    """
    pairs = pattern.causal_pairs(rows, seq_len)
    share = pairs / (rows * seq_len)
    sinks = pattern.sink_keys
    keys = 0.0
    heads = len(selection.num_columns)
    for head in range(heads):
        columns = selection.columns[head, : int(selection.num_columns[head])]
        diagonals = selection.diagonals[head, : int(selection.num_diagonals[head])]
        merged = int(((columns >= sinks) & (columns < seq_len)).sum()) + min(sinks, seq_len)
        keys += pattern.expected_keys(merged, pattern.granules_of(diagonals, seq_len), share)
    return min(1.0, keys / heads * rows / pairs)


def upper_bound(pattern: SparsePattern, rows: int, seq_len: int, budgets: Budgets) -> float:
    """What ``expected_density`` is at most, known before anything is selected."""
    pairs = pattern.causal_pairs(rows, seq_len)
    columns = seq_len if budgets.max_columns is None else min(budgets.max_columns + pattern.sink_keys, seq_len)
    granules = seq_len // pattern.block_k + 2
    if budgets.max_diagonals is not None:
        granules = min(granules, budgets.max_diagonals * pattern.granules_per_diagonal)
    return min(1.0, pattern.expected_keys(columns, granules, pairs / (rows * seq_len)) * rows / pairs)
