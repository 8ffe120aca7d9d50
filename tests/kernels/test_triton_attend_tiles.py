# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Attention to lists of tiles: the reference over a paged cache against the plain one, the kernel against that."""

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
from tests.kernels.problems import TOLERANCE
from tests.kernels.tile_problems import NOWHERE, random_keys, tile_index
from vllm_vsprefill.kernels.attend_tiles import naive, paged
from vllm_vsprefill.kernels.attend_tiles.paged import check_attend_tiles
from vllm_vsprefill.kernels.attend_tiles.triton import Parts, attend_tiles, parts_of
from vllm_vsprefill.kernels.paged import Batch
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.tile_index import EVERYTHING, TileIndex
from vllm_vsprefill.kernels.types import SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

NARROW = Settings(32, 32, 4, 1)
WIDE = Settings(128, 64, 4, 1)
PATTERN = SparsePattern(block_q=20, block_k=4, window=20, sinks=5, dense_last=0)


def solved(problem: PagedProblem, index: TileIndex, version: Any, **options: Any) -> tuple[Tensor, list[int]]:
    """Output, NaN where nothing was written, and the pairs of each request."""
    out = torch.full_like(problem.q, float("nan"))
    visited = torch.zeros(problem.batch.num_requests, dtype=torch.int64, device=DEVICE)
    check_attend_tiles(problem.q, problem.kv, index, problem.batch, problem.scale, out, visited)
    found = version(
        problem.q, problem.kv, index, problem.batch, scale=problem.scale, out=out, visited=visited, **options
    )
    assert found is out
    return out, visited.tolist()


def compare(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # Rows of no request are untouched, all others are finite.
    assert torch.equal(actual.isnan(), expected.isnan())
    used = ~expected.isnan()
    error = (actual[used].double() - expected[used].double()).norm()
    assert float(error / expected[used].double().norm().clamp(min=1e-30)) < TOLERANCE[dtype]


def check(problem: PagedProblem, config: Settings | None = None, share: float = 0.3, seed: int = 0) -> TileIndex:
    """Kernel and paged reference against the plain one, request by request."""
    keys = random_keys(problem, share, seed)
    index = tile_index(problem, keys)
    expected = torch.full_like(problem.q, float("nan"))
    pairs = []
    starts, ends = problem.batch.row_start.tolist(), problem.batch.row_end.tolist()
    for i, (start, end, n) in enumerate(zip(starts, ends, problem.seq_lens(), strict=True)):
        pairs.append(0)
        if start < end:
            k, v = (x.to(problem.q.dtype) for x in keys_values(problem.kv, i, n))
            expected[start:end], pairs[i] = naive.attend_tiles(
                problem.q[start:end], k, v, keys[i], problem.pattern, scale=problem.scale
            )
    for version, options in ((paged.attend_tiles, {}), (attend_tiles, {"config": config})):
        out, visited = solved(problem, index, version, **options)
        assert visited == pairs
        compare(out, expected, problem.q.dtype)
    return index


def test_problems_hold_every_kind_of_tile() -> None:
    """Else the tests below would say little."""
    problem = make_paged(seq_lens=[150, 90, 60], rows=[150, 0, 60], pattern=PATTERN)
    index = check(problem)
    counts = index.counts[index.counts != NOWHERE]
    assert bool((counts == EVERYTHING).any())
    assert bool((counts == 0).any())
    assert bool((counts == PATTERN.sink_keys).any())
    assert bool((counts > PATTERN.sink_keys).any())
    assert bool((index.counts == NOWHERE).any())


@pytest.mark.parametrize("group", [1, 6, 7, 8])
@pytest.mark.parametrize("block_q", [20, 18, 32, 40])
def test_groups_and_tiles(group: int, block_q: int) -> None:
    problem = make_paged(
        seq_lens=[131, 77], rows=[90, 77], pattern=replace(PATTERN, block_q=block_q), heads=2, group=group, size=16,
        seed=group + block_q,
    )  # fmt: skip
    check(problem, WIDE if group == 6 else NARROW)


@pytest.mark.parametrize("seed", range(24))
def test_random_problems(seed: int) -> None:
    rng = random.Random(seed)
    seq_lens = [rng.randint(1, 150) for _ in range(rng.randint(1, 3))]
    rows = [rng.choice([0, 1, n, rng.randint(1, n)]) for n in seq_lens]
    rows[0] = max(rows[0], 1)
    pattern = SparsePattern(
        block_q=rng.choice([1, 7, 16, 18, 20, 36, 130]),
        block_k=rng.choice([1, 3, 4, 16]),
        window=rng.choice([0, 1, 5, 16, 40, 70]),
        sinks=rng.choice([0, 1, 16, 40]),
        dense_last=rng.choice([0, 64]),
    )
    problem = make_paged(
        seq_lens=seq_lens,
        rows=rows,
        pattern=pattern,
        heads=rng.randint(1, 2),
        group=rng.choice([1, 2, 3, 4, 6, 7, 8, 40]),
        size=rng.choice([16, 24, 64]),
        block=rng.choice([16, 48]),
        layout=rng.choice(["NHD", "HND"]),
        seed=seed,
    )
    check(problem, rng.choice([None, NARROW, WIDE]), rng.choice([0.0, 0.1, 0.5]), seed)


@pytest.mark.parametrize("size", [80, 128, 256])
def test_head_sizes(size: int) -> None:
    check(make_paged(seq_lens=[70], rows=[33], pattern=PATTERN, heads=1, size=size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(make_paged(seq_lens=[90, 40], rows=[50, 40], pattern=PATTERN, dtype=dtype))


@pytest.mark.parametrize("scales", [(0.5, 3.0), (0.5, None), (None, 3.0), (None, None)])
def test_fp8_cache(scales: tuple[float | None, float | None]) -> None:
    made = make_paged(seq_lens=[90, 40], rows=[50, 40], pattern=PATTERN, dtype=torch.float16)
    k_scale, v_scale = (None if x is None else torch.tensor([x], device=DEVICE) for x in scales)
    kv = made.kv._replace(cache=made.kv.cache.to(torch.float8_e4m3fn), k_scale=k_scale, v_scale=v_scale)
    check(replace(made, kv=kv))


def test_a_first_request_without_rows() -> None:
    """As the guard leaves one that runs dense. No row lies before its own; a memory checker sees if one is read."""
    made = make_paged(seq_lens=[140, 200], rows=[0, 150], pattern=PATTERN)
    first = int(made.batch.row_start[0])
    batch = made.batch._replace(row_start=made.batch.row_start - first, row_end=made.batch.row_end - first)
    check(replace(made, q=made.q[first:].clone(), batch=batch))


def test_no_request_and_no_row() -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    index = tile_index(problem, random_keys(problem, 0.3))
    nothing = problem.batch._replace(row_end=problem.batch.row_start)
    for batch in (Batch.from_lists([], [], DEVICE), nothing, nothing._replace(max_rows=0)):
        out = torch.full_like(problem.q, float("nan"))
        assert attend_tiles(problem.q, problem.kv, index, batch, scale=0.3, out=out).isnan().all()


def test_output_with_strides_and_a_new_one() -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    index = tile_index(problem, random_keys(problem, 0.3))
    wide = torch.full((problem.q.shape[0], 16, 64), float("nan"), device=DEVICE)
    attend_tiles(problem.q, problem.kv, index, problem.batch, scale=problem.scale, out=wide[:, ::2])
    expected, _ = solved(problem, index, paged.attend_tiles)
    compare(wide[:, ::2], expected, torch.float32)
    assert wide[:, 1::2].isnan().all()
    new = attend_tiles(problem.q, problem.kv, index, problem.batch, scale=problem.scale)
    compare(new[1:41], expected[1:41], torch.float32)


def test_tiles_are_divided_evenly() -> None:
    assert parts_of(6, 20, WIDE) == Parts(1, 20, 128)
    assert parts_of(6, 40, WIDE) == Parts(2, 20, 128)
    assert parts_of(7, 18, NARROW) == Parts(5, 4, 32)
    assert parts_of(1, 1, WIDE) == Parts(1, 1, 16)
    assert parts_of(40, 2, NARROW) == Parts(2, 1, 64)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q must have dtype", {"q": torch.zeros(42, 8, 64, dtype=torch.float64, device=DEVICE)}),
        ("cache has head size", {"q": torch.zeros(42, 8, 32, device=DEVICE)}),
        ("scale", {"scale": -1.0}),
        ("out has shape", {"out": torch.zeros(41, 8, 64, device=DEVICE)}),
        ("out must have contiguous channels", {"out": torch.zeros(42, 8, 128, device=DEVICE)[..., ::2]}),
        ("visited must have dtype", {"visited": torch.zeros(1, device=DEVICE)}),
        ("visited must be contiguous", {"visited": torch.zeros(0, dtype=torch.int64, device=DEVICE)}),
    ],
)
def test_bad_arguments_are_named(name: str, change: dict[str, Any]) -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    arguments: dict[str, Any] = {
        "q": problem.q, "kv": problem.kv, "index": tile_index(problem, random_keys(problem, 0.3)),
        "batch": problem.batch, "scale": 1.0, "out": None, "visited": None,
    }  # fmt: skip
    check_attend_tiles(**arguments)
    with pytest.raises(ValueError, match="^" + re.escape(name)):
        check_attend_tiles(**{**arguments, **change})


def test_bad_indexes_are_named() -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    index = tile_index(problem, random_keys(problem, 0.3))
    for name, bad in (
        ("index.starts must have dtype", index._replace(starts=index.starts.long())),
        ("index.counts has shape", index._replace(counts=index.counts[:, 1:])),
        ("index.slots must be contiguous", index._replace(slots=index.slots.repeat(2)[::2])),
        ("index has no room", index._replace(bits=index.bits[:, :1])),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(name)):
            check_attend_tiles(problem.q, problem.kv, bad, problem.batch, 1.0, None, None)
