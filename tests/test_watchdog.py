# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Tests that hang, in every way that has been seen, end with their names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFTEST = """
from tests.watchdog import Watchdog

def pytest_configure(config):
    config.pluginmanager.register(Watchdog(grace=2, quiet=1, end={end}), "watchdog")
"""
GOOD = "\ndef test_good():\n    pass\n"
INTERRUPTIBLE = "import time\ndef test_hangs():\n    time.sleep(120)\n" + GOOD
# Compiled code that no signal ends, and that holds the interpreter's lock meanwhile.
STUCK = (
    "import ctypes, signal\n"
    "def test_hangs():\n"
    "    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
    "    ctypes.PyDLL(None).sleep(120)\n" + GOOD
)
BEFORE_THE_FIRST_TEST = "import os, time\nif 'PYTEST_XDIST_WORKER' in os.environ:\n    time.sleep(120)\n" + GOOD
PROCESSES = pytest.mark.parametrize("processes", [0, 2])


def run(folder: Path, text: str, processes: int, *arguments: str, end: float = 90) -> tuple[int, str]:
    """Status and output of `pytest` on one file, in the background's way: SIGINT is ignored. It must end."""
    (folder / "conftest.py").write_text(CONFTEST.format(end=end))
    (folder / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(folder), "--timeout", "1", "-n", str(processes), "--max-worker-restart", "0"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    start = time.monotonic()
    done = subprocess.run(
        [*command, *arguments, "test_it.py"],
        cwd=folder,
        env={**env, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=110,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert time.monotonic() - start < 100
    return done.returncode, done.stdout


@PROCESSES
def test_one_that_can_be_interrupted_fails_and_the_others_run(processes: int, tmp_path: Path) -> None:
    status, output = run(tmp_path, INTERRUPTIBLE, processes)
    assert status == 1
    assert "FAILED test_it.py::test_hangs - Failed: Timeout (>1.0s)" in output
    assert "1 failed, 1 passed" in output


@PROCESSES
def test_one_that_cannot_be_interrupted_is_named_and_the_run_ends(processes: int, tmp_path: Path) -> None:
    status, output = run(tmp_path, STUCK, processes)
    assert status != 0
    assert "in test_hangs" in output  # faulthandler's
    if processes:
        assert "crashed while running 'test_it.py::test_hangs'" in output


def test_a_worker_that_hangs_outside_of_tests_ends_the_run(tmp_path: Path) -> None:
    status, output = run(tmp_path, BEFORE_THE_FIRST_TEST, 2, end=5)
    assert status == 70
    assert "nothing has happened for 1 s; no test is running" in output
    assert "the run ends here" in output


def test_a_quiet_test_is_named_while_it_runs(tmp_path: Path) -> None:
    slow = "import time\ndef test_slow():\n    time.sleep(3)\n"
    status, output = run(tmp_path, slow, 2, "--timeout", "60")
    assert status == 0
    assert "running: test_it.py::test_slow (1 s)" in output


def test_a_longer_timeout_is_waited_for(tmp_path: Path) -> None:
    slow = "import time\ndef test_slow():\n    time.sleep(5)\n"
    status, output = run(tmp_path, slow, 0, "--timeout", "60", end=3)
    assert status == 0, output


def test_nothing_ends_while_somebody_debugs(tmp_path: Path) -> None:
    """As pytest tells plugins of `breakpoint()` and `--pdb`."""
    thinking = (
        "import time\ndef test_thinks(pytestconfig):\n"
        "    pytestconfig.hook.pytest_enter_pdb(config=pytestconfig, pdb=None)\n    time.sleep(8)\n"
    )
    status, output = run(tmp_path, thinking, 0, end=3)
    assert status == 0, output
    # A debugger that was there before the first test
    attached = "import time\ndef test_thinks():\n    time.sleep(8)\n"
    debugger = "import pytest_timeout\npytest_timeout.SUPPRESS_TIMEOUT = True\n"
    status, output = run(tmp_path, debugger + attached, 0, end=3)
    assert status == 0, output
