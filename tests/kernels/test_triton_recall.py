# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Recall over a paged cache against the plain reference, on poisoned caches."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import make_paged
from vllm_vsprefill.kernels.index import allocate_index
from vllm_vsprefill.kernels.merge.paged import set_flags
from vllm_vsprefill.kernels.merge.triton import build_index
from vllm_vsprefill.kernels.recall import naive, paged
from vllm_vsprefill.kernels.recall.paged import allocate_recall, check_recall
from vllm_vsprefill.kernels.recall.triton import recall
from vllm_vsprefill.kernels.reference import keys_values
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.types import SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for an empty program as for one with work."""
    if DEVICE == "cpu":
        monkeypatch.setattr(paged, "SPLITS", 4)


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    seq_lens = [rng.randint(1, 250) for _ in range(rng.randint(1, 3))]
    rows = [rng.choice([0, 1, rng.randint(1, n), n]) for n in seq_lens]
    pattern = SparsePattern(
        block_q=rng.choice([16, 64]),
        block_k=rng.choice([1, 4, 16]),
        window=rng.choice([0, 1, 9, 40]),
        sinks=rng.choice([0, 5]),
        dense_last=0,
    )
    problem = make_paged(
        seq_lens=seq_lens,
        rows=rows,
        pattern=pattern,
        heads=rng.randint(1, 2),
        group=rng.choice([1, 2, 3, 4, 7, 8]),
        size=rng.choice([16, 24, 64]),
        dtype=rng.choice([torch.float32, torch.float16]),
        layout=rng.choice(["NHD", "HND"]),
        seed=seed,
    )
    heads, batch, count = problem.kv.num_kv_heads, problem.batch, rng.choice([1, 5, 16])
    index = allocate_index(len(rows), heads, batch.max_seq_len, pattern, DEVICE)
    for tensor in index[:-1]:  # everything that is read has to be written first
        tensor.fill_(77)
    set_flags(index, problem.selections, batch)
    build_index(index, problem.kv, batch)
    workspace = allocate_recall(len(rows), problem.q.shape[1], heads, count, DEVICE)
    workspace.partial.fill_(float("nan"))
    totals, plain = torch.tensor([[0.5, 3.0], [0.5, 3.0]], device=DEVICE)
    config = Settings(rng.choice([16, 64]), rng.choice([16, 64]), 4, 1)
    check_recall(problem.q, problem.kv, batch, index, workspace, totals, problem.scale)
    recall(problem.q, problem.kv, batch, index, workspace, totals, scale=problem.scale, config=config)
    paged.recall(problem.q, problem.kv, batch, index, workspace, plain, scale=problem.scale)
    expected, used = 0.5, 0
    for i, (n, number, selection) in enumerate(zip(seq_lens, rows, problem.selections, strict=True)):
        if number:
            k, _ = keys_values(problem.kv, i, n)
            start = int(batch.row_start[i])
            found = naive.recall(
                problem.q[start : start + number], k, selection, pattern, scale=problem.scale, num_rows=count
            )
            expected, used = expected + float(found.sum()), used + heads
    assert totals[1] == plain[1] == 3 + used
    assert float(totals[0]) == pytest.approx(expected, abs=1e-3)
    assert float(plain[0]) == pytest.approx(expected, abs=1e-5)


def test_bad_arguments_are_named() -> None:
    pattern = SparsePattern(block_q=16, block_k=4, window=9, sinks=0, dense_last=0)
    problem = make_paged(seq_lens=[40], rows=[40], pattern=pattern)
    index = allocate_index(1, 2, 60, pattern, DEVICE)
    workspace = allocate_recall(1, 8, 2, 16, DEVICE)
    totals = torch.zeros(2, device=DEVICE)
    q, kv, batch = problem.q, problem.kv, problem.batch
    check_recall(q, kv, batch, index, workspace, totals, 1.0)
    with pytest.raises(ValueError, match=r"^cache has head size"):
        check_recall(q[..., :32], kv, batch, index, workspace, totals, 1.0)
    with pytest.raises(ValueError, match=r"^scale"):
        check_recall(q, kv, batch, index, workspace, totals, 0.0)
    with pytest.raises(ValueError, match=r"^num_rows"):
        allocate_recall(1, 8, 2, 0, DEVICE)
    with pytest.raises(ValueError, match=r"^workspace is for"):
        check_recall(q, kv, batch, index, allocate_recall(1, 8, 1, 16, DEVICE), totals, 1.0)
    with pytest.raises(ValueError, match=r"^totals"):
        check_recall(q, kv, batch, index, workspace, torch.zeros(3, device=DEVICE), 1.0)
