# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which thresholds a layer gets, and how much of its attention they should cover."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_vsprefill.checkpoint import LoadedIndexer
    from vllm_vsprefill.config import VSPrefillConfig

Threshold = float | tuple[float, ...]

RECALL_GOALS = {"accurate": 0.98, "balanced": 0.95, "fast": 0.9}
"""Share of the true attention that the thresholds of each preset are to cover, where nothing else is asked for."""

_DECIDE = ("tau_columns", "tau_diagonals", "max_columns", "max_diagonals", "window")


def thresholds(options: VSPrefillConfig, indexer: LoadedIndexer | None, index: int) -> tuple[Threshold, Threshold]:
    """``(tau_columns, tau_diagonals)`` of a layer: the user's, else the one the checkpoint was calibrated with for the
    preset, else the preset's. Each is one number, or one for each of the KV heads that the indexer was read for."""
    calibrated: tuple[Threshold | None, Threshold | None] = (None, None)
    if indexer is not None:
        calibrated = indexer.thresholds(options.preset, index)

    def choose(name: str, value: Threshold | None) -> Threshold:
        if value is None or name in options.model_fields_set:
            return float(getattr(options, name))
        return value

    return choose("tau_columns", calibrated[0]), choose("tau_diagonals", calibrated[1])


def expected_recall(options: VSPrefillConfig, indexer: LoadedIndexer, index: int) -> float | None:
    """Share of a layer's attention that its thresholds should cover: what they did when the checkpoint was calibrated,
    else the preset's goal. None where the user has said what is kept."""
    if options.model_fields_set.intersection(_DECIDE):
        return None
    known = indexer.recall(options.preset, index)
    return RECALL_GOALS[options.preset] if known is None else known
