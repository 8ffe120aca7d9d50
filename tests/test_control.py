# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The commands for running servers, and the switch that workers follow."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_vsprefill import cli, exchange
from vllm_vsprefill.exchange import STATS_DIR_VARIABLE
from vllm_vsprefill.recall_check import Recall
from vllm_vsprefill.stats import LayerCounts, Recorder, read_last_prompt, read_modes
from vllm_vsprefill.switch import Switch, write_mode


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv(STATS_DIR_VARIABLE, raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return tmp_path


def start(folder: Path, mode: str = "sparse") -> Recorder:
    """A worker of a server that uses ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder = Recorder(0, folder)
    recorder.mode = mode
    recorder.write()
    return recorder


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, list(arguments))
    return result.exit_code, result.output


def test_no_server(temporary: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    (temporary / f"vsprefill-{dead.pid}-abcd").mkdir()
    (temporary / "vsprefill-notes").mkdir()
    for command in (["status"], ["mode", "dense"], ["status", "--server", str(dead.pid)]):
        code, text = run(*command)
        assert code == 1
        assert "is running" in text
        for part in (STATS_DIR_VARIABLE, "TMPDIR", str(temporary)):
            assert part in text


def test_status_and_mode_of_the_only_server(temporary: Path) -> None:
    folder = temporary / f"vsprefill-{os.getpid()}-abcd"
    recorder = start(folder)
    code, text = run("status")
    assert code == 0
    assert f"server {os.getpid()}: 1 workers, mode sparse" in text
    assert "nothing computed yet" in text
    for computed in (80, 20):
        recorder.begin_prompt()
        recorder.record(3, LayerCounts(computed, 100, 1, 0))
        recorder.record(4, LayerCounts(100, 100, 0, 1))
        recorder.publish()
    text = run("status", "--layers")[1]
    assert "since start: 75.0% of causal attention, 50.0% (layer 3) to 100.0% (layer 4); 2 sparse and 2 dense" in text
    assert "last prompt: 60.0% of causal attention, 20.0% (layer 3) to 100.0% (layer 4)" in text
    assert "layer   3:  50.0% since start,  20.0% last prompt" in text

    assert "recall" not in text
    recorder.recall = Recall(0.612, 0.95, 8)
    recorder.write()
    assert "  recall of the indexer in the first sparse steps: 61.2%, expected 95.0%\n" in run("status")[1]
    recorder.recall = Recall(0.612, None, 8)
    recorder.write()
    assert "  recall of the indexer in the first sparse steps: 61.2%\n" in run("status")[1]

    code, text = run("mode", "dense")
    assert code == 0
    assert (folder / "mode").read_text() == "dense\n"
    assert run("mode", "thick")[0] == 2


def test_several_servers_must_be_told_apart(temporary: Path) -> None:
    for pid in (os.getpid(), os.getppid()):
        start(temporary / f"vsprefill-{pid}-abcd")
    code, text = run("mode", "dense")
    assert code == 1
    assert f"{os.getpid()}  " in text
    assert run("mode", "dense", "--server", str(os.getpid()))[0] == 0
    assert not (temporary / f"vsprefill-{os.getppid()}-abcd" / "mode").exists()
    assert run("status")[1].count("workers") == 2


def test_incarnations_with_one_process_id(temporary: Path) -> None:
    """A server was killed and started again in a container: the first process has the same id."""
    name = f"vsprefill-{os.getpid()}-{{}}"
    for kind in ("dead", "beef"):
        start(temporary / name.format(kind))
        (temporary / name.format(kind) / exchange.OWNER_FILE).write_text("{}")
    with (temporary / name.format("beef") / exchange.OWNER_FILE).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert run("mode", "dense", "--server", str(os.getpid()))[0] == 0
        assert not (temporary / name.format("dead") / "mode").exists()
        assert (temporary / name.format("beef") / "mode").read_text() == "dense\n"
        assert run("status")[1].count("workers") == 1
    assert run("status")[0] == 1


def test_two_servers_of_one_process_are_told_apart_by_name(temporary: Path) -> None:
    for kind in ("aaaa", "bbbb"):
        start(temporary / f"vsprefill-{os.getpid()}-{kind}")
    code, text = run("mode", "dense", "--server", str(os.getpid()))
    assert code == 1
    assert f"{os.getpid()}  bbbb" in text
    assert run("mode", "dense", "--server", "bbbb")[0] == 0
    assert not (temporary / f"vsprefill-{os.getpid()}-aaaa" / "mode").exists()
    assert f"server {os.getpid()} (bbbb): 1 workers" in run("status")[1]


def test_the_variable_selects_its_server_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(temporary / f"vsprefill-{os.getppid()}-abcd")
    start(temporary / "a" / "b" / f"vsprefill-{os.getpid()}-abcd")
    monkeypatch.setenv(STATS_DIR_VARIABLE, str(temporary / "a" / "b"))
    assert run("mode", "dense")[0] == 0
    assert (temporary / "a" / "b" / f"vsprefill-{os.getpid()}-abcd" / "mode").exists()
    assert not (temporary / f"vsprefill-{os.getppid()}-abcd" / "mode").exists()
    monkeypatch.setenv(STATS_DIR_VARIABLE, str(temporary / "elsewhere"))
    code, text = run("mode", "dense")
    assert code == 1
    assert str(temporary / "elsewhere") in text


def test_a_folder_named_by_hand(temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start(tmp_path / "mine" / f"vsprefill-{os.getpid()}-abcd", mode="off")
    monkeypatch.setenv(STATS_DIR_VARIABLE, str(tmp_path / "mine"))
    assert "mode off" in run("status")[1]
    code, text = run("mode", "dense")
    assert code == 1
    assert "enabled: false" in text


def test_switch_follows_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "exchange"
    switch = Switch(folder / "mode")

    def look() -> bool:
        switch._next = 0.0
        return switch.look()

    assert not look()
    write_mode(folder, "sparse")
    assert not look()  # that is how it starts
    write_mode(folder, "dense")
    assert look()
    assert switch.mode == "dense"
    assert not look()
    (folder / "mode").write_text("purple")
    assert not look()
    assert switch.mode == "dense"
    write_mode(folder, "sparse")
    assert not switch.look()  # not time yet
    assert look()
    assert switch.mode == "sparse"
    (folder / "mode").unlink()
    assert not look()
    with pytest.raises(ValueError, match="sparse, dense"):
        write_mode(folder, "purple")
    assert not Switch(None).look()


def test_last_prompt_and_mode_are_summed_over_workers(temporary: Path) -> None:
    folder = temporary / "exchange"
    for _ in range(2):
        recorder = start(folder)
        for computed in (8, 2):
            recorder.begin_prompt()
            recorder.record(0, LayerCounts(computed, 10, 1, 0))
            recorder.publish()
    assert read_last_prompt(folder) == {0: LayerCounts(4, 20, 2, 0)}
    assert read_modes(folder) == ["sparse", "sparse"]


def test_imports_neither_torch_nor_vllm() -> None:
    code = "import sys; import vllm_vsprefill.control; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
