# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the architecture pages name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["architecture.md", "add_an_estimator.md", "add_a_kernel.md"]
STEP = re.compile(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
PATH = re.compile(r"`((?:kernels|vllm_vsprefill|tests|benchmarks)/[\w/.]*)`")


def names(file: Path) -> set[str]:
    """Functions, classes and ``Class.method`` of a source file."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_every_step_of_the_way_exists() -> None:
    steps = STEP.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(steps) > 25
    assert [f"{file}: {name}" for file, name in steps if name not in names(ROOT / file)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_exists(page: str) -> None:
    paths = PATH.findall((ROOT / "docs" / page).read_text())
    assert paths
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []
