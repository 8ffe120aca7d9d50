# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Half the variance of logits over a tile, over a paged cache: the paged reference against the plain one, the kernels
against the paged reference."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import PagedProblem, make_paged
from vllm_vsprefill.kernels.paged import FP8_DTYPES, PagedKV
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.kernels.variance import naive, paged
from vllm_vsprefill.kernels.variance.naive import tiles_of_variance
from vllm_vsprefill.kernels.variance.paged import VarianceWorkspace, allocate_variance, check_variance

if USABLE:
    from vllm_vsprefill.kernels.variance.triton import variance

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

UNTOUCHED = -7.0
PATTERN = SparsePattern(block_q=16, block_k=4, window=8, sinks=4, dense_last=0)


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for an empty program as for one with work."""
    if DEVICE == "cpu":
        monkeypatch.setattr(paged, "MAX_SPLITS", 3)


def room(problem: PagedProblem) -> tuple[VarianceWorkspace, Tensor]:
    """A workspace full of NaN, and a prior that nobody has written."""
    batch, heads = problem.batch, problem.kv.num_kv_heads
    workspace = allocate_variance(batch.num_requests, heads, problem.q.shape[2], problem.q.dtype, DEVICE)
    for tensor in workspace:
        tensor.fill_(float("nan"))
    prior = torch.full((batch.num_requests + 1, heads, batch.max_seq_len + 3), UNTOUCHED, device=DEVICE)
    return workspace, prior[1:]


def random_problem(seed: int, **fixed: Any) -> PagedProblem:
    rng = random.Random(seed)
    pattern = SparsePattern(block_q=rng.choice([1, 7, 16, 20, 64, 150]), block_k=4, dense_last=0, parts=1 + seed % 3)
    seq_lens = [rng.choice([rng.randint(1, 250), 128, 129]) for _ in range(rng.randint(1, 3))]
    rows = [rng.choice([0, 1, rng.randint(1, n), n]) for n in seq_lens]
    options = {
        "heads": rng.randint(1, 2), "group": rng.choice([1, 2, 6, 7]), "size": rng.choice([16, 24, 64, 80]),
        "layout": rng.choice(["NHD", "HND"]), "dtype": rng.choice([torch.float32, torch.float16, torch.bfloat16]),
    }  # fmt: skip
    problem = make_paged(seq_lens=seq_lens, rows=rows, pattern=pattern, seed=seed, **options | fixed)  # type: ignore[arg-type]
    # What all queries of a head have in common adds nothing, nor what all keys have; and channels differ.
    gen = torch.Generator().manual_seed(seed)
    common, channels = torch.randn(problem.q.shape[1:], generator=gen), torch.rand(problem.q.shape[2], generator=gen)
    problem.q.mul_(channels.to(problem.q)).add_(common.to(problem.q))
    keys = problem.kv.cache[..., : problem.q.shape[2]]  # [blocks, heads, positions, size]
    keys.add_(2 * torch.randn(1, keys.shape[1], 1, keys.shape[3], generator=gen).to(keys))
    return problem


def compare(problem: PagedProblem, config: Settings | None = None) -> Tensor:
    """Runs the kernels and compares with the paged reference; what the kernels wrote."""
    workspace, found = room(problem)
    check_variance(problem.q, problem.kv, problem.batch, problem.pattern, workspace, found, problem.scale)
    call = problem.q, problem.kv, problem.batch, problem.pattern
    variance(*call, workspace, found, scale=problem.scale, config=config)
    _, wanted = room(problem)
    paged.variance(*call, workspace, wanted, scale=problem.scale)
    # The interpreter multiplies float32 as such, and cuts bfloat16 off instead of rounding it.
    exact, rough = problem.q.dtype == torch.float32 and DEVICE == "cpu", 1.5e-2 if DEVICE == "cpu" else 1e-2
    # Rounding is relative to what the result was before its mean was taken off: here as large as the largest result.
    largest = float(torch.where(wanted != UNTOUCHED, wanted, 0.0).abs().max())
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=largest * (1e-4 if exact else rough) + 1e-6)
    return found


@pytest.mark.parametrize("seed", range(24))
def test_equals_the_reference(seed: int) -> None:
    problem = random_problem(seed)
    found = compare(problem, None if seed % 2 else Settings([16, 64][seed // 2 % 2], [32, 64][seed // 4 % 2], 4, 1))
    for i, n in enumerate(problem.seq_lens()):
        rows = int(problem.batch.row_end[i] - problem.batch.row_start[i])
        assert bool((found[i, :, n if rows else 0 :] == UNTOUCHED).all())
        assert bool(found[i, :, : n if rows else 0].isfinite().all())


@pytest.mark.parametrize("seed", range(8))
def test_the_paged_reference_equals_the_plain_one(seed: int) -> None:
    problem = random_problem(seed, dtype=torch.float32)
    workspace, found = room(problem)
    paged.variance(
        problem.q, problem.kv, problem.batch, problem.pattern, workspace, found, scale=problem.scale
    )  # fmt: skip
    for i, n in enumerate(problem.seq_lens()):
        start, end = int(problem.batch.row_start[i]), int(problem.batch.row_end[i])
        if start == end:
            continue
        k, _ = keys_values(problem.kv, i, n)
        wanted = naive.variance(problem.q[start:end], k, scale=problem.scale, pattern=problem.pattern)
        torch.testing.assert_close(found[i, :, :n], wanted)


@pytest.mark.parametrize("parts", [1, 2])
def test_of_long_chunks_only_some_tiles_are_looked_at(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(naive, "ENOUGH_ROWS", 40)
    pattern = replace(PATTERN, parts=parts)
    assert list(tiles_of_variance(pattern, 130, 210)) == [5, 8, 11]
    assert list(tiles_of_variance(pattern, 79, 210)) == list(pattern.tiles(79, 210))
    problem = make_paged(seq_lens=[210, 90, 100], rows=[130, 40, 95], pattern=pattern, heads=1, group=3, size=16)
    # Tiles that are left out are not read: the second to the fourth of the first request
    start = int(problem.batch.row_start[0])
    problem.q[start + 16 : start + 48] = float("nan")
    found = compare(problem)
    assert bool((found[0, :, :210] != 0.0).all())


@pytest.mark.parametrize("size", [100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_heads(size: int, dtype: torch.dtype) -> None:
    problem = random_problem(3, size=size, dtype=dtype, heads=2, group=2)
    compare(problem)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("factor", [None, 0.6])
def test_fp8_cache(dtype: torch.dtype, factor: float | None) -> None:
    problem = random_problem(5, dtype=torch.float16)
    scales = None if factor is None else torch.tensor([factor], device=DEVICE)
    kv = PagedKV(problem.kv.cache.to(dtype), problem.kv.block_table, scales, scales)
    compare(replace(problem, kv=kv))


def test_every_round_brings_the_same_numbers() -> None:
    """Whatever was in the workspace, and whoever else is in the round where that leaves the splits as they are."""
    problem = make_paged(seq_lens=[150, 90], rows=[64, 90], pattern=PATTERN, heads=1, group=2, size=32)
    assert torch.equal(compare(problem), compare(problem))


def test_large_queries_do_not_overflow() -> None:
    problem = make_paged(seq_lens=[60], rows=[60], pattern=PATTERN, group=2, size=16, dtype=torch.float16)
    problem.q.mul_(1000.0)
    workspace, found = room(problem)
    variance(problem.q, problem.kv, problem.batch, PATTERN, workspace, found, scale=problem.scale)
    assert bool(found[..., :60].isfinite().all())
    assert float(found[..., :60].max()) == naive.MOST


def test_of_what_is_not_a_number_nothing_is_added() -> None:
    """To the keys of a head with such a query; its scores and costs are none themselves (``price`` keeps all)."""
    problem = make_paged(seq_lens=[60, 40], rows=[60, 40], pattern=PATTERN, group=2, size=16)
    problem.q[int(problem.batch.row_start[0]) + 3, 0] = float("nan")
    found = compare(problem)
    assert bool((found[0, 0, :60] == 0.0).all())
    assert bool((found[0, 1, :60] != 0.0).all())
    assert bool((found[1, :, :40] != 0.0).all())


def test_what_all_keys_have_in_common_adds_nothing() -> None:
    problem = make_paged(seq_lens=[90, 40], rows=[60, 40], pattern=PATTERN, group=2, size=16)
    found = compare(problem)
    problem.kv.cache[..., :16].add_(5.0)
    moved = compare(problem)
    written = found != UNTOUCHED
    torch.testing.assert_close(moved[written], found[written], rtol=1e-3, atol=1e-4)


def test_nothing_to_do() -> None:
    problem = make_paged(seq_lens=[50], rows=[0], pattern=PATTERN)
    workspace, prior = room(problem)
    for batch in (problem.batch, problem.batch._replace(max_rows=0)):
        variance(problem.q, problem.kv, batch, PATTERN, workspace, prior, scale=problem.scale)
    assert bool((prior == UNTOUCHED).all())


def test_bad_arguments_are_named() -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    workspace, prior = room(problem)
    q, kv, batch = problem.q, problem.kv, problem.batch
    wrong: Any = (16, None)
    with pytest.raises(ValueError, match=r"^cache has head size"):
        check_variance(q[..., :32], kv, batch, PATTERN, workspace, prior, 1.0)
    with pytest.raises(ValueError, match=r"^scale"):
        check_variance(q, kv, batch, PATTERN, workspace, prior, 0.0)
    with pytest.raises(ValueError, match=r"^pattern must be a SparsePattern, got int"):
        check_variance(q, kv, batch, wrong[0], workspace, prior, 1.0)
    with pytest.raises(ValueError, match=r"^prior must be a tensor, got NoneType"):
        check_variance(q, kv, batch, PATTERN, workspace, wrong[1], 1.0)
    with pytest.raises(ValueError, match=r"^prior has room for 9 tokens"):
        check_variance(q, kv, batch, PATTERN, workspace, prior[..., :9], 1.0)
    for size, heads, requests, dtype in (
        (32, 2, 1, q.dtype), (64, 1, 1, q.dtype), (64, 2, 0, q.dtype), (64, 2, 1, torch.float16),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^workspace is"):
            check_variance(q, kv, batch, PATTERN, allocate_variance(requests, heads, size, dtype, DEVICE), prior, 1.0)
    with pytest.raises(ValueError, match=r"^workspace has room for 1 sums"):
        check_variance(q, kv, batch, PATTERN, workspace._replace(sums=workspace.sums[:1]), prior, 1.0)
