# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Commands for a running server: how dense its prefill is, and a switch to dense prefill and back.

A server and these commands meet in a folder (``VSPREFILL_STATS_DIR``, chosen by the server under the temporary folder
if it is not set): workers write their counts there and look there for the mode. Nothing is restarted. Cached prefix
blocks keep what was computed when they were written, so a comparison wants a prompt that is not cached, or another
``cache_salt`` for each mode.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_vsprefill import stats
from vllm_vsprefill.stats import STATS_DIR_VARIABLE, LayerCounts
from vllm_vsprefill.switch import write_mode


@dataclass(frozen=True)
class Server:
    """A running server. ``pid`` is None for one whose folder was named by hand."""

    pid: int | None
    folder: Path

    @property
    def name(self) -> str:
        """How messages call it."""
        return f"server {self.pid}" if self.pid is not None else f"server of {self.folder}"


def find_servers() -> list[Server]:
    """Servers of this machine that use VSPREFILL, by their folders; those of dead processes are left out."""
    found: dict[Path, Server] = {}
    named = os.environ.get(STATS_DIR_VARIABLE)
    candidates = [Path(named)] if named else []
    for folder in [*candidates, *sorted(Path(tempfile.gettempdir()).glob("vsprefill-*"))]:
        match = stats.AUTOMATIC_NAME.fullmatch(folder.name)
        pid = int(match[1]) if match else None
        if not folder.is_dir() or (match is None and folder not in candidates):
            continue
        if pid is None or _is_alive(pid):
            found.setdefault(folder, Server(pid, folder))
    return list(found.values())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _choose(server: int | None) -> Server:
    """The server meant; ends the command where that is not clear."""
    servers = [one for one in find_servers() if server is None or one.pid == server]
    if len(servers) == 1:
        return servers[0]
    if not servers:
        what = (
            "No server with VSPREFILL is running" if server is None else f"No server {server} with VSPREFILL is running"
        )
        typer.echo(
            f"{what} on this machine. If it was started with {STATS_DIR_VARIABLE}, set that variable here, too.",
            err=True,
        )
    else:
        typer.echo("Several servers are running; say which one with --server:", err=True)
        for one in servers:
            typer.echo(f"  {one.pid}  {one.folder}", err=True)
    raise typer.Exit(1)


def _percent(counts: dict[int, LayerCounts]) -> str:
    """Mean density over layers, with the extremes."""
    densities = {layer: one.density for layer, one in sorted(counts.items()) if one.causal}
    if not densities:
        return "nothing computed yet"
    low, high = min(densities, key=densities.__getitem__), max(densities, key=densities.__getitem__)
    mean = sum(densities.values()) / len(densities)
    text = f"{mean:.1%} of causal attention"
    if len(densities) > 1:
        text += f", {densities[low]:.1%} (layer {low}) to {densities[high]:.1%} (layer {high})"
    return text


def status(
    server: Annotated[int | None, typer.Option(help="Process id; without it every server is shown.")] = None,
    layers: Annotated[bool, typer.Option(help="Show every layer.")] = False,
) -> None:
    """Show running servers: mode, and how much of causal attention their prefill computes."""
    servers = find_servers() if server is None else [_choose(server)]
    if not servers:
        _choose(None)
    for one in servers:
        total, last = stats.read_counts(one.folder), stats.read_last_prompt(one.folder)
        modes = stats.read_modes(one.folder)
        chunks = LayerCounts()
        for counts in total.values():
            chunks += counts
        typer.echo(f"{one.name}: {len(modes)} workers, mode {' and '.join(sorted(set(modes))) or 'unknown'}")
        typer.echo(f"  since start: {_percent(total)}; {chunks.sparse_chunks} sparse and {chunks.dense_chunks} dense")
        typer.echo(f"  last prompt: {_percent(last)}")
        if layers:
            for layer, counts in sorted(total.items()):
                recent = last.get(layer, LayerCounts())
                typer.echo(f"  layer {layer:3d}: {counts.density:6.1%} since start, {recent.density:6.1%} last prompt")


def mode(
    to: Annotated[Literal["sparse", "dense"], typer.Argument(help="What prefill to do from now on.")],
    server: Annotated[int | None, typer.Option(help="Process id, where several servers run.")] = None,
) -> None:
    """Switch a running server between sparse and dense prefill. Cached prefix blocks keep what they were computed with:
    compare with a prompt that is not cached, or with another cache_salt."""
    one = _choose(server)
    found = set(stats.read_modes(one.folder))
    if found == {"off"}:
        typer.echo(f"{one.name} was started with enabled: false; it has nothing to switch.", err=True)
        raise typer.Exit(1)
    try:
        write_mode(one.folder, to)
    except OSError as error:
        typer.echo(f"{one.name}: cannot write to {one.folder}: {error.strerror}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{one.name}: {to} prefill from the next step on (workers look a few times a second).")
