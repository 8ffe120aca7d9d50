# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a figure was measured on: hardware, versions, commit, command. Goes into every result file; and writes these."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDLE_MODEL = ROOT / "examples" / "needle" / "model"


def describe() -> dict[str, Any]:
    """Hardware, versions, date, commit and command line of this process."""
    import torch

    import vllm_vsprefill

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        # Folders of the machine it ran on say nothing; a file given by its whole path is shown by its name.
        "command": shlex.join(
            ["python", "-m", _module(), *(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])]
        ),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm_vsprefill": vllm_vsprefill.__version__,
        "hardware": _hardware(),
    }
    try:
        import vllm

        facts["vllm"] = vllm.__version__
    except ImportError:
        facts["vllm"] = None
    return facts


def write(path: Path, record: dict[str, Any]) -> None:
    """Replaces a result file in one step, so that an interrupted run loses nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _module() -> str:
    path = Path(sys.argv[0]).resolve()
    try:
        return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    except ValueError:
        return path.stem


def _commit() -> str | None:
    if told := os.environ.get("SOURCE_COMMIT"):  # of a copy of the tree that has no history beside it
        return told
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + (" with uncommitted changes" if dirty.stdout.strip() else "")


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    instructions = torch.backends.cpu.get_cpu_capability()
    if getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)():
        instructions += " with AMX"
    return f"{os.cpu_count()} x86-64 cores, {instructions}" if platform.machine() == "x86_64" else platform.machine()
