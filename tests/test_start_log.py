# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The parts of the start-up message."""

from __future__ import annotations

import pytest

from vllm_vsprefill import start_log
from vllm_vsprefill.config import PRESETS, VSPrefillConfig
from vllm_vsprefill.plan import MIN_ROWS, Gate


def test_lines_are_aligned_and_empty_ones_left_out() -> None:
    text = start_log.block("all is well.", [("model", "m: 2 layers"), ("stock layers", ""), ("estimator", "sampled")])
    assert text.splitlines() == ["VSPREFILL: all is well.", "  model      m: 2 layers", "  estimator  sampled"]


@pytest.mark.parametrize(
    ("layers", "text"), [([], ""), ([3], "3"), ([1, 0, 2], "0-2"), ([0, 1, 5, 7, 8, 8], "0-1, 5, 7-8")]
)
def test_ranges_of_layers(layers: list[int], text: str) -> None:
    assert start_log.layer_ranges(layers) == text


def test_options_that_differ_from_the_preset() -> None:
    usual = int(PRESETS["fast"]["window"] or 0)
    given = {"preset": "fast", "window": usual + 64, "sinks": 5, "dense_layers": "0-1,3"}
    shown = start_log.given_options(VSPrefillConfig.from_sources(given))
    assert shown == f"preset fast; given: dense_layers=0-1, 3, sinks=5, window={usual + 64} (preset {usual})"
    same = VSPrefillConfig.from_sources({"preset": "fast", "window": usual})
    assert start_log.given_options(same) == "preset fast"
    nothing = VSPrefillConfig.from_sources({"block_q": None, "tile_parts": "null", "checkpoint": None})
    assert start_log.given_options(nothing) == "preset balanced"


@pytest.mark.parametrize(
    ("given", "trained", "names"),
    [
        ({"max_columns": 5000, "price": 0.02, "tau_columns": 0.5}, False, "max_columns, tau_columns"),
        (
            {"max_columns": 5000, "price": 0.02, "tile_parts": 2, "tile_variance": True, "sampled_rows": 5},
            True,
            "price, sampled_rows, tile_parts, tile_variance",
        ),
        ({"estimator": "sampled", "price": 0.02, "sampled_rows": 5}, False, "price"),
        ({"estimator": "priced", "price": 0.02, "sampled_rows": 5}, False, ""),
        ({"preset": "fast"}, True, ""),
        ({"tile_parts": None, "tile_variance": "null"}, True, ""),
        ({"max_columns": None}, False, "max_columns"),
    ],
)
def test_options_for_nothing_are_named(given: dict[str, object], trained: bool, names: str) -> None:
    text = start_log.without_effect(VSPrefillConfig.from_sources(given), trained)
    assert text == (f"{names}: this estimator does not look at that" if names else "")


def test_gates_name_every_limit() -> None:
    text = start_log.gates(Gate(min_seq_len=4096, dense_last_rows=32, min_pairs=2**24))
    assert text == (
        f"at least 4096 tokens of context, {32 + MIN_ROWS} rows in a chunk, 16777216 rows times tokens; "
        "the last 32 rows of a chunk are dense"
    )
    assert "1024 rows in a chunk;" in start_log.gates(Gate(0, 32, min_rows=1024))


def test_stock_layers_are_grouped_by_reason() -> None:
    stock = {"it has a sliding window": [0, 1, 3], "its name carries no layer index": [-1], "it is listed": [2]}
    assert start_log.dense_layers(stock) == (
        "0-1, 3: it has a sliding window; its name carries no layer index; 2: it is listed"
    )
