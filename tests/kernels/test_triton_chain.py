# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The prefill that is served, by the kernels and by the references over a paged cache, which can replace each other."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import PagedProblem, make_paged
from tests.prefill.operations import REFERENCE
from vllm_vsprefill.kernels.score.paged import prepare_weights
from vllm_vsprefill.kernels.types import Budgets, IndexerLayerWeights, SparsePattern
from vllm_vsprefill.prefill.buffers import DeviceBuffers, Shape
from vllm_vsprefill.prefill.cuda import TRITON, CudaPrefill, PagedOperations, Round
from vllm_vsprefill.prefill.layer import Heads, SparseLayer

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

# The number of each is fixed, so that rounding moves no threshold.
BUDGETS = Budgets(9, 9, 3, 3)
LONGEST = 300


def run(
    operations: PagedOperations, problem: PagedProblem, layer: SparseLayer, max_density: float
) -> tuple[DeviceBuffers, torch.Tensor]:
    """Buffers and output of one round; dense last rows are left out, as a step does."""
    heads, requests = layer.heads, problem.batch.num_requests
    shape = Shape(heads.num_heads, heads.num_kv_heads, LONGEST, 1, 16 if layer.weights is None else None)
    buffers = DeviceBuffers.allocate(
        shape, problem.pattern, max_num_seqs=requests, max_tokens=4096, device=torch.device(DEVICE)
    )
    prefill = CudaPrefill(BUDGETS, buffers, max_density=max_density, operations=operations)
    batch = problem.batch
    part = Round(batch, batch, batch._replace(row_end=buffers.sparse_end[:requests]))
    out = torch.full_like(problem.q, float("nan"))
    prefill.choose(layer, problem.q, problem.kv, part, scale=problem.scale)
    prefill.attend(layer, problem.q, problem.kv, part, scale=problem.scale, out=out)
    return buffers, out


@pytest.mark.parametrize("indexer", [True, False], ids=["vsindexer", "sampled"])
@pytest.mark.parametrize("seed", range(4))
def test_kernels_and_references_take_each_others_place(seed: int, indexer: bool) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(150, LONGEST - 10) for _ in range(2)]
    pattern = SparsePattern(rng.choice([16, 32]), rng.choice([1, 4, 16]), rng.choice([0, 24]), rng.choice([0, 5]), 0)
    problem = make_paged(
        seq_lens=lengths, rows=[rng.randint(64, n) for n in lengths], pattern=pattern, heads=2, group=2, size=16,
        seed=seed,
    )  # fmt: skip
    weights, slots = None, problem.kv.cache.shape[0] * problem.kv.block_size
    if indexer:
        gen = torch.Generator().manual_seed(seed)
        shapes = ((2, 32, 32), (2, 32), (2, 32, 2), (2, 2))
        found = IndexerLayerWeights(*(torch.randn(shape, generator=gen).to(DEVICE) for shape in shapes))
        weights = prepare_weights(found, torch.float32)
    tau = torch.full((2, 2), 0.5, dtype=torch.float64, device=DEVICE)
    limit = rng.choice([0.3, 0.6, 1.0])
    results = []
    for operations in (TRITON, REFERENCE):
        logits = SimpleNamespace(slots=torch.full((slots, 4), float("nan"), device=DEVICE))
        layer = SparseLayer(0, 0, Heads(4, 2, 16), weights, tau, logits)
        results.append(run(operations, problem, layer, limit))
    (one, found_out), (other, wanted_out) = results
    for i, n in enumerate(lengths):
        assert torch.equal(one.work.index.flags[i, :, :, :n], other.work.index.flags[i, :, :, :n])
    for name in ("dense_rows", "sparse_end", "counts"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    torch.testing.assert_close(found_out, wanted_out, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert int(one.counts.sum()) > 0
