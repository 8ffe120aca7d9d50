# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The Triton attention against the plain reference, on poisoned paged caches."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import PagedProblem, make_paged
from tests.kernels.problems import TOLERANCE, make_selection
from vllm_vsprefill.kernels.attend import paged
from vllm_vsprefill.kernels.attend.paged import check_attend
from vllm_vsprefill.kernels.attend.triton import attend, packing
from vllm_vsprefill.kernels.index import Index, allocate_index
from vllm_vsprefill.kernels.merge.paged import set_flags
from vllm_vsprefill.kernels.merge.triton import build_index
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.types import Selection, SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

NARROW = Settings(64, 32, 4, 1)
TWO_TILES = Settings(128, 64, 4, 1, lanes=2)
PATTERN = SparsePattern(block_q=16, block_k=4, window=20, sinks=5, dense_last=0)


def index_of(problem: PagedProblem) -> Index:
    heads = problem.kv.num_kv_heads
    requests = problem.batch.num_requests
    index = allocate_index(requests, heads, problem.batch.max_seq_len, problem.pattern, DEVICE)
    for tensor in index[:-1]:  # everything that is read has to be written first
        tensor.fill_(77)
    set_flags(index, problem.selections, problem.batch)
    return build_index(index, problem.kv, problem.batch)


def check(problem: PagedProblem, config: Settings | None = None) -> tuple[Tensor, list[int]]:
    index = index_of(problem)
    out = torch.full_like(problem.q, float("nan"))
    visited = torch.zeros(problem.batch.num_requests, dtype=torch.int64, device=DEVICE)
    check_attend(problem.q, problem.kv, index, problem.batch, problem.scale, out, None, visited)
    attend(problem.q, problem.kv, index, problem.batch, scale=problem.scale, out=out, visited=visited, config=config)
    expected, counted = torch.full_like(out, float("nan")), torch.zeros_like(visited)
    paged.attend(problem.q, problem.kv, index, problem.batch, scale=problem.scale, out=expected, visited=counted)
    pairs = counted.tolist()
    assert visited.tolist() == pairs
    # Rows of no request are untouched, all others are finite.
    assert torch.equal(out.isnan(), expected.isnan())
    used = ~expected.isnan()
    error = (out[used].double() - expected[used].double()).norm() / expected[used].double().norm().clamp(min=1e-30)
    assert float(error) < TOLERANCE[problem.q.dtype]
    return out, pairs


def test_a_first_request_without_rows() -> None:
    """As the guard leaves one that runs dense. No row lies before its own; a memory checker sees if one is read."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the Hopper kernel, where there is one
    made = make_paged(seq_lens=[140, 200], rows=[0, 150], pattern=PATTERN, dtype=dtype)
    first = int(made.batch.row_start[0])
    batch = made.batch._replace(row_start=made.batch.row_start - first, row_end=made.batch.row_end - first)
    problem = replace(made, q=made.q[first:].clone(), batch=batch)
    assert problem.batch.row_end.tolist() == [0, 151]
    _, pairs = check(problem)
    assert pairs[0] == 0 < pairs[1]


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed: int) -> None:
    rng = random.Random(seed)
    seq_lens = [rng.randint(1, 150) for _ in range(rng.randint(1, 3))]
    rows = [rng.choice([0, 1, n, rng.randint(1, n)]) for n in seq_lens]
    rows[0] = max(rows[0], 1)
    block_q = rng.choice([16, 32, 64])
    pattern = SparsePattern(
        block_q=block_q,
        block_k=rng.choice([k for k in (1, 2, 4, 16, 32) if k <= block_q]),
        window=rng.choice([0, 1, 5, 16, 40, 70]),
        sinks=rng.choice([0, 1, 16, 40]),
        dense_last=rng.choice([0, 0, 1, 5, 64]),
    )
    problem = make_paged(
        seq_lens=seq_lens,
        rows=rows,
        pattern=pattern,
        heads=rng.randint(1, 2),
        group=rng.choice([1, 2, 3, 4, 7, 8]),
        size=rng.choice([16, 24, 64]),
        block=rng.choice([16, 48]),
        columns=rng.choice([0, 1, 20, 300]),
        diagonals=rng.choice([0, 1, 4, 300]),
        layout=rng.choice(["NHD", "HND"]),
        seed=seed,
    )
    check(problem, rng.choice([None, NARROW, TWO_TILES]))


@pytest.mark.parametrize("size", [80, 96, 128, 256])
def test_head_sizes(size: int) -> None:
    check(make_paged(seq_lens=[70], rows=[33], pattern=PATTERN, heads=1, size=size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(make_paged(seq_lens=[90, 40], rows=[50, 40], pattern=PATTERN, dtype=dtype))


@pytest.mark.parametrize("config", [NARROW, TWO_TILES], ids=["narrow", "two tiles"])
def test_everything_selected_is_dense(config: Settings) -> None:
    problem = make_paged(seq_lens=[100], rows=[61], pattern=PATTERN, group=4)
    everything = make_selection([list(range(100))] * 2, [list(range(100))] * 2)
    pairs = 2 * sum(range(40, 101))
    for selection in (
        Selection(everything.columns, everything.num_columns, everything.diagonals, everything.num_diagonals * 0),
        Selection(everything.columns, everything.num_columns * 0, everything.diagonals, everything.num_diagonals),
        everything,
    ):
        moved = Selection(*(x.to(DEVICE) for x in selection))
        assert check(replace(problem, selections=[moved]), config)[1] == [pairs]


def test_two_tiles_share_columns_but_not_diagonals() -> None:
    assert packing(4, 16, TWO_TILES) == (4, 16, 2)
    assert packing(4, 32, TWO_TILES) == (4, 16, 2)
    assert packing(1, 16, TWO_TILES) == (1, 16, 2)
    assert packing(7, 64, NARROW) == (8, 8, 1)
    problem = make_paged(seq_lens=[200], rows=[150], pattern=replace(PATTERN, block_k=1, window=3), diagonals=0)
    selection = make_selection([list(range(0, 180, 3))] * 2, [[7, 8, 60, 61, 120], []])
    check(replace(problem, selections=[Selection(*(x.to(DEVICE) for x in selection))]), TWO_TILES)


def test_budget_of_one_and_nothing() -> None:
    pattern = SparsePattern(block_q=16, block_k=1, window=0, sinks=0, dense_last=0)
    problem = make_paged(seq_lens=[60], rows=[60], pattern=pattern)
    selection = make_selection([[3], []], [[], [40]])
    check(replace(problem, selections=[Selection(*(x.to(DEVICE) for x in selection))]), TWO_TILES)


def test_log_sum_exp() -> None:
    pattern = replace(PATTERN, window=500)
    problem = make_paged(seq_lens=[50], rows=[20], pattern=pattern, group=2)
    lse = torch.full(problem.q.shape[:2], float("nan"), device=DEVICE)
    attend(problem.q, problem.kv, index_of(problem), problem.batch, scale=0.3, lse=lse)
    k, _ = keys_values(problem.kv, 0, 50)
    rows = slice(1, 21)
    logits = torch.einsum("thd,nhd->thn", problem.q[rows].double(), k.double().repeat_interleave(2, 1)) * 0.3
    future = torch.arange(50, device=DEVICE) > torch.arange(30, 50, device=DEVICE).unsqueeze(1)
    expected = logits.masked_fill(future.unsqueeze(1), float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse[rows].double(), expected, rtol=1e-5, atol=1e-5)
    assert lse[0].isnan().all()
    assert lse[21].isnan().all()
    plain = torch.full_like(lse, float("nan"))
    paged.attend(problem.q, problem.kv, index_of(problem), problem.batch, scale=0.3, lse=plain)
    torch.testing.assert_close(lse, plain, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_output_with_strides() -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    wide = torch.full((problem.q.shape[0], 16, 64), float("nan"), device=DEVICE)
    out = wide[:, ::2]
    attend(problem.q, problem.kv, index_of(problem), problem.batch, scale=problem.scale, out=out)
    expected, _ = check(problem)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert wide[:, 1::2].isnan().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q must have dtype", {"q": torch.zeros(42, 8, 64, dtype=torch.float64, device=DEVICE)}),
        ("cache has dtype", {"q": torch.zeros(42, 8, 64, dtype=torch.float16, device=DEVICE)}),
        ("cache has head size", {"q": torch.zeros(42, 8, 32, device=DEVICE)}),
        ("q has 7 heads", {"q": torch.zeros(42, 7, 64, device=DEVICE)}),
        ("q must have contiguous channels", {"q": torch.zeros(42, 8, 128, device=DEVICE)[..., ::2]}),
        ("scale", {"scale": -1.0}),
        ("out has shape", {"out": torch.zeros(41, 8, 64, device=DEVICE)}),
        ("lse has shape", {"lse": torch.zeros(42, 7, device=DEVICE)}),
        ("visited must have dtype", {"visited": torch.zeros(1, device=DEVICE)}),
        ("dense_last", {"dense_last": -1}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, Any]) -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    arguments: dict[str, Any] = {
        "q": problem.q, "kv": problem.kv, "index": index_of(problem), "batch": problem.batch, "scale": 1.0, "out": None,
        "lse": None, "visited": None,
    }  # fmt: skip
    check_attend(**arguments)
    with pytest.raises(ValueError, match="^" + re.escape(name)):
        check_attend(**{**arguments, **change})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("block_q", {"block_q": 8}),
        ("block_q", {"block_q": 48}),
        ("block_k", {"block_k": 3}),
        ("block_k", {"block_k": 32}),
    ],
)
def test_patterns_that_do_not_shift_are_refused(name: str, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(name)):
        allocate_index(1, 1, 100, replace(PATTERN, **change), DEVICE)


def test_bad_caches_are_named() -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    index, kv, batch = index_of(problem), problem.kv, problem.batch
    for name, bad in (
        ("cache must have 4 axes", kv._replace(cache=kv.cache[0])),
        ("cache must have blocks", kv._replace(cache=kv.cache[:, :, :8])),
        ("block_table must have dtype", kv._replace(block_table=kv.block_table.long())),
        ("block_table has room", kv._replace(block_table=kv.block_table[:, :1])),
        ("k_scale is for an fp8 cache", kv._replace(k_scale=torch.ones(1, device=DEVICE))),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(name)):
            check_attend(problem.q, bad, index, batch, 1.0, None, None, None)
    with pytest.raises(ValueError, match=r"^seq_len"):
        check_attend(problem.q, kv, index, batch._replace(seq_len=batch.seq_len.repeat(2)), 1.0, None, None, None)
    long = kv._replace(block_table=kv.block_table.repeat(1, 100))
    with pytest.raises(ValueError, match=r"^index has no room"):
        check_attend(problem.q, long, index, batch._replace(max_seq_len=5000), 1.0, None, None, None)
