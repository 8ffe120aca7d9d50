# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Streaming sums and maxima against the plain reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from vllm_vsprefill.distil.mass import naive
from vllm_vsprefill.distil.mass.triton import column_weights, mass_sums
from vllm_vsprefill.kernels.settings import Settings

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)


def causal_lse(q: torch.Tensor, k: torch.Tensor, start: int) -> torch.Tensor:
    """Log-sum-exp of rows from ``start`` on, scaled by 0.3; NaN before them: rows outside the range are not read."""
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("thd,nhd->htn", q.double(), k.double().repeat_interleave(group, 1)) * 0.3
    future = torch.ones(len(q), len(q), dtype=torch.bool, device=DEVICE).triu(1)
    lse = logits.masked_fill(future, float("-inf")).logsumexp(-1).T.float()
    lse[:start] = float("nan")
    return lse


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_reference(seed: int) -> None:
    choose, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, group, size = choose.randint(1, 2), choose.choice([1, 2, 3, 4, 7, 8]), choose.choice([16, 24, 64])
    n = choose.choice([1, 17, choose.randint(1, 200)])
    start = choose.choice([0, choose.randrange(n)])
    end = choose.choice([None, choose.randint(start + 1, n)])
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16])
    q = torch.randn(n, heads * group, size, generator=rng).to(dtype).to(DEVICE)
    k = torch.randn(n, heads, size, generator=rng).to(dtype).to(DEVICE)
    lse = None
    if choose.random() < 0.5:
        lse = causal_lse(q, k, start)
    config = Settings(choose.choice([16, 32, 64]), choose.choice([16, 32, 64]), 4, 1)
    found = mass_sums(q, k, scale=0.3, row_start=start, row_end=end, lse=lse, config=config)
    expected = naive.mass_sums(q, k, scale=0.3, row_start=start, row_end=end)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-7)
        torch.testing.assert_close(one.sum(-1), torch.ones(heads, device=DEVICE), rtol=1e-4, atol=0)


def test_diagonals_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(70, heads, 16, generator=rng).to(DEVICE) for heads in (4, 2))
    columns, diagonals = mass_sums(q, k, scale=0.3, row_start=9, with_columns=False)
    assert columns.shape == (2, 0)
    assert torch.equal(diagonals, mass_sums(q, k, scale=0.3, row_start=9)[1])


def test_bad_arguments_are_named() -> None:
    q, k = torch.zeros(10, 4, 16, device=DEVICE), torch.zeros(10, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"^lse has shape"):
        mass_sums(q, k, scale=1.0, lse=torch.zeros(10, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"^q must have dtype"):
        mass_sums(q.double(), k.double(), scale=1.0)
    with pytest.raises(ValueError, match=r"^row_start and row_end"):
        mass_sums(q, k, scale=1.0, row_start=5, row_end=5)


@pytest.mark.parametrize("seed", range(20))
def test_weights_equal_the_reference(seed: int) -> None:
    choose, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    heads, group, size = choose.randint(1, 2), choose.choice([1, 2, 3, 4, 7, 8]), choose.choice([16, 24, 64])
    n = choose.choice([1, 17, choose.randint(1, 200)])
    start = choose.choice([0, choose.randrange(n)])
    end = choose.choice([None, choose.randint(start + 1, n)])
    near = choose.choice([0, 1, choose.randint(0, n + 3)])
    reduce = choose.choice(["max", "sum"])
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16])
    q = torch.randn(n, heads * group, size, generator=rng).to(dtype).to(DEVICE)
    k = torch.randn(n, heads, size, generator=rng).to(dtype).to(DEVICE)
    lse = None
    if choose.random() < 0.5:
        lse = causal_lse(q, k, start)
    config = Settings(choose.choice([16, 32, 64]), choose.choice([16, 32, 64]), 4, 1)
    options: dict[str, Any] = {"scale": 0.3, "reduce": reduce, "min_distance": near, "row_start": start, "row_end": end}
    found = column_weights(q, k, **options, lse=lse, config=config)
    torch.testing.assert_close(found, naive.column_weights(q, k, **options), rtol=2e-4, atol=1e-7)


def test_bad_arguments_of_weights_are_named() -> None:
    q, k = torch.zeros(10, 4, 16, device=DEVICE), torch.zeros(10, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match=r"^lse has shape"):
        column_weights(q, k, scale=1.0, lse=torch.zeros(10, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"^q must have dtype"):
        column_weights(q.double(), k.double(), scale=1.0)
    with pytest.raises(ValueError, match=r"^min_distance must be"):
        column_weights(q, k, scale=1.0, min_distance=-1)
