# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Marks of tiles over a paged cache: the paged reference against the plain one, the kernels against the scores."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import PagedProblem, make_paged, random_priors
from vllm_vsprefill.kernels.paged import FP8_DTYPES, PagedKV
from vllm_vsprefill.kernels.rank import naive, paged
from vllm_vsprefill.kernels.rank.paged import RankWorkspace, allocate_rank, check_rank
from vllm_vsprefill.kernels.rank.triton import rank
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.tile_index import WORD_BITS, TileIndex, allocate_tiles
from vllm_vsprefill.kernels.tile_scores import listable, tile_scores
from vllm_vsprefill.kernels.types import SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

STALE = 77


def tiles_for(problem: PagedProblem, bars: list[float]) -> tuple[TileIndex, RankWorkspace]:
    """An index whose bars are those of ``bars`` in turn, and a workspace; all else has to be written first."""
    batch, heads = problem.batch, problem.kv.num_kv_heads
    total = max(problem.q.shape[0], batch.max_rows)
    requests = batch.num_requests
    storage = allocate_tiles(requests, heads, total, [(problem.pattern, batch.max_seq_len)], DEVICE)
    index = storage.view(problem.pattern, total, requests, batch.max_seq_len)
    index.bits.fill_(STALE)
    for i in range(requests * heads):
        index.bars[i // heads, i % heads] = bars[i % len(bars)]
    workspace = allocate_rank(
        total,
        requests,
        problem.q.shape[1],
        problem.q.shape[2],
        problem.pattern.block_q,
        problem.q.dtype,
        DEVICE,
        problem.pattern.parts,
    )
    for tensor in workspace:
        tensor.fill_(float("nan"))
    return index, workspace


def marked(index: TileIndex, problem: PagedProblem, request: int) -> Tensor:
    """The bits of a request's tiles, bool ``[Hkv, tiles, n]``."""
    start, end, n = (int(x[request]) for x in problem.batch[:3])
    tiles = problem.pattern.tiles(end - start, n)
    place = index.place(start, request, n - (end - start), tiles[0])
    words = index.bits[:, place : place + len(tiles)]
    bits = words.unsqueeze(-1) >> torch.arange(WORD_BITS, device=words.device) & 1
    return bits.flatten(2)[..., :n] != 0


def random_problem(seed: int, **fixed: object) -> PagedProblem:
    rng = random.Random(seed)
    block_q = rng.choice([1, 7, 16, 20, 64])
    pattern = SparsePattern(
        block_q=block_q, block_k=rng.choice([1, 4, 16]), window=rng.choice([0, 1, 5, 40]),
        sinks=rng.choice([0, 1, 16, 40]), dense_last=0, parts=1 + seed // 2 % 3,
    )  # fmt: skip
    seq_lens = [rng.choice([rng.randint(1, 250), 128, 129]) for _ in range(rng.randint(1, 3))]
    most = 30 if block_q == 1 else 250
    rows = [rng.choice([0, 1, rng.randint(1, min(n, most)), min(n, most)]) for n in seq_lens]
    options = {
        "heads": rng.randint(1, 2), "group": rng.choice([1, 2, 6, 7]), "size": rng.choice([16, 24, 64]),
        "layout": rng.choice(["NHD", "HND"]), "dtype": torch.float32,
    }  # fmt: skip
    return make_paged(seq_lens=seq_lens, rows=rows, pattern=pattern, seed=seed, **options | fixed)  # type: ignore[arg-type]


def check_marks(problem: PagedProblem, index: TileIndex, margin: float, prior: Tensor | None = None) -> None:
    """Every bit of a listable key is as its score says, but for scores within ``margin`` of the bar."""
    for i, n in enumerate(problem.seq_lens()):
        start, end = int(problem.batch.row_start[i]), int(problem.batch.row_end[i])
        if start == end:
            continue
        k, _ = keys_values(problem.kv, i, n)
        tiles = problem.pattern.tiles(end - start, n)
        q = problem.q[start:end].to(k.dtype)
        added = None if prior is None else prior[i, :, :n]
        scores = tile_scores(q, k, list(tiles), scale=problem.scale, pattern=problem.pattern, prior=added)
        bars = index.bars[i].view(-1, 1, 1)
        matter = listable(problem.pattern, tiles, n, q.device) & bars.isfinite() & ((scores - bars).abs() > margin)
        assert torch.equal(marked(index, problem, i)[matter], (scores >= bars)[matter])


@pytest.mark.parametrize("seed", range(16))
def test_equals_the_scores(seed: int) -> None:
    problem = random_problem(seed)
    index, workspace = tiles_for(problem, [-3.0, -4.5, -2.0])
    prior = random_priors(problem, seed) if seed // 2 % 2 else None
    check_rank(problem.q, problem.kv, problem.batch, index, workspace, problem.scale, prior)
    config = None if seed % 2 else Settings(16, [32, 64, 256][seed % 3], 4, 1)
    rank(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, prior=prior, config=config)
    check_marks(problem, index, 1e-4, prior)


@pytest.mark.parametrize("seed", range(16))
def test_the_paged_reference_equals_the_plain_one(seed: int) -> None:
    problem = random_problem(seed)
    index, workspace = tiles_for(problem, [-3.0, -4.5, -2.0])
    prior = random_priors(problem, seed) if seed // 2 % 2 else None
    paged.rank(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, prior=prior)
    for i, n in enumerate(problem.seq_lens()):
        start, end = int(problem.batch.row_start[i]), int(problem.batch.row_end[i])
        if start == end:
            continue
        k, _ = keys_values(problem.kv, i, n)
        added = None if prior is None else prior[i, :, :n].contiguous()
        wanted = naive.rank(
            problem.q[start:end], k, index.bars[i], scale=problem.scale, pattern=problem.pattern, prior=added
        )
        open_to = listable(problem.pattern, problem.pattern.tiles(end - start, n), n, k.device)
        assert torch.equal(marked(index, problem, i) & open_to, wanted)


@pytest.mark.parametrize(("dtype", "margin"), [(torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("size", [64, 256])
def test_types_and_sizes(dtype: torch.dtype, margin: float, size: int) -> None:
    problem = random_problem(3, dtype=dtype, size=size, group=3)
    index, workspace = tiles_for(problem, [-3.0])
    rank(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale)
    check_marks(problem, index, margin)


@pytest.mark.parametrize("dtype", FP8_DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_cache(dtype: torch.dtype, scaled: bool) -> None:
    problem = random_problem(5)
    scales = torch.tensor([0.6], device=DEVICE) if scaled else None
    problem = PagedProblem(
        problem.q, PagedKV(problem.kv.cache.to(dtype), problem.kv.block_table, scales, scales), problem.batch,
        problem.selections, problem.pattern,
    )  # fmt: skip
    index, workspace = tiles_for(problem, [-3.0])
    check_rank(problem.q, problem.kv, problem.batch, index, workspace, problem.scale)
    rank(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale)
    check_marks(problem, index, 1e-4)


@pytest.mark.parametrize("bar", [math.inf, -math.inf])
def test_heads_that_list_all_or_none_get_no_bits(bar: float) -> None:
    pattern = SparsePattern(block_q=16, block_k=1, window=8, sinks=4, dense_last=0)
    problem = make_paged(seq_lens=[150, 90], rows=[64, 90], pattern=pattern, heads=2, group=2)
    for version in (rank, paged.rank):
        index, workspace = tiles_for(problem, [bar, -3.0])
        version(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale)
        assert (index.bits[0] == STALE).all()
        check_marks(problem, index, 1e-4)


def test_many_tiles_and_long_windows() -> None:
    """More tiles than a program takes at once; windows of more keys than a block."""
    pattern = SparsePattern(block_q=3, block_k=2, window=150, sinks=70, dense_last=0)
    problem = make_paged(seq_lens=[420], rows=[400], pattern=pattern, heads=1, group=2, size=16)
    index, workspace = tiles_for(problem, [-5.0])
    rank(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale)
    check_marks(problem, index, 1e-4)


def test_a_prior_moves_the_bar_of_a_key() -> None:
    pattern = SparsePattern(block_q=16, block_k=1, window=8, sinks=4, dense_last=0)
    problem = make_paged(seq_lens=[150], rows=[64], pattern=pattern, heads=2, group=2)
    index, workspace = tiles_for(problem, [-3.0])
    prior = torch.zeros(1, 2, 155, device=DEVICE)
    prior[0, 0, 50], prior[0, 1, 51] = 1e6, -1e6
    rank(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale, prior=prior)
    check_marks(problem, index, 1e-4, prior)
    bits = marked(index, problem, 0)
    assert bits[0, :, 50].all()
    assert not bits[1, :, 51].any()


def test_nothing_to_do() -> None:
    pattern = SparsePattern(block_q=16, block_k=1, window=8, sinks=4, dense_last=0)
    problem = make_paged(seq_lens=[50], rows=[0], pattern=pattern)
    index, workspace = tiles_for(problem, [-3.0])
    rank(problem.q, problem.kv, problem.batch._replace(max_rows=0), index, workspace, scale=problem.scale)
    rank(problem.q, problem.kv, problem.batch, index, workspace, scale=problem.scale)
    assert (index.bits == STALE).all()


def test_bad_arguments_are_named() -> None:
    pattern = SparsePattern(block_q=16, block_k=1, window=8, sinks=4, dense_last=0)
    problem = make_paged(seq_lens=[40], rows=[40], pattern=pattern)
    index, workspace = tiles_for(problem, [0.0])
    q, kv, batch = problem.q, problem.kv, problem.batch
    with pytest.raises(ValueError, match=r"^cache has head size"):
        check_rank(q[..., :32], kv, batch, index, workspace, 1.0)
    with pytest.raises(ValueError, match=r"^scale"):
        check_rank(q, kv, batch, index, workspace, 0.0)
    prior = torch.zeros(1, 2, 45, device=DEVICE)
    check_rank(q, kv, batch, index, workspace, 1.0, prior)
    with pytest.raises(ValueError, match=r"^prior must have dtype float32"):
        check_rank(q, kv, batch, index, workspace, 1.0, prior.half())
    with pytest.raises(ValueError, match=r"^prior is for 1 requests and 1 KV heads, expected 1 and 2"):
        check_rank(q, kv, batch, index, workspace, 1.0, prior[:, :1])
    with pytest.raises(ValueError, match=r"^prior has room for 44 tokens but max_seq_len is 45"):
        check_rank(q, kv, batch, index, workspace, 1.0, prior[..., :44])
    with pytest.raises(ValueError, match=r"^prior must have contiguous positions"):
        check_rank(q, kv, batch, index, workspace, 1.0, prior.expand(1, 2, 45).mT.contiguous().mT)
    with pytest.raises(ValueError, match=r"^prior is on meta"):
        check_rank(q, kv, batch, index, workspace, 1.0, prior.to("meta"))
    with pytest.raises(ValueError, match=r"^index has room for 1 KV heads"):
        check_rank(q, kv, batch, index._replace(bits=index.bits[:1]), workspace, 1.0)
    with pytest.raises(ValueError, match=r"^workspace has room for 1 tiles"):
        check_rank(q, kv, batch, index, workspace._replace(means=workspace.means[:, :1]), 1.0)
    with pytest.raises(ValueError, match=r"^workspace is for 1 mean queries"):
        check_rank(q, kv, batch, index, workspace._replace(means=workspace.means[:1]), 1.0)
    with pytest.raises(ValueError, match=r"^workspace is of"):
        check_rank(q, kv, batch, index, workspace._replace(means=workspace.means.half()), 1.0)
