# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""From end to end: the needle model on a stock server, switched between dense and sparse, and servers of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.eval.tokenizers import NEEDLE
from vllm_vsprefill.cli import app
from vllm_vsprefill.eval.journal import FILE
from vllm_vsprefill.eval.server import VLLMServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
pytest.importorskip("wonderwords")

ARGUMENTS = ["--max-model-len", "4096", "--max-num-batched-tokens", "1024", "--enforce-eager", "--dtype", "float32"]


@pytest.fixture(scope="module", autouse=True)
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Small servers, and none in sight but those of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VSPREFILL_STATS_DIR", str(tmp_path_factory.mktemp("exchange")))
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    # Thresholds of the shipped indexer keep nearly everything of so short a prompt; a window alone loses answers.
    options = {"min_seq_len": 1024, "tau_columns": 1e-9, "tau_diagonals": 1e-9, "min_columns": 0, "max_columns": 1}
    with VLLMServer(str(NEEDLE), "VSPREFILL", log, arguments=ARGUMENTS, options=options, timeout=300) as running:
        yield running


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text((NEEDLE.parent / "README.md").read_text() * 4)
    return file


def run(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["eval", *words])
    assert result.exit_code == code, result.output
    return result.output


def figures(out: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    found = json.loads((out / "results.json").read_text())
    assert found["complete"]
    return {(f["suite"], f["task"], f["target"]): f for f in found["figures"]}


def test_all_suites_on_a_server_that_runs(server: VLLMServer, data: Path, tmp_path: Path) -> None:
    words = ["--url", server.url, "--suite", "fidelity,in-prompt,ruler", "--lengths", "4k", "--samples", "2"]
    words += ["--tasks", "niah_single_1", "--data", str(data)]
    out = tmp_path / "out"
    run(*words, "--out", str(out))
    found = figures(out)
    floor, sparse = (found["fidelity", "text", target] for target in ("floor", "sparse"))
    assert floor["top1"] > 0.99
    assert abs(floor["nll_change"]) < 0.01
    assert floor["density"] == 1.0
    assert sparse["top1"] < floor["top1"]
    assert sparse["kl"] > floor["kl"]
    assert 0 < sparse["density"] < 0.7
    assert sorted(map(int, sparse["density_per_layer"])) == list(range(6))
    assert sparse["by_position"][0]["absolute"] < 0.01  # the first rows run dense in any case
    assert found["fidelity", "text", "dense"]["ttft"] > 0
    # What the model is made for it does with dense attention, and not with a window alone.
    dense, sparse = (found["in-prompt", "facts", target] for target in ("dense", "sparse"))
    assert dense["score"] > 0.9
    assert sparse["score"] < dense["score"]
    assert sparse["retention"] == pytest.approx(sparse["score"] / dense["score"], abs=1e-4)
    assert found["ruler", "niah_single_1", "dense"]["samples"] == 2
    report = (out / "report.md").read_text()
    assert "mean of the above" in report
    for name in ("fidelity", "in-prompt", "ruler"):
        assert (out / f"{name}.png").exists()

    # Nothing is missing: the same command measures nothing and says the same.
    before = (out / FILE).read_bytes()
    assert "0 are missing" in run(*words, "--out", str(out))
    assert (out / FILE).read_bytes() == before
    # What an interruption cost is measured again, with the same outcome.
    cut = tmp_path / "cut"
    shutil.copytree(out, cut)
    lines = before.splitlines(keepends=True)
    gone = [i for i, line in enumerate(lines) if json.loads(line).get("key", "").startswith(("sparse/", "dense/ruler"))]
    kept = [line for i, line in enumerate(lines) if i not in set(gone)]
    (cut / FILE).write_bytes(b"".join(kept) + b'{"key": "sparse/fide')
    run(*words, "--out", str(cut))
    again = figures(cut)
    for key, first in found.items():
        for name in ("score", "top1", "nll", "kl", "by_position", "density"):
            assert again[key].get(name) == first.get(name), (key, name)
    # Another evaluation does not get into the same folder.
    assert "seed: 0 in the run so far, 1 now" in run(*words, "--out", str(out), "--seed", "1", code=1)
    assert "complete" in (out / "results.json").read_text()


def test_mistakes_get_one_message_each(server: VLLMServer, data: Path, tmp_path: Path) -> None:
    words = ["--url", server.url, "--out", str(tmp_path / "out"), "--data", str(data)]
    assert "prompts of 4,097 tokens do not fit the server's 4,096 (--max-model-len)" in run(
        *words, "--lengths", "4097", "--samples", "1", code=1
    )
    said = run(*words, "--lengths", "4k", "--model", "other", code=1)
    assert "does not serve 'other'; it serves" in said
    assert "longer than the text" in run(*words, "--lengths", "1024k", code=1)
    assert "where several run" not in said
    assert "Traceback" not in said
    assert "no server answers" in run("--url", "http://127.0.0.1:9", "--out", str(tmp_path / "out"), code=1)


def test_servers_of_its_own(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")  # as on a machine where nobody thought of it
    custom = tmp_path / "settings.json"
    custom.write_text(json.dumps({"mine": {"estimator": "sampled", "min_seq_len": 512, "max_density": 1.0}}))
    out = tmp_path / "out"
    run(
        *("--model", str(NEEDLE), "--compare", "mine", "--settings", str(custom), "--data", str(data)),
        *("--lengths", "2k", "--samples", "1", "--no-ttft", "--out", str(out)),
        *("--serve-args", "--max-num-batched-tokens 1024 --enforce-eager --dtype float32"),
    )
    found = figures(out)
    assert found["fidelity", "text", "dense"]["density"] == 1.0
    mine = found["fidelity", "text", "mine"]
    assert mine["density"] < 1
    assert mine["top1"] > 0.9
    assert {file.name for file in (out / "logs").iterdir()} == {"dense.log", "mine.log"}


def test_a_server_that_does_not_start(data: Path, tmp_path: Path) -> None:
    words = ["--model", str(NEEDLE), "--compare", "dense", "--data", str(data), "--lengths", "2k", "--samples", "1"]
    said = run(*words, "--out", str(tmp_path / "out"), "--serve-args", "--no-such-argument", code=1)
    assert "dense: the server ended with exit code" in said
    assert "no-such-argument" in said
