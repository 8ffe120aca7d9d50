#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Checks what the linters do not: no large files, weights as safetensors only. (Headers: reuse; pickles: ruff.)"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", ".cache", "build", "dist", "out", ".gpu", ".whl", "__pycache__"}
MAX_BYTES = 15 * 2**20
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle"}


def files(folder: Path) -> list[Path]:
    """Files below a folder, without environments, caches and build outputs."""
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name in SKIPPED or entry.name.endswith((".egg-info", "_cache")):
            continue
        if entry.is_dir() and not entry.is_symlink():
            found += files(entry)
        elif entry.is_file():
            found.append(entry)
    return found


def problems(path: Path) -> list[str]:
    """What is wrong with one file."""
    name = path.relative_to(ROOT)
    found = []
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{name}: {path.stat().st_size / 2**20:.1f} MiB, at most {MAX_BYTES >> 20} MiB a file")
    if path.suffix in PICKLE_SUFFIXES:
        found.append(f"{name}: weights are kept as .safetensors only")
    return found


def main() -> int:
    found = [problem for path in files(ROOT) for problem in problems(path)]
    print("\n".join(found) if found else "sources: sizes and formats are in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
