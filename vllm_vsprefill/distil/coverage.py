# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much of the true attention a selection covers, for every pair of thresholds at once.

Of a few sampled rows the true attention is computed and each of its entries filed under the lowest column threshold and
the lowest distance threshold at which it is kept. From that table recall and density follow for all pairs of a grid,
exactly for these rows and with the semantics of the attention kernels: columns one by one; diagonals, local window and
sinks in whole granules per query tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.kernels.recall.naive import probabilities
from vllm_vsprefill.kernels.types import SparsePattern

# Thresholds that are tried. The lowest keeps the single likeliest entry.
COLUMN_GRID = (
    1e-6, 1e-3, 2e-3, 4e-3, 7e-3, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.125, 0.15, 0.18, 0.21, 0.25,
    0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 1.0,
)  # fmt: skip
DISTANCE_GRID = (
    1e-6, 2e-4, 1e-3, 3e-3, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.17, 0.23, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95,
    0.98, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Budgets:
    """What is kept whatever the thresholds: the pattern, and the bounds on columns and diagonals."""

    pattern: SparsePattern
    min_columns: int = 0
    max_columns: int | None = None
    min_diagonals: int = 0
    max_diagonals: int | None = None


def levels(probs: Tensor, grid: tuple[float, ...], minimum: int, maximum: int | None) -> Tensor:
    """Index of the lowest threshold of the grid at which each entry is kept; ``len(grid)`` where none keeps it.

    Args:
        probs: ``[H, n]``, distributions.
        grid: ascending thresholds, the last one 1.
        minimum: entries that every threshold keeps.
        maximum: entries that no threshold exceeds; None: no cap.
    """
    ranked, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = ranked.double().cumsum(-1) - ranked.double()
    taus = torch.tensor(grid, dtype=torch.float64, device=probs.device)
    # An entry is kept as long as those before it have not reached the threshold.
    level = torch.searchsorted(taus, before, right=True).clamp_(max=len(grid) - 1)
    level[:, :minimum] = 0
    if maximum is not None:
        level[:, maximum:] = len(grid)
    return torch.empty_like(level).scatter_(1, order, level)


class Coverage:
    """Tables of several layers, ``[layers, H, 3, columns + 1, diagonals + 1]``.

    The three are entries (counted), true mass, and true mass squared: the last weighs an entry by its own probability,
    so rows that look for one key count and rows that look everywhere do not.
    """

    def __init__(self, layers: int, heads: int, budgets: Budgets, device: torch.device) -> None:
        self.budgets = budgets
        shape = (layers, heads, 3, len(COLUMN_GRID) + 1, len(DISTANCE_GRID) + 1)
        self.table = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, layer: int, logits: Tensor, end: int, rows: Tensor, truth: Tensor, squares: Tensor) -> None:
        """File the entries of some rows.

        Args:
            layer: place of the layer in the table.
            logits: ``[H, n, 2]``, of the whole sequence.
            end: tokens of the context at which selection takes place.
            rows: positions of the rows, ``[R]``, all below ``end``.
            truth: ``[H, R, end]``, true probabilities, mean over the group's query heads.
            squares: ``[H, R, end]``, their squares, mean over the group's query heads.
        """
        b, pattern = self.budgets, self.budgets.pattern
        columns, diagonals = torch.softmax(logits[:, :end].float().permute(2, 0, 1).contiguous(), dim=-1).unbind(0)
        by_column = levels(columns, COLUMN_GRID, b.min_columns, b.max_columns)
        by_distance = levels(diagonals.flip(-1), DISTANCE_GRID, b.min_diagonals, b.max_diagonals)
        bq, bk = pattern.block_q, pattern.block_k
        by_column[:, : pattern.sink_keys] = 0
        by_distance[:, : pattern.reach] = 0
        # A granule is kept for a tile as soon as a diagonal crosses both: the least of a run of diagonals.
        step = math.gcd(bq, bk)
        padded = F.pad(by_distance.double(), (bq - step + bk - 1, bq + bk), value=float(len(DISTANCE_GRID)))
        pooled = -F.max_pool1d(-padded.unsqueeze(1), bq + bk - 1, step).squeeze(1)
        key = torch.arange(end, device=rows.device)
        place = (rows[:, None] // bq * bq - key // bk * bk + (bq - step)) // step
        causal = key <= rows[:, None]
        place = place.clamp_(min=0)
        size = (len(COLUMN_GRID) + 1) * (len(DISTANCE_GRID) + 1)
        for head in range(logits.shape[0]):
            bins = by_column[head] * (len(DISTANCE_GRID) + 1) + pooled[head][place].long()
            bins = bins[causal]
            for kind, weights in enumerate((None, truth[head][causal], squares[head][causal])):
                found = torch.bincount(bins, None if weights is None else weights.double(), minlength=size)
                self.table[layer, head, kind] += found.double().view(self.table.shape[-2:])

    def shares(self) -> Tensor:
        """Density, recall and recall of squares for every pair of thresholds, ``[layers, H, 3, C, D]``."""
        return shares(self.table)


def shares(table: Tensor) -> Tensor:
    """Kept share of each table ``[..., columns + 1, diagonals + 1]`` for every pair of thresholds."""
    total = table.sum((-2, -1), keepdim=True).clamp(min=1e-300)
    # Left out at a pair: what needs a higher threshold of both kinds.
    left_out = table.flip((-2, -1)).cumsum(-1).cumsum(-2).flip((-2, -1))[..., 1:, 1:]
    return 1 - left_out / total


def true_rows(call: LayerCall, rows: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """True probabilities of some rows and their squares, means over each group: float32 ``[Hkv, R, end]`` each."""
    heads = call.k.shape[1]
    first, second = [], []
    for head, queries in enumerate(call.q[rows].unflatten(1, (heads, -1)).unbind(1)):
        probs = probabilities(queries, call.k[:end, head], rows, call.scale)
        first.append(probs.mean(0))
        second.append(probs.square_().mean(0))
    return torch.stack(first), torch.stack(second)


def best_recall(shares: Tensor, density: float, kind: int = 1) -> tuple[Tensor, Tensor]:
    """Largest share of a kind within a density, and the density that it takes.

    Where even the lowest thresholds exceed the density, for the local window alone does, their share and density.

    Args:
        shares: ``[..., 3, C, D]``, from ``Coverage.shares``.
        density: largest share of the causal entries.
        kind: 1 for recall, 2 for that of squares.

    Returns:
        Two tensors ``[...]``.
    """
    found, dense = shares[..., kind, :, :].flatten(-2), shares[..., 0, :, :].flatten(-2)
    place = found.masked_fill(dense > density, -1.0).argmax(-1, keepdim=True)
    # All out of reach: argmax gives the first pair, which is the lowest of both.
    return found.gather(-1, place).squeeze(-1), dense.gather(-1, place).squeeze(-1)
