# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The README says what the code does: options, defaults, presets, commands."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_vsprefill.config import PRESETS, VSPrefillConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


def test_every_option_is_listed_with_its_default() -> None:
    defaults = VSPrefillConfig.from_sources()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+) \| ", README, re.M))
    expected = {name: shown(getattr(defaults, name)) for name in VSPrefillConfig.model_fields}
    assert {name: rows.get(name) for name in expected} == expected


def test_every_preset_is_listed_with_its_values() -> None:
    header = re.search(r"^\| preset \| (.*) \|$", README, re.M)
    assert header is not None
    columns = [name.strip(" `") for name in header[1].split("|")]
    for preset, values in PRESETS.items():
        row = re.search(rf"^\| `{preset}` \| (.*) \|$", README, re.M)
        assert row is not None
        found = dict(zip(columns, (cell.strip() for cell in row[1].split("|")), strict=True))
        assert found == {name: shown(value) for name, value in values.items()}


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"`?make ([a-z][a-z-]*)", README):
        assert target in targets


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in README


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
