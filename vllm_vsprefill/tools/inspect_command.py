# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The command ``vsprefill inspect``; torch is imported when it runs, not for ``--help``."""

from __future__ import annotations

import typer

from vllm_vsprefill.checkpoint import CheckpointError
from vllm_vsprefill.command_line import takes
from vllm_vsprefill.config import ConfigError
from vllm_vsprefill.distil.errors import INSTALL, DistilError
from vllm_vsprefill.tools.errors import ToolError, plain
from vllm_vsprefill.tools.options import InspectCommand


@takes(InspectCommand, ToolError, DistilError, CheckpointError, ConfigError, OSError)
def inspect(options: InspectCommand) -> None:
    """Show what is kept of a text: attention of every layer and KV head beside what is computed of it, recall, error of
    the output, and the columns in the text, as pictures and one page."""
    try:
        from vllm_vsprefill.tools import inspecting
    except ImportError as error:
        raise ToolError(f"{error}: {INSTALL}") from None
    try:
        inspecting.run(options, lambda line: typer.echo(plain(line)))
    except KeyboardInterrupt:
        typer.echo("vsprefill: stopped; nothing was written", err=True)
        raise typer.Exit(130) from None
