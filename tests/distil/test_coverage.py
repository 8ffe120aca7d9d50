# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Recall and density for all pairs of thresholds, against selection and attention as the kernels define them."""

from __future__ import annotations

import pytest
import torch

from vllm_vsprefill.checkpoint import Thresholds
from vllm_vsprefill.distil import calibrate
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.coverage import COLUMN_GRID, DISTANCE_GRID, Budgets, Coverage, best_recall, true_rows
from vllm_vsprefill.distil.targets import Range
from vllm_vsprefill.kernels import types
from vllm_vsprefill.kernels.attend.naive import attend
from vllm_vsprefill.kernels.select.naive import distributions, select
from vllm_vsprefill.kernels.types import SparsePattern

N, HEADS, GROUP, SIZE = 150, 2, 2, 8


def problem(seed: int = 0) -> tuple[LayerCall, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(N, HEADS * GROUP, SIZE, generator=rng) * 2
    k, v = (torch.randn(N, HEADS, SIZE, generator=rng) for _ in range(2))
    return LayerCall(0, q, k, v, 0.4, None), torch.randn(HEADS, N, 2, generator=rng) * 3


BUDGETS = [
    Budgets(SparsePattern(16, 8, 12, 5, 0)),
    Budgets(SparsePattern(32, 16, 0, 0, 0), 4, 40, 1, 3),
    Budgets(SparsePattern(16, 4, 20, 8, 0), 0, None, 0, 0),
]


@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("pair", [(0, 0), (8, 3), (20, 9), (34, 14), (len(COLUMN_GRID) - 1, 2)])
def test_shares_are_those_of_the_selection_and_the_kernels_semantics(budgets: Budgets, pair: tuple[int, int]) -> None:
    call, logits = problem()
    end, first = 128, 64  # whole tiles: the last one of a context may be shorter, which coverage does not look at
    rows = torch.arange(first, end)
    table = Coverage(1, HEADS, budgets, torch.device("cpu"))
    table.add(0, logits, end, rows, *true_rows(call, rows, end))
    density, recall, strong = table.shares()[0, :, :, pair[0], pair[1]].unbind(1)

    selection = select(
        *distributions(logits[:, :end].transpose(0, 1)),
        tau_columns=COLUMN_GRID[pair[0]],
        tau_diagonals=DISTANCE_GRID[pair[1]],
        budgets=types.Budgets(budgets.min_columns, budgets.max_columns, budgets.min_diagonals, budgets.max_diagonals),
    )
    # With values that are one-hot in the position, attention's output names the keys it used.
    eye = torch.eye(end).unsqueeze(1).expand(end, HEADS, end)
    wide_q = torch.nn.functional.pad(call.q[first:end], (0, end - SIZE))
    wide_k = torch.nn.functional.pad(call.k[:end], (0, end - SIZE))
    out, visited = attend(wide_q, wide_k, eye, selection, budgets.pattern, scale=call.scale)
    used = (out > 0).unflatten(1, (HEADS, GROUP)).any(2).permute(1, 0, 2)
    causal = torch.arange(end) <= rows[:, None]
    assert int(used.sum()) == int(visited)
    keys = call.k[:end].repeat_interleave(GROUP, 1)
    true = torch.einsum("thd,nhd->htn", call.q[first:end], keys) * call.scale
    true = true.masked_fill(~causal, float("-inf")).softmax(-1).unflatten(0, (HEADS, GROUP))
    for weights, found in ((causal.expand(HEADS, -1, -1).double(), density), (true.mean(1), recall)):
        expected = (weights * used).sum((1, 2)) / weights.sum((1, 2))
        torch.testing.assert_close(found, expected.double(), rtol=1e-4, atol=1e-6)
    squares = true.square().mean(1)
    torch.testing.assert_close(strong, ((squares * used).sum((1, 2)) / squares.sum((1, 2))).double(), rtol=1e-4, atol=0)


def table_of(seeds: list[int]) -> Coverage:
    table = Coverage(len(seeds), HEADS, BUDGETS[0], torch.device("cpu"))
    rows = torch.arange(40, N, 7)
    for layer, seed in enumerate(seeds):
        call, logits = problem(seed)
        table.add(layer, logits, N, rows, *true_rows(call, rows, N))
    return table


def test_recall_grows_with_density_up_to_all() -> None:
    shares = table_of([0]).shares()
    found = [float(best_recall(shares, d)[0].mean()) for d in (0.05, 0.3, 0.6, 1.0)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1)
    assert float(best_recall(shares, 0.6)[1].max()) <= 0.6
    # The window alone takes more than this: what it reaches is said with what it takes.
    lowest = shares[..., 0, 0]
    recall, density = best_recall(shares, 1e-3)
    assert torch.equal(recall, lowest[:, :, 1])
    assert torch.equal(density, lowest[:, :, 0])


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("metric", ["mass", "strong"])
def test_a_wanted_recall_is_reached_with_as_few_entries_as_possible(per_head: bool, metric: str) -> None:
    table = table_of([0, 1, 2])
    goal = calibrate.Goal(recall=0.8, metric=metric)  # type: ignore[arg-type]
    found = calibrate.choose(table.table, goal, per_head)
    if per_head:
        assert bool((found.recall >= 0.8 - 1e-9).all())
        kind = 1 if metric == "mass" else 2
        # No pair of the grid reaches it for less.
        shares = table.shares()
        cheaper = shares[:, :, 0].masked_fill(shares[:, :, kind] < 0.8, 2.0).flatten(-2).amin(-1)
        torch.testing.assert_close(found.density, cheaper)
    elif metric == "mass":
        assert bool((found.recall.mean(1) >= 0.8 - 1e-9).all())
    assert float(found.density.mean()) < 1
    stricter = calibrate.choose(table.table, calibrate.Goal(recall=0.95, metric=metric), per_head)  # type: ignore[arg-type]
    assert float(stricter.density.mean()) > float(found.density.mean())
    # The checkpoint says how much of the attention itself is covered, whatever was counted for the goal.
    assert found.thresholds.recall is not None
    assert len(found.thresholds.recall) == 3
    for layer, share in enumerate(found.thresholds.recall):
        shares = table.shares()[layer, :, 1]
        columns, diagonals = (
            [grid.index(value) for value in (entry if isinstance(entry, tuple) else (entry,) * HEADS)]
            for grid, entry in (
                (COLUMN_GRID, (found.thresholds.tau_columns or ())[layer]),
                (DISTANCE_GRID, (found.thresholds.tau_diagonals or ())[layer]),
            )
        )
        expected = [float(shares[head, columns[head], diagonals[head]]) for head in range(HEADS)]
        assert share == pytest.approx(sum(expected) / HEADS, abs=1e-4)


def test_thresholds_per_head_spend_less() -> None:
    table = table_of([0, 1, 2, 3]).table
    goal = calibrate.Goal(density=0.5)
    layer, head = (calibrate.choose(table, goal, per_head) for per_head in (False, True))
    assert float(head.density.mean()) <= 0.5
    assert float(layer.density.mean()) <= 0.5
    assert float(head.recall.mean()) >= float(layer.recall.mean()) - 0.02
    entries = head.thresholds.tau_columns
    assert entries is not None
    assert all(isinstance(entry, tuple) and len(entry) == HEADS for entry in entries)
    assert isinstance(layer.thresholds, Thresholds)


def test_density_goes_where_it_brings_most() -> None:
    # Layer 0 reaches everything with its cheapest pair, layer 1 needs many columns.
    table = torch.zeros(2, 1, 3, len(COLUMN_GRID) + 1, len(DISTANCE_GRID) + 1, dtype=torch.float64)
    table[:, :, 0] = 1.0
    table[0, :, 1:, 0, 0] = 1.0
    table[1, :, 1:, 30, -2] = 1.0
    found = calibrate.choose(table, calibrate.Goal(density=0.5), per_head=False)
    assert float(found.recall[0]) == pytest.approx(1)
    assert float(found.recall[1]) == pytest.approx(1)
    assert float(found.density[0]) < 0.1 < float(found.density[1])


def test_goals_are_one_of_two() -> None:
    with pytest.raises(ValueError, match="either"):
        calibrate.Goal()
    with pytest.raises(ValueError, match="either"):
        calibrate.Goal(recall=0.5, density=0.5)
    with pytest.raises(ValueError, match="no such preset: slow"):
        calibrate.calibrate({}, {"slow": calibrate.Goal(recall=0.5)}, False)


def test_sampled_rows_lie_in_their_range() -> None:
    import numpy as np

    rows = calibrate.sample_rows(Range(10, 30), 7, np.random.default_rng(0), torch.device("cpu"))
    assert len(set(rows.tolist())) == 7
    assert bool((rows >= 10).all())
    assert bool((rows < 30).all())
    assert calibrate.sample_rows(Range(10, 12), 7, np.random.default_rng(0), torch.device("cpu")).tolist() == [10, 11]
