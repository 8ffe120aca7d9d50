# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Selection by cumulative threshold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_vsprefill.kernels import select as package
from vllm_vsprefill.kernels.select import cpu, naive
from vllm_vsprefill.kernels.types import Budgets, Selection

Select = Callable[..., Selection]
BOTH = pytest.mark.parametrize("select", [naive.select, cpu.select], ids=["naive", "cpu"])

Distributions = Callable[[Tensor], tuple[Tensor, Tensor]]
EITHER = pytest.mark.parametrize("distributions", [naive.distributions, cpu.distributions], ids=["naive", "cpu"])

# Multiples of 1/64 add up without rounding, so that "reaches tau" is exact; many of them are equal.
exact_probs = st.lists(st.integers(0, 20).map(lambda x: x / 64), min_size=1, max_size=60)
taus = st.one_of(st.sampled_from([-1.0, 0.0, 1.0, 2.0]), st.integers(0, 640).map(lambda x: x / 640))


def kept(items: Tensor, counts: Tensor) -> list[list[int]]:
    return [row[: int(count)].tolist() for row, count in zip(items, counts, strict=True)]


def columns_of(
    select: Select, probs: list[float], tau: float, minimum: int = 0, maximum: int | None = None
) -> list[int]:
    p = torch.tensor([probs])
    result = select(p, p, tau_columns=tau, tau_diagonals=tau, budgets=Budgets(minimum, maximum))
    return kept(result.columns, result.num_columns)[0]


@BOTH
@given(probs=exact_probs, tau=taus, minimum=st.integers(0, 70), extra=st.one_of(st.none(), st.integers(0, 70)))
def test_definition(select: Select, probs: list[float], tau: float, minimum: int, extra: int | None) -> None:
    ranking = sorted(range(len(probs)), key=lambda t: (-probs[t], t))
    if tau >= 1.0:
        count = len(probs)
    elif tau <= 0.0:
        count = 0
    else:
        count, mass = 0, 0.0
        while count < len(probs) and mass < tau:
            mass += probs[ranking[count]]
            count += 1
    maximum = None if extra is None else minimum + extra
    count = min(max(count, minimum), len(probs) if maximum is None else maximum, len(probs))
    assert columns_of(select, probs, tau, minimum, maximum) == sorted(ranking[:count])


@BOTH
@given(seed=st.integers(0, 10**6), n=st.integers(1, 300), tau=st.floats(0.01, 0.99), sharpness=st.floats(0, 8))
def test_mass_is_reached_by_the_fewest(select: Select, seed: int, n: int, tau: float, sharpness: float) -> None:
    logits = torch.randn(n, 2, 2, generator=torch.Generator().manual_seed(seed)) * sharpness
    p_columns, p_diagonals = naive.distributions(logits)
    result = select(p_columns, p_diagonals, tau_columns=tau, tau_diagonals=torch.tensor([tau, tau / 2]))
    for probs, items, counts, limits in (
        (p_columns, result.columns, result.num_columns, (tau, tau)),
        (p_diagonals, result.diagonals, result.num_diagonals, (tau, tau / 2)),
    ):
        assert items.dtype == counts.dtype == torch.int32
        assert items.shape == (2, int(counts.max()))
        for row, chosen, limit in zip(probs.double(), kept(items, counts), limits, strict=True):
            assert chosen == sorted(set(chosen))
            assert 0 <= chosen[0]
            assert chosen[-1] < n
            mass, smallest = float(row[chosen].sum()), float(row[chosen].min())
            assert mass >= limit - 1e-6
            assert mass - smallest < limit + 1e-6
            others = np.delete(row.numpy(), chosen)
            assert not len(others) or others.max() <= smallest


@given(
    probs=st.lists(
        st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.25, float("nan"), float("inf")])),
        min_size=1,
        max_size=50,
    ),
    tau=taus,
    minimum=st.integers(0, 30),
    extra=st.one_of(st.none(), st.integers(0, 30)),
)
def test_cpu_equals_naive(probs: list[float], tau: float, minimum: int, extra: int | None) -> None:
    maximum = None if extra is None else minimum + extra
    assert columns_of(cpu.select, probs, tau, minimum, maximum) == columns_of(
        naive.select, probs, tau, minimum, maximum
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_cpu_equals_naive_on_a_long_context(dtype: torch.dtype) -> None:
    logits = torch.randn(20_000, 3, 2, generator=torch.Generator().manual_seed(0)) * 3
    probs = [p.to(dtype) for p in naive.distributions(logits)]
    budgets = Budgets(min_columns=100, max_columns=900, min_diagonals=10)
    for tau in (0.0, 0.3, 0.95, 1.0):
        fast = cpu.select(*probs, tau_columns=tau, tau_diagonals=tau, budgets=budgets)
        reference = naive.select(*probs, tau_columns=tau, tau_diagonals=tau, budgets=budgets)
        for a, b in zip(fast, reference, strict=True):
            assert torch.equal(a, b)


@BOTH
def test_ties_go_to_the_lower_position(select: Select) -> None:
    assert columns_of(select, [0.25, 0.25, 0.25, 0.25], 0.5) == [0, 1]
    assert columns_of(select, [0.125, 0.25, 0.125, 0.25, 0.25], 0.75) == [1, 3, 4]
    assert columns_of(select, [0.125, 0.25, 0.125, 0.25, 0.25], 0.8) == [0, 1, 3, 4]
    assert columns_of(select, [0.2] * 5, 0.0, minimum=2) == [0, 1]


@BOTH
def test_one_token(select: Select) -> None:
    for tau in (0.5, 1.0):
        assert columns_of(select, [1.0], tau) == [0]
    assert columns_of(select, [1.0], 0.0) == []
    assert columns_of(select, [1.0], 0.0, minimum=5) == [0]


@BOTH
def test_threshold_of_one_takes_everything_whatever_the_rounding(select: Select) -> None:
    probs = torch.softmax(torch.linspace(0, 40, 1000), dim=0).tolist()
    assert len(columns_of(select, probs, 1.0)) == 1000
    assert len(columns_of(select, probs, 1.0, maximum=7)) == 7
    # Just below: as few as float32 says.
    assert len(columns_of(select, probs, 1 - 1e-3)) < 1000


@BOTH
def test_sums_that_fall_short_take_everything(select: Select) -> None:
    assert columns_of(select, [0.25, 0.25], 0.9) == [0, 1]


@BOTH
def test_a_head_with_nan_keeps_everything_and_leaves_the_others_alone(select: Select) -> None:
    p = torch.tensor([[0.5, float("nan"), 0.25, 0.25], [0.5, 0.25, 0.25, 0.0]])
    result = select(p, p, tau_columns=0.5, tau_diagonals=0.5, budgets=Budgets(max_diagonals=3))
    assert kept(result.columns, result.num_columns) == [[0, 1, 2, 3], [0]]
    assert kept(result.diagonals, result.num_diagonals) == [[0, 1, 2], [0]]


@BOTH
def test_thresholds_per_head_and_repeatable(select: Select) -> None:
    p = torch.softmax(torch.randn(4, 500, generator=torch.Generator().manual_seed(1)), dim=-1)
    tau = torch.tensor([0.0, 0.2, 0.7, 1.0])
    first = select(p, p.flip(0), tau_columns=tau, tau_diagonals=0.3, budgets=Budgets(min_columns=2))
    assert first.num_columns[0] == 2
    assert 2 < first.num_columns[1] < first.num_columns[2] < 500
    assert first.num_columns[3] == 500
    again = select(
        p.clone(), p.flip(0).clone(), tau_columns=tau.double(), tau_diagonals=0.3, budgets=Budgets(min_columns=2)
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@EITHER
@pytest.mark.parametrize("n", [1, 2, 77])
def test_distributions(distributions: Distributions, n: int) -> None:
    logits = torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(n)) * 5
    columns, diagonals = distributions(logits)
    assert columns.shape == diagonals.shape == (3, n)
    weights = np.exp(logits.double().numpy())
    for h in range(3):
        for t in range(n):
            assert float(columns[h, t]) == pytest.approx(weights[t, h, 0] / weights[:, h, 0].sum(), rel=1e-5)
            assert float(diagonals[h, n - 1 - t]) == pytest.approx(weights[t, h, 1] / weights[:, h, 1].sum(), rel=1e-5)


@EITHER
def test_distributions_of_extreme_logits_are_finite(distributions: Distributions) -> None:
    logits = torch.full((50, 1, 2), -3e38)
    logits[7] = 3e38
    for probs in distributions(logits):
        assert torch.isfinite(probs).all()
        assert float(probs.sum()) == pytest.approx(1.0)
    assert distributions(logits.bfloat16().clamp(-100, 100))[0].dtype == torch.float32


@EITHER
@pytest.mark.parametrize("shape", [(0, 2, 2), (5, 2, 3), (5, 2)])
def test_distributions_name_bad_logits(distributions: Distributions, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits must have"):
        distributions(torch.zeros(shape))


P = torch.full((2, 4), 0.25)


@BOTH
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"p_columns": P.int()}, "p_columns must have dtype"),
        ({"p_columns": P[0]}, "p_columns must have 2 axes"),
        ({"p_columns": P[:, :0], "p_diagonals": P[:, :0]}, "p_columns must have at least one position"),
        ({"p_diagonals": P[:, :3]}, "p_diagonals has shape"),
        ({"p_diagonals": P.double()}, "p_diagonals has dtype"),
        ({"p_diagonals": P.to("meta")}, "p_diagonals is on meta"),
        ({"tau_columns": float("nan")}, "tau_columns must not be NaN"),
        ({"tau_diagonals": torch.tensor([0.5, 0.5, 0.5])}, "tau_diagonals must be a number or have shape"),
        ({"budgets": Budgets(min_columns=-1)}, "min_columns must be a non-negative int"),
        ({"budgets": Budgets(max_columns=cast(int, 1.5))}, "max_columns must be a non-negative int"),
        ({"budgets": Budgets(min_diagonals=5, max_diagonals=4)}, "min_diagonals is 5, above max_diagonals"),
        ({"budgets": Budgets(max_diagonals=True)}, "max_diagonals must be a non-negative int"),
    ],
)
def test_bad_argument_is_named(select: Select, bad: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"p_columns": P, "p_diagonals": P, "tau_columns": 0.5, "tau_diagonals": 0.5}
    select(**good)
    with pytest.raises(ValueError, match=message):
        select(**{**good, **bad})


def test_cpu_refuses_other_devices() -> None:
    with pytest.raises(ValueError, match="p_columns is on meta; this version runs on the CPU only"):
        cpu.select(P.to("meta"), P.to("meta"), tau_columns=0.5, tau_diagonals=0.5)


def test_the_package_offers_the_fast_version() -> None:
    assert package.select is cpu.select
    assert package.distributions is cpu.distributions
