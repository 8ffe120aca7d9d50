# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Attention over lists of tiles on the CPU against the plain reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.problems import TOLERANCE, make_problem, patterns, relative_error
from vllm_vsprefill.kernels.attend_tiles import cpu, naive
from vllm_vsprefill.kernels.types import SparsePattern


def random_lists(num_kv_heads: int, tiles: int, n: int, density: float, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(num_kv_heads, tiles, n, generator=rng) < density


@settings(max_examples=300)
@given(
    n=st.integers(1, 300),
    num_kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7]),
    size=st.sampled_from([64, 128]),
    dtype=st.sampled_from(list(TOLERANCE)),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    pattern=patterns(),
    seed=st.integers(1, 10**6),
    data=st.data(),
)
def test_equals_the_reference(
    n: int,
    num_kv_heads: int,
    group: int,
    size: int,
    dtype: torch.dtype,
    density: float,
    pattern: SparsePattern,
    seed: int,
    data: st.DataObject,
) -> None:
    rows = data.draw(st.integers(1, n))
    problem = make_problem(
        n=n, num_rows=rows, num_kv_heads=num_kv_heads, group=group, size=size, dtype=dtype, seed=seed
    )
    keys = random_lists(num_kv_heads, len(pattern.tiles(rows, n)), n, density, seed)
    args = (problem.q, problem.k, problem.v, keys, pattern)
    expected, pairs = naive.attend_tiles(*args, scale=problem.scale)
    out = torch.full_like(problem.q, float("nan"))
    actual, visited = cpu.attend_tiles(*args, scale=problem.scale, out=out)
    assert actual is out
    assert visited == pairs
    # The reference sums in float32 whatever the dtype.
    assert relative_error(actual, expected) < max(TOLERANCE[dtype], TOLERANCE[torch.float32])


@pytest.mark.parametrize("max_logits", [1, 40_000])
def test_a_tile_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch, max_logits: int) -> None:
    monkeypatch.setattr(cpu, "MAX_LOGITS", max_logits)
    problem = make_problem(n=500, num_rows=300, group=3)
    pattern = SparsePattern(block_q=128, block_k=16, window=70, sinks=16, dense_last=0)
    args = (problem.q, problem.k, problem.v, random_lists(2, len(pattern.tiles(300, 500)), 500, 0.1, 0), pattern)
    expected, pairs = naive.attend_tiles(*args, scale=problem.scale)
    actual, visited = cpu.attend_tiles(*args, scale=problem.scale)
    assert visited == pairs
    assert relative_error(actual, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("far", [0.0, 200.0])
def test_large_logits_are_not_rounded_coarsely(far: float) -> None:
    """A common part of all logits, as a bias of the keys brings, must not cost digits."""
    problem = make_problem(n=400, num_rows=200, num_kv_heads=1, group=2, dtype=torch.bfloat16)
    q, k = problem.q.clone(), problem.k.clone()
    q[..., 0], k[..., 0] = 16.0, far / 16 / problem.scale
    pattern = SparsePattern(block_q=64, block_k=16, window=100, sinks=16, dense_last=0)
    keys = random_lists(1, len(pattern.tiles(200, 400)), 400, 0.2, 0)
    expected, _ = naive.attend_tiles(q.float(), k.float(), problem.v.float(), keys, pattern, scale=problem.scale)
    actual, _ = cpu.attend_tiles(q, k, problem.v, keys, pattern, scale=problem.scale)
    assert relative_error(actual, expected) < 0.01


def test_keys_outside_the_listable_range_are_not_read() -> None:
    problem = make_problem(n=200, num_rows=100)
    pattern = SparsePattern(block_q=16, block_k=8, window=30, sinks=8, dense_last=0)
    keys = random_lists(2, len(pattern.tiles(100, 200)), 200, 0.1, 0)
    expected, _ = cpu.attend_tiles(problem.q, problem.k, problem.v, keys, pattern, scale=problem.scale)
    for i, tile in enumerate(pattern.tiles(100, 200)):
        keys[:, i, : pattern.sink_keys] = True
        keys[:, i, pattern.window_start(tile * 16) :] = True
    actual, _ = cpu.attend_tiles(problem.q, problem.k, problem.v, keys, pattern, scale=problem.scale)
    assert torch.equal(actual, expected)


def test_other_devices_are_refused() -> None:
    problem = make_problem(n=20)
    q, k, v = (x.to("meta") for x in (problem.q, problem.k, problem.v))
    keys = torch.zeros(2, len(problem.pattern.tiles(20, 20)), 20, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="q is on meta"):
        cpu.attend_tiles(q, k, v, keys, problem.pattern, scale=1.0)
