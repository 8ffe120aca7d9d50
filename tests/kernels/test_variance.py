# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Half the variance of logits over a tile: the plain reference against a loop, the version for CPUs against it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.kernels.variance import cpu, naive


def random_pattern(seed: int, rng: random.Random) -> SparsePattern:
    return SparsePattern(block_q=rng.choice([1, 7, 16, 64]), block_k=4, window=16, dense_last=0, parts=1 + seed % 3)


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pattern, group, heads, scale = random_pattern(seed, rng), rng.choice([1, 3]), 2, 0.3
    n = rng.randint(2, 90)
    q, k = torch.randn(rng.randint(1, n), heads * group, 8), torch.randn(n, heads, 8)
    found = naive.variance(q, k, scale=scale, pattern=pattern)
    first = n - len(q)
    size = -(-pattern.block_q // pattern.parts)
    parts: dict[tuple[int, int], list[int]] = {}
    for row in range(len(q)):
        tile, place = divmod(first + row, pattern.block_q)
        parts.setdefault((tile, place // size), []).append(row)
    for head in range(heads):
        keys = k[:, head] - k[:, head].mean(0)
        logits = scale * torch.einsum("rhd,nd->rhn", q[:, head * group : (head + 1) * group], keys)
        squares = torch.zeros(n)
        for rows in parts.values():
            squares += (logits[rows] - logits[rows].mean(0)).square().sum((0, 1))
        wanted = squares / (len(q) * group) / 2
        wanted -= wanted.mean()
        torch.testing.assert_close(found[head], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_cpu_equals_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    pattern, heads, dtype = random_pattern(seed, rng), rng.randint(1, 3), rng.choice([torch.float32, torch.bfloat16])
    n, size = rng.randint(1, 300), rng.choice([8, 64])
    q = torch.randn(rng.randint(1, n), heads * rng.choice([1, 3, 7]), size).to(dtype)
    # As a backend hands it over: heads first in memory
    k = torch.randn(heads, n, size).to(dtype).transpose(0, 1)
    found = cpu.variance(q, k, scale=size**-0.5, pattern=pattern)
    wanted = naive.variance(q, k, scale=size**-0.5, pattern=pattern)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_what_all_keys_have_in_common_adds_nothing() -> None:
    q, k = torch.randn(60, 4, 8), torch.randn(90, 2, 8)
    found = naive.variance(q, k, scale=0.5, pattern=SparsePattern(block_q=8))
    moved = naive.variance(q, k + 10 * torch.randn(2, 8), scale=0.5, pattern=SparsePattern(block_q=8))
    torch.testing.assert_close(found, moved, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("version", [naive, cpu])
def test_of_long_sequences_some_keys_stand_for_all(version: Any) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(60, 2, 8), torch.randn(3 * naive.CENTRE_KEYS, 1, 8)
    spread = naive.covariance(q[-32:], 1, range(380, 384), seq_len=len(k), pattern=SparsePattern(block_q=8))
    mean = naive.centre(k)
    assert 0.0 < float((mean - k.mean(0)).abs().max()) < 0.15
    keys = (k - mean)[:, 0]
    wanted = torch.einsum("nd,de,ne->n", keys, spread[0], keys) / 2
    found = version.variance(q[-32:], k, scale=1.0, pattern=SparsePattern(block_q=8))[0]
    level = wanted - found
    torch.testing.assert_close(level, level[:1].expand(len(k)), rtol=1e-4, atol=1e-4)
    assert 0.0 < abs(float(level[0] - wanted.mean())) < 0.2 * float(wanted.mean())


def test_queries_that_are_all_the_same_have_none() -> None:
    q, k = torch.ones(40, 2, 8), torch.randn(50, 1, 8)
    assert not naive.variance(q, k, scale=1.0, pattern=SparsePattern(block_q=8)).any()


@pytest.mark.parametrize("version", [naive, cpu])
def test_of_what_is_not_a_number_nothing_is_added(version: Any) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(40, 4, 8), torch.randn(50, 2, 8)
    q[3, 1] = float("nan")
    found = version.variance(q, k, scale=1.0, pattern=SparsePattern(block_q=8))
    assert not found[0].any()
    assert bool(found[1].isfinite().all())
    assert bool(found[1].any())


@pytest.mark.parametrize("version", [naive, cpu])
def test_bad_arguments_are_named(version: Any) -> None:
    q, k = torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=r"^scale"):
        version.variance(q, k, scale=0.0, pattern=SparsePattern())
    with pytest.raises(ValueError, match=r"^k has head size"):
        version.variance(q, k[..., :4], scale=1.0, pattern=SparsePattern())


def test_other_devices_are_refused() -> None:
    q = torch.zeros(4, 2, 8, device="meta")
    with pytest.raises(ValueError, match="q is on meta"):
        cpu.variance(q, q, scale=1.0, pattern=SparsePattern())
