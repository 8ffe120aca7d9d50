#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Runs mypy on the package as it is installed.

mypy cannot be told that `kernels/` is `vllm_vsprefill.kernels`, so it gets a tree of links in which it is. Arguments
are passed on to mypy.
"""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".cache" / "typecheck"


def make_tree() -> Path:
    """The link tree; returns the package's folder in it."""
    package = TREE / "vllm_vsprefill"
    shutil.rmtree(TREE, ignore_errors=True)
    package.mkdir(parents=True)
    for entry in (ROOT / "vllm_vsprefill").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name in ("kernels", "indexer_ckpts"):
        if (ROOT / name).is_dir():
            (package / name).symlink_to(ROOT / name)
    return package


def main() -> int:
    package = make_tree()
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), *sys.argv[1:], str(package.relative_to(TREE))]
    return subprocess.run(command, cwd=TREE, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
