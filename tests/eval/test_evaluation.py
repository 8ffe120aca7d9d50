# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The whole command, quickly: servers of a few lines in the place of vLLM's. With vLLM: test_server.py."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.eval.fake import Reply, serving
from vllm_vsprefill.cli import app

pytest.importorskip("wonderwords")


class Pretender:
    """A model of single characters that reads prompts well (dense) or loses what lies far back (sparse)."""

    def __init__(self, sparse: bool, limit: int = 9000) -> None:
        self.sparse, self.limit = sparse, limit
        self.computed = self.causal = self.asked = 0
        self.broken_after: int | None = None

    def models(self, body: dict[str, Any]) -> Reply:
        return 200, {"data": [{"id": "m", "root": "nowhere", "max_model_len": self.limit}]}

    def tokenize(self, body: dict[str, Any]) -> Reply:
        turns = body.get("messages")
        if turns is None:
            return 200, {"tokens": [ord(c) for c in body["prompt"]]}
        text = "".join(f"<{turn['role'][0]}>{turn['content']}" for turn in turns)
        return 200, {"tokens": [ord(c) for c in text + ("<a>" if body["add_generation_prompt"] else "")]}

    def complete(self, body: dict[str, Any]) -> Reply:
        self.asked += 1
        if self.broken_after is not None and self.asked > self.broken_after:
            return 500, {"error": {"message": "the engine died"}}
        ids = body["prompt"]
        pairs = len(ids) * (len(ids) + 1) // 2
        self.causal += pairs
        self.computed += pairs // 4 if self.sparse else pairs
        if (top := body.get("prompt_logprobs")) is None:
            text = "".join(map(chr, ids[-2000:] if self.sparse else ids))
            asked = re.findall(r"for (\S+-\S+(?: \S+)?) mentioned in the provided text is$", text)
            found = re.findall(rf"for {re.escape(asked[-1])} is: (\d+)", text) if asked else []
            return 200, {"choices": [{"text": " " + " ".join(found)}]}
        listed: list[Any] = [None]
        for i, token in enumerate(ids[1:], 1):
            lost = self.sparse and i > 2000 and i % 10 == 0
            entry = {str(token): {"logprob": -2.0 if lost else -0.1, "rank": 2 if lost else 1}}
            if top > 1 or lost:
                entry[str(token + 1)] = {"logprob": -0.2 if lost else -3.0, "rank": 1 if lost else 2}
            listed.append(entry)
        return 200, {"choices": [{"text": "", "prompt_logprobs": listed}]}

    def metrics(self, body: dict[str, Any]) -> Reply:
        lines = [
            f'vsprefill_pairs_{n}_total{{layer="0"}} {v}' for n, v in vars(self).items() if n in ("computed", "causal")
        ]
        return 200, "\n".join(lines) + "\n"


@contextmanager
def two(limit: int = 9000) -> Iterator[tuple[list[str], Pretender]]:
    dense, sparse = Pretender(False, limit), Pretender(True, limit)

    def paths(model: Pretender) -> Any:
        found = {"/v1/models": model.models, "/tokenize": model.tokenize, "/metrics": model.metrics}
        return {**found, "/v1/completions": model.complete}

    with serving(paths(dense)) as dense_url, serving(paths(sparse)) as url:
        yield ["--url", url, "--dense-url", dense_url], sparse


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # counters here stand still at once


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} of a long text about nothing.\n" for i in range(2000)))
    given = ["--suite", "fidelity,in-prompt,ruler", "--tasks", "niah_single_1,niah_multikey_2,qa_1", "--samples", "3"]
    return [*given, "--lengths", "6000,8k", "--data", str(text), "--out", str(tmp_path / "out")]


def run(words: list[str], code: int = 0) -> str:
    result = CliRunner().invoke(app, ["eval", *words])
    assert result.exit_code == code, result.output
    return result.output


def figures(folder: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    found = json.loads((folder / "results.json").read_text())
    return {(f["task"], f["length"], f["target"]): f for f in found["figures"]}


def test_figures_are_those_of_the_servers(words: list[str], tmp_path: Path) -> None:
    with two() as (urls, _):
        run([*urls, *words])
    found = figures(tmp_path / "out")
    sparse = found["text", 8192, "sparse"]
    lost = len([i for i in range(1, 8191) if i > 2000 and i % 10 == 0])
    assert sparse["top1"] == pytest.approx(1 - lost / 8190, abs=1e-5)
    assert sparse["nll_change"] == pytest.approx(1.9 * lost / 8190, abs=1e-4)
    assert sparse["density"] == pytest.approx(0.25, abs=1e-3)
    assert found["text", 8192, "floor"]["top1"] == 1.0
    assert found["text", 8192, "floor"]["density"] == 1.0
    for length in (6000, 8192):
        assert found["facts", length, "dense"]["score"] == 1.0
        assert 0 < found["facts", length, "sparse"]["score"] < 1
        for task in ("niah_single_1", "niah_multikey_2"):
            dense, kept = found[task, length, "dense"], found[task, length, "sparse"]
            assert dense["score"] == 1.0
            assert kept["score"] < 1.0
            assert kept["retention"] == kept["score"]
            assert kept["remark"] == "dense near 1"
            assert 0.9 * length < dense["tokens"][0] <= dense["tokens"][1] <= length - 128
    report = (tmp_path / "out" / "report.md").read_text()
    assert "RULER's qa_1 was skipped: needs --squad" in report
    assert "Not complete" not in report


def test_a_server_that_dies_costs_nothing_that_was_finished(words: list[str], tmp_path: Path) -> None:
    with two() as (urls, sparse):
        sparse.broken_after = 5
        assert "refused: 500, the engine died" in run([*urls, *words], code=1)
        assert "Not complete" in (tmp_path / "out" / "report.md").read_text()
        partly = (tmp_path / "out" / "journal.jsonl").read_text()
        sparse.broken_after = None
        said = run([*urls, *words])
    assert re.search(r"[1-9]\d* samples are in out already, [1-9]\d* are missing", said)
    assert (tmp_path / "out" / "journal.jsonl").read_text().startswith(partly)
    interrupted = figures(tmp_path / "out")
    with two() as (urls, _):
        run([*urls, *words[:-1], str(tmp_path / "whole")])
    whole = figures(tmp_path / "whole")
    for key, figure in whole.items():
        for name in ("score", "top1", "nll_change", "kl", "by_position"):
            assert interrupted[key].get(name) == figure.get(name), (key, name)


def test_more_may_be_added_and_nothing_changed(words: list[str], tmp_path: Path) -> None:
    with two() as (urls, _):
        run([*urls, *words, "--suite", "ruler", "--lengths", "6000"])
        before = figures(tmp_path / "out")
        run([*urls, *words, "--suite", "ruler", "--lengths", "6000,8k", "--samples", "4"])
        after = figures(tmp_path / "out")
        assert set(before) < set(after)
        assert after["niah_single_1", 6000, "dense"]["samples"] == 4
        said = run([*urls, *words, "--suite", "ruler", "--template", "plain"], code=1)
    assert "template: 'chat' in the run so far, 'plain' now" in said


def test_prompts_that_are_too_long_are_refused_before_anything_is_measured(words: list[str], tmp_path: Path) -> None:
    with two(limit=8191) as (urls, sparse):
        assert "prompts of 8,192 tokens do not fit the server's 8,191" in run([*urls, *words], code=1)
        assert sparse.asked == 0


def test_nobody_at_the_url(tmp_path: Path) -> None:
    assert "no server answers at http://127.0.0.1:9" in run(
        ["--url", "http://127.0.0.1:9", "--out", str(tmp_path / "out")], code=1
    )
    assert not (tmp_path / "out").exists()
