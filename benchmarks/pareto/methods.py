# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Methods by name, with settings from text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.pareto.field import Anchor, FlashPrefill, FlexPrefill, VerticalSlash, XAttention
from benchmarks.pareto.priced import Priced
from benchmarks.pareto.structures import Estimator, RowOracle, Sampled, Structure

METHODS: dict[str, type] = {
    "structure": Structure,
    "priced": Priced,
    "sampled": Sampled,
    "row_oracle": RowOracle,
    "vertical_slash": VerticalSlash,
    "flexprefill": FlexPrefill,
    "xattention": XAttention,
    "anchor": Anchor,
    "flashprefill": FlashPrefill,
}


def make(text: str) -> Estimator:
    """The method of a line such as ``structure keys=512 tile=128``; a value is JSON, a word, or ``file:PATH`` of JSON.

    Raises:
        ValueError: unknown method or setting; the message lists the known ones.
    """
    name, *settings = text.split()
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    kind = METHODS[name]
    known = {f.name for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; it has: {', '.join(sorted(known))}")
        if value.startswith("file:"):
            value = Path(value[5:]).read_text(encoding="utf-8")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return kind(**values)
