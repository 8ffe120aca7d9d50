# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""`docker/` as an engine reads it: instructions of the Dockerfile, services, merged and filled in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.test_packaging import ROOT

DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
COMPOSE_CPU = DOCKER / "compose.cpu.yaml"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "vsprefill.json"
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^${}]*))?\}")
RESET = "removed by !reset"


class Instruction(NamedTuple):
    """One instruction of a Dockerfile, its continuation lines joined, and the build stage that it is in."""

    stage: int
    name: str
    text: str


def instructions() -> list[Instruction]:
    """Instructions of the Dockerfile, in order."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    found: list[Instruction] = []
    stage = -1
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, text = line.partition(" ")
            stage += name == "FROM"
            found.append(Instruction(stage, name, text.strip()))
    return found


class Loader(yaml.SafeLoader):
    """Knows the tag that takes out what an earlier file says."""


Loader.add_constructor("!reset", lambda *_: RESET)


def raw(path: Path) -> Any:
    """A YAML file as it stands."""
    return yaml.load(path.read_text(), Loader)  # a SafeLoader


def merged(base: Any, over: Any) -> Any:
    """What two compose files say together: mappings are merged, lists joined, all else replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        both = {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}
        return {key: value for key, value in both.items() if value != RESET}
    if isinstance(base, list) and isinstance(over, list):
        return base + over
    return over


def filled(value: Any, variables: Mapping[str, str]) -> Any:
    """A compose file's content with `${NAME:-default}` replaced, as an engine does with a `.env` file."""
    if isinstance(value, dict):
        return {key: filled(one, variables) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, variables) for one in value]
    if isinstance(value, str):
        return VARIABLE.sub(lambda found: variables.get(found[1]) or found[2] or "", value)
    return value


def services(*files: Path, **variables: str) -> dict[str, Any]:
    """Services of compose files; a name in `environment` without a value has the variable's, or is left out."""
    content: Any = {}
    for file in files:
        content = merged(content, raw(file))
    found: dict[str, Any] = filled(content, variables)["services"]
    for service in found.values():
        given = service.get("environment", {})
        known = {name: variables.get(name) if value is None else value for name, value in given.items()}
        service["environment"] = {name: value for name, value in known.items() if value is not None}
    return found


def example() -> dict[str, str]:
    """Variables that `.env.example` sets."""
    lines = (DOCKER / ".env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def queries() -> Iterator[tuple[str, str]]:
    """Title and query of every panel of the dashboard."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
