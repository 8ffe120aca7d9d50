# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The paged price: its reference against the contiguous one, the kernels by what their choice costs."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import PagedProblem, make_paged, random_priors
from tests.kernels.priced import Priced, planted
from vllm_vsprefill.kernels import tile_index
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.price import naive, paged
from vllm_vsprefill.kernels.price.paged import PriceWorkspace, allocate_price, check_price
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.tile_index import TileIndex, allocate_tiles
from vllm_vsprefill.kernels.tile_scores import tile_scores
from vllm_vsprefill.kernels.types import SparsePattern

if USABLE:
    from vllm_vsprefill.kernels.price import triton as kernels
    from vllm_vsprefill.kernels.price.triton import price

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

PATTERN = SparsePattern(block_q=20, block_k=4, window=30, sinks=8, dense_last=0)
UNTOUCHED = 7.0


@pytest.fixture(autouse=True)
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for an empty program as for one with work."""
    if DEVICE == "cpu":
        monkeypatch.setattr(paged, "PROGRAMS", 1)


def room(problem: PagedProblem, num_rows: int) -> tuple[TileIndex, PriceWorkspace]:
    """An index that nobody has written, and a workspace full of NaN."""
    batch, heads = problem.batch, problem.kv.num_kv_heads
    requests, longest, pattern = batch.num_requests, batch.max_seq_len, problem.pattern
    storage = allocate_tiles(requests + 1, heads, batch.max_rows, [(pattern, longest)], DEVICE)
    index = storage.view(pattern, batch.max_rows, requests, longest)
    index.bars.fill_(UNTOUCHED)
    index.density.fill_(UNTOUCHED)
    _, query_heads, size = problem.q.shape
    workspace = allocate_price(
        requests, query_heads, heads, size, longest, num_rows, problem.q.dtype, DEVICE, pattern.parts
    )
    for tensor in workspace[:-2]:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 123456)
    return index, workspace


def exact(problem: PagedProblem, request: int, num_rows: int, prior: torch.Tensor | None = None) -> Priced:
    """Exact costs of one request."""
    start, end, n = (int(x[request]) for x in problem.batch[:3])
    k, v = keys_values(problem.kv, request, n)
    added = None if prior is None else prior[request, :, :n].cpu()
    return Priced(problem.q[start:end], k, v, problem.scale, problem.pattern, num_rows, added)


def check(
    problem: PagedProblem, num_rows: int, worth: float, index: TileIndex, slack: float,
    prior: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """The choice of every request costs little more than the best one, and its density is right."""
    for i in range(problem.batch.num_requests):
        if problem.batch.row_start[i] == problem.batch.row_end[i]:
            assert index.bars[i].tolist() == index.density[i].tolist() == [UNTOUCHED] * index.bars.shape[1]
            continue
        true, bars = exact(problem, i, num_rows, prior), index.bars[i].tolist()
        for cost, best in zip(true.costs(bars, worth), true.best(worth), strict=True):
            assert cost <= best * (1 + slack) + 1e-4 * worth
        assert index.density[i].tolist() == pytest.approx(true.of(bars)[1], abs=4e-3)


def sharpen(problem: PagedProblem) -> None:
    """Makes every other KV head look at few keys, and the queries of a tile alike."""
    heads = problem.kv.num_kv_heads
    problem.q.mul_(0.5)
    problem.q.unflatten(1, (heads, -1))[:, ::2].mul_(3.0)
    common = torch.randn(problem.q.shape[1:], generator=torch.Generator().manual_seed(5)).to(problem.q)
    problem.q.add_(common)


@pytest.mark.parametrize("seed", range(10))
def test_choices_cost_little_more_than_the_best(seed: int) -> None:
    rng = random.Random(seed)
    seq_lens = [rng.randint(1, 600) for _ in range(rng.randint(1, 2))]
    rows = [rng.choice([1, rng.randint(1, n), n]) for n in seq_lens]
    pattern = SparsePattern(
        block_q=rng.choice([1, 16, 20, 50]), block_k=rng.choice([1, 4, 16]), window=rng.choice([0, 30]),
        sinks=rng.choice([0, 8]), dense_last=0, parts=1 + seed % 2,
    )  # fmt: skip
    problem = make_paged(
        seq_lens=seq_lens, rows=rows, pattern=pattern, heads=rng.randint(1, 3), group=rng.choice([1, 2, 3, 7]),
        size=rng.choice([16, 24, 64]), dtype=rng.choice([torch.float32, torch.float16, torch.bfloat16]),
        layout=rng.choice(["NHD", "HND"]), seed=seed,
    )  # fmt: skip
    sharpen(problem)
    count, worth = rng.choice([1, 8, 13]), rng.choice([0.01, 0.1])
    index, workspace = room(problem, count)
    prior = random_priors(problem, seed) if seed // 2 % 2 else None
    check_price(problem.q, problem.kv, problem.batch, index, workspace, problem.scale, worth, prior)
    call: dict[str, Any] = {"scale": problem.scale, "price": worth, "prior": prior}
    config = Settings(rng.choice([16, 64]), 128, 4, 1)
    price(problem.q, problem.kv, problem.batch, index, workspace, **call, config=config)
    check(problem, count, worth, index, 0.15, prior)
    paged.price(problem.q, problem.kv, problem.batch, index, workspace, **call)
    check(problem, count, worth, index, 0.01 if problem.q.dtype == torch.float32 else 0.05, prior)


@pytest.mark.parametrize("group", [1, 6])
def test_counts_and_errors_are_close_to_exact_ones(group: int) -> None:
    problem = make_paged(seq_lens=[700], rows=[300], pattern=PATTERN, heads=2, group=group, size=64)
    sharpen(problem)
    index, workspace = room(problem, 12)
    config = Settings(32, 128, 4, 1)
    prior = random_priors(problem, 3) if group == 6 else None
    price(
        problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, price=0.1, prior=prior,
        config=config,
    )  # fmt: skip
    true = exact(problem, 0, 12, prior)
    k, _ = keys_values(problem.kv, 0, 700)
    start = int(problem.batch.row_start[0])
    tiles = [(400 + row) // 20 for row in true.rows]
    scores = tile_scores(
        problem.q[start : start + 300], k, tiles, scale=problem.scale, pattern=PATTERN,
        prior=None if prior is None else prior[0, :, :700],
    )  # fmt: skip
    counts = torch.zeros(2, naive.BINS, dtype=torch.int64)
    for i, places in enumerate(true.places):
        for head in range(2):
            counts[head] += torch.bincount(naive.bin_of(scores[head, i, places.to(DEVICE)]).cpu(), minlength=naive.BINS)
    # A score within rounding of a bar may fall on either side.
    assert int((workspace.counts[0].cpu() - counts).abs().sum()) <= 12
    assert workspace.bars[0, :, :-1].tolist() == naive.ladder(workspace.counts[0].long(), 12, 700).tolist()
    found = workspace.errors[0, :, : -(-12 * (8 if group == 6 else 1) // paged.CHUNK_ROWS)].sum(1).cpu()
    for step in range(paged.STEPS - 1):
        bars = [b / 8 - 20 if b < naive.BINS else math.inf for b in workspace.bars[0, :, step].tolist()]
        errors, density = true.of(bars)
        assert workspace.density[0, :, step].tolist() == pytest.approx(density, abs=2e-3)
        estimated = (found[:, step] / found[:, -1].sum()).tolist()
        assert estimated == pytest.approx(errors, rel=0.5, abs=1e-6)
        assert sum(estimated) == pytest.approx(sum(errors), rel=0.4, abs=1e-6)


def contiguous(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> PagedProblem:
    """One sequence, whose last rows are ``q``, in a cache in order."""
    n, heads, size = k.shape
    both = torch.zeros(-(-n // 16) * 16, heads, 2 * size, dtype=torch.float64)
    both[:n] = torch.cat((k, v), 2)
    cache = both.view(-1, 16, heads, 2 * size).transpose(1, 2).to(dtype).to(DEVICE)
    kv = PagedKV(cache, torch.arange(len(cache), dtype=torch.int32, device=DEVICE)[None])
    batch = Batch.from_lists([len(q)], [n], DEVICE)
    return PagedProblem(q.to(dtype).to(DEVICE), kv, batch, [], PATTERN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_that_differ_are_told_apart(dtype: torch.dtype) -> None:
    q, k, v = planted(900, 32, torch.Generator().manual_seed(0))
    problem = contiguous(q[-300:], k, v, dtype)
    index, workspace = room(problem, 16)
    config = Settings(32, 128, 4, 1)
    price(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, price=0.05, config=config)
    found = index.bars[0].tolist(), index.density[0].tolist()
    check(problem, 16, 0.05, index, 0.05)
    paged.price(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, price=0.05)
    assert found[0][:2] == index.bars[0, :2].tolist()
    assert found[1][:2] == pytest.approx(index.density[0, :2].tolist(), abs=1e-3)
    assert math.isfinite(found[0][1])


@pytest.mark.parametrize("factors", [(None, None), (0.5, 3.0)])
def test_an_fp8_cache(factors: tuple[float | None, float | None]) -> None:
    q, k, v = planted(600, 32, torch.Generator().manual_seed(1))
    problem = contiguous(q[-200:], k, v, torch.float32)
    scales = [None if x is None else torch.full((1,), x, device=DEVICE) for x in factors]
    cache = problem.kv.cache
    if scales[0] is not None:
        cache = torch.cat([half / x for half, x in zip(cache.chunk(2, 3), factors, strict=True)], 3)  # type: ignore[operator]
    kv = PagedKV(cache.to(torch.float8_e4m3fn), problem.kv.block_table, *scales)
    problem = PagedProblem(problem.q.half(), kv, problem.batch, [], PATTERN)
    index, workspace = room(problem, 8)
    config = Settings(16, 128, 4, 1)
    price(problem.q, kv, problem.batch, index, workspace, scale=problem.scale, price=0.05, config=config)
    check(problem, 8, 0.05, index, 0.1)


@pytest.mark.parametrize("with_prior", [False, True])
def test_long_sequences_are_looked_at_in_part(monkeypatch: pytest.MonkeyPatch, with_prior: bool) -> None:
    """Fewer rows, longer lists, and bars from a part of the keys, which keep nearly the sizes of the ladder."""
    monkeypatch.setattr(tile_index, "FULL_KEYS", 500)
    monkeypatch.setattr(kernels, "COUNT_KEYS", 256)
    assert [naive.rows_of(32, n) for n in (500, 501, 1000, 1001, 9000)] == [32, 16, 16, 8, 8]
    problem = make_paged(seq_lens=[1400, 300], rows=[400, 90], pattern=PATTERN, heads=2, group=2, size=64)
    sharpen(problem)
    index, workspace = room(problem, 32)
    config = Settings(32, 128, 4, 1)
    prior = random_priors(problem, 4) if with_prior else None
    price(
        problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, price=0.1, prior=prior,
        config=config,
    )  # fmt: skip
    for i, rows in enumerate((8, 32)):
        true = exact(problem, i, 32, prior)
        assert len(true.rows) == rows
        pairs = sum(len(places) for places in true.places)
        for head in range(2):
            assert int(workspace.counts[i, head].sum()) == pytest.approx(pairs, rel=0.05)
            for step, size in enumerate(naive.sizes_of((1400, 300)[i])[1:3], 1):
                bar = int(workspace.bars[i, head, step])
                kept = sum(int((scores[head] >= bar / 8 - 20).sum()) for scores in true.scores) / rows
                assert kept <= size * 1.2
                assert bar == 0 or kept >= size * 0.5
        for cost, best in zip(true.costs(index.bars[i].tolist(), 0.1), true.best(0.1), strict=True):
            assert cost <= best * 1.25


def test_requests_take_turns_where_room_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_paged(seq_lens=[150, 40, 90], rows=[64, 0, 90], pattern=PATTERN, heads=1, size=16)
    sharpen(problem)
    found = []
    for size in (paged.PARTIAL_BYTES, 1):
        monkeypatch.setattr(paged, "PARTIAL_BYTES", size)
        index, workspace = room(problem, 8)
        config = Settings(32, 64, 4, 1)
        price(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, price=0.1, config=config)
        chunks = 8 * 4 // paged.CHUNK_ROWS
        errors = workspace.errors[[0, 2], :, :chunks].clone()
        assert not torch.isnan(errors).any()
        found.append((workspace.sums.shape[0], index.bars.clone(), index.density.clone(), errors))
        check(problem, 8, 0.1, index, 0.15)
    assert [turn for turn, *_ in found] == [3, 1]
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("broken", ["q", "values"])
def test_keeps_everything_where_a_cost_is_not_a_number(broken: str) -> None:
    problem = make_paged(seq_lens=[120], rows=[64], pattern=PATTERN, heads=2, group=2, size=16)
    if broken == "q":
        problem.q[:, 0] = float("nan")
    else:
        problem.kv.cache[:, 0, :, 16:] = float("nan")
    index, workspace = room(problem, 8)
    config = Settings(32, 64, 4, 1)
    price(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, price=0.1, config=config)
    assert float(index.bars[0, 0]) == -math.inf
    assert float(index.density[0, 0]) == 1.0


def test_nothing_to_list_is_everything() -> None:
    pattern = SparsePattern(block_q=16, block_k=4, window=100, sinks=4, dense_last=0)
    problem = make_paged(seq_lens=[80], rows=[40], pattern=pattern, heads=2, group=2, size=16)
    index, workspace = room(problem, 8)
    config = Settings(32, 64, 4, 1)
    price(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, price=0.1, config=config)
    assert index.bars.tolist() == [[-math.inf] * 2]
    assert index.density.tolist() == [[1.0] * 2]
    assert int(workspace.counts[0].sum()) == 0


def test_large_heads_and_groups() -> None:
    problem = make_paged(seq_lens=[140], rows=[30], pattern=PATTERN, heads=1, group=64, size=256, dtype=torch.float16)
    sharpen(problem)
    index, workspace = room(problem, 3)
    config = Settings(64, 64, 4, 1)
    price(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, price=0.05, config=config)
    check(problem, 3, 0.05, index, 0.15)


def test_bad_arguments_are_named() -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    index, workspace = room(problem, 8)
    q, kv, batch = problem.q, problem.kv, problem.batch
    check_price(q, kv, batch, index, workspace, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"^cache has head size"):
        check_price(q[..., :32], kv, batch, index, workspace, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"^scale"):
        check_price(q, kv, batch, index, workspace, 0.0, 0.1)
    with pytest.raises(ValueError, match=r"^price"):
        check_price(q, kv, batch, index, workspace, 1.0, math.inf)
    with pytest.raises(ValueError, match=r"^prior has room for 3 tokens"):
        check_price(q, kv, batch, index, workspace, 1.0, 0.1, torch.zeros(1, 2, 3, device=DEVICE))
    with pytest.raises(ValueError, match=r"^num_rows"):
        allocate_price(1, 8, 2, 64, 60, 0, q.dtype, DEVICE)
    with pytest.raises(ValueError, match=r"^num_rows"):
        allocate_price(1, 8, 2, 64, 2**20, 2048, q.dtype, DEVICE)
    with pytest.raises(ValueError, match=r"^parts must be a power of two, got 3"):
        allocate_price(1, 8, 2, 64, 60, 8, q.dtype, DEVICE, 3)
    for wrong in (
        allocate_price(1, 8, 2, 64, 60, 8, q.dtype, DEVICE, 2),
        allocate_price(1, 8, 2, 32, 60, 8, q.dtype, DEVICE), allocate_price(1, 8, 1, 64, 60, 8, q.dtype, DEVICE),
        allocate_price(1, 8, 2, 64, 60, 8, torch.float16, DEVICE), allocate_price(1, 2, 2, 64, 60, 64, q.dtype, DEVICE),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"^workspace"):
            check_price(q, kv, batch, index, wrong, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"^index has no room for sequences"):
        check_price(
            q, kv, batch._replace(max_seq_len=64), index._replace(bits=index.bits[..., :1]), workspace, 1.0, 0.1
        )
