# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The line that says from where chunks run sparse, or everything that keeps them from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_vsprefill.outlook import outlook
from vllm_vsprefill.plan import Gate

GATE = Gate(min_seq_len=8192, dense_last_rows=64)


def config(*, longest: int = 32768, tokens: int = 4096, load_format: str = "auto", **scheduler: Any) -> Any:
    return SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=longest),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=tokens, **scheduler),
        load_config=SimpleNamespace(load_format=load_format),
    )


def test_a_model_that_runs_sparse() -> None:
    found = outlook(config(), GATE, 6, {"it has a sliding window": 10})
    assert not found.is_warning
    assert found.text == "chunks of 4096 prompt tokens run sparse from 8192 tokens of context, in 6 of 16 layers."


def test_everything_that_is_in_the_way_is_named_at_once() -> None:
    found = outlook(config(longest=4096), GATE, 0, {"the layer is listed in dense_layers": 2, "it has ALiBi slopes": 1})
    assert found.is_warning
    for part in (
        "no prompt will run sparse",
        "the layer is listed in dense_layers (2 layers)",
        "it has ALiBi slopes (1 layer)",
        "the longest prompt has 4096 tokens",
    ):
        assert part in found.text


def test_a_loader_that_skips_the_processing_of_weights() -> None:
    assert "the loader (sharded) leaves that out" in outlook(config(load_format="sharded"), GATE, 0, {}).text


@pytest.mark.parametrize(
    ("settings", "gate", "parts"),
    [
        ({"tokens": 100}, GATE, ("have 100 (max_num_batched_tokens)", "raise max_num_batched_tokens", "min_rows")),
        ({"max_num_scheduled_tokens": 90}, GATE, ("have 90 (max_num_scheduled_tokens)",)),
        ({"longest": 6000}, GATE, ("pays from 8192 tokens of context", "lower min_seq_len")),
        ({}, Gate(0, 64, min_pairs=2**40), ("pays from 268435456 tokens",)),
    ],
)
def test_chunks_that_are_too_small(settings: dict[str, Any], gate: Gate, parts: tuple[str, ...]) -> None:
    found = outlook(config(**settings), gate, 6, {})
    assert found.is_warning
    for part in ("no prompt will run sparse", *parts):
        assert part in found.text


def test_chunks_that_become_too_small_beside_other_requests() -> None:
    found = outlook(config(long_prefill_token_threshold=100), GATE, 6, {})
    assert found.is_warning
    assert "run sparse from 8192" in found.text
    assert "long_prefill_token_threshold cuts prompts into chunks of 100 tokens" in found.text
    for fine in ({"long_prefill_token_threshold_adaptive": True}, {"long_prefill_token_threshold": 1024}):
        scheduler: dict[str, Any] = {"long_prefill_token_threshold": 100, **fine}
        assert not outlook(config(**scheduler), GATE, 6, {}).is_warning
