# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Lists of tiles on the CPU against the plain reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.problems import TOLERANCE, make_problem, patterns
from vllm_vsprefill.kernels import tiles_cpu
from vllm_vsprefill.kernels.rank import cpu, naive
from vllm_vsprefill.kernels.tile_scores import listable, tile_scores
from vllm_vsprefill.kernels.types import SparsePattern


@settings(max_examples=300)
@given(
    n=st.integers(1, 300),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7]),
    dtype=st.sampled_from(list(TOLERANCE)),
    pattern=patterns(),
    bar=st.sampled_from([-math.inf, -7.0, -5.0, -4.0, math.inf]),
    common=st.sampled_from([0.0, 100.0]),
    block=st.sampled_from([1, 50, 2048]),
    seed=st.integers(1, 10**6),
    data=st.data(),
)
def test_what_is_clear_is_the_same(
    n: int,
    num_kv_heads: int,
    group: int,
    dtype: torch.dtype,
    pattern: SparsePattern,
    bar: float,
    common: float,
    block: int,
    seed: int,
    data: st.DataObject,
) -> None:
    """A score as near to the bar as products in this dtype are exact may be on either side of it."""
    rows = data.draw(st.integers(1, n))
    problem = make_problem(n=n, num_rows=rows, num_kv_heads=num_kv_heads, group=group, dtype=dtype, seed=seed)
    q, k = problem.q * 2, problem.k.clone()
    # A part of all logits that says nothing
    q[..., 0], k[..., 0] = 8.0, common / 8 / problem.scale
    bars = torch.full((num_kv_heads,), bar)
    bars[-1] += 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles_cpu, "KEYS", block)
        actual = cpu.rank(q, k, bars, scale=problem.scale, pattern=pattern)
    expected = naive.rank(q, k, bars, scale=problem.scale, pattern=pattern)
    assert actual.dtype == torch.bool
    assert actual.shape == expected.shape
    tiles = pattern.tiles(rows, n)
    scores = tile_scores(q, k, list(tiles), scale=problem.scale, pattern=pattern)
    unclear = (scores - bars.view(-1, 1, 1)).abs() < 1e-3
    assert torch.equal(actual & ~unclear, expected & ~unclear)
    assert not (actual & ~listable(pattern, tiles, n, q.device)).any()


def test_other_devices_are_refused() -> None:
    problem = make_problem(n=20)
    q, k = (x.to("meta") for x in (problem.q, problem.k))
    with pytest.raises(ValueError, match="q is on meta"):
        cpu.rank(q, k, torch.zeros(2), scale=1.0, pattern=problem.pattern)
