# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Prices on the CPU against the plain reference: what is chosen must be as good, by an exact count of what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.problems import TOLERANCE, make_problem, patterns
from vllm_vsprefill.kernels.price import cpu, naive
from vllm_vsprefill.kernels.rows import spread_rows
from vllm_vsprefill.kernels.tile_scores import tile_scores
from vllm_vsprefill.kernels.types import SparsePattern


def objectives(
    q: Tensor, k: Tensor, v: Tensor, bars: Tensor, *, scale: float, pattern: SparsePattern, price: float, num_rows: int,
    prior: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """float64 ``[Hkv]``: what ``price`` makes smallest, and the density, row by row from the definition."""
    n, first, heads = k.shape[0], k.shape[0] - q.shape[0], k.shape[1]
    error, kept, seen, total = torch.zeros(heads), torch.zeros(heads), 0, 0.0
    for row in spread_rows(q.shape[0], naive.rows_of(num_rows, n)):
        position = row + first
        tile = position // pattern.block_q
        scores = tile_scores(q, k, [tile], scale=scale, pattern=pattern, prior=prior)[:, 0]
        seen += position + 1
        for head in range(heads):
            near = torch.arange(n) < pattern.sink_keys
            near[pattern.window_start(tile * pattern.block_q) :] = True
            some = (near | (scores[head] >= bars[head]))[: position + 1]
            queries = q[row].unflatten(0, (heads, -1))[head].float()
            logits = queries @ k[: position + 1, head].float().T * scale
            values = v[: position + 1, head].float()
            true = logits.softmax(-1) @ values
            out = logits.masked_fill(~some, float("-inf")).softmax(-1) @ values
            error[head] += (out - true).square().sum()
            total += float(true.square().sum())
            kept[head] += some.sum()
    density = kept / seen
    return error / max(total, 1e-30) + price * density, density


def structured(n: int, rows: int, heads: int, group: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Heads from diffuse to sharp, over keys that come in groups."""
    problem = make_problem(n=n, num_rows=rows, num_kv_heads=heads, group=group, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, heads, 64, generator=rng) * 1.5
    k = problem.k + centres[torch.randint(0, 12, (n,), generator=rng)]
    v = problem.v + 0.5 * k
    sharp = torch.linspace(0.2, 1.5, heads).repeat_interleave(group).view(1, -1, 1)
    near = centres[torch.arange(rows) // 40 % 12].repeat_interleave(group, 1)
    q = (problem.q + near) * sharp
    return q.to(dtype), k.to(dtype), v.to(dtype)


@settings(max_examples=80)
@given(
    n=st.integers(1, 700),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7]),
    dtype=st.sampled_from(list(TOLERANCE)),
    pattern=patterns(),
    price=st.sampled_from([0.0, 0.01, 0.05, 0.5, 5.0]),
    num_rows=st.sampled_from([1, 5, 30]),
    with_prior=st.booleans(),
    max_logits=st.sampled_from([1, 5000, 1 << 20]),
    seed=st.integers(1, 10**6),
    data=st.data(),
)
def test_the_choice_is_as_good_as_the_reference(
    n: int,
    heads: int,
    group: int,
    dtype: torch.dtype,
    pattern: SparsePattern,
    price: float,
    num_rows: int,
    with_prior: bool,
    max_logits: int,
    seed: int,
    data: st.DataObject,
) -> None:
    rows = data.draw(st.integers(1, n))
    q, k, v = structured(n, rows, heads, group, dtype, seed)
    prior = torch.randn(heads, n, generator=torch.Generator().manual_seed(seed)) if with_prior else None
    call: dict[str, Any] = {
        "scale": 0.125, "pattern": pattern, "price": price, "num_rows": num_rows, "prior": prior,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "MAX_LOGITS", max_logits)
        # Steps that short sequences can tell apart
        patch.setattr(naive, "SIZES", (0, 8, 16, 32, 64, 128, 256))
        actual = cpu.price(q, k, v, **call)
        expected = naive.price(q, k, v, **call)
    assert actual.scores.dtype == actual.density.dtype == torch.float32
    assert actual.scores.shape == actual.density.shape == (heads,)
    ours, density = objectives(q, k, v, actual.scores, **call)
    best, _ = objectives(q, k, v, expected.scores, **call)
    exact = dtype in (torch.float32, torch.float64)
    assert (ours <= best * (1.001 if exact else 1.03) + (1e-6 if exact else 1e-3 + 0.02 * price)).all()
    assert (actual.density - density).abs().max() < (1e-3 if exact else 0.05)


def test_a_free_choice_lists_everything_and_a_dear_one_nothing() -> None:
    q, k, v = structured(900, 400, 2, 3, torch.bfloat16, 1)
    pattern = SparsePattern(block_q=32, block_k=16, window=64, sinks=16, dense_last=0)
    free = cpu.price(q, k, v, scale=0.125, pattern=pattern, price=0.0)
    assert free.scores.tolist() == [float("-inf")] * 2
    assert free.density.tolist() == [1.0, 1.0]
    # Window and sinks are computed whatever they cost.
    dear = cpu.price(q, k, v, scale=0.125, pattern=pattern, price=1e6)
    assert float(dear.density.max()) < 0.2


def test_other_devices_are_refused() -> None:
    problem = make_problem(n=20)
    q, k, v = (x.to("meta") for x in (problem.q, problem.k, problem.v))
    with pytest.raises(ValueError, match="q is on meta"):
        cpu.price(q, k, v, scale=1.0, pattern=problem.pattern, price=0.1)
