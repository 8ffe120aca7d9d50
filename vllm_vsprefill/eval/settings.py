# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What servers are started with for a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_vsprefill.config import ConfigError, VSPrefillConfig
from vllm_vsprefill.eval.errors import EvalError

DENSE, FLOOR = "dense", "floor"

Settings = dict[str, "dict[str, Any] | None"]

KNOWN: Settings = {
    DENSE: None,  # the stock backend
    # Sparse prefill that leaves nothing out: what differs from dense is rounding.
    FLOOR: {"estimator": "priced", "price": 0.0, "max_density": 1.0},
    "accurate": {"preset": "accurate"},
    "balanced": {"preset": "balanced"},
    "fast": {"preset": "fast"},
    "priced": {"estimator": "priced"},
    "sampled": {"estimator": "sampled"},
    # Sinks and a window (StreamingLLM's A-shape), and a single column: what any selection has to beat.
    "streaming": {
        "estimator": "sampled",
        "preset": "fast",
        "tau_columns": 1e-9,
        "tau_diagonals": 1e-9,
        "min_columns": 0,
        "max_columns": 1,
    },
}

DEFAULT = (DENSE, FLOOR, "balanced")


def chosen(names: tuple[str, ...], file: Path | None) -> Settings:
    """Options of each setting, dense first: the others are compared with it.

    Raises:
        EvalError: every name and option that cannot be used.
    """
    known = {**KNOWN, **(_read(file) if file is not None else {})}
    names = names or DEFAULT
    problems = [f"{name!r} is no setting; there are {', '.join(known)}" for name in names if name not in known]
    for name in names:
        if known.get(name) is not None:
            try:
                VSPrefillConfig.from_sources(known[name])
            except ConfigError as error:
                problems.append(f"{name}: {error}")
    if problems:
        raise EvalError("settings that cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return {name: known[name] for name in sorted(dict.fromkeys(names), key=lambda n: (n != DENSE, n != FLOOR))}


def _read(file: Path) -> Settings:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(f"--settings {file}: {(error.strerror or str(error)).lower()}") from None
    except ValueError as error:
        raise EvalError(f"--settings {file}: it is not JSON ({error})") from None
    if not isinstance(found, dict) or not all(v is None or isinstance(v, dict) for v in found.values()):
        raise EvalError(f'--settings {file}: expected names with options, {{"mine": {{"preset": "fast"}}}}')
    if twice := sorted(KNOWN.keys() & found.keys()):
        raise EvalError(f"--settings {file}: {', '.join(twice)} cannot be given another meaning")
    return found
