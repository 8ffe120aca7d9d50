# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Training-free estimate of columns and diagonals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_vsprefill.distil.mass.naive import mass_sums
from vllm_vsprefill.kernels.sampled import cpu, naive

Sampled = Callable[..., tuple[Tensor, Tensor]]
BOTH = pytest.mark.parametrize("sampled", [naive.sampled, cpu.sampled], ids=["naive", "cpu"])


def random_qk(n: int, num_kv_heads: int = 2, group: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, num_kv_heads * group, 32, generator=rng), torch.randn(n, num_kv_heads, 32, generator=rng)


@given(total=st.integers(1, 500), wanted=st.integers(1, 600))
def test_rows_are_spread_evenly_and_end_with_the_last(total: int, wanted: int) -> None:
    rows = naive.sampled_rows(total, wanted)
    assert len(rows) == min(total, wanted)
    assert rows[-1] == total - 1
    gaps = [b - a for a, b in zip([-1, *rows], rows, strict=False)]
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@BOTH
@given(
    n=st.integers(1, 60),
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    num_rows=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_equals_the_true_mass_of_its_rows(
    sampled: Sampled, n: int, num_kv_heads: int, group: int, num_rows: int, seed: int, data: st.DataObject
) -> None:
    q, k = random_qk(n, num_kv_heads, group, seed)
    chunk_len = data.draw(st.integers(1, n))
    actual = sampled(q[n - chunk_len :], k, scale=0.2, num_rows=num_rows)
    rows = [n - chunk_len + row for row in naive.sampled_rows(chunk_len, num_rows)]
    sums = [mass_sums(q, k, scale=0.2, row_start=row, row_end=row + 1) for row in rows]
    for which in (0, 1):
        assert actual[which].dtype == torch.float32
        expected = torch.stack([part[which] for part in sums]).mean(dim=0)
        torch.testing.assert_close(actual[which], expected, rtol=1e-4, atol=1e-6)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sums_to_one_and_is_finite(sampled: Sampled, dtype: torch.dtype) -> None:
    q, k = random_qk(500)
    for probs in sampled((q[-100:] * 20).to(dtype), k.to(dtype), scale=1.0, num_rows=16):
        assert torch.isfinite(probs).all()
        torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpu_is_close_to_naive_in_half_precision(dtype: torch.dtype) -> None:
    q, k = (x.to(dtype) for x in random_qk(700))
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    actual = cpu.sampled(q[-300:], k, scale=0.3, num_rows=20)
    for a, b in zip(actual, naive.sampled(q[-300:], k, scale=0.3, num_rows=20), strict=True):
        # Probability mass that is somewhere else, of a total of one
        assert float((a - b).abs().sum(dim=-1).max()) < 0.02


Q, K = random_qk(10)


@BOTH
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"q": Q[0]}, "q must have 3 axes"),
        ({"q": Q[:, :5]}, "q has 5 heads"),
        ({"k": K[:9]}, "q has 10 rows but k has only 9"),
        ({"k": K.double()}, "k has dtype"),
        ({"k": K.to("meta")}, "k is on meta"),
        ({"scale": -1.0}, "scale must be"),
        ({"num_rows": 0}, "num_rows must be a positive int"),
        ({"num_rows": 2.0}, "num_rows must be a positive int"),
    ],
)
def test_bad_argument_is_named(sampled: Sampled, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampled(**{"q": Q, "k": K, "scale": 1.0, "num_rows": 4, **bad})
