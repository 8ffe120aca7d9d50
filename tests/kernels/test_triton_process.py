# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Runs the tests of the Triton kernels in a process of their own where this one cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.interpreted import USABLE


@pytest.mark.slow
@pytest.mark.skipif(USABLE, reason="they run in this process")
def test_kernels_under_the_interpreter() -> None:
    here = Path(__file__).resolve().parent
    names = sorted(str(path) for path in here.parent.glob("*/test_triton_*.py") if path.name != Path(__file__).name)
    environ = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, cwd=here.parent.parent, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
