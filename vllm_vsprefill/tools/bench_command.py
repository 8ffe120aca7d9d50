# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The command ``vsprefill bench``."""

from __future__ import annotations

import signal
import threading

import typer

from vllm_vsprefill.command_line import takes
from vllm_vsprefill.eval.errors import INSTALL, EvalError
from vllm_vsprefill.tools.bench_options import BenchCommand
from vllm_vsprefill.tools.errors import plain


@takes(BenchCommand, EvalError)
def bench(options: BenchCommand) -> None:
    """Time a running server with `vllm bench serve`, dense against sparse prefill: time to first token and throughput
    by prompt length and, with --rate, while requests of mixed lengths arrive by themselves.

    Everything finished is kept: the same command goes on where it stopped.
    """
    try:
        from vllm_vsprefill.tools import benching
    except ImportError as error:
        raise EvalError(f"{error}: {INSTALL}") from None
    if threading.current_thread() is threading.main_thread():
        # Ended politely by others, too: the server is to be sparse again.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        benching.bench(options, lambda line: typer.echo(plain(line)))
    except KeyboardInterrupt:
        typer.echo(f"vsprefill: stopped; what is finished is in {options.out}, the same command goes on", err=True)
        raise typer.Exit(130) from None
