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
    """Set the presets' thresholds of an indexer for a recall or a density on held-out text."""
    from vllm_vsprefill.distil import runs

    try:
        runs.calibrate(options, typer.echo)
    except KeyboardInterrupt:
        typer.echo("vsprefill: stopped; the checkpoint is as it was", err=True)
        raise typer.Exit(130) from None
