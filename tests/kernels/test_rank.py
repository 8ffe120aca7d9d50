# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Keys that tiles list: the plain reference against a loop in float64, the version for CPUs against the reference."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_vsprefill.kernels.rank import cpu, naive
from vllm_vsprefill.kernels.tile_scores import listable, tile_scores
from vllm_vsprefill.kernels.types import SparsePattern


def score_of(q: Tensor, k: Tensor, head: int, tile: int, key: int, scale: float, pattern: SparsePattern) -> float:
    """The score of one key by its definition; ``q`` and ``k`` in float64."""
    n, first, group = k.shape[0], k.shape[0] - q.shape[0], q.shape[1] // k.shape[1]
    rows = [p - first for p in range(tile * pattern.block_q, (tile + 1) * pattern.block_q) if first <= p < n]
    start = max(tile * pattern.block_q - max(pattern.window, 1) + 1, 0) // pattern.block_k * pattern.block_k
    sinks = -(-pattern.sinks // pattern.block_k) * pattern.block_k
    near = [p for p in range(first + rows[-1] + 1) if p < sinks or p >= start]
    best = -math.inf
    size = -(-pattern.block_q // pattern.parts)
    for part in range(pattern.parts):
        some = [row for row in rows if (first + row) % pattern.block_q // size == part]
        for one in range(head * group, (head + 1) * group) if some else ():
            mean = torch.stack([q[row, one] for row in some]).mean(0)
            unit = math.log(sum(math.exp(scale * float(mean @ k[p, head])) for p in near))
            best = max(best, scale * float(mean @ k[key, head]) - unit)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pattern = SparsePattern(
        block_q=rng.choice([1, 5, 8, 16]), block_k=rng.choice([1, 4]), window=rng.choice([0, 1, 7, 16]),
        sinks=rng.choice([0, 3, 8]), dense_last=0, parts=1 + seed % 3,
    )  # fmt: skip
    n, heads, group, scale = rng.randint(20, 60), 2, rng.choice([1, 3]), rng.choice([0.2, 0.7])
    q = torch.randn(rng.randint(1, n), heads * group, 8, dtype=torch.float64)
    k = torch.randn(n, heads, 8, dtype=torch.float64)
    tiles = pattern.tiles(q.shape[0], n)
    bars = torch.tensor([rng.uniform(-4.0, -1.0), rng.choice([-4.0, math.inf, -math.inf])])
    prior = torch.randn(heads, n) if seed % 2 else None
    found = naive.rank(q, k, bars, scale=scale, pattern=pattern, prior=prior)
    assert found.dtype == torch.bool
    assert found.shape == (heads, len(tiles), n)
    for i, tile in enumerate(tiles):
        window = pattern.window_start(tile * pattern.block_q)
        for key in range(n):
            for head in range(heads):
                if not pattern.sink_keys <= key < window:
                    assert not found[head, i, key]
                    continue
                margin = score_of(q, k, head, tile, key, scale, pattern) - float(bars[head])
                margin += float(prior[head, key]) if prior is not None else 0.0
                if abs(margin) > 1e-5:
                    assert bool(found[head, i, key]) == (margin > 0)


@pytest.mark.parametrize("seed", range(24))
def test_cpu_equals_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pattern = SparsePattern(
        block_q=rng.choice([1, 7, 16, 20, 128]), block_k=rng.choice([1, 4, 16]), window=rng.choice([0, 1, 33, 100]),
        sinks=rng.choice([0, 3, 40, 200]), dense_last=0, parts=1 + seed % 3,
    )  # fmt: skip
    n, heads, group, size = rng.randint(1, 400), rng.randint(1, 3), rng.choice([1, 3, 6, 40]), rng.choice([8, 64])
    dtype, margin = rng.choice([(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 5e-3)])
    q, k = torch.randn(rng.randint(1, n), heads * group, size), torch.randn(n, heads, size)
    q, k, scale = q.to(dtype), k.to(dtype), size**-0.5
    bars = torch.tensor([rng.choice([-2.0, -3.0, -5.0, math.inf, -math.inf]) for _ in range(heads)])
    prior = torch.randn(heads, n) if seed // 3 % 2 else None
    found = cpu.rank(q, k, bars, scale=scale, pattern=pattern, prior=prior)
    wanted = naive.rank(q, k, bars, scale=scale, pattern=pattern, prior=prior)
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    tiles = pattern.tiles(q.shape[0], n)
    assert not (found & ~listable(pattern, tiles, n, q.device)).any()
    scores = tile_scores(q, k, list(tiles), scale=scale, pattern=pattern, prior=prior)
    clear = (scores - bars.view(-1, 1, 1)).abs() > margin
    assert torch.equal(found[clear], wanted[clear])


@pytest.mark.parametrize("version", [naive, cpu])
def test_bad_arguments_are_named(version: Any) -> None:
    q, k = torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=r"^scale"):
        version.rank(q, k, torch.zeros(2), scale=0.0, pattern=SparsePattern())
    with pytest.raises(ValueError, match=r"^k has head size"):
        version.rank(q, k[..., :4], torch.zeros(2), scale=1.0, pattern=SparsePattern())
    with pytest.raises(ValueError, match=r"^prior has shape \(2, 5\), expected \(2, 4\)"):
        version.rank(q, k, torch.zeros(2), scale=1.0, pattern=SparsePattern(), prior=torch.zeros(2, 5))
