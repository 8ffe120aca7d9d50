# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Runs the programs beside these tests that compile kernels, each in a process without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_compiler(module: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Output of ``python -m tests.kernels.MODULE``, whose last line is JSON; ``environment`` is set on top."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", f"tests.kernels.{module}"]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
