# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The commands ``vsprefill train`` and ``vsprefill calibrate``; torch is imported when one runs, not for ``--help``."""

from __future__ import annotations

import typer

from vllm_vsprefill.command_line import takes
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.options import CalibrateCommand, TrainCommand


@takes(TrainCommand, DistilError)
def train(options: TrainCommand) -> None:
    """Train an indexer: the model stays frozen, the indexer learns from its attention.

    On several GPUs: accelerate launch --num_processes N -m vllm_vsprefill.cli train ...
    """
    from vllm_vsprefill.distil import runs
    from vllm_vsprefill.distil.trainer import Interrupted

    try:
        runs.train(options, typer.echo)
    except Interrupted as stop:
        typer.echo(f"vsprefill: {stop}", err=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        typer.echo("vsprefill: stopped at once; the last saved state and checkpoint are intact", err=True)
        raise typer.Exit(130) from None


@takes(CalibrateCommand, DistilError)
def calibrate(options: CalibrateCommand) -> None:
    """Find the price that reaches a goal on your own text, or, with --checkpoint, set the thresholds of an indexer."""
    try:
        if options.checkpoint is None:
            from vllm_vsprefill.pricing import run

            run.calibrate(options, typer.echo)
        else:
            from vllm_vsprefill.distil import runs

            runs.calibrate(options, typer.echo)
    except KeyboardInterrupt:
        kept = (
            "what was measured, if anything, is above" if options.checkpoint is None else "the checkpoint is as it was"
        )
        typer.echo(f"vsprefill: stopped; {kept}", err=True)
        raise typer.Exit(130) from None
