# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The Hopper versions: compiled anywhere, compared with the references on a GPU of capability 9.0."""

from __future__ import annotations

import json
import random

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import make_paged
from tests.kernels.programs import run_compiler
from tests.kernels.tile_problems import random_keys, tile_index
from vllm_vsprefill.kernels.index import allocate_index
from vllm_vsprefill.kernels.merge.paged import set_flags
from vllm_vsprefill.kernels.merge.triton import build_index
from vllm_vsprefill.kernels.types import SparsePattern

HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.slow
def test_compiles_without_a_device() -> None:
    """Matrix products are wgmma, the ring fits into shared memory, and no arrival runs ahead of a warp."""
    done = run_compiler("compile_hopper")
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert found["products"] > 0, found
        assert found["arrivals"] > 0, found
        assert found["unguarded"] == 0, found
        assert found["shared"] <= found["limit"], found


@pytest.mark.gpu
@pytest.mark.skipif(not USABLE, reason=REASON)
@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("seed", range(40))
def test_equals_the_reference(seed: int) -> None:
    from vllm_vsprefill.kernels.attend import hopper, paged
    from vllm_vsprefill.kernels.attend.triton import without_hopper

    rng = random.Random(seed)
    group, size, block_q = rng.choice([(4, 128, 16), (8, 64, 32), (7, 128, 16), (1, 128, 64), (2, 64, 128)])
    seq_lens = [rng.choice([1, 17, rng.randint(1, 400), rng.randint(1000, 3000)]) for _ in range(rng.randint(1, 3))]
    rows = [min(n, rng.choice([1, 33, rng.randint(1, 300), n])) for n in seq_lens]
    pattern = SparsePattern(
        block_q=block_q,
        block_k=rng.choice([1, 4, 16]),
        window=rng.choice([0, 1, 40, 700]),
        sinks=rng.choice([0, 5, 64]),
        dense_last=0,
    )
    problem = make_paged(
        seq_lens=seq_lens,
        rows=rows,
        pattern=pattern,
        heads=rng.randint(1, 2),
        group=group,
        size=size,
        dtype=rng.choice([torch.bfloat16, torch.float16]),
        layout=rng.choice(["NHD", "HND"]),
        seed=seed,
    )
    index = allocate_index(len(rows), problem.kv.num_kv_heads, problem.batch.max_seq_len, pattern, DEVICE)
    set_flags(index, problem.selections, problem.batch)
    build_index(index, problem.kv, problem.batch)
    out = torch.full_like(problem.q, float("nan"))
    lse = torch.full(problem.q.shape[:2], float("nan"), device=DEVICE)
    visited = torch.zeros(len(rows), dtype=torch.int64, device=DEVICE)
    assert without_hopper(problem.q, problem.kv, index, 0) is None
    hopper.attend(problem.q, problem.kv, index, problem.batch, scale=problem.scale, out=out, lse=lse, visited=visited)
    counted = torch.zeros_like(visited)
    expected = paged.attend(problem.q, problem.kv, index, problem.batch, scale=problem.scale, visited=counted)
    assert visited.tolist() == counted.tolist()
    for start, end in zip(problem.batch.row_start.tolist(), problem.batch.row_end.tolist(), strict=True):
        found, wanted = out[start:end].float(), expected[start:end].float()
        assert float((found - wanted).norm() / wanted.norm()) < 1e-2
        assert bool(lse[start:end].isfinite().all())


@pytest.mark.gpu
@pytest.mark.skipif(not USABLE, reason=REASON)
@pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0")
@pytest.mark.parametrize("seed", range(60))
def test_lists_of_tiles_equal_the_reference(seed: int) -> None:
    from vllm_vsprefill.kernels.attend_tiles import hopper, paged
    from vllm_vsprefill.kernels.attend_tiles.triton import without_hopper

    # What the kernel is compiled for is the same for every tenth seed.
    rng = random.Random(seed % 10)
    group = (6, 7, 4, 8, 1, 64, 6, 7, 12, 3)[seed % 10]
    block_q, block_k = hopper.piece_positions(group) * rng.choice([1, 2, 3, 8]), rng.choice([1, 4, 16, 64])
    heads, size, layout = rng.randint(1, 2), rng.choice([64, 128]), rng.choice(["NHD", "HND"])
    dtype = rng.choice([torch.bfloat16, torch.float16])
    rng = random.Random(seed)
    seq_lens = [rng.choice([1, 17, rng.randint(1, 400), rng.randint(1000, 3000)]) for _ in range(rng.randint(1, 3))]
    rows = [min(n, rng.choice([0, 1, 33, rng.randint(1, 300), n])) for n in seq_lens]
    rows[0] = max(rows[0], 1)
    pattern = SparsePattern(
        block_q=block_q,
        block_k=block_k,
        window=rng.choice([0, 1, 40, 700]),
        sinks=rng.choice([0, 5, 64]),
    )
    problem = make_paged(
        seq_lens=seq_lens,
        rows=rows,
        pattern=pattern,
        heads=heads,
        group=group,
        size=size,
        dtype=dtype,
        layout=layout,
        seed=seed,
    )
    index = tile_index(problem, random_keys(problem, rng.choice([0.0, 0.1, 0.4]), seed))
    out, expected = (torch.full_like(problem.q, float("nan")) for _ in range(2))
    visited, counted = (torch.zeros(len(rows), dtype=torch.int64, device=DEVICE) for _ in range(2))
    assert without_hopper(problem.q, problem.kv, index) is None
    for attend_tiles, to, pairs in ((hopper.attend_tiles, out, visited), (paged.attend_tiles, expected, counted)):
        attend_tiles(problem.q, problem.kv, index, problem.batch, scale=problem.scale, out=to, visited=pairs)
    assert visited.tolist() == counted.tolist()
    # Rows of no request are left as they are.
    assert torch.equal(out.isnan(), expected.isnan())
    found, wanted = (x[~expected.isnan()].float() for x in (out, expected))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_rows_that_cannot_be_copied_16_bytes_at_a_time_are_told_apart() -> None:
    from vllm_vsprefill.kernels.hopper_shared import aligned

    wide = torch.zeros(4, 3, 64, dtype=torch.bfloat16)
    assert aligned(wide, wide[1:], wide[:, 1:], wide[..., 8:])
    assert not aligned(wide[..., 4:])
    assert not aligned(wide, torch.zeros(4, 3, 68, dtype=torch.bfloat16)[..., :64])
