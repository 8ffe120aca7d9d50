# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Fixtures of the backend tests: tiny models, and a process that vLLM's layers can be made in."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import models


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3 model, 2 KV heads, float32, random weights."""
    return models.save_random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def random_indexer(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained indexer for ``random_model``."""
    return models.save_random_indexer(tmp_path_factory.mktemp("indexer") / "checkpoint", random_model)


@pytest.fixture
def single_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Engines run in this process; each has an exchange folder of its own in the folder this yields."""
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_vsprefill.exchange import STATS_DIR_VARIABLE

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv(STATS_DIR_VARIABLE, str(tmp_path / "stats"))
    for name in list(os.environ):
        if name.startswith("VSPREFILL_") and name != STATS_DIR_VARIABLE:
            monkeypatch.delenv(name)
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    yield tmp_path / "stats"
    cleanup_dist_env_and_memory()
    # vLLM's CPU worker replaces this function for good; later tests need the real one.
    torch.set_num_threads = set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture
def plugin_log() -> Iterator[list[str]]:
    """What the plugin logs; vLLM's loggers do not propagate to pytest's."""
    messages: list[str] = []

    # Not a handler: vLLM configures logging anew with a process's first engine, which takes handlers away.
    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return True

    logger = logging.getLogger("vllm.vsprefill")
    logger.addFilter(keep)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(level)
    logger.removeFilter(keep)
