# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which thresholds a layer gets."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_vsprefill.checkpoint import LoadedIndexer
    from vllm_vsprefill.config import VSPrefillConfig

Threshold = float | tuple[float, ...]


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
