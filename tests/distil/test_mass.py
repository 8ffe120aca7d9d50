# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""True attention along columns and diagonals."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_vsprefill.distil.mass import cpu, naive

MassSums = Callable[..., tuple[Tensor, Tensor]]
BOTH = pytest.mark.parametrize("mass_sums", [naive.mass_sums, cpu.mass_sums], ids=["naive", "cpu"])


def random_qk(
    n: int, num_kv_heads: int = 2, group: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(n, num_kv_heads * group, 16, generator=rng) * 2
    return q.to(dtype), torch.randn(n, num_kv_heads, 16, generator=rng).to(dtype)


def by_hand(q: Tensor, k: Tensor, scale: float, rows: range) -> tuple[Tensor, Tensor]:
    """Loops over rows and heads in float64."""
    queries, keys = q.double().numpy(), k.double().numpy()
    n, num_kv_heads, _ = keys.shape
    group = queries.shape[1] // num_kv_heads
    columns, diagonals = np.zeros((num_kv_heads, n)), np.zeros((num_kv_heads, n))
    for g in range(queries.shape[1]):
        for i in rows:
            logits = keys[: i + 1, g // group] @ queries[i, g] * scale
            probs = np.exp(logits - logits.max())
            probs /= probs.sum() * len(rows) * group
            for j, p in enumerate(probs):
                columns[g // group, j] += p
                diagonals[g // group, i - j] += p
    return torch.from_numpy(columns).float(), torch.from_numpy(diagonals).float()


@BOTH
@given(
    n=st.integers(1, 40),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_definition(mass_sums: MassSums, n: int, num_kv_heads: int, group: int, seed: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, n - 1))
    end = data.draw(st.integers(start + 1, n))
    q, k = random_qk(n, num_kv_heads, group, seed=seed)
    actual = mass_sums(q, k, scale=0.3, row_start=start, row_end=end)
    for a, b in zip(actual, by_hand(q, k, 0.3, range(start, end)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 200, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cpu_equals_naive_across_step_boundaries(n: int, dtype: torch.dtype) -> None:
    q, k = random_qk(n, dtype=dtype)
    for start, end in ((0, None), (n // 3, n - n // 4), (n - 1, n)):
        actual = cpu.mass_sums(q, k, scale=0.25, row_start=start, row_end=end)
        expected = naive.mass_sums(q, k, scale=0.25, row_start=start, row_end=end)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@BOTH
@pytest.mark.parametrize("rows", [(0, None), (0, 1), (50, 51), (13, 150), (199, 200)])
def test_sums_to_one_and_is_finite(mass_sums: MassSums, rows: tuple[int, int | None]) -> None:
    q, k = random_qk(200)
    # Logits of several hundred
    for sums in mass_sums(q * 30, k, scale=1.0, row_start=rows[0], row_end=rows[1]):
        assert torch.isfinite(sums).all()
        torch.testing.assert_close(sums.sum(dim=-1), torch.ones(2), rtol=1e-5, atol=0)


@BOTH
def test_ranges_average_to_the_whole(mass_sums: MassSums) -> None:
    q, k = random_qk(150)
    whole = mass_sums(q, k, scale=0.25)
    cuts = [0, 10, 100, 150]
    parts = [mass_sums(q, k, scale=0.25, row_start=a, row_end=b) for a, b in pairwise(cuts)]
    for which in (0, 1):
        mean = sum((b - a) / 150 * part[which] for (a, b), part in zip(pairwise(cuts), parts, strict=True))
        torch.testing.assert_close(mean, whole[which], rtol=1e-4, atol=1e-6)


@BOTH
def test_a_key_that_everyone_looks_at_and_one_fixed_distance(mass_sums: MassSums) -> None:
    n = 64
    # Query i points at key 0 with head 0, at key i - 1 with head 1 (key 0 for query 0).
    k = torch.eye(n).unsqueeze(1) * 100
    q = torch.stack((k[torch.zeros(n, dtype=torch.long), 0], k[torch.arange(n).sub(1).clamp(min=0), 0]), dim=1)
    columns, diagonals = mass_sums(q, k, scale=1.0)
    assert float(columns[0, 0]) == pytest.approx(0.5 + 0.5 * 2 / n)
    assert float(diagonals[0, 1]) == pytest.approx(0.5 * (n - 1) / n + 0.5 / n)
    assert float(columns[0, n - 1]) == 0.0


def test_steps_of_any_size_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = random_qk(70)
    expected = cpu.mass_sums(q, k, scale=0.25)
    for rows in (1, 7, 1000):
        monkeypatch.setattr(cpu, "ROWS", rows)
        for a, b in zip(cpu.mass_sums(q, k, scale=0.25), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_diagonal_sums() -> None:
    probs = torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 5.0, 6.0, 7.0]])
    # Rows at positions 2 and 3
    assert cpu.diagonal_sums(probs, 2).tolist() == [3 + 7, 2 + 6, 1 + 5, 4]


Q, K = random_qk(10)


@BOTH
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": Q[:9]}, "q has 9 rows but k has 10"),
        ({"q": Q.long()}, "q must have dtype"),
        ({"q": Q[:, :5]}, "q has 5 heads"),
        ({"k": K.half()}, "k has dtype"),
        ({"k": K.to("meta")}, "k is on meta"),
        ({"k": K[..., :3]}, "k has head size 3"),
        ({"scale": float("inf")}, "scale must be"),
        ({"row_start": 10}, "row_start"),
        ({"row_start": -1}, "row_start"),
        ({"row_end": 11}, "row_end"),
        ({"row_start": 5, "row_end": 5}, "row_start < row_end"),
    ],
)
def test_bad_argument_is_named(mass_sums: MassSums, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mass_sums(**{"q": Q, "k": K, "scale": 1.0, **bad})


# ----------------------------------------------------------------------------------------------------------------------
# columns over rows that are far enough behind

ColumnWeights = Callable[..., Tensor]
BOTH_WEIGHTS = pytest.mark.parametrize(
    "column_weights", [naive.column_weights, cpu.column_weights], ids=["naive", "cpu"]
)


@BOTH_WEIGHTS
@given(n=st.integers(1, 150), heads=st.integers(1, 2), group=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_definition_of_weights(
    column_weights: ColumnWeights, n: int, heads: int, group: int, seed: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, n - 1))
    end = data.draw(st.integers(start + 1, n))
    near = data.draw(st.integers(0, n + 2))
    q, k = random_qk(n, heads, group, seed=seed)
    logits = torch.einsum("thd,nhd->htn", q.double(), k.double().repeat_interleave(group, 1)) * 0.3
    position = torch.arange(n)
    distance = position[:, None] - position
    probs = logits.masked_fill(distance < 0, float("-inf")).softmax(-1)
    probs = torch.where(distance >= near, probs, 0.0)[:, start:end].unflatten(0, (heads, group))
    options = {"scale": 0.3, "min_distance": near, "row_start": start, "row_end": end}
    largest, total = probs.amax((1, 2)).float(), (probs.sum((1, 2)) / (group * (end - start))).float()
    torch.testing.assert_close(column_weights(q, k, reduce="max", **options), largest, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(column_weights(q, k, reduce="sum", **options), total, rtol=1e-5, atol=1e-7)


@BOTH_WEIGHTS
def test_sums_of_all_rows_are_the_mass_sums(column_weights: ColumnWeights) -> None:
    q, k = random_qk(90)
    expected = naive.mass_sums(q, k, scale=0.2, row_start=10)[0]
    torch.testing.assert_close(column_weights(q, k, scale=0.2, reduce="sum", row_start=10), expected)


def test_a_key_that_one_row_asks_for_has_the_largest_maximum_and_a_small_sum() -> None:
    n, size = 128, 16
    q, k = torch.zeros(n, 1, size), torch.zeros(n, 1, size)
    k[20, 0, 0] = q[100, 0, 0] = 6.0
    largest = cpu.column_weights(q, k, scale=1.0, min_distance=16)[0]
    total = cpu.column_weights(q, k, scale=1.0, reduce="sum", min_distance=16)[0]
    assert largest.argmax() == 20
    assert largest[20] > 0.99
    assert largest[20] > 10 * largest[0]
    assert total[20] < 1.5 * total[0]


@BOTH_WEIGHTS
def test_bad_arguments_of_weights_are_named(column_weights: ColumnWeights) -> None:
    q, k = random_qk(8)
    with pytest.raises(ValueError, match=r"^reduce must be"):
        column_weights(q, k, scale=1.0, reduce="mean")
    with pytest.raises(ValueError, match=r"^min_distance must be"):
        column_weights(q, k, scale=1.0, min_distance=True)
    with pytest.raises(ValueError, match=r"^row_start and row_end"):
        column_weights(q, k, scale=1.0, row_start=8)
