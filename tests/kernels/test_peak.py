# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Largest and total probability per column."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_vsprefill.kernels.mass.naive import mass_sums
from vllm_vsprefill.kernels.peak import cpu, naive

ColumnWeights = Callable[..., Tensor]
BOTH = pytest.mark.parametrize("column_weights", [naive.column_weights, cpu.column_weights], ids=["naive", "cpu"])


def random_qk(n: int, heads: int = 2, group: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, heads * group, 16, generator=rng) * 2, torch.randn(n, heads, 16, generator=rng)


@BOTH
@given(n=st.integers(1, 150), heads=st.integers(1, 2), group=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_definition(
    column_weights: ColumnWeights, n: int, heads: int, group: int, seed: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, n - 1))
    end = data.draw(st.integers(start + 1, n))
    near = data.draw(st.integers(0, n + 2))
    q, k = random_qk(n, heads, group, seed)
    logits = torch.einsum("thd,nhd->htn", q.double(), k.double().repeat_interleave(group, 1)) * 0.3
    position = torch.arange(n)
    distance = position[:, None] - position
    probs = logits.masked_fill(distance < 0, float("-inf")).softmax(-1)
    probs = torch.where(distance >= near, probs, 0.0)[:, start:end].unflatten(0, (heads, group))
    options = {"scale": 0.3, "min_distance": near, "row_start": start, "row_end": end}
    largest, total = probs.amax((1, 2)).float(), (probs.sum((1, 2)) / (group * (end - start))).float()
    torch.testing.assert_close(column_weights(q, k, reduce="max", **options), largest, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(column_weights(q, k, reduce="sum", **options), total, rtol=1e-5, atol=1e-7)


@BOTH
def test_sums_of_all_rows_are_the_mass_sums(column_weights: ColumnWeights) -> None:
    q, k = random_qk(90)
    expected = mass_sums(q, k, scale=0.2, row_start=10)[0]
    torch.testing.assert_close(column_weights(q, k, scale=0.2, reduce="sum", row_start=10), expected)


def test_a_key_that_one_row_asks_for_has_the_largest_maximum_and_a_small_sum() -> None:
    n, size = 128, 16
    q, k = torch.zeros(n, 1, size), torch.zeros(n, 1, size)
    k[20, 0, 0] = q[100, 0, 0] = 6.0
    most = cpu.column_weights(q, k, scale=1.0, min_distance=16)[0]
    total = cpu.column_weights(q, k, scale=1.0, reduce="sum", min_distance=16)[0]
    assert most.argmax() == 20
    assert most[20] > 0.99
    assert most[20] > 10 * most[0]
    assert total[20] < 1.5 * total[0]


@BOTH
def test_bad_arguments_are_named(column_weights: ColumnWeights) -> None:
    q, k = random_qk(8)
    with pytest.raises(ValueError, match=r"^reduce must be"):
        column_weights(q, k, scale=1.0, reduce="mean")
    with pytest.raises(ValueError, match=r"^min_distance must be"):
        column_weights(q, k, scale=1.0, min_distance=True)
    with pytest.raises(ValueError, match=r"^row_start and row_end"):
        column_weights(q, k, scale=1.0, row_start=8)
