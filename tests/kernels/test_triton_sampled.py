# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The paged estimator against the plain reference."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import make_paged
from vllm_vsprefill.kernels.gathered import allocate_gathered
from vllm_vsprefill.kernels.index import allocate_index
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.sampled import naive, paged
from vllm_vsprefill.kernels.sampled.paged import BAND_BYTES, allocate_sampled, check_sampled
from vllm_vsprefill.kernels.sampled.triton import sampled
from vllm_vsprefill.kernels.select.paged import allocate_select
from vllm_vsprefill.kernels.select.triton import select
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.types import Budgets, SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

PATTERN = SparsePattern(block_q=16, block_k=1, window=1, sinks=0, dense_last=0)


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    seq_lens = [rng.randint(1, 250) for _ in range(rng.randint(1, 2))]
    rows = [rng.choice([1, rng.randint(1, n), n]) for n in seq_lens]
    problem = make_paged(
        seq_lens=seq_lens,
        rows=rows,
        pattern=PATTERN,
        heads=rng.randint(1, 2),
        group=rng.choice([1, 2, 3, 4, 7, 8]),
        size=rng.choice([16, 24, 64]),
        dtype=rng.choice([torch.float32, torch.float16]),
        layout=rng.choice(["NHD", "HND"]),
        seed=seed,
    )
    heads, longest, count = problem.kv.num_kv_heads, problem.batch.max_seq_len, rng.choice([1, 5, 16, 64])
    workspace = allocate_sampled(len(rows), problem.q.shape[1], heads, longest, count, DEVICE)
    into, plain = (allocate_gathered(len(rows), heads, longest, DEVICE) for _ in range(2))
    workspace.partial.fill_(float("nan"))
    into.logits.fill_(float("nan"))
    config = Settings(rng.choice([16, 64]), rng.choice([16, 64]), 4, 1)
    sampled(problem.q, problem.kv, problem.batch, workspace, into, scale=problem.scale, config=config)
    paged.sampled(problem.q, problem.kv, problem.batch, workspace, plain, scale=problem.scale)
    for i, n in enumerate(seq_lens):
        k, _ = keys_values(problem.kv, i, n)
        start = int(problem.batch.row_start[i])
        columns, diagonals = naive.sampled(problem.q[start : start + rows[i]], k, scale=problem.scale, num_rows=count)
        found = into.logits[i, :, :, :n].softmax(-1)
        torch.testing.assert_close(found[0], columns, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(found[1].flip(-1), diagonals, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(into.block_max[i, ..., 0], into.logits[i, :, :, :n].amax(-1))
        torch.testing.assert_close(found, plain.logits[i, :, :, :n].softmax(-1), rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(plain.block_max[i, ..., 0], plain.logits[i, :, :, :n].amax(-1))


def test_heads_take_turns_where_room_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_paged(seq_lens=[150, 90], rows=[64, 90], pattern=PATTERN, heads=3)
    found = []
    for room in (BAND_BYTES, 1):
        monkeypatch.setattr("vllm_vsprefill.kernels.sampled.paged.BAND_BYTES", room)
        workspace = allocate_sampled(2, problem.q.shape[1], 3, problem.batch.max_seq_len, 40, DEVICE)
        into = allocate_gathered(2, 3, problem.batch.max_seq_len, DEVICE)
        sampled(problem.q, problem.kv, problem.batch, workspace, into, scale=problem.scale)
        found.append((workspace.bands.shape[0], [into.logits[i, :, :, :n].clone() for i, n in enumerate((150, 90))]))
    assert [heads for heads, _ in found] == [3, 1]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(one, other)


def test_feeds_the_selection() -> None:
    problem = make_paged(seq_lens=[120], rows=[64], pattern=PATTERN, heads=2)
    workspace = allocate_sampled(1, 8, 2, problem.batch.max_seq_len, 16, DEVICE)
    into = allocate_gathered(1, 2, problem.batch.max_seq_len, DEVICE)
    scratch = allocate_select(1, 2, problem.batch.max_seq_len, DEVICE)
    index = allocate_index(1, 2, problem.batch.max_seq_len, PATTERN, DEVICE)
    sampled(problem.q, problem.kv, problem.batch, workspace, into, scale=problem.scale)
    tau = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    select(into, problem.batch, tau, index, scratch, budgets=Budgets(min_columns=10, min_diagonals=7))
    k, _ = keys_values(problem.kv, 0, 120)
    columns, diagonals = naive.sampled(problem.q[1:65], k, scale=problem.scale, num_rows=16)
    for kind, (probs, count) in enumerate(((columns, 10), (diagonals, 7))):
        for head in range(2):
            best = set(probs[head].topk(count).indices.tolist())
            assert set(index.flags[0, kind, head, :120].nonzero().flatten().tolist()) == best


def test_bad_arguments_are_named() -> None:
    problem = make_paged(seq_lens=[40], rows=[40], pattern=PATTERN)
    workspace = allocate_sampled(1, 8, 2, 60, 16, DEVICE)
    into = allocate_gathered(1, 2, 60, DEVICE)
    q, kv, batch = problem.q, problem.kv, problem.batch
    with pytest.raises(ValueError, match=r"^cache has head size"):
        check_sampled(q[..., :32], kv, batch, workspace, into, 1.0)
    with pytest.raises(ValueError, match=r"^scale"):
        check_sampled(q, kv, batch, workspace, into, 0.0)
    with pytest.raises(ValueError, match=r"^num_rows"):
        allocate_sampled(1, 8, 2, 60, 0, DEVICE)
    with pytest.raises(ValueError, match=r"^gathered is for"):
        check_sampled(q, kv, batch, workspace, allocate_gathered(1, 1, 60, DEVICE), 1.0)
