# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the metrics add up to: series, quarters, ranks, steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.test_stats import scraped
from vllm_vsprefill import metrics
from vllm_vsprefill.metrics import FAMILIES, Look, Tally, quarter
from vllm_vsprefill.plan import Gate, plan_step
from vllm_vsprefill.stats import LayerCounts, Recorder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    path = tmp_path / "exchange"
    path.mkdir()
    return path


def test_names_are_those_that_prometheus_wants() -> None:
    for name, family in FAMILIES.items():
        assert re.fullmatch("vsprefill_[a-z_]+", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket"))
        assert family.text.endswith(".")
        if family.buckets is not None:
            assert list(family.buckets) == sorted(set(family.buckets))


@pytest.mark.parametrize("layers", [1, 2, 6, 36, 61])
def test_quarters_cover_a_model(layers: int) -> None:
    found = [quarter(layer, layers) for layer in range(layers)]
    assert found == sorted(found)
    assert found[0] == "1"
    assert len(set(found)) == min(layers, 4)
    assert max(map(found.count, found)) <= -(-layers // 4)


def test_what_processes_dump_is_added() -> None:
    both = Tally()
    for value, tokens in ((0.3, 5), (0.95, 7)):
        one = Tally()
        one.inc(tokens, "vsprefill_tokens", "sparse", "none")
        one.observe(value, "vsprefill_density_ratio", "2")
        both.add(json.loads(json.dumps(one.dump())))
    both.add([[["vsprefill_unknown"], 1], [["vsprefill_tokens", "sparse"], 1], [["vsprefill_density_ratio", "2"], [1]]])
    found = {metric.name: metric.samples for metric in both.collect()}
    assert sorted(found) == ["vsprefill_density_ratio", "vsprefill_tokens"]
    assert [sample.value for sample in found["vsprefill_tokens"]] == [12]
    below = {sample.labels["le"]: sample.value for sample in found["vsprefill_density_ratio"] if "le" in sample.labels}
    assert (below["0.2"], below["0.3"], below["0.9"], below["1.0"], below["+Inf"]) == (0, 1, 1, 2, 2)


def test_counters_are_there_before_anything_is_counted(folder: Path) -> None:
    Recorder(0, folder).write()
    Recorder(1, folder).write()
    found = scraped(folder)
    assert set(found.values()) == {0}
    assert 'vsprefill_request_chunks_total{path="dense",reason="short_sequence"}' in found
    assert 'vsprefill_fallbacks_total{quarter="4",reason="max_density"}' in found


def test_steps_of_two_ranks(folder: Path) -> None:
    """Pairs are those of both, everything else is that of the first."""
    for rank in (0, 1):
        recorder = Recorder(rank, folder)
        recorder.num_layers = 8
        for computed, handed_back in ((40, 0), (110, 1)):
            # 10 pairs of each were never meant to run sparse.
            recorder.record(7, LayerCounts(computed, 110, 1 - handed_back, handed_back, handed_back, 10))
            recorder.record(0, LayerCounts(110, 110, 0, 1, given=110))
            recorder.fall_back(0, metrics.DENSE_LAYERS, 1)
            recorder.look(7, Look(0.5, 0.25, 100.0, 3.0, 30, 20, 700.0))
            recorder.count(1, "vsprefill_request_chunks", "sparse", "none")
            recorder.publish()
    found = scraped(folder)
    assert found['vsprefill_pairs_computed_total{layer="7"}'] == 300
    assert found['vsprefill_chunks_total{layer="7",path="sparse"}'] == 1
    assert found['vsprefill_chunks_total{layer="7",path="dense"}'] == 1
    assert found['vsprefill_fallbacks_total{quarter="4",reason="max_density"}'] == 1
    assert found['vsprefill_fallbacks_total{quarter="1",reason="dense_layers"}'] == 2
    assert found['vsprefill_density_ratio_sum{quarter="4"}'] == pytest.approx(0.3 + 1.0)
    assert found['vsprefill_density_ratio_count{quarter="4"}'] == 2
    assert not any("density_ratio" in name and 'quarter="1"' in name for name in found)
    assert found['vsprefill_choose_seconds_sum{quarter="4"}'] == 1.0
    assert found['vsprefill_attend_seconds_count{quarter="4"}'] == 2
    assert found['vsprefill_columns_sum{quarter="4"}'] == 200
    assert found['vsprefill_tile_keys_sum{quarter="4"}'] == 1400
    assert found['vsprefill_diagonals_bucket{le="4.0",quarter="4"}'] == 2
    assert found['vsprefill_index_logits_total{source="cached"}'] == 60
    assert found['vsprefill_index_logits_total{source="scored"}'] == 40
    assert found['vsprefill_request_chunks_total{path="sparse",reason="none"}'] == 2


def test_every_row_of_a_step_has_its_reason() -> None:
    gate = Gate(min_seq_len=1000, dense_last_rows=64, min_pairs=2**21)
    rows = [1, 5, 2048, 900, 600, 200, 0]
    lengths = [4000, 4000, 2048, 900, 1500, 3000, 10]
    flags = [False, False, True, True, True, True, True]
    starts = [0]
    for number in rows:
        starts.append(starts[-1] + number)
    plan = plan_step(starts, lengths, flags, gate)
    assert plan.shares == {
        ("dense", "decode"): (2, 6),
        ("sparse", "none"): (1, 1984),
        ("dense", "last_rows"): (0, 64),
        ("dense", "short_sequence"): (1, 900),
        ("dense", "few_pairs"): (2, 800),
    }
    assert plan.dense_chunks == 3
    few = plan_step([0, 100], [5000], [True], gate)
    assert few.shares == {("dense", "few_rows"): (1, 100)}
    off = plan_step([0, 4000], [4000], [True], Gate(1000, 64, enabled=False))
    assert off.shares == {("dense", "switched_off"): (1, 4000)}
    idle = plan_step([0, 4000], [4000], [True], Gate(1000, 64, worth=False))
    assert idle.shares == {("dense", "not_worth"): (1, 4000)}
    reasons = {reason for step in (plan, few, off, idle) for path, reason in step.shares if path == "dense"}
    assert reasons - {metrics.LAST_ROWS} == set(metrics.GATE_REASONS)
