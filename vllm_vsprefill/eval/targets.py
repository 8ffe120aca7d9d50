# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What is measured: a server and the state it is in."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_vsprefill import stats
from vllm_vsprefill.control import find_servers
from vllm_vsprefill.eval import settings
from vllm_vsprefill.eval.client import Client, is_loopback
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.options import EvalCommand, ServerOptions
from vllm_vsprefill.eval.rows import Rows
from vllm_vsprefill.eval.server import ServerError, VLLMServer
from vllm_vsprefill.eval.settings import DENSE, FLOOR
from vllm_vsprefill.exchange import Server
from vllm_vsprefill.switch import write_mode

SPARSE = "sparse"
SWITCH_SECONDS = 15.0
COMPANION_TOKENS, COMPANION_ANSWER = 333, 64
# On a CPU vLLM would take nearly all memory for its cache, and refuses to start where others use some of it.
CPU_CACHE, CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE", "4"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Target:
    """A server in one state.

    Attributes:
        name: of the state, as reports show it.
        client: to ask it.
        beside: every prompt is computed beside another one, so that its chunks are cut elsewhere.
    """

    name: str
    client: Client
    beside: bool = False

    def rows(self, prompt: list[int], top: int) -> Rows:
        """See :meth:`Client.rows`."""
        if not self.beside:
            return self.client.rows(prompt, top)
        # Its decoding takes a token of every one of the prompt's chunks.
        other = prompt[: min(COMPANION_TOKENS, len(prompt))]
        companion = threading.Thread(target=self._accompany, args=(other,), daemon=True)
        companion.start()
        time.sleep(0.02)
        try:
            return self.client.rows(prompt, top)
        finally:
            companion.join()

    def _accompany(self, prompt: list[int]) -> None:
        with contextlib.suppress(EvalError):  # what it would say, the prompt itself says
            self.client.answer(prompt, COMPANION_ANSWER)


@dataclass(frozen=True)
class Plan:
    """A target to come. ``open`` starts or switches its server, and ends or switches it back after use.

    ``options`` are those of VSPREFILL that its server is started with, if it is.
    """

    name: str
    open: Callable[[], AbstractContextManager[Target]]
    options: dict[str, Any] | None = None


def plans(options: EvalCommand, say: Say) -> list[Plan]:
    """Targets of an evaluation in the order in which they are measured, dense first.

    Raises:
        EvalError: settings that cannot be used, or no way to have dense attention where it is needed.
    """
    wanted = options.server
    needs_dense = "fidelity" in options.suite
    if wanted.url is None:
        return _started(options, say, needs_dense)
    served = Plan(SPARSE, lambda: running(SPARSE, wanted.url, wanted.model))
    if wanted.dense_url is not None:
        dense = Plan(DENSE, lambda: running(DENSE, wanted.dense_url, None))
        floor = Plan(FLOOR, lambda: running(FLOOR, wanted.dense_url, None, beside=True))
    else:
        try:
            server = local_server(wanted)
        except EvalError:
            if needs_dense:
                raise
            say("the server cannot be switched to dense attention from here: only what it does now is measured")
            return [served]
        served = Plan(SPARSE, lambda: switched(SPARSE, wanted, server, SPARSE))
        dense = Plan(DENSE, lambda: switched(DENSE, wanted, server, DENSE))
        floor = Plan(FLOOR, lambda: switched(FLOOR, wanted, server, DENSE, beside=True))
    return [dense, *([floor] if needs_dense else []), served]


# -- servers that run already --------------------------------------------------------------------------------------


def connect(url: str, model: str | None) -> Client:
    """A client of a server that runs already, with the key in ``OPENAI_API_KEY`` if there is one."""
    return Client(url, model, os.environ.get("OPENAI_API_KEY"))


@contextlib.contextmanager
def running(name: str, url: str | None, model: str | None, beside: bool = False) -> Iterator[Target]:
    """A server as it is found."""
    assert url is not None
    with connect(url, model) as client:
        yield Target(name, client, beside)


def local_server(wanted: ServerOptions) -> Server:
    """The server at --url, by the folder it can be switched through.

    Raises:
        EvalError: it is another machine's, none is found, or several are.
    """
    assert wanted.url is not None
    how = "give a server with dense attention as --dense-url"
    if not is_loopback(wanted.url):
        raise EvalError(f"{wanted.url} is another machine's and cannot be switched to dense attention from here; {how}")
    found = [one for one in find_servers() if wanted.server in (None, str(one.pid), one.name)]
    if wanted.server is None and (port := urlsplit(wanted.url).port) is not None:
        # Another one on this machine would be switched in its place, and the wrong attention be measured.
        there = {one: one.listens_on(port) for one in found}
        found = [one for one in found if there[one]] or [one for one in found if there[one] is None]
    if len(found) > 1:
        listed = ", ".join(str(one.pid) for one in found)
        raise EvalError(f"several servers with VSPREFILL run here ({listed}); say which one --url is with --server")
    if not found:
        raise EvalError(f"no server with VSPREFILL that can be switched to dense attention was found here; {how}")
    return found[0]


@contextlib.contextmanager
def switched(name: str, wanted: ServerOptions, server: Server, mode: str, beside: bool = False) -> Iterator[Target]:
    """The server in a mode; afterwards sparse, as servers start."""
    assert wanted.url is not None
    with running(name, wanted.url, wanted.model, beside) as target:
        try:
            _switch(target.client, server, mode)
            yield target
        finally:
            with contextlib.suppress(OSError):
                write_mode(server.folder, SPARSE)


def _switch(client: Client, server: Server, mode: str) -> None:
    try:
        write_mode(server.folder, mode)
    except OSError as error:
        raise EvalError(f"server {server.pid} cannot be switched: {server.folder}: {error.strerror}") from None
    deadline = time.monotonic() + SWITCH_SECONDS
    while True:
        time.sleep(0.3)  # workers look a few times a second, when there is something to do
        client.answer([1] * 16, 1)
        modes = set(stats.read_modes(server.folder))
        if modes == {mode}:
            return
        if "off" in modes:
            raise EvalError(f"server {server.pid} was started with enabled: false; it has no sparse prefill to measure")
        if time.monotonic() > deadline:
            shown = " and ".join(sorted(modes)) or "unknown"
            raise EvalError(
                f"server {server.pid} did not switch to {mode} prefill (mode {shown}); is it the one at --url?"
            )


# -- servers of its own --------------------------------------------------------------------------------------------


def _started(options: EvalCommand, say: Say, needs_dense: bool) -> list[Plan]:
    names = options.server.compare
    if names and needs_dense and DENSE not in names:
        names = (DENSE, *names)  # what all others are compared with
    found = settings.chosen(names, options.server.settings)
    return [Plan(name, partial(_start, name, given, options, say), given) for name, given in found.items()]


@contextlib.contextmanager
def _start(name: str, given: dict[str, Any] | None, options: EvalCommand, say: Say) -> Iterator[Target]:
    assert options.server.model is not None
    arguments = list(options.server.serve_args)
    if not any(word.split("=")[0] == "--max-model-len" for word in arguments):
        arguments += ["--max-model-len", str(max(options.lengths))]
    say(f"{name}: starting a server")
    log = options.out / "logs" / f"{name}.log"
    server = VLLMServer(
        options.server.model,
        None if given is None else "VSPREFILL",
        log,
        arguments=arguments,
        options=given,
        environment={CPU_CACHE: os.environ.get(CPU_CACHE, CPU_CACHE_GIB)},
        timeout=options.server.start_timeout,
    )
    try:
        # The client takes whatever model there is: it is the one that the server was started with.
        with server, Client(server.url, None, _key(arguments)) as client:
            yield Target(name, client)
    except ServerError as error:
        raise EvalError(f"{name}: {error}\nThe whole log: {_shown(log)}") from None


def _key(arguments: list[str]) -> str | None:
    return arguments[arguments.index("--api-key") + 1] if "--api-key" in arguments[:-1] else None


def _shown(path: Path) -> str:
    return os.path.relpath(path)
