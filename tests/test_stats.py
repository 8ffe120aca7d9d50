# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Density counters: from a worker to /metrics, both ways."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from vllm_vsprefill import stats
from vllm_vsprefill.stats import STATS_DIR_VARIABLE, FolderCollector, LayerCounts, Recorder, read_counts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "exchange"
    monkeypatch.setenv(STATS_DIR_VARIABLE, str(path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return path


def test_density() -> None:
    assert LayerCounts().density == 1.0
    assert LayerCounts(computed=1, causal=4).density == 0.25


def test_workers_are_summed_per_layer(folder: Path) -> None:
    for rank in (0, 1):
        recorder = Recorder(rank)
        recorder.record(3, LayerCounts(10, 40, 1, 0))
        recorder.record(3, LayerCounts(5, 5, 0, 1))
        recorder.publish()
    assert read_counts(folder) == {3: LayerCounts(30, 90, 2, 2)}
    assert not [file for file in folder.iterdir() if file.suffix != ".json"]


def test_nothing_exists_before_the_first_publication(folder: Path) -> None:
    Recorder()
    assert not folder.exists()
    assert list(FolderCollector(folder).collect()) == []


def test_collector_exports_counters(folder: Path) -> None:
    recorder = Recorder()
    recorder.record(0, LayerCounts(25, 100, 2, 1))
    recorder.publish()
    registry = CollectorRegistry()
    registry.register(FolderCollector(folder))
    text = generate_latest(registry).decode()
    assert 'vsprefill_pairs_computed_total{layer="0"} 25.0' in text
    assert 'vsprefill_pairs_causal_total{layer="0"} 100.0' in text
    assert 'vsprefill_chunks_total{layer="0",path="sparse"} 2.0' in text
    assert 'vsprefill_chunks_total{layer="0",path="dense"} 1.0' in text


def test_broken_file_is_skipped(folder: Path) -> None:
    folder.mkdir()
    (folder / "1-0-aa.json").write_text("{")
    (folder / "2-0-bb.json").write_text(json.dumps({"1": [1, 2, 3, 4]}))
    assert read_counts(folder) == {1: LayerCounts(1, 2, 3, 4)}


def test_an_unwritable_folder_costs_no_request(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    recorder = Recorder()
    recorder.record(0, LayerCounts(1, 1, 1, 0))
    recorder.publish()
    recorder.publish()
    assert recorder.layers[0].computed == 1


def test_multiprocess_mode_uses_ordinary_counters(tmp_path: Path) -> None:
    """In a process of its own: prometheus_client decides on its mode when it is imported."""
    program = (
        "from vllm_vsprefill.stats import LayerCounts, Recorder\n"
        "r = Recorder(); r.record(2, LayerCounts(7, 9, 1, 0)); r.publish()\n"
        "r.record(2, LayerCounts(1, 1, 0, 1)); r.publish()\n"
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry(); multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    shown = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert 'vsprefill_pairs_computed_total{layer="2"} 8.0' in shown.stdout
    assert 'vsprefill_pairs_causal_total{layer="2"} 10.0' in shown.stdout
    assert 'vsprefill_chunks_total{layer="2",path="dense"} 1.0' in shown.stdout


def test_folder_is_named_once_and_removed_at_exit() -> None:
    program = (
        "import os\n"
        "from vllm_vsprefill import stats\n"
        "stats.install_collector(); assert stats.STATS_DIR_VARIABLE not in os.environ\n"
        "stats.open_exchange(); stats.open_exchange()\n"
        "name = os.environ[stats.STATS_DIR_VARIABLE]\n"
        "assert not os.path.exists(name)\n"
        "r = stats.Recorder(); r.record(0, stats.LayerCounts(1, 2, 1, 0)); r.publish()\n"
        "assert os.path.isdir(name)\n"
        "print(name)\n"
    )
    environ = {k: v for k, v in os.environ.items() if k not in (STATS_DIR_VARIABLE, "PROMETHEUS_MULTIPROC_DIR")}
    shown = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    assert not Path(shown.stdout.strip()).exists()
    # Another server, started by a process that has one: a folder of its own. Its engine process: the same.
    program = (
        "import multiprocessing, os\n"
        "from vllm_vsprefill import stats\n"
        "def child(queue):\n"
        "    stats.open_exchange(); queue.put(os.environ[stats.STATS_DIR_VARIABLE])\n"
        "stats.open_exchange()\n"
        "context = multiprocessing.get_context('fork'); queue = context.Queue()\n"
        "process = context.Process(target=child, args=(queue,)); process.start()\n"
        "print(queue.get(), os.environ[stats.STATS_DIR_VARIABLE]); process.join()\n"
    )
    environ[STATS_DIR_VARIABLE] = shown.stdout.strip()
    shown = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True)
    engine, own = shown.stdout.split()
    assert engine == own
    assert own != environ[STATS_DIR_VARIABLE]


def test_collector_is_quiet_without_traffic() -> None:
    assert stats.FolderCollector(Path("does-not-exist")).describe() == []
