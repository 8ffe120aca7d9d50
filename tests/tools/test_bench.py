# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``vsprefill bench``, quickly: a program and servers of a few lines in vLLM's place. With vLLM: test_server.py."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.eval import tokenizers
from tests.eval.fake import Reply, serving
from vllm_vsprefill.cli import app
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.journal import Journal
from vllm_vsprefill.eval.server import free_port
from vllm_vsprefill.eval.texts import Text
from vllm_vsprefill.eval.tokens import LocalTokens
from vllm_vsprefill.tools import bench_serve
from vllm_vsprefill.tools.bench_figures import capacity, figures, jobs
from vllm_vsprefill.tools.bench_options import BenchCommand
from vllm_vsprefill.tools.bench_prompts import SHARED, Prompts
from vllm_vsprefill.tools.bench_serve import Measured

ROOT = Path(__file__).resolve().parents[2]
NEEDLE = ROOT / "examples" / "needle" / "model"

# Takes as long as it is told to by the server's first word, and remembers what it was asked.
PROGRAM = """
import json, os, pathlib, sys, time

def main():
    given = dict(zip(sys.argv[3::1], sys.argv[4::1]))
    folder = pathlib.Path(os.environ["FAKE_BENCH"])
    with (folder / "asked.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    print("0/3 [00:00<?", file=sys.stderr, flush=True)
    if (folder / "hang").exists():
        (folder / "hanging").touch()
        time.sleep(60)
    if (folder / "broken").exists():
        raise RuntimeError((folder / "broken").read_text())
    lines = pathlib.Path(given["--dataset-path"]).read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    slow = 2.0 if "dense" in given["--extra-body"] else 1.0
    failed = (folder / "refused").exists()
    result = {
        "duration": 10.0,
        "input_lens": [len(prompt) for prompt in prompts],
        "output_lens": [4 for _ in prompts],
        "ttfts": [0.0 if failed else slow * (i + 1) for i in range(len(prompts))],
        "itls": [[0.1, 0.2, 0.1] for _ in prompts],
        "errors": ["Traceback\\n  x\\nValueError: refused" if failed else "" for _ in prompts],
    }
    path = pathlib.Path(given["--result-dir"], given["--result-filename"])
    path.write_text(json.dumps(result))
"""


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, " ".join(result.output.split())


def prompts(folder: Path, made: Callable[[Path], Path], seed: int = 0, answer: int = 8) -> tuple[Prompts, LocalTokens]:
    tokens = LocalTokens(str(made(folder)))
    text = (ROOT / "docs" / "performance.md").read_text() + (ROOT / "CHANGELOG.md").read_text()
    return Prompts([Text("t", text)], tokens, seed, answer), tokens


@pytest.mark.parametrize("made", [tokenizers.needle, tokenizers.pairs])
def test_prompts_fit_and_begin_differently(made: Callable[[Path], Path], tmp_path: Path) -> None:
    first, tokens = prompts(tmp_path, made)
    requests = [*first.closed(256, 0, 4), *first.closed(1024, 0, 4), *first.opened((128, 512, 2000), 0.5, 60)]
    for one in requests:
        used = len(tokens.prefix()) + len(tokens.encode(one.text)) + 8
        assert 0.95 * one.length < used <= one.length
    own = [tuple(tokens.encode(one.text)[:16]) for one in requests if one.document < 0]
    assert len(set(own)) == len(own)


def test_the_same_prompts_from_the_same_seed(tmp_path: Path) -> None:
    one, two, other = (prompts(tmp_path, tokenizers.needle, seed)[0] for seed in (0, 0, 1))
    assert one.closed(256, 0, 3) == two.closed(256, 0, 3)
    assert one.closed(256, 0, 3)[2:] == two.closed(256, 2, 3)
    assert one.opened((128, 512), 0.5, 40)[:15] == two.opened((128, 512), 0.5, 15)
    assert one.closed(256, 0, 3) != other.closed(256, 0, 3)
    assert one.opened((128, 512), 0.5, 15) != other.opened((128, 512), 0.5, 15)


def test_a_share_of_the_requests_goes_on_from_documents(tmp_path: Path) -> None:
    made, tokens = prompts(tmp_path, tokenizers.pairs)
    requests = made.opened((256, 512), 0.5, 200)
    sharing = [one for one in requests if one.document >= 0]
    assert 70 < len(sharing) < 130
    assert {one.length for one in requests} == {256, 512}
    by_document: dict[int, list[list[int]]] = {}
    for one in sharing:
        by_document.setdefault(one.document, []).append(tokens.encode(one.text))
    assert sum(len(ids) > 1 for ids in by_document.values()) > 10
    for ids in by_document.values():
        for a, b in itertools.pairwise(ids):
            same = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            assert 0.9 * SHARED < same / len(a) < SHARED + 0.1
    assert not any(one.document >= 0 for one in made.opened((256,), 0.0, 20))


def test_text_too_short(tmp_path: Path) -> None:
    made, _ = prompts(tmp_path, tokenizers.needle)
    with pytest.raises(EvalError, match=r"prompts of 2,000,000 tokens are longer than the text.*--data"):
        made.check((256, 2_000_000))


def options(folder: Path, **given: Any) -> BenchCommand:
    return BenchCommand.model_validate({"out": folder, "server": {"url": "http://127.0.0.1:1"}, **given})


def test_figures_of_both_loops(tmp_path: Path) -> None:
    command = options(tmp_path, lengths="256,512", samples=4, rate="2", seconds=2, ttft_limit=1.5, output_tokens=8)
    assert [job.key for job in jobs(command)] == [
        "closed/256/0-3", "closed/512/0-3", "closed/256/3-4", "closed/512/3-4", "open/2-2s"
    ]  # fmt: skip
    journal = Journal(tmp_path, {})
    cache = {"queries": 100.0, "hits": 25.0}
    for key, ttfts in (("closed/256/0-3", [1.0, 3.0, 2.0]), ("closed/256/3-4", [4.0])):
        run = Measured(5.0, [240] * len(ttfts), [8] * len(ttfts), ttfts, ttfts, [""] * len(ttfts))
        journal.add(f"dense/{key}", **run.record(), lengths=[256] * len(ttfts), pairs=[50, 100], cache=cache)
    run = Measured(4.0, [100, 200, 100, 0], [8, 8, 8, 0], [1.0, 2.0, 1.2, 0.0], [2.0] * 4, ["", "", "", "x\nBad: y"])
    journal.add("sparse/open/2-2s", **run.record(), lengths=[256, 512, 256, 512], pairs=None, cache=cache)
    closed, opened = figures(journal, command, ["dense", "sparse"])
    assert (closed["target"], closed["length"], closed["requests"]) == ("dense", 256, 4)
    assert closed["ttft"] == 2.5
    assert closed["ttft_quartiles"] == [1.75, 3.25]
    assert closed["tokens_per_second"] == 4 * 248 / 10
    assert closed["density"] == 0.5
    assert (opened["requests"], opened["failed"]) == (4, 1)
    assert opened["ttft_p50"] == 1.2
    assert opened["ttft_p99"] == pytest.approx(np.percentile([1.0, 2.0, 1.2], 99), rel=1e-4)
    assert opened["requests_per_second"] == 0.75
    assert (opened["within_limit"], opened["goodput"]) == (0.5, 0.5)
    assert opened["prefix_hits"] == 0.25
    assert opened["density"] is None
    assert opened["by_length"] == {"256": {"requests": 2, "ttft_p50": 1.1}, "512": {"requests": 1, "ttft_p50": 2.0}}
    assert Measured.of(journal.records["sparse/open/2-2s"]).errors[3] == "Bad: y"


def test_what_a_target_can_take() -> None:
    rows = [
        {"loop": "open", "target": "a", "rate": rate, "ttft_p99": p99, "failed": failed, "goodput": goodput}
        for rate, p99, failed, goodput in (
            (1.0, 0.5, 0, 0.9),
            (2.0, 0.9, 0, 1.8),
            (3.0, 0.9, 1, 1.9),
            (4.0, 5.0, 0, 0.4),
        )
    ]
    assert capacity(rows, "a", 1.0) == {"rate": 2.0, "goodput": 1.9}
    assert capacity(rows, "a", 0.1)["rate"] is None
    assert capacity(rows, "b", 1.0) == {"rate": None, "goodput": None}


@pytest.mark.parametrize(
    "found", [{}, {"duration": 1, "input_lens": [1], "output_lens": [], "ttfts": [1], "itls": [[]]}]
)
def test_results_that_cannot_be_read(found: dict[str, Any]) -> None:
    with pytest.raises(EvalError, match="cannot read; expected duration, input_lens"):
        Measured.parse(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--samples", 0], "nothing to measure: give --samples or --rate"),
        (["--mode", "sparse", "--dense-url", "http://127.0.0.1:2"], "--dense-url is not asked with --mode sparse"),
        (["--rate", "1,x"], "--rate"),
        (["--lengths", "64", "--output-tokens", 32], "leave no prompt"),
        (["--prefix-share", 2], "--prefix-share: expected a number less than or equal to 1"),
    ],
)
def test_mistakes(words: list[Any], said: str, tmp_path: Path) -> None:
    code, output = run("--url", "http://127.0.0.1:1", "--out", tmp_path / "out", *words)
    assert code == 1
    assert said in output
    assert not (tmp_path / "out").exists()


class Pretender:
    """A server with the needle model's tokenizer."""

    tokens = LocalTokens(str(NEEDLE))

    def __init__(self, sparse: bool, root: str = str(NEEDLE), limit: int = 4096, counts: bool = True) -> None:
        self.sparse, self.root, self.limit, self.counts = sparse, root, limit, counts

    def paths(self) -> dict[str, Any]:
        model = {"id": "needle", "root": self.root, "max_model_len": self.limit}
        counters = f'vsprefill_pairs_computed_total{{layer="0"}} {5 if self.sparse else 9}\n'
        counters += 'vsprefill_pairs_causal_total{layer="0"} 9\n'
        return {
            "/v1/models": (200, {"data": [model]}),
            "/v1/completions": (200, {"choices": [{"text": ""}]}),
            "/tokenize": self._tokenize,
            "/version": (200, {"version": "0.0"}),
            "/metrics": (200, counters if self.counts else ""),
        }

    def _tokenize(self, body: dict[str, Any]) -> Reply:
        ids = self.tokens.encode(body["prompt"])
        return 200, {"tokens": [*self.tokens.prefix(), *ids] if body["add_special_tokens"] else ids}


@contextmanager
def two(**given: Any) -> Iterator[list[object]]:
    with serving(Pretender(False, **given).paths()) as dense, serving(Pretender(True, **given).paths()) as sparse:
        yield ["--url", sparse, "--dense-url", dense]


def test_servers_that_cannot_be_measured(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--lengths", "256")
    port = free_port()
    assert f"no server answers at http://127.0.0.1:{port}" in run("--url", f"http://127.0.0.1:{port}", *out)[1]
    with two() as urls:
        assert "does not serve 'other'; it serves needle" in run(*urls, *out, "--model", "other")[1]
        code, said = run(*urls, *out, "--lengths", "4k,8k")
        assert code == 1
        assert "prompts of 8,192 tokens, answer included, do not fit the 4,096" in said
        (tmp_path / "pairs").mkdir()
        pairs = tokenizers.pairs(tmp_path / "pairs")
        assert "is not the server's" in run(*urls, *out, "--tokenizer", pairs)[1]
        assert "can be switched to dense attention was found here" in run(*urls[:2], *out)[1]
        assert "no such file" in run(*urls, *out, "--data", tmp_path / "none")[1].lower()
    with two(root="owner/model") as urls:
        assert "its model from 'owner/model', which is no folder on this machine" in run(*urls, *out)[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("missing", "said"), [("vllm", "where vLLM is installed"), ("pandas", "vllm[bench]")])
def test_without_what_measures(missing: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_serve, "find_spec", lambda name: None if name == missing else object())
    code, output = run("--url", "http://127.0.0.1:1", "--out", tmp_path / "out")
    assert code == 1
    assert said in output


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that tells the program in vLLM's place what to do, and in which it tells what it did."""
    package = tmp_path / "instead" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'instead'}{os.pathsep}{ROOT}")
    monkeypatch.setenv("FAKE_BENCH", str(tmp_path))
    return tmp_path


WORDS: tuple[object, ...] = (
    "--lengths",
    "256,512",
    "--samples",
    4,
    "--rate",
    "1",
    "--seconds",
    6,
    "--output-tokens",
    4,
)


def asked(folder: Path) -> list[dict[str, str]]:
    lines = map(json.loads, (folder / "asked.jsonl").read_text().splitlines())
    return [dict(zip(line[2:], [*line[3:], ""], strict=True)) for line in lines]


def test_both_targets_get_the_same_and_share_no_cache(program: Path) -> None:
    with two() as urls:
        code, said = run(*urls, *WORDS, "--out", program / "out", "--ttft-limit", 4)
    assert code == 0, said
    calls = asked(program)
    salts = [json.loads(call["--extra-body"])["cache_salt"] for call in calls]
    assert [salt.split("-", 1)[1] for salt in salts] == [
        "dense-closed-256-0-3", "sparse-closed-256-0-3", "sparse-closed-512-0-3", "dense-closed-512-0-3",
        "dense-closed-256-3-4", "sparse-closed-256-3-4", "sparse-closed-512-3-4", "dense-closed-512-3-4",
        "dense-open-1-6s", "sparse-open-1-6s",
    ]  # fmt: skip
    assert all(re.fullmatch(r"[\w.-]{,128}", salt) for salt in salts)  # what vLLM takes
    assert {call["--seed"] for call in calls} == {"0"}
    assert [call.get("--request-rate") for call in calls] == [None] * 8 + ["1.0"] * 2
    assert [call.get("--max-concurrency") for call in calls] == ["1"] * 8 + [None] * 2
    found = json.loads((program / "out" / "results.json").read_text())
    assert found["complete"]
    assert found["about"]["vllm"] == {"sparse": "0.0", "dense": "0.0"}
    by = {(f["loop"], f["target"], f.get("length")): f for f in found["figures"]}
    for length in (256, 512):
        dense, sparse = by["closed", "dense", length], by["closed", "sparse", length]
        assert (dense["ttft"], sparse["ttft"]) == (3.0, 1.5)
        assert dense["prompt_tokens"] == sparse["prompt_tokens"]
    assert by["open", "dense", None]["requests"] == 6
    assert (by["open", "dense", None]["goodput"], by["open", "sparse", None]["goodput"]) == (0.2, 0.4)
    report = (program / "out" / "report.md").read_text()
    assert "is none with VSPREFILL" not in report
    assert "| 256 | sparse | 4 | 1.500 s | 1.000 s to 2.250 s | 2.00x |" in report
    assert "Not complete" not in report
    pytest.importorskip("matplotlib")
    assert (program / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_one_mode_of_a_server_that_cannot_be_switched(program: Path) -> None:
    words = (*WORDS[:2], "--lengths", 256, "--samples", 1)
    with two() as (_, sparse, _, dense):
        code, said = run("--url", dense, *words, "--mode", "dense", "--out", program / "dense")
        assert code == 0, said
        code, said = run("--url", sparse, *words, "--mode", "dense", "--out", program / "sparse")
        assert code == 0, said  # nothing was computed between the two looks at its counters
    with two(counts=False) as (_, sparse, _, _):
        code, said = run("--url", sparse, *words, "--mode", "sparse", "--out", program / "stock")
    assert code == 0, said
    assert "it is measured in the mode that it is in" in said
    assert "it is none with VSPREFILL" in (program / "stock" / "report.md").read_text()


@pytest.mark.slow
def test_a_failure_costs_nothing_that_was_finished(program: Path) -> None:
    out = ("--out", program / "out")
    with two() as urls:
        assert run(*urls, *WORDS[:6], *WORDS[-2:], *out)[0] == 0
        (program / "broken").write_text("Please install vllm[bench] for this.")
        code, said = run(*urls, *WORDS, *out)
        assert code == 1
        assert "needs what its extra installs (RuntimeError: Please install vllm[bench] for this.)" in said
        (program / "broken").write_text("out of luck")
        assert "vllm bench serve failed: RuntimeError: out of luck The whole log: " in run(*urls, *WORDS, *out)[1]
        (program / "broken").unlink()
        (program / "refused").touch()
        assert "answered none of 6 requests (ValueError: refused)" in run(*urls, *WORDS, *out)[1]
        assert "Not complete" in (program / "out" / "report.md").read_text()
        (program / "refused").unlink()
        before = len(asked(program))
        code, said = run(*urls, *WORDS, "--ttft-limit", 3, *out)
        assert code == 0, said
        assert len(asked(program)) == before + 2
        assert "8 runs are in out already, 2 are missing" in said
        assert "within it" in (program / "out" / "report.md").read_text()
        code, said = run(*urls, *WORDS, "--seed", 1, *out)
        assert code == 1
        assert "seed: 0 in the run so far, 1 now" in said


@pytest.mark.slow
def test_stopped_from_the_keyboard(program: Path) -> None:
    (program / "hang").touch()
    words = [str(word) for word in (*WORDS, "--out", program / "out")]
    with two() as urls:
        command = [sys.executable, "-m", "vllm_vsprefill.cli", "bench", *map(str, urls), *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        deadline = time.monotonic() + 100
        while not (program / "hanging").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    assert "stopped; what is finished is in" in said
    assert "Traceback" not in said
