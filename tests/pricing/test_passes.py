# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A model in chunks, with its attention replaced, is the stock model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distil import tiny
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import attention_layers
from vllm_vsprefill.pricing import passes as module
from vllm_vsprefill.pricing.passes import LayerRows, Passes, attend_dense, dense

IDS = torch.randint(4096, (90,), generator=torch.Generator().manual_seed(1))


def in_chunks(made: Passes, ids: Tensor, *ends: int) -> Tensor:
    hidden = [made.run(ids, first, end) for first, end in zip((0, *ends), (*ends, len(ids)), strict=False)]
    return torch.cat([made.logits(part) for part in hidden])


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_chunks_give_the_logits_of_the_stock_model(name: str) -> None:
    """Also where a head does more than multiply (Gemma 2 caps its logits), and where layers have a sliding window."""
    stock = tiny.model(name)
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        expected = stock(IDS[None]).logits[0]
    model = tiny.model(name)
    covered = attention_layers(model.config).covered
    made = Passes(model, 100, covered)
    torch.testing.assert_close(in_chunks(made, IDS, 33, 64), expected, rtol=1e-4, atol=1e-4)
    # Rows behind a beginning that is there
    again = made.logits(made.run(IDS, 64, 90))
    torch.testing.assert_close(again, expected[64:], rtol=1e-4, atol=1e-4)
    assert "forward" not in vars(made.decoder)


def test_the_function_is_given_every_row_and_all_keys() -> None:
    model = tiny.model("gemma3")
    made = Passes(model, 90)
    seen: list[tuple[int, int, int, int]] = []

    def attend(rows: LayerRows) -> Tensor:
        assert rows.k.shape == rows.v.shape == (2, rows.seq_len, rows.q.shape[2])
        assert rows.room.shape[1] == 96  # whole blocks
        seen.append((rows.layer, rows.first, rows.q.shape[1], rows.seq_len))
        return attend_dense(rows)

    made.run(IDS, 0, 40, attend)
    made.run(IDS, 40, 90, attend)
    assert seen == [(1, 0, 40, 40), (1, 40, 50, 90)]  # layer 0 has a sliding window
    made.run(IDS, 40, 90)
    assert len(seen) == 2


@pytest.mark.parametrize(("rows", "n"), [(1, 40), (17, 40), (40, 40)])
def test_dense_is_causal_at_the_end_of_a_sequence(rows: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_ROWS", 7)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, m, 8, generator=rng) for h, m in ((4, rows), (2, n), (2, n)))
    logits = (q @ k.repeat_interleave(2, 0).mT) * 0.3
    future = torch.arange(n) > torch.arange(n - rows, n)[:, None]
    expected = logits.masked_fill(future, float("-inf")).softmax(-1) @ v.repeat_interleave(2, 0)
    torch.testing.assert_close(dense(q, k, v, 0.3), expected)


def test_what_does_not_fit_or_goes_its_own_way_is_refused() -> None:
    model = tiny.model("qwen3")
    made = Passes(model, 60, (0, 1))
    with pytest.raises(ValueError, match="end must be at most 64, got 90"):
        made.run(IDS, 0, 90)
    with pytest.raises(DistilError, match="it runs in passes only"):
        model(IDS[None])
    config: Any = made.decoder.config
    config._attn_implementation = "eager"
    with pytest.raises(DistilError, match=r"layers \[0, 1\] of the model did not pass through"):
        made.run(IDS, 0, 50)


def test_a_head_that_needs_more_than_hidden_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("qwen3")
    made = Passes(model, 60)
    hidden = made.run(IDS, 0, 9)
    monkeypatch.setattr(model, "forward", lambda **given: made.decoder(**given).something_else)
    with pytest.raises(DistilError, match="the head of a qwen3 model cannot be run without its decoder"):
        made.logits(hidden)
    assert "forward" not in vars(made.decoder)
