# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""From samples to figures and their report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_vsprefill.eval import intervals, report, summary
from vllm_vsprefill.eval.fidelity import Differences, pack
from vllm_vsprefill.eval.journal import Journal
from vllm_vsprefill.eval.suites import Cell


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilsons_interval(right: int, samples: int, low: float, high: float) -> None:
    # The last is Newcombe's example (Statistics in Medicine 17, 1998, p. 861).
    assert intervals.wilson(right, samples) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "samples"), [(1, 0), (3, 2), (-1, 4)])
def test_no_interval_of_nothing(right: int, samples: int) -> None:
    with pytest.raises(ValueError):
        intervals.wilson(right, samples)


def test_fidelity_over_prompts_of_two_texts(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    cell = Cell("fidelity", "text", 8, 3)
    for i, agree in enumerate((4, 2)):
        parts = pack([Differences(4, agree, 1, 2, 0.5), Differences(4, 4, 0, 0, 0)])
        journal.add(f"dense/fidelity/text/8/{i}", text=f"t{i}", nll=2.0, ttft=2.0)
        journal.add(f"fast/fidelity/text/8/{i}", text=f"t{i}", nll=2.1, ttft=1.0, parts=parts)
    journal.add("fast/fidelity/text/8/portion-0", computed={"0": 10, "1": 30}, causal={"0": 100, "1": 100})
    journal.add("fast/fidelity/text/8/portion-1", computed={"0": 10, "1": 30}, causal={"0": 100, "1": 100})
    dense, fast = summary.summarise(journal, [cell], ["dense", "floor", "fast"])
    assert (dense["target"], dense["density"], dense["samples"], dense["nll"]) == ("dense", 1.0, 2, 2.0)
    assert "top1" not in dense
    assert fast["top1"] == 14 / 16
    assert fast["top1_of_prompts"] == [0.75, 1.0]
    assert fast["top1_by_text"] == {"t0": 1.0, "t1": 0.75}
    assert fast["nll_change"] == 2 / 16
    assert fast["absolute"] == 4 / 16
    assert [part["top1"] for part in fast["by_position"]] == [0.75, 1.0]
    assert fast["density"] == 0.2
    assert fast["density_per_layer"] == {"0": 0.1, "1": 0.3}
    assert fast["ttft"] == 1.0


def test_scores_with_interval_and_retention_on_the_same_samples(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    cell = Cell("ruler", "vt", 8, 4)
    for i, score in enumerate((1.0, 0.5, 0.5, 0.0)):
        journal.add(f"dense/ruler/vt/8/{i}", score=score)
    for i, score in enumerate((1.0, 0.5)):  # an interrupted run
        journal.add(f"fast/ruler/vt/8/{i}", score=score)
    dense, fast = summary.summarise(journal, [cell], ["dense", "fast"])
    assert dense["score"] == 0.5
    assert "retention" not in dense
    assert fast["score"] == 0.75
    assert fast["retention"] == 1.0  # of the two samples that both have
    assert fast["interval"] == [round(x, 4) for x in intervals.wilson(1.5, 2)]
    assert fast["remark"] == ""


def test_prompts_with_several_answers(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    for i, score in enumerate((1.0, 0.5)):
        journal.add(f"fast/in-prompt/facts/8/{i}", score=score, of=12)
    (fast,) = summary.summarise(journal, [Cell("in-prompt", "facts", 8, 2)], ["fast"])
    assert (fast["score"], fast["answers"], fast["samples"]) == (0.75, 24, 2)
    assert fast["interval"] == [round(x, 4) for x in intervals.wilson(18, 24)]


@pytest.mark.parametrize(("score", "remark"), [(0.0, "dense near 0"), (1.0, "dense near 1")])
def test_dense_at_an_end_is_said(tmp_path: Path, score: float, remark: str) -> None:
    journal = Journal(tmp_path, {})
    for target in ("dense", "fast"):
        journal.add(f"{target}/ruler/vt/8/0", score=score)
    _, fast = summary.summarise(journal, [Cell("ruler", "vt", 8, 1)], ["dense", "fast"])
    assert fast["remark"] == remark


def test_no_mean_without_its_parts(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    journal.add("dense/ruler/vt/8/0", score=1.0)
    journal.add("dense/ruler/cwe/8/0", score=0.5)
    journal.add("fast/ruler/vt/8/0", score=1.0)
    cells = [Cell("ruler", task, 8, 1) for task in ("vt", "cwe")]
    figures = summary.summarise(journal, cells, ["dense", "fast"])
    text = report.render({"about": {}, "notes": [], "complete": False, "figures": figures})
    mean = next(line for line in text.splitlines() if line.startswith("| mean"))
    assert mean == "| mean of the above | 75.0% | incomplete |  |"
    assert "Not complete" in text


def test_files_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    test_fidelity_over_prompts_of_two_texts(tmp_path)
    journal = Journal(tmp_path, {})
    for target in ("dense", "fast"):
        for length in (8, 16):
            journal.add(f"{target}/ruler/vt/{length}/0", score=0.5, tokens=7)
    cells = [Cell("fidelity", "text", 8, 3), Cell("ruler", "vt", 8, 1), Cell("ruler", "vt", 16, 1)]
    figures = summary.summarise(journal, cells, ["dense", "fast"])
    said: list[str] = []
    report.write(tmp_path, {"about": {"model": "m"}, "notes": [], "complete": True, "figures": figures}, said.append)
    assert not said
    assert json.loads((tmp_path / "results.json").read_text())["figures"] == figures
    for name in ("fidelity.png", "ruler.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        (tmp_path / name).unlink()
    subprocess.run([sys.executable, "-m", "vllm_vsprefill.eval.plots", str(tmp_path)], check=True)  # and once more
    assert (tmp_path / "fidelity.png").exists()
