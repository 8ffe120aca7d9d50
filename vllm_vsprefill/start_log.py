# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The message in the start-up log that says all there is to know: one a model, of aligned lines."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from vllm_vsprefill.config import PRESETS, VSPrefillConfig
from vllm_vsprefill.plan import MIN_ROWS, Gate


def block(title: str, lines: Iterable[tuple[str, str]]) -> str:
    """``title`` and under it the lines, each of a name and a text; lines without text are left out."""
    shown = [(name, text) for name, text in lines if text]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(["VSPREFILL: " + title, *(f"  {name:<{width}}  {text}" for name, text in shown)])


def layer_ranges(layers: Iterable[int]) -> str:
    """Layer indices in short: ``0-3, 7``."""
    found = []
    for _, run in itertools.groupby(enumerate(sorted(set(layers))), key=lambda item: item[1] - item[0]):
        indices = [index for _, index in run]
        found.append(f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else f"{indices[0]}")
    return ", ".join(found)


def given_options(options: VSPrefillConfig) -> str:
    """The preset, and the options that were given, with what they would have been."""
    preset = VSPrefillConfig.from_sources({"preset": options.preset})
    shown = []
    for name, value in sorted(options.given().items()):
        usual = getattr(preset, name)
        if name == "preset" or value == usual:
            continue
        by = f"preset {usual:g}" if name in PRESETS[options.preset] and usual is not None else ""
        value = layer_ranges(value) if name == "dense_layers" else value
        shown.append(f"{name}={value}" + (f" ({by})" if by else ""))
    return f"preset {options.preset}" + ("; given: " + ", ".join(shown) if shown else "")


def without_effect(options: VSPrefillConfig, trained: bool) -> str:
    """Options that were given for nothing: the estimator that runs does not look at them."""
    names = options.without_effect(trained)
    return f"{', '.join(names)}: this estimator does not look at that" if names else ""


def gates(gate: Gate) -> str:
    """Which chunks the gate lets through."""
    rows = max(gate.min_rows, gate.dense_last_rows + MIN_ROWS)
    text = f"{gate.min_seq_len} tokens of context, {rows} rows in a chunk"
    if gate.min_pairs:
        text += f", {gate.min_pairs} rows times tokens"
    return f"at least {text}; the last {gate.dense_last_rows} rows of a chunk are dense"


def dense_layers(stock: Mapping[str, Iterable[int]]) -> str:
    """Layers that the stock backend computes, by reason."""
    parts = []
    for reason, layers in stock.items():
        indices = [layer for layer in layers if layer >= 0]
        parts.append(f"{layer_ranges(indices)}: {reason}" if indices else reason)
    return "; ".join(parts)
