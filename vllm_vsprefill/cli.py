# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The ``vsprefill`` command: one line for each of its commands.

A command is a function that typer understands, in a module that imports neither torch nor vLLM: ``--help``, ``status``
and ``mode`` answer at once.
"""

from __future__ import annotations

import typer

from vllm_vsprefill import control
from vllm_vsprefill.distil import commands as distil
from vllm_vsprefill.eval import command as evaluation
from vllm_vsprefill.tools import ckpt
from vllm_vsprefill.tools.bench_command import bench
from vllm_vsprefill.tools.doctor import doctor
from vllm_vsprefill.tools.inspect_command import inspect

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train and calibrate indexers for VSPREFILL, measure what it does, look at and switch a running server.",
)
app.command("train")(distil.train)
app.command("calibrate")(distil.calibrate)
app.command("eval")(evaluation.evaluate)
app.command("bench")(bench)
app.command("doctor")(doctor)
app.command("inspect")(inspect)
app.add_typer(ckpt.app, name="ckpt")
app.command("status")(control.status)
app.command("mode")(control.mode)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
