# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much each KV head keeps: the plain reference against costs worked out row by row in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kernels.priced import Priced, planted
from vllm_vsprefill.kernels.price.naive import BINS, SIZES, kinds_of_length, ladder, price, rows_of, sizes_of
from vllm_vsprefill.kernels.types import SparsePattern

PATTERN = SparsePattern(block_q=20, block_k=4, window=30, sinks=8, dense_last=0)


def random_problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; heads differ in how sharp they are."""
    rng = torch.Generator().manual_seed(seed)
    n = int(torch.randint(200, 900, (), generator=rng))
    rows = int(torch.randint(1, n // 2, (), generator=rng))
    k, v = torch.randn(2, n, 2, 16, generator=rng)
    q = torch.randn(rows, 2, 2, 16, generator=rng) * torch.tensor([0.5, 4.0])[:, None, None]
    return (q + torch.randn(16, generator=rng)).flatten(1, 2), k, v


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("worth", [0.001, 0.02, 0.3])
def test_takes_the_cheapest_step(seed: int, worth: float) -> None:
    q, k, v = random_problem(seed)
    bars = price(q, k, v, scale=0.25, pattern=PATTERN, price=worth, num_rows=9)
    exact = Priced(q, k, v, 0.25, PATTERN, 9)
    found = [float(bar) for bar in bars.scores]
    for cost, best in zip(exact.costs(found, worth), exact.best(worth), strict=True):
        assert cost <= best * 1.002 + 1e-6
    assert bars.density.tolist() == pytest.approx(exact.of(found)[1], abs=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_price_of_nothing_keeps_everything_and_a_high_one_nothing(seed: int) -> None:
    q, k, v = random_problem(seed)
    assert price(q, k, v, scale=0.25, pattern=PATTERN, price=0.0, num_rows=9).density.tolist() == [1.0, 1.0]
    bars = price(q, k, v, scale=0.25, pattern=PATTERN, price=1e6, num_rows=9)
    exact = Priced(q, k, v, 0.25, PATTERN, 9)
    assert bars.density.tolist() == pytest.approx(exact.of([math.inf, math.inf])[1])


def test_heads_that_differ_are_told_apart() -> None:
    q, k, v = (x.float() for x in planted(900, 32, torch.Generator().manual_seed(0)))
    bars = price(q[-300:], k, v, scale=32**-0.5, pattern=PATTERN, price=0.05, num_rows=16).scores
    exact = Priced(q[-300:], k, v, 32**-0.5, PATTERN, 16)
    nothing = exact.of([math.inf] * 3)[1]
    density = exact.of(bars.tolist())[1]
    assert density[0] == nothing[0]
    assert nothing[1] < density[1] < 0.5
    assert math.isfinite(bars[1])


def test_steps_hold_as_many_keys_as_they_may() -> None:
    counts = torch.zeros(1, BINS, dtype=torch.int64)
    counts[0, [200, 100, 50, 10]] = torch.tensor([100, 28, 1, 9000])
    steps = ladder(counts, 1, 16384)[0].tolist()
    assert steps == [201, 51, 11, 11, 11, 11, 11]  # 0, 128, then 129 keys; with the rest they would be too many
    assert ladder(counts, 71, 16384)[0].tolist() == [201, 11, 0, 0, 0, 0, 0]
    assert ladder(torch.zeros(1, BINS, dtype=torch.int64), 1, 16384)[0].tolist() == [0] * len(SIZES)
    assert ladder(counts, 1, 16385)[0].tolist() == [201, 11, 11, 11, 11, 11, 11]  # 256: room for 129
    assert ladder(counts, 1, 32769)[0].tolist() == [201, 11, 11, 11, 11, 11, 0]  # 16,384: for all
    counts[0, BINS - 1] = 1
    assert ladder(counts, 1, 16384)[0, 0] == BINS  # no bar lists none


def test_longer_sequences_have_longer_lists_and_fewer_rows() -> None:
    for n, factor in ((1, 1), (16384, 1), (16385, 2), (32768, 2), (32769, 4), (1 << 20, 4)):
        assert sizes_of(n) == [size * factor for size in SIZES]
        assert rows_of(64, n) == 64 // factor
    assert [rows_of(64, n) for n in kinds_of_length()] == [64, 32, 16]


@pytest.mark.parametrize(
    ("change", "named"), [({"price": -1.0}, "price"), ({"price": math.nan}, "price"), ({"num_rows": 0}, "num_rows")]
)
def test_wrong_arguments_are_named(change: dict[str, float], named: str) -> None:
    q, k, v = random_problem(0)
    arguments = {"scale": 0.25, "price": 0.1, "num_rows": 9, **change}
    with pytest.raises(ValueError, match=f"^{named}"):
        price(q, k, v, pattern=PATTERN, **arguments)  # type: ignore[arg-type]
