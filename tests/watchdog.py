# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Every run of the tests has an end, and says which test was to blame.

1. pytest-timeout's signal fails a test that takes too long, and the run goes on.
2. A test that no signal reaches, because compiled code does not return, ends its process ``GRACE`` seconds later:
   faulthandler, which needs no lock of the interpreter, shows where every thread is. pytest-xdist then names the test.
3. What neither reaches, such as a worker that hangs before its first test or after its last one, is seen by the first
   process: after ``QUIET`` seconds without news it says which tests run, and after ``END`` seconds it ends all.

None of them does anything any more once a debugger is at work: whoever debugs may think as long as it takes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from pytest_timeout import _get_item_settings, is_debugging

GRACE = 60.0
QUIET = 120.0
END = 1200.0  # above the longest timeout of a test and GRACE
STATUS = 70  # of a run that the third step has ended


class Watchdog:
    """A pytest plugin; times are in seconds."""

    def __init__(self, *, grace: float = GRACE, quiet: float = QUIET, end: float = END) -> None:
        self.grace, self.quiet, self.end = grace, quiet, end
        self.running: dict[str, float] = {}
        self.news = time.monotonic()
        self.finished = threading.Event()
        self.stderr = os.dup(2)  # output is not captured while plugins are configured

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.news = time.monotonic()
        timeout = session.config._env_timeout  # type: ignore[attr-defined]  # pytest-timeout's
        self.end = max(self.end, (timeout or 0) + 2 * self.grace)  # somebody may have given slow tests more
        if not hasattr(session.config, "workerinput"):  # pytest-xdist's workers are watched by the first process
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def pytest_unconfigure(self) -> None:
        self.finished.set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        timeout = _get_item_settings(item).timeout
        if is_debugging():
            self.finished.set()
        elif timeout:
            faulthandler.dump_traceback_later(timeout + self.grace, exit=True, file=self.stderr)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def pytest_enter_pdb(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        self.finished.set()

    # With pytest-xdist these are called in the first process, too.
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.news = self.running[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.news = time.monotonic()
        self.running.pop(nodeid, None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if str(report.when) == "???":  # pytest-xdist's word for the test that a process died in
            self.pytest_runtest_logfinish(report.nodeid)

    def _watch(self) -> None:
        told = self.news
        while not self.finished.wait(min(1.0, self.quiet / 4)):
            now = time.monotonic()
            if now - self.news >= self.end:
                self._say(f"nothing has happened for {now - self.news:.0f} s, the run ends here; {self._tests()}")
                self._end()
            if now - max(told, self.news) >= self.quiet:
                told = now
                self._say(f"nothing has happened for {now - self.news:.0f} s; {self._tests()}")

    def _tests(self) -> str:
        now = time.monotonic()
        running = [f"{test} ({now - since:.0f} s)" for test, since in sorted(self.running.items())]
        return "running: " + ", ".join(running) if running else "no test is running"

    def _say(self, text: str) -> None:
        os.write(self.stderr, f"\nwatchdog: {text}\n".encode())

    def _end(self) -> None:
        faulthandler.dump_traceback(file=self.stderr)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os._exit(STATUS)
