# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Commands for a running server: how dense its prefill is, and a switch to dense prefill and back.

A server and these commands meet in a folder that the server makes in ``VSPREFILL_STATS_DIR`` or in the temporary folder
(see ``exchange``): workers write their counts there and look there for the mode. Nothing is restarted. Cached prefix
blocks keep what was computed when they were written, so a comparison wants a prompt that is not cached, or another
``cache_salt`` for each mode.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

import typer

from vllm_vsprefill import exchange, stats
from vllm_vsprefill.exchange import STATS_DIR_VARIABLE, Server
from vllm_vsprefill.stats import LayerCounts
from vllm_vsprefill.switch import write_mode

_ServerOption = Annotated[
    str | None,
    typer.Option("--server", metavar="PID|NAME", help="Process id of the server, or the name that `status` shows."),
]


def find_servers() -> list[Server]:
    """Servers with VSPREFILL that run: those of ``VSPREFILL_STATS_DIR`` alone if that is set, else those of the
    temporary folder."""
    try:
        return [server for server in exchange.servers(exchange.base_folder()) if server.is_running()]
    except OSError:
        return []


def _describe(server: Server) -> str:
    return f"server {server.pid}"


def _choose(wanted: str | None) -> Server:
    """The server meant; ends the command where that is not clear."""
    servers = [one for one in find_servers() if wanted is None or wanted in (str(one.pid), one.name)]
    if len(servers) == 1:
        return servers[0]
    if not servers:
        what = "No server with VSPREFILL" if wanted is None else f"No server {wanted} with VSPREFILL"
        try:
            where = f"in {exchange.base_folder()}"
        except OSError:
            where = "anywhere: there is no temporary folder"
        typer.echo(
            f"{what} is running, as far as can be seen {where}. If it was started with {STATS_DIR_VARIABLE} or with "
            "another TMPDIR, or in a container, set that variable and run this command there, too, as the same user.",
            err=True,
        )
    else:
        typer.echo("Several servers are running; say which one with --server and its process id or name:", err=True)
        for one in servers:
            started = one.started
            since = "" if started is None else time.strftime(", started %Y-%m-%d %H:%M:%S", time.localtime(started))
            typer.echo(f"  {one.pid}  {one.name}  {one.folder}{since}", err=True)
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
    server: _ServerOption = None,
    layers: Annotated[bool, typer.Option(help="Show every layer.")] = False,
) -> None:
    """Show running servers, all of them unless one is named: mode, and how much of causal attention their prefill
    computes."""
    servers = [one for one in find_servers() if server in (None, str(one.pid), one.name)]
    if not servers:
        _choose(server)
    pids = [one.pid for one in servers]
    for one in servers:
        total, last = stats.read_counts(one.folder), stats.read_last_prompt(one.folder)
        modes = stats.read_modes(one.folder)
        chunks = LayerCounts()
        for counts in total.values():
            chunks += counts
        name = _describe(one) if pids.count(one.pid) == 1 else f"{_describe(one)} ({one.name})"
        typer.echo(f"{name}: {len(modes)} workers, mode {' and '.join(sorted(set(modes))) or 'unknown'}")
        back = f", {chunks.handed_back} of these by max_density" if chunks.handed_back else ""
        typer.echo(
            f"  since start: {_percent(total)}; {chunks.sparse_chunks} sparse and {chunks.dense_chunks} dense{back}"
        )
        typer.echo(f"  last prompt: {_percent(last)}")
        for found, expected in stats.read_recall(one.folder):
            wanted = "" if expected is None else f", expected {expected:.1%}"
            typer.echo(f"  recall of the indexer in the first sparse steps: {found:.1%}{wanted}")
        if layers:
            for layer, counts in sorted(total.items()):
                recent = last.get(layer, LayerCounts())
                typer.echo(f"  layer {layer:3d}: {counts.density:6.1%} since start, {recent.density:6.1%} last prompt")


def mode(
    to: Annotated[Literal["sparse", "dense"], typer.Argument(help="What prefill to do from now on.")],
    server: _ServerOption = None,
) -> None:
    """Switch a running server between sparse and dense prefill. Cached prefix blocks keep what they were computed with:
    compare with a prompt that is not cached, or with another cache_salt."""
    one = _choose(server)
    found = set(stats.read_modes(one.folder))
    if found == {"off"}:
        typer.echo(f"{_describe(one)} was started with enabled: false; it has nothing to switch.", err=True)
        raise typer.Exit(1)
    try:
        write_mode(one.folder, to)
    except OSError as error:
        typer.echo(f"{_describe(one)}: cannot write to {one.folder}: {error.strerror}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{_describe(one)}: {to} prefill from the next step on (workers look a few times a second).")
