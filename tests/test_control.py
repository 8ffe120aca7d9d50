# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The commands for running servers, and the switch that workers follow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_vsprefill import cli, control
from vllm_vsprefill.stats import STATS_DIR_VARIABLE, LayerCounts, Recorder, read_last_prompt, read_modes
from vllm_vsprefill.switch import Switch, write_mode


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(control.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.delenv(STATS_DIR_VARIABLE, raising=False)
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    return tmp_path


def start(folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "sparse") -> Recorder:
    """A worker of a server that uses ``folder``."""
    monkeypatch.setenv(STATS_DIR_VARIABLE, str(folder))
    recorder = Recorder()
    monkeypatch.delenv(STATS_DIR_VARIABLE)
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
        assert STATS_DIR_VARIABLE in text


def test_status_and_mode_of_the_only_server(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temporary / f"vsprefill-{os.getpid()}-abcd"
    recorder = start(folder, monkeypatch)
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

    code, text = run("mode", "dense")
    assert code == 0
    assert (folder / "mode").read_text() == "dense\n"
    assert run("mode", "thick")[0] == 2


def test_several_servers_must_be_told_apart(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in (os.getpid(), os.getppid()):
        start(temporary / f"vsprefill-{pid}-abcd", monkeypatch)
    code, text = run("mode", "dense")
    assert code == 1
    assert f"{os.getpid()}  " in text
    assert run("mode", "dense", "--server", str(os.getpid()))[0] == 0
    assert not (temporary / f"vsprefill-{os.getppid()}-abcd" / "mode").exists()
    assert run("status")[1].count("workers") == 2


def test_a_folder_named_by_hand(temporary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start(tmp_path / "mine", monkeypatch, mode="off")
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


def test_last_prompt_and_mode_are_summed_over_workers(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = temporary / "exchange"
    for _ in range(2):
        recorder = start(folder, monkeypatch)
        for computed in (8, 2):
            recorder.begin_prompt()
            recorder.record(0, LayerCounts(computed, 10, 1, 0))
            recorder.publish()
    assert read_last_prompt(folder) == {0: LayerCounts(4, 20, 2, 0)}
    assert read_modes(folder) == ["sparse", "sparse"]


def test_imports_neither_torch_nor_vllm() -> None:
    code = "import sys; import vllm_vsprefill.control; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
