# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``vsprefill doctor``: is everything there that a server with VSPREFILL needs, and what would it do?"""

from __future__ import annotations

import json

import typer

from vllm_vsprefill.command_line import takes
from vllm_vsprefill.tools.errors import plain
from vllm_vsprefill.tools.findings import Finding
from vllm_vsprefill.tools.options import DoctorCommand

_WIDTH = 8


def _shown(finding: Finding) -> str:
    mark = {"ok": "ok", "note": "note", "problem": "PROBLEM"}[finding.level]
    text = plain(f"{mark:{_WIDTH}} {finding.subject}: {finding.text}")
    if finding.remedy:
        text += plain(f"\n{'':{_WIDTH}} -> {finding.remedy}")
    return text


@takes(DoctorCommand)
def doctor(options: DoctorCommand) -> None:
    """Look for everything that keeps VSPREFILL from working here and, with --model, say what a server would do with it.

    Loads no weights and starts nothing. Exit status 1 if there is a problem.
    """
    from vllm_vsprefill.tools import engine, surroundings

    findings: list[Finding] = []
    for source in (surroundings.look(), engine.look(options.server)):
        for finding in source:
            findings.append(finding)
            if not options.json_:
                typer.echo(_shown(finding))
    problems = sum(finding.level == "problem" for finding in findings)
    if options.json_:
        typer.echo(json.dumps({"problems": problems, "findings": [one._asdict() for one in findings]}, indent=2))
    else:
        typer.echo("no problems" if not problems else f"{problems} {'problem' if problems == 1 else 'problems'}")
    if problems:
        raise typer.Exit(1)
