# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Starts a stock ``vllm serve`` on a free loopback port, waits for it and ends it: for evaluations, demo and tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import httpx

from vllm_vsprefill.eval.density import Densities

if TYPE_CHECKING:
    import openai

HOST = "127.0.0.1"


def loopback(timeout: float | httpx.Timeout | None = 30) -> httpx.Client:
    """A client for servers on this machine: no proxy of the environment comes between, and no certificate store."""
    return httpx.Client(trust_env=False, timeout=timeout)


class ServerError(RuntimeError):
    """The server ended before it was ready, or did not become ready in time. Shows the end of its log."""


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class VLLMServer:
    """A ``vllm serve`` process. Use as a context manager; leaving it ends the server and its children.

    Args:
        model: folder or Hugging Face id.
        backend: attention backend, e.g. ``VSPREFILL``; None leaves the choice to vLLM.
        log: file that receives the server's output.
        arguments: further command-line arguments.
        options: VSPREFILL options, passed through ``--additional-config``.
        environment: variables set on top of this process's.
        on_wait: called about twice a second while waiting, with seconds waited and the last line of the log.
        timeout: seconds to wait for readiness.
    """

    def __init__(
        self,
        model: str,
        backend: str | None,
        log: Path,
        *,
        arguments: Sequence[str] = (),
        options: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        on_wait: Callable[[float, str], None] | None = None,
        timeout: float = 600,
    ) -> None:
        self.port = free_port()
        self.log = log
        self.on_wait = on_wait
        self.timeout = timeout
        self.process: subprocess.Popen[bytes] | None = None
        # Not the `vllm` script: vLLM may have been put on the path without one.
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
        self.command += ["--attention-backend", backend] if backend is not None else []
        self.command += ["--host", HOST, "--port", str(self.port), *arguments]
        if options:
            self.command += ["--additional-config", json.dumps({"vsprefill": options})]
        self.environment = {**os.environ, **(environment or {})}

    @property
    def url(self) -> str:
        """Root of the server, without a trailing slash."""
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> VLLMServer:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            # A session of its own: Ctrl-C reaches this process only, which then ends the server in order.
            self.process = subprocess.Popen(
                self.command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process is None:
            return
        group = self.process.pid
        for number, patience in ((signal.SIGINT, 20.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            if not _group_alive(self.process, group):
                break
            try:
                os.killpg(group, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + patience
            while _group_alive(self.process, group) and time.monotonic() < deadline:
                time.sleep(0.1)
        self.process.wait()

    def get(self, path: str) -> str:
        """Body of a GET request to the server."""
        with loopback() as http:
            return http.get(self.url + path).raise_for_status().text

    def client(self, timeout: float = 300) -> openai.OpenAI:
        """An openai client for the server that sends every request once."""
        import openai  # the demo's and the tests'; evaluations have a client of their own

        http: Any = loopback(timeout)
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", timeout=timeout, max_retries=0, http_client=http
        )

    def tail(self, lines: int = 30) -> str:
        """The end of the server's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def densities(self) -> Densities:
        """The density counters as they stand now."""
        return Densities.parse(self.get("/metrics"))

    def _wait_until_ready(self) -> None:
        assert self.process is not None
        start = time.monotonic()
        while True:
            waited = time.monotonic() - start
            if (code := self.process.poll()) is not None:
                raise ServerError(f"the server ended with exit code {code} before it was ready\n{self.tail()}")
            if waited > self.timeout:
                raise ServerError(f"the server was not ready after {self.timeout:.0f} s\n{self.tail()}")
            with contextlib.suppress(httpx.TransportError), loopback(2) as http:
                if http.get(f"{self.url}/health").status_code == 200:
                    return
            if self.on_wait is not None:
                self.on_wait(waited, self.tail(1))
            time.sleep(0.4)


def _group_alive(process: subprocess.Popen[bytes], group: int) -> bool:
    process.poll()
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
