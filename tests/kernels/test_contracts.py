# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What ``kernels/README.md`` promises: operations stand alone, and versions of one contract have one signature."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import tests.kernels.interpreted  # noqa: F401 (first: it decides whether Triton interprets)
import vllm_vsprefill.kernels.types

ROOT = Path(vllm_vsprefill.kernels.types.__file__).parent
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FILES = sorted(ROOT.glob("*/*.py"))
# Of the versions alone: tile sizes, and registers of the Hopper kernel
OWN = {"config", "regs"}


def test_there_are_operations() -> None:
    assert {"attend", "guard", "merge", "sampled", "score", "select"} <= set(OPERATIONS)


def imported(file: Path, operation: str) -> set[str]:
    """Absolute names that a file of an operation imports, those after ``from ... import`` included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["vllm_vsprefill", "kernels", operation][: 4 - node.level] if node.level else []
            base += [node.module] if node.module else []
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def others(file: Path, operation: str) -> list[str]:
    """What it imports of other operations."""
    folders = [f"vllm_vsprefill.kernels.{name}" for name in OPERATIONS if name != operation]
    return [name for name in imported(file, operation) for folder in folders if f"{name}.".startswith(f"{folder}.")]


@pytest.mark.parametrize("file", FILES, ids=[f"{file.parent.name}/{file.name}" for file in FILES])
def test_no_operation_imports_another(file: Path) -> None:
    assert others(file, file.parent.name) == []


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("from ..merge.triton import build_index", 1),
        ("from .. import merge", 1),
        ("from vllm_vsprefill.kernels.merge import naive", 1),
        ("from vllm_vsprefill.kernels import merge", 1),
        ("import vllm_vsprefill.kernels.merge.naive", 1),
        ("from ..index import Index", 0),
        ("from . import naive", 0),
        ("from torch import select", 0),
    ],
)
def test_an_import_of_another_operation_is_found(line: str, count: int, tmp_path: Path) -> None:
    file = tmp_path / "version.py"
    file.write_text(line + "\n")
    assert len(others(file, "attend")) == count


def test_files_have_the_names_of_the_contracts() -> None:
    names = {"__init__.py", "naive.py", "cpu.py", "paged.py", "triton.py", "hopper.py", "hopper_values.py"}
    assert {file.name for file in FILES} <= names
    for operation in OPERATIONS:
        found = {file.name for file in FILES if file.parent.name == operation}
        assert found >= {"naive.py"} or found >= {"paged.py"}, f"{operation} has no reference"
        assert "cpu.py" not in found or "naive.py" in found, f"{operation}/cpu.py has no reference"


def test_the_table_of_folders_is_right() -> None:
    """In a checkout: an installed package has no README here."""
    said = {}
    for line in (ROOT.resolve() / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            said[cells[0].strip("`")] = {f"{name}.py" for name in re.findall(r"`(\w+)`", cells[2] + cells[3])}
    there = {
        name: {file.name for file in FILES if file.parent.name == name and "_" not in file.stem} for name in OPERATIONS
    }
    assert said == there


def public_functions(module: Any) -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(value)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def versions(names: tuple[str, ...]) -> list[Any]:
    found = [(file.parent.name, file.stem) for file in FILES if file.stem in names]
    return [pytest.param(*one, id="/".join(one)) for one in found]


def check_signatures(operation: str, reference: str, version: str) -> None:
    folder = f"vllm_vsprefill.kernels.{operation}"
    declared = public_functions(importlib.import_module(f"{folder}.{reference}"))
    common = 0
    for name, found in public_functions(importlib.import_module(f"{folder}.{version}")).items():
        if name in declared:
            common += 1
            shared = [parameter for parameter in found.parameters.values() if parameter.name not in OWN]
            assert shared == list(declared[name].parameters.values()), name
            assert found.return_annotation == declared[name].return_annotation, name
    assert common, f"{operation}/{version}.py has no function of {reference}.py"


@pytest.mark.parametrize(("operation", "version"), versions(("cpu",)))
def test_contiguous_versions_have_the_signature_of_their_reference(operation: str, version: str) -> None:
    check_signatures(operation, "naive", version)


@pytest.mark.parametrize(("operation", "version"), versions(("triton", "hopper")))
def test_paged_versions_have_the_signature_of_their_reference(operation: str, version: str) -> None:
    check_signatures(operation, "paged", version)
