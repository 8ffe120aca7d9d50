# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""README.md and docs/ say what the code does and the results hold: tables, commands, links."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from tests.test_packaging import ROOT, script
from vllm_vsprefill import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_table_that_is_not_up_to_date_is_found() -> None:
    make_docs = script("make_docs")
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert make_docs.renewed(text) == text
    changed = text.replace("| `max_density` | 0.5 |", "| `max_density` | 0.6 |")
    assert changed != text
    assert make_docs.renewed(changed) == text
    with pytest.raises(KeyError, match="of nobody"):
        make_docs.renewed("<!-- table: of nobody -->\n<!-- end of table -->")


@pages
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.M)) <= targets
    commands = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    assert set(re.findall(r"(?:^|`)vsprefill ([a-z]+)", text, re.M)) <= commands
    for module in re.findall(r"python -m ((?:benchmarks|examples|tests)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target, _, wanted in (
        link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))
    ):
        file = page.parent / target if target else page
        assert file.exists(), target
        if wanted:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert wanted in map(anchor, titles), f"{target}#{wanted}"
