# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The command ``vsprefill eval``."""

from __future__ import annotations

import signal
import threading

import typer

from vllm_vsprefill.command_line import takes
from vllm_vsprefill.eval.errors import INSTALL, EvalError
from vllm_vsprefill.eval.options import EvalCommand


@takes(EvalCommand, EvalError)
def evaluate(options: EvalCommand) -> None:
    """Measure what sparse prefill does to a model's answers, on a server that runs or on servers that it starts.

    Everything finished is kept: the same command goes on where it stopped.
    """
    try:
        from vllm_vsprefill.eval import evaluation
    except ImportError as error:
        raise EvalError(f"{error}: {INSTALL}") from None
    if threading.current_thread() is threading.main_thread():
        # Ended politely by others, too: servers that were started must not stay behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        evaluation.evaluate(options, typer.echo)
    except KeyboardInterrupt:
        typer.echo(f"vsprefill: stopped; what is finished is in {options.out}, the same command goes on", err=True)
        raise typer.Exit(130) from None
