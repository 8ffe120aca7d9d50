#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Checks what the linters do not: licence headers, no pickle, no large files."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {".git", ".venv", ".cache", "build", "dist", "out", ".gpu", ".whl", "__pycache__"}
SOURCE_SUFFIXES = {".py", ".sh", ".toml"}
LICENCE = "SPDX-License-Identifier: Apache-2.0"
COPYRIGHT = "SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project"
MAX_BYTES = 15 * 2**20
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".pickle"}
# Reading with torch.load executes what the file says; checkpoints here are safetensors only.
UNSAFE = re.compile(r"^\s*(import pickle|from pickle\b)|\btorch\.load\(|\bpickle\.loads?\(", re.MULTILINE)


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
    if path.suffix in SOURCE_SUFFIXES or path.name == "Makefile":
        text = path.read_text(encoding="utf-8")
        head = "\n".join(text.splitlines()[:3])
        if text.strip() and (LICENCE not in head or COPYRIGHT not in head):
            found.append(f"{name}: no SPDX licence and copyright lines at its top")
        shipped = name.parts[0] not in ("tests", "scripts")
        if path.suffix == ".py" and shipped and UNSAFE.search(text):
            found.append(f"{name}: reads pickles")
    return found


def main() -> int:
    found = [problem for path in files(ROOT) for problem in problems(path)]
    print("\n".join(found) if found else "sources: licence headers, sizes and formats are in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
