# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Densities of engines that run in this process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vllm_vsprefill import stats
from vllm_vsprefill.exchange import STATS_DIR_VARIABLE
from vllm_vsprefill.stats import LayerCounts


def exchange_folder() -> Path:
    """Folder that engines made after this call report to, each in one of its own inside."""
    if STATS_DIR_VARIABLE not in os.environ:
        os.environ[STATS_DIR_VARIABLE] = tempfile.mkdtemp()
    return Path(os.environ[STATS_DIR_VARIABLE])


def total(folder: Path) -> LayerCounts:
    """Counts of all layers together; the density is 1 where nothing was counted."""
    counts = LayerCounts()
    for layer in stats.read_counts(folder).values():
        counts += layer
    return counts
