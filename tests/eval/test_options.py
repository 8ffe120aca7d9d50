# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Options, settings and servers that cannot be used are told before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vllm_vsprefill.cli import app
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.eval import settings, targets
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.options import EvalCommand
from vllm_vsprefill.exchange import Server


def command(**options: Any) -> EvalCommand:
    return EvalCommand.model_validate({"out": "out", "server": {"url": "http://127.0.0.1:1"}, **options})


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("4096", (4096,)),
        ("4k,32K", (4096, 32768)),
        ("4k..32k", (4096, 8192, 16384, 32768)),
        ("6k..20k, 6k", (6144, 12288)),
    ],
)
def test_lengths(text: str, lengths: tuple[int, ...]) -> None:
    assert command(lengths=text).lengths == lengths


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lengths", "long"], "--lengths: expected lengths such as 4096, 4k,32k or 4k..32k"),
        (["--lengths", "8k..4k"], "expected lengths that rise"),
        (["--suite", "ruler,nothing"], "--suite"),
        (["--tasks", "vt,cwee"], "found cwee"),
        (["--compare", "dense"], "--compare starts servers itself"),
        (["--samples", "0"], "--samples"),
    ],
)
def test_mistakes(words: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "--out", str(tmp_path / "o"), "--url", "http://127.0.0.1:1", *words])
    assert result.exit_code == 1
    assert said in result.output
    assert not (tmp_path / "o").exists()


def test_neither_server_nor_model(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["eval", "--out", str(tmp_path / "o")])
    assert "give --url of a server, or --model to start servers of" in result.output


def test_every_setting_is_valid() -> None:
    for options in settings.KNOWN.values():
        if options is not None:
            VSPrefillConfig.from_sources(options)
    assert list(settings.chosen(("fast", "floor", "dense", "fast"), None)) == ["dense", "floor", "fast"]
    assert list(settings.chosen((), None)) == list(settings.DEFAULT)


def test_settings_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"mine": {"window": 64}, "bad": {"windou": 1}}))
    assert settings.chosen(("mine",), file) == {"mine": {"window": 64}}
    with pytest.raises(EvalError) as error:
        settings.chosen(("mine", "bad", "none"), file)
    assert "'none' is no setting; there are dense, floor" in str(error.value)
    assert "windou" in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "is not JSON"), ('{"a": 1}', "expected names with options"), ('{"fast": {}}', "another meaning")],
)
def test_settings_files_that_cannot_be_used(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(content)
    with pytest.raises(EvalError, match=said):
        settings.chosen((), file)
    with pytest.raises(EvalError, match="no such file"):
        settings.chosen((), tmp_path / "none.json")


def test_where_dense_attention_comes_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    found: list[Server] = []
    monkeypatch.setattr(targets, "find_servers", lambda: found)
    with pytest.raises(EvalError, match=r"no server with VSPREFILL that can be switched.*--dense-url"):
        targets.plans(command(), said.append)
    with pytest.raises(EvalError, match="is another machine's and cannot be switched"):
        targets.plans(command(server={"url": "http://10.0.0.1:1"}), said.append)
    # Tasks can do without; the report then has no retention.
    assert [plan.name for plan in targets.plans(command(suite="ruler"), said.append)] == ["sparse"]
    assert "cannot be switched" in said[0]
    other = {"url": "http://10.0.0.1:1", "dense_url": "http://10.0.0.2:1"}
    assert [plan.name for plan in targets.plans(command(server=other), said.append)] == ["dense", "floor", "sparse"]
    monkeypatch.setattr(Server, "listens_on", lambda self, port: None)  # nobody can say
    found += [Server(i, f"{i}a", tmp_path) for i in (1, 2)]
    with pytest.raises(EvalError, match=r"several servers with VSPREFILL run here \(1, 2\); say which one"):
        targets.plans(command(), said.append)
    chosen = {"url": "http://127.0.0.1:1", "server": "2"}
    assert [plan.name for plan in targets.plans(command(server=chosen), said.append)] == ["dense", "floor", "sparse"]


def test_dense_is_added_where_it_is_needed() -> None:
    given = {"model": "m", "compare": "fast,sampled"}
    assert [plan.name for plan in targets.plans(command(server=given), print)] == ["dense", "fast", "sampled"]
    plans = targets.plans(command(server=given, suite="ruler"), print)
    assert [plan.options for plan in plans] == [{"preset": "fast"}, {"estimator": "sampled"}]


def test_stopped_from_the_keyboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm_vsprefill.eval import evaluation

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", stop)
    words = ["eval", "--out", str(tmp_path / "o"), "--url", "http://127.0.0.1:1"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 130
    assert "stopped; what is finished is in" in result.output
