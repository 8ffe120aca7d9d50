# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What can be seen without torch and vLLM: Python, packages, the plugin's entry point, variables, folders, servers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from vllm_vsprefill import control, exchange, stats
from vllm_vsprefill.checkpoint import CheckpointError, candidates, read_config
from vllm_vsprefill.config import ENV_PREFIX, ConfigError, VSPrefillConfig, env_name
from vllm_vsprefill.registration import BACKEND_NAME
from vllm_vsprefill.tools.findings import Finding, note, ok, one_line, problem

PLUGIN = "vsprefill"
PLUGIN_GROUP = "vllm.general_plugins"
MIN_PYTHON = (3, 10)
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
LOOPBACK = ("127.0.0.1", "localhost")


def look(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Everything here."""
    yield from python()
    yield from plugin(environment)
    yield from variables(environment)
    yield from stats_folder()
    yield from servers()
    yield from indexers()


def installed(*names: str) -> str | None:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < MIN_PYTHON:
        yield problem("Python", f"{version}, expected 3.10 or later", "make an environment with a newer Python")
    else:
        yield ok("Python", f"{version} ({sys.executable})")
    own = installed("vllm-vsprefill")
    if own is not None:
        yield ok("vllm-vsprefill", own)
    transformers = installed("transformers")
    if transformers is None:
        yield problem("transformers", "not installed", "install vLLM, which brings it")
    else:
        yield ok("transformers", transformers)


def plugin(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Whether vLLM will load this package."""
    found = [entry for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP) if entry.name == PLUGIN]
    if not found:
        yield problem(
            "plugin",
            f"no entry point {PLUGIN!r} in {PLUGIN_GROUP}: vllm-vsprefill is not installed in this environment",
            f"install it with this Python: {sys.executable} -m pip install . (a folder on PYTHONPATH is not enough)",
        )
    for entry in found[:1]:
        try:
            entry.load()
        except Exception as error:
            yield problem(
                "plugin", f"the entry point cannot be loaded ({one_line(error)})", "install the package again"
            )
        else:
            yield ok("plugin", f"entry point {entry.value}")
    targets = {entry.value for entry in found}
    if len(targets) > 1:
        yield problem(
            "plugin", f"several packages offer it: {', '.join(sorted(targets))}", "uninstall all but one of them"
        )
    allowed = environment.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in (name.strip() for name in allowed.split(",")):
        yield problem(
            "VLLM_PLUGINS",
            f"is set to {allowed!r}, so vLLM does not load {PLUGIN!r}",
            f"unset it, or add {PLUGIN} to it: VLLM_PLUGINS={','.join(filter(None, (allowed, PLUGIN)))}",
        )


def variables(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that are options, that are wrong, or that come between."""
    try:
        VSPrefillConfig.from_sources(None, environment)
    except ConfigError as error:
        for line in str(error).splitlines()[1:] or [str(error)]:
            yield problem("options", line.strip().removeprefix("- "), "correct or unset the variable")
    options = [name for name in map(env_name, VSPrefillConfig.model_fields) if environment.get(name, "").strip()]
    if options:
        given = ", ".join(f"{name}={environment[name]}" for name in options)
        yield note("options", f"{given}; every server started from here reads {'it' if len(options) == 1 else 'them'}")
    else:
        yield ok("options", f"no {ENV_PREFIX}* option is set in the environment")
    backend = environment.get("VLLM_ATTENTION_BACKEND", "").strip()
    if backend:
        yield note(
            "VLLM_ATTENTION_BACKEND",
            f"is set to {backend!r}, which vLLM ignores since it has an option for it",
            f"start the server with --attention-backend {BACKEND_NAME}, and unset it",
        )
    proxies = [name for name in PROXIES if environment.get(name, "").strip()]
    direct = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    exempt = {part.strip() for part in direct.split(",")}
    if proxies and "*" not in exempt and not exempt.issuperset(LOOPBACK):
        yield note(
            "proxy",
            f"{' and '.join(proxies)} set without {' and '.join(LOOPBACK)} in no_proxy: curl and other clients ask a "
            "server on this machine through the proxy",
            f"export no_proxy={','.join((*filter(None, (direct,)), *LOOPBACK))} (commands of vsprefill do without)",
        )


def stats_folder() -> Iterator[Finding]:
    """Whether a server can make its exchange folder."""
    name = exchange.STATS_DIR_VARIABLE
    remedy = f"set {name} (or TMPDIR) to a folder that you may write to"
    try:
        base = exchange.base_folder()
    except (OSError, RuntimeError) as error:
        yield problem("stats folder", f"there is none ({error})", remedy)
        return
    at = base
    while not at.exists() and at != at.parent:  # a server makes what is missing
        at = at.parent
    try:
        with tempfile.TemporaryDirectory(prefix="vsprefill-doctor-", dir=at):
            pass
    except OSError as error:
        yield note(
            "stats folder",
            f"cannot write to {at} ({error.strerror or error}): a server runs, but without density counters, and "
            "`vsprefill status` and `mode` do not find it",
            remedy,
        )
    else:
        missing = "" if at == base else " (made when a server starts)"
        yield ok("stats folder", f"{base}{missing}")


def servers() -> Iterator[Finding]:
    """Servers that run."""
    found = control.find_servers()
    for server in found:
        modes = ", ".join(sorted(set(stats.read_modes(server.folder)))) or "starting"
        yield ok("server", f"process {server.pid} ({server.name}) runs: {modes}")
    if not found:
        yield ok("server", "none with VSPREFILL is running")


def indexers() -> Iterator[Finding]:
    """Indexers that a server would look through."""
    names = []
    for folder in candidates():
        try:
            if importlib.util.find_spec("torch") is not None:  # the weights' header is read with it
                read_config(folder)
        except Exception as error:
            if not isinstance(error, CheckpointError):  # a broken torch, say, which is a finding of its own
                yield note("indexers", f"{Path(folder).name} cannot be looked at ({one_line(error)})")
                continue
            yield note(
                "indexer", f"{Path(folder).name} cannot be used: {'; '.join(error.problems)}", "install it again"
            )
        else:
            names.append(Path(folder).name)
    yield ok("indexers", f"installed: {', '.join(names) or 'none'}")
