# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Settings that all tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

# Before anything imports the libraries that read them: no test reaches for the network, and none is counted as use.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

# Threads that wait for each other do not spin: more processes than cores would spend most of their time that way, a
# product of some microseconds thousands of them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Where Python is told to leave no bytecode, as images of containers do, each of the processes that tests start would
# compile thousands of modules of the libraries, most of its time. They keep it in one folder that git ignores.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parent.parent / ".cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

import hypothesis
import pytest

from tests.watchdog import Watchdog

# A shell starts background jobs with SIGINT ignored, and so would be every process that a test wants to interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Options set in the caller's shell would change what the tests see.
for _name in [name for name in os.environ if name.startswith("VSPREFILL_")]:
    del os.environ[_name]
# Servers of the tests are by themselves: nobody else on the machine counts them or switches them, nor they others.
os.environ["VSPREFILL_STATS_DIR"] = tempfile.mkdtemp(prefix="vsprefill-tests-")
atexit.register(shutil.rmtree, os.environ["VSPREFILL_STATS_DIR"], ignore_errors=True)

# No deadline: on a busy machine the first example of a test also pays for imports. The examples are the same on every
# run, so that a failure seen in continuous integration can be had again elsewhere.
hypothesis.settings.register_profile(
    "default_run",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "thorough", parent=hypothesis.settings.get_profile("default_run"), max_examples=1000
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default_run"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watchdog(), "watchdog")


STARTS_VLLM = {"test_engine.py", "test_server.py"}


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file in one process (``make test`` has two), and those that start vLLM in the same one."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "vllm" if Path(file).name in STARTS_VLLM else file

    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest group first, so that the other process has the rest; skip ``gpu`` where there is no CUDA device."""
    items.sort(key=lambda item: item.path.name not in STARTS_VLLM)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
