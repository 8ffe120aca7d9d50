# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Passes at a price against dense ones, and what is read from their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distil import tiny
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.prefill.layer import Heads
from vllm_vsprefill.pricing import readings
from vllm_vsprefill.pricing.comparison import Comparison
from vllm_vsprefill.pricing.passes import Passes
from vllm_vsprefill.pricing.readings import compare, read
from vllm_vsprefill.pricing.tiles import ContiguousTiles, Served
from vllm_vsprefill.tuning import CPU


def test_figures_are_those_of_the_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "ROWS", 8)
    rng = torch.Generator().manual_seed(0)
    logits, other = (2 * torch.randn(21, 30, generator=rng) for _ in range(2))
    following = torch.randint(30, (20,), generator=rng)
    held: list[int] = []

    def head(values: Tensor) -> Tensor:
        held.append(len(values))
        return values

    dense = read(head, logits, following)
    found = read(head, other, following, dense)
    assert held == [8, 8, 5] * 2
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    assert dense.best.tolist() == logits.argmax(-1).tolist()
    torch.testing.assert_close(dense.nll[:20], -p[:20].gather(1, following[:, None])[:, 0])
    torch.testing.assert_close(dense.nll[20], -p[20].max())  # no token follows the last
    change = compare(dense, found)
    assert change.rows == 21
    assert change.agree == int((logits.argmax(-1) == other.argmax(-1)).sum())
    # Thirty tokens are less than the 32 likeliest, so nothing is left out.
    assert change.kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert change.nll == pytest.approx(float((found.nll - dense.nll).sum()), rel=1e-5)
    monkeypatch.setattr(readings, "TOP", 3)
    dense = read(head, logits, following)
    merged = compare(dense, read(head, other, following, dense))
    assert 0 < merged.kl < change.kl  # merging outcomes only lowers it
    assert dense[2:5].nll.tolist() == dense.nll[2:5].tolist()


def test_logits_that_are_no_numbers_end_it() -> None:
    logits = torch.zeros(5, 40)
    dense = read(lambda x: x, logits, torch.zeros(5, dtype=torch.int64))
    logits[3, 7] = float("nan")
    with pytest.raises(DistilError, match=r"no numbers with dense attention.*--dtype bfloat16"):
        read(lambda x: x, logits, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(DistilError, match="no numbers without dense attention"):
        read(lambda x: x, logits, torch.zeros(5, dtype=torch.int64), dense)


@pytest.fixture(scope="module")
def compared() -> tuple[Comparison, ContiguousTiles, list[int]]:
    model = tiny.model("qwen3")
    sequences = [torch.randint(4096, (n,), generator=torch.Generator().manual_seed(n)) for n in (500, 420)]
    options = VSPrefillConfig.from_sources({"window": 16, "sinks": 4, "dense_last_rows": 8})
    served = Served(options.resolved(CPU).for_estimator(False, CPU), CPU, Heads(4, 2, 16), (0, 1), 500)
    done: list[int] = []
    made = Comparison(Passes(model, 500, (0, 1)), sequences, [150, 0], 100, done.append)
    made.dense()
    return made, ContiguousTiles(served), done


def test_a_pass_over_several_texts(compared: tuple[Comparison, ContiguousTiles, list[int]]) -> None:
    made, tiles, done = compared
    assert made.rows == 720
    assert done == [150, 150, 100, 320]
    floor = made.measure(tiles, 0.0, 1.0)
    assert floor.density == 1.0
    assert floor.top1 > 0.99
    assert abs(floor.kl) < 1e-5
    little = made.measure(tiles, 10.0, 1.0)
    assert little.density < 0.5
    assert little.top1 < 0.99
    assert little.kl > floor.kl
    assert done[4:] == done[:4] * 2
    assert made.measure(tiles, 10.0, 1.0) == little  # nothing of a pass is left behind
    guarded = made.measure(tiles, 10.0, 1e-3)
    assert guarded.density == 1.0
    assert guarded.kl == pytest.approx(floor.kl, abs=1e-5)


def test_too_little_memory_is_said(
    compared: tuple[Comparison, ContiguousTiles, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, tiles, _ = compared

    def exhausted(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tiles, "sparse", exhausted)
    with pytest.raises(DistilError, match="out of memory on cpu with a sequence of 500 tokens"):
        made.measure(tiles, 1.0, 1.0)
