# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a layer's thresholds should cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.test_checkpoint import description
from vllm_vsprefill.checkpoint import LoadedIndexer, Thresholds
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.thresholds import RECALL_GOALS, expected_recall


def loaded(thresholds: dict[str, Thresholds]) -> LoadedIndexer:
    return LoadedIndexer(Path("mine"), description(thresholds=thresholds), (0, 4), {})


def test_the_recall_of_the_calibration_is_expected() -> None:
    indexer = loaded({"fast": Thresholds(tau_columns=(0.5, 0.6, 0.7), recall=(0.81, 0.82, 0.83))})
    options = VSPrefillConfig(preset="fast")
    assert [expected_recall(options, indexer, layer) for layer in (0, 2, 5)] == [0.81, 0.82, 0.83]


@pytest.mark.parametrize("preset", list(RECALL_GOALS))
def test_else_the_goal_of_the_preset(preset: Any) -> None:
    for indexer in (loaded({}), loaded({preset: Thresholds(tau_columns=(0.5, 0.6, 0.7))})):
        assert expected_recall(VSPrefillConfig(preset=preset), indexer, 2) == RECALL_GOALS[preset]


@pytest.mark.parametrize("given", [{"tau_columns": 0.9}, {"tau_diagonals": 0.9}, {"max_columns": 4096}, {"window": 64}])
def test_nothing_where_the_user_has_said_what_is_kept(given: dict[str, Any]) -> None:
    indexer = loaded({"balanced": Thresholds(recall=(0.8, 0.8, 0.8))})
    assert expected_recall(VSPrefillConfig(**given), indexer, 2) is None
    assert expected_recall(VSPrefillConfig(min_seq_len=4096), indexer, 2) == 0.8
