# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Density counters: from a worker to /metrics, both ways."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from vllm_vsprefill import stats
from vllm_vsprefill.exchange import STATS_DIR_VARIABLE
from vllm_vsprefill.stats import FolderCollector, LayerCounts, Recorder, read_counts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "exchange"
    path.mkdir()
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return path


def values(text: str) -> dict[str, float]:
    """Series of an exposition, with their labels in alphabetical order."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def scraped(folder: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(FolderCollector(folder))
    return values(generate_latest(registry).decode())


def test_density() -> None:
    assert LayerCounts().density == 1.0
    assert LayerCounts(computed=1, causal=4).density == 0.25


def test_workers_are_summed_per_layer(folder: Path) -> None:
    for rank in (0, 1):
        recorder = Recorder(rank, folder)
        recorder.record(3, LayerCounts(10, 40, 1, 0))
        recorder.record(3, LayerCounts(5, 5, 0, 1))
        recorder.publish()
    assert read_counts(folder) == {3: LayerCounts(30, 90, 1, 1)}  # both ranks' heads, the same chunks
    assert not [file for file in folder.iterdir() if file.suffix != ".json"]


def test_nothing_is_collected_before_the_first_publication(folder: Path) -> None:
    Recorder(0, folder)
    assert not list(folder.iterdir())
    assert list(FolderCollector(folder).collect()) == []


def test_collector_exports_counters(folder: Path) -> None:
    recorder = Recorder(0, folder)
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
    (folder / "1-0-aa.json").write_text("{")
    (folder / "2-0-bb.json").write_text(json.dumps({"1": [1, 2, 3, 4]}))
    assert read_counts(folder) == {1: LayerCounts(1, 2, 3, 4)}


def test_a_folder_that_cannot_be_written_costs_no_request_and_recovers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk, say; here a file stands where the folder was. Told once, and once more when it works again."""
    monkeypatch.setattr(stats, "RETRY", 0.0)
    recorder = Recorder(0, folder)
    folder.rmdir()
    folder.write_text("")
    with caplog.at_level(logging.INFO, "vllm.vsprefill"):
        for _ in range(3):
            recorder.record(0, LayerCounts(1, 2, 1, 0))
            recorder.publish()
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "cannot be written" in caplog.text
        folder.unlink()
        recorder.publish()
    assert "again" in caplog.text
    assert read_counts(folder) == {0: LayerCounts(3, 6, 3, 0)}


def test_a_folder_that_somebody_tidied_away_is_made_again(folder: Path) -> None:
    recorder = Recorder(0, folder)
    recorder.record(0, LayerCounts(1, 2, 1, 0))
    recorder.publish()
    shutil.rmtree(folder)
    recorder.publish()
    assert read_counts(folder) == {0: LayerCounts(1, 2, 1, 0)}


def test_a_worker_on_another_machine_says_what_it_does_not_see(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats, "RETRY", 0.0)
    with caplog.at_level(logging.WARNING, "vllm.vsprefill"):
        recorder = Recorder(1, tmp_path / "there")
        recorder.publish()
    assert "does not see the server's folder" in caplog.text
    assert STATS_DIR_VARIABLE in caplog.text
    assert len(caplog.records) == 1
    assert not (tmp_path / "there").exists()


def test_a_step_that_is_handed_back_as_a_whole_is_told(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Recorder(0), Recorder(1)
    for recorder in ranks:
        recorder.record(0, LayerCounts(1, 1, 0, 1, 1))
        recorder.record(1, LayerCounts(1, 1, 1, 0, 0))
        recorder.publish()
        assert not caplog.records  # one layer ran sparse
        recorder.record(0, LayerCounts(1, 1, 0, 1, 0))
        recorder.publish()
        assert not caplog.records  # dense for another reason
    for _ in range(2 * stats.TELL):
        for recorder in ranks:
            recorder.record(0, LayerCounts(1, 1, 0, 1, 1))
            recorder.publish()
    assert len(caplog.records) == stats.TELL
    assert "max_density" in caplog.text


def test_counts_of_all_servers_in_a_folder_together(tmp_path: Path) -> None:
    for name in ("vsprefill-1-aa", "vsprefill-1-bb"):
        (tmp_path / name).mkdir()
        recorder = Recorder(0, tmp_path / name)
        recorder.record(0, LayerCounts(1, 2, 1, 0, 1))
        recorder.publish()
    assert read_counts(tmp_path) == {0: LayerCounts(2, 4, 2, 0, 2)}
    assert read_counts(tmp_path / "vsprefill-1-aa") == {0: LayerCounts(1, 2, 1, 0, 1)}


def test_multiprocess_mode_uses_ordinary_counters(tmp_path: Path) -> None:
    """In a process of its own: prometheus_client decides on its mode when it is imported."""
    program = (
        "import sys\n"
        "from vllm_vsprefill.stats import LayerCounts, Recorder\n"
        "from vllm_vsprefill.metrics import Look\n"
        "r = Recorder(int(sys.argv[1])); r.num_layers = 3\n"
        "r.record(2, LayerCounts(7, 9, 1, 0)); r.publish()\n"
        "r.count(5, 'vsprefill_tokens', 'sparse', 'none'); r.look(2, Look(0.004, 0.03, 20, 3, 40, 50))\n"
        "r.record(2, LayerCounts(1, 1, 0, 1, given=1)); r.publish()\n"
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry(); multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())\n"
    )
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for rank in ("1", "0"):  # each adds its own process to the folder
        shown = subprocess.run(
            [sys.executable, "-c", program, rank], env=environ, capture_output=True, text=True, check=True
        )
    found = values(shown.stdout)
    assert found['vsprefill_pairs_computed_total{layer="2"}'] == 16
    assert found['vsprefill_pairs_causal_total{layer="2"}'] == 20
    assert found['vsprefill_chunks_total{layer="2",path="dense"}'] == 1
    assert found['vsprefill_tokens_total{path="sparse",reason="none"}'] == 5
    assert found['vsprefill_tokens_total{path="dense",reason="few_pairs"}'] == 0
    assert found['vsprefill_index_logits_total{source="cached"}'] == 40
    assert found['vsprefill_choose_seconds_bucket{le="0.005",quarter="3"}'] == 1
    assert found['vsprefill_choose_seconds_bucket{le="0.002",quarter="3"}'] == 0
    assert found['vsprefill_density_ratio_count{quarter="3"}'] == 1
    assert found['vsprefill_density_ratio_sum{quarter="3"}'] == pytest.approx(7 / 9)


def test_collector_is_quiet_where_its_folder_is_missing(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(FolderCollector(tmp_path / "missing"))
    assert generate_latest(registry) == b""
