# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``vsprefill doctor``: each thing that can be wrong is found, said once and with a remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import models
from vllm_vsprefill import exchange
from vllm_vsprefill.plan import Gate
from vllm_vsprefill.tools import surroundings
from vllm_vsprefill.tools.engine import told_apart
from vllm_vsprefill.tools.findings import Finding


def doctor(*arguments: str | Path, code: str = "", **variables: str) -> tuple[int, dict[str, Any]]:
    """The command in a process of its own, as it changes what vLLM's import finds; ``code`` runs before it."""
    program = f"{code}\nfrom vllm_vsprefill.cli import main\nmain()"
    environment = {**os.environ, **variables}
    command = [sys.executable, "-c", program, "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def problems(report: dict[str, Any]) -> list[str]:
    return [f"{one['subject']}: {one['text']}" for one in report["findings"] if one["level"] == "problem"]


def text(findings: list[Finding], level: str) -> str:
    return "\n".join(f"{one.subject}: {one.text} {one.remedy}" for one in findings if one.level == level)


@pytest.mark.slow
def test_a_model_and_what_would_run(tmp_path: Path) -> None:
    model = models.save_random_mixed_model(tmp_path / "model")
    options = json.dumps({"min_seq_len": 3000, "dense_layers": [3]})
    limits = ("--max-model-len", "16384", "--max-num-batched-tokens", "2048")
    status, report = doctor("--model", model, *limits, "--options", options)
    assert (status, report["problems"]) == (0, 0)
    everything = "\n".join(one["text"] for one in report["findings"])
    for part in (
        "vLLM knows --attention-backend VSPREFILL",
        "no installed indexer was trained for this model",
        "2 of 4 run the stock backend: sliding window of 256 tokens",
        "1 of 4 run the stock backend: the layer is listed in dense_layers",
        "chunks of 2048 prompt tokens run sparse from 3000 tokens of context, in 1 of 4 layers",
        "from 3000 tokens on",
    ):
        assert part in everything
    assert not list(Path(os.environ[exchange.STATS_DIR_VARIABLE]).glob("*/server"))  # it looks like no server


@pytest.mark.slow
def test_all_problems_at_once(tmp_path: Path) -> None:
    model = models.save_random_model(tmp_path / "model")
    options = json.dumps({"presett": "fast", "checkpoint": str(tmp_path / "none")})
    status, report = doctor(VLLM_PLUGINS="other", VSPREFILL_WINDOW="wide")
    found = "\n".join(problems(report))
    assert status == 1
    for part in ("VLLM_PLUGINS: is set to 'other'", "window", "backend: vLLM does not know VSPREFILL"):
        assert part in found
    status, report = doctor("--model", model, "--options", options)
    found = "\n".join(problems(report))
    assert status == 1
    assert "unknown option 'presett'; did you mean preset?" in found
    assert "no such folder" in found


@pytest.mark.slow
def test_a_model_too_short_to_run_sparse_is_a_problem(tmp_path: Path) -> None:
    model = models.save_random_model(tmp_path / "model")
    status, report = doctor("--model", model, "--max-model-len", "4096")
    assert status == 1
    assert "no prompt will run sparse" in problems(report)[0]


@pytest.mark.parametrize("missing", ["torch", "vllm"])
def test_without_torch_or_vllm(missing: str) -> None:
    status, report = doctor("--model", "any", code=f"import sys; sys.modules[{missing!r}] = None")
    assert status == 1
    assert [line for line in problems(report) if line.startswith(f"{missing}: ")]
    assert any(one["subject"] == "Python" for one in report["findings"])


def test_a_torch_that_is_broken() -> None:
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            import importlib.machinery
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise OSError("libtorch.so: no such file")
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Broken())
"""
    status, report = doctor(code=code)
    assert status == 1
    assert "torch: cannot be imported (OSError: libtorch.so: no such file)" in problems(report)


def test_plugins_that_are_not_loaded() -> None:
    assert "VLLM_PLUGINS=other,vsprefill" in text(list(surroundings.plugin({"VLLM_PLUGINS": "other"})), "problem")
    assert "VLLM_PLUGINS=vsprefill" in text(list(surroundings.plugin({"VLLM_PLUGINS": ""})), "problem")
    assert not text(list(surroundings.plugin({"VLLM_PLUGINS": "a, vsprefill"})), "problem")


def test_variables() -> None:
    found = list(
        surroundings.variables(
            {
                "VSPREFILL_PRESETT": "fast",
                "VSPREFILL_WINDOW": "wide",
                "VLLM_ATTENTION_BACKEND": "VSPREFILL",
                "http_proxy": "http://proxy:3128",
                "no_proxy": "localhost",
            }
        )
    )
    assert len([one for one in found if one.level == "problem"]) == 2
    assert "did you mean VSPREFILL_PRESET?" in text(found, "problem")
    assert "--attention-backend VSPREFILL" in text(found, "note")
    assert "export no_proxy=localhost,127.0.0.1" in text(found, "note")
    fine = surroundings.variables({"https_proxy": "x", "HTTP_PROXY": "x", "NO_PROXY": "a, 127.0.0.1, localhost"})
    assert [one.level for one in fine] == ["ok"]


def test_a_stats_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv(exchange.STATS_DIR_VARIABLE, str(file / "below"))
    assert "cannot write to" in text(list(surroundings.stats_folder()), "note")
    monkeypatch.setenv(exchange.STATS_DIR_VARIABLE, str(tmp_path / "new" / "er"))
    assert "made when a server starts" in text(list(surroundings.stats_folder()), "ok")
    assert not (tmp_path / "new").exists()


def test_messages_of_start_up_told_apart() -> None:
    lines = ["one thing", "VSPREFILL options: 2 problems", "  - a", "  - b", "checkpoint x:", "  - c", "last thing"]
    expected = ["one thing", "VSPREFILL options: a", "VSPREFILL options: b", "checkpoint x: c", "last thing"]
    assert list(told_apart(lines)) == expected


@pytest.mark.parametrize(
    "gate", [Gate(40, 4), Gate(0, 2, min_pairs=900), Gate(8, 0, min_rows=80), Gate(1, 1, enabled=False)]
)
@pytest.mark.parametrize("chunk", [70, 96, 128])
def test_shortest_prompt_against_trying_every_length(gate: Gate, chunk: int) -> None:
    def runs_sparse(prompt: int) -> bool:
        ends = [*range(chunk, prompt, chunk), prompt]
        return any(gate.admits(end - begin, end, True) for begin, end in zip([0, *ends], ends, strict=False))

    longest = 400
    assert gate.shortest_prompt(chunk, longest) == next(filter(runs_sparse, range(1, longest + 1)), None)
