# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the benchmark of distillation does with its time, and its table."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from benchmarks import distil
from vllm_vsprefill.distil.model import Teacher


def test_a_length_takes_no_more_passes_than_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, bool]] = []
    real = Teacher.run

    def run(self: Teacher, ids: Tensor, call: Any = None) -> Tensor:
        passes.append((len(ids), call is not None))
        return real(self, ids, call)

    monkeypatch.setattr(Teacher, "run", run)
    rows = list(distil.shape_rows("tiny", [48, 96], 1, 32, 8, 2))
    # One of each kind to warm up, then the timed ones.
    assert passes == [
        (96, False),
        (96, True),
        *2 * [(48, False)],
        *2 * [(48, True)],
        *2 * [(96, False)],
        *2 * [(96, True)],
    ]
    assert [row["length"] for row in rows] == [48, 96]
    assert all(0 < row["target_share"] < 1 for row in rows)


def test_the_table_of_several_indexers() -> None:
    rows = [
        {"indexer": "none", "setting": "dense", "accuracy": 1.0, "density": 1.0},
        {"indexer": "old", "setting": "64 columns", "accuracy": 0.25, "density": 0.1},
        {"indexer": "new", "setting": "64 columns", "accuracy": 0.5, "density": 0.1},
        {"indexer": "new", "setting": "fast, calibrated", "accuracy": 0.75, "density": 0.06},
    ]
    recalls = {"old": {"mass": {"0.05": [0.5, 0.7]}}, "new": {"mass": {"0.05": [0.8, 0.9]}}}
    assert distil.quality_table(rows, recalls, ["old", "new"]).splitlines() == [
        "| answers inside prompts | old | new |",
        "|---|---|---|",
        "| dense | 100.0% at 100.0% | 100.0% at 100.0% |",
        "| 64 columns | 25.0% at 10.0% | 50.0% at 10.0% |",
        "| fast, calibrated |  | 75.0% at 6.0% |",
        "| recall at density 5% | 60.0% | 85.0% |",
    ]
