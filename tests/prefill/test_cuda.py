# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The prefill of a round over a paged cache, by the references of its operations, against that of each sequence alone.

The kernels take the place of the references in ``tests/backends/test_cuda_layer.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.prefill import operations
from vllm_vsprefill.kernels.guard import expected_density
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.types import Budgets, IndexerLayerWeights, SparsePattern
from vllm_vsprefill.prefill.buffers import DeviceBuffers, Shape
from vllm_vsprefill.prefill.cpu import REFERENCE, CPUPrefill
from vllm_vsprefill.prefill.cuda import CudaPrefill, PagedOperations, Round
from vllm_vsprefill.prefill.layer import Heads, SparseLayer

HEADS, BLOCK, TAIL, SCALE = Heads(4, 2, 16), 16, 16, 0.25
PATTERN = SparsePattern(block_q=32, block_k=8, window=20, sinks=5, dense_last=0)
BUDGETS = Budgets(9, 9, 3, 3)
LENGTHS, ROWS = (230, 180), (150, 64)  # tokens of each sequence, rows of each chunk


class Problem:
    """Two sequences in one cache whose blocks lie in random order."""

    def __init__(self, indexer: bool, kept: bool) -> None:
        rng = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng)

        weights = IndexerLayerWeights(random(2, 32, 32), random(2, 32), random(2, 32, 2), random(2, 2))
        cache = random(40, 2, BLOCK, 32)
        table = torch.randperm(40, generator=rng)[:30].view(2, 15).int()
        self.kv = PagedKV(cache, table)
        self.slots = [(table[i, :, None] * BLOCK + torch.arange(BLOCK)).flatten()[:n] for i, n in enumerate(LENGTHS)]
        self.query = random(sum(ROWS), *HEADS[::2])
        self.logits = torch.full((40 * BLOCK, 4), float("nan"))
        self.layer = SparseLayer(
            1,
            1,  # not the first one, whose arguments are checked, and with them the device
            HEADS,
            weights if indexer else None,
            torch.full((2, 2), 0.5, dtype=torch.float64),
            SimpleNamespace(slots=self.logits) if kept else None,
        )
        head = [rows - TAIL for rows in ROWS]
        whole = Batch.from_lists(list(ROWS), list(LENGTHS))
        rows = whole._replace(
            row_end=whole.row_start + torch.tensor(head, dtype=torch.int32),
            seq_len=whole.seq_len - TAIL,
            max_rows=max(head),
        )
        self.part = Round(whole, rows)

    def prefill(self, max_density: float = 1.0) -> CudaPrefill:
        shape = Shape(HEADS.num_heads, HEADS.num_kv_heads, 256, 2, 12, 8)
        buffers = DeviceBuffers.allocate(
            shape, PATTERN, max_num_seqs=2, max_tokens=512, device=torch.device("cpu")
        )  # fmt: skip
        return CudaPrefill(BUDGETS, buffers, max_density=max_density, operations=operations.REFERENCE)

    def recall(self, i: int) -> Tensor:
        """Of what is chosen for a sequence, ``[num_kv_heads]``."""
        prefill = CPUPrefill(PATTERN, BUDGETS, sampled_rows=12, operations=REFERENCE)
        layer = SparseLayer(0, 0, HEADS, self.layer.weights, self.layer.tau)
        both = self.kv.cache.transpose(1, 2).flatten(0, 1)[self.slots[i]]
        query, rows = self.query.split(list(ROWS))[i], ROWS[i] - TAIL
        chosen = prefill.choose(layer, query, both[..., :16], both[..., 16:], rows, scale=SCALE)
        assert chosen is not None
        return prefill.recall(query, both[..., :16], chosen, rows, scale=SCALE, num_rows=8)

    def expected(self, i: int) -> tuple[Tensor, int, float]:
        """The rows of a sequence before its dense last ones, the pairs visited, and the density to expect."""
        prefill = CPUPrefill(PATTERN, BUDGETS, sampled_rows=12, operations=REFERENCE)
        layer = SparseLayer(0, 0, HEADS, self.layer.weights, self.layer.tau)
        both = self.kv.cache.transpose(1, 2).flatten(0, 1)[self.slots[i]]
        key, value = both[..., :16], both[..., 16:]
        query = self.query.split(list(ROWS))[i]
        chosen = prefill.choose(layer, query, key, value, ROWS[i] - TAIL, scale=SCALE)
        assert chosen is not None
        out, visited = prefill.attend(query, key, value, chosen, ROWS[i] - TAIL, scale=SCALE)
        return out, int(visited), expected_density(chosen, PATTERN, ROWS[i] - TAIL, LENGTHS[i] - TAIL)


@pytest.mark.parametrize(("indexer", "kept"), [(True, True), (True, False), (False, False)])
def test_a_round_is_its_sequences(indexer: bool, kept: bool) -> None:
    problem = Problem(indexer, kept)
    prefill = problem.prefill()
    out = torch.full_like(problem.query, 7.0)
    prefill.choose(problem.layer, problem.query, problem.kv, problem.part, scale=SCALE)
    prefill.attend(problem.layer, problem.query, problem.kv, problem.part, scale=SCALE, out=out)
    for i, rows in enumerate(out.split(list(ROWS))):
        expected, visited, _ = problem.expected(i)
        torch.testing.assert_close(rows[:-TAIL], expected, atol=1e-5, rtol=1e-4)
        assert bool((rows[-TAIL:] == 7.0).all())
        assert int(prefill.buffers.visited(1)[i]) == visited
    assert not prefill.buffers.counts[0].any()
    assert not prefill.buffers.guarded(1).any()
    assert not prefill.buffers.recall.any()
    for times in (1, 2):
        prefill.recall(problem.layer, problem.query, problem.kv, problem.part, scale=SCALE)
        total = times * float(sum(problem.recall(i).sum() for i in range(2)))
        assert prefill.buffers.covered(1).tolist() == pytest.approx([total, times * 4])
    if kept:
        assert not problem.logits[torch.cat(problem.slots)].isnan().any()


def test_guard_keeps_rows_of_wide_requests_for_the_dense_kernel() -> None:
    problem = Problem(indexer=False, kept=False)
    pairs = [2 * SparsePattern.causal_pairs(ROWS[i] - TAIL, LENGTHS[i] - TAIL) for i in range(2)]
    densities = [problem.expected(i)[2] for i in range(2)]
    assert abs(densities[0] - densities[1]) > 0.01
    prefill = problem.prefill(max_density=sum(densities) / 2)
    guarded = problem.part.rows._replace(row_end=prefill.buffers.sparse_end[:2])
    part = Round(problem.part.whole, problem.part.rows, guarded)
    out = torch.full_like(problem.query, 7.0)
    prefill.choose(problem.layer, problem.query, problem.kv, part, scale=SCALE)
    prefill.attend(problem.layer, problem.query, problem.kv, part, scale=SCALE, out=out)
    prefill.recall(problem.layer, problem.query, problem.kv, part, scale=SCALE)
    kept = densities.index(min(densities))
    assert prefill.buffers.covered(1).tolist() == pytest.approx([float(problem.recall(kept).sum()), 2])
    sent = prefill.buffers.dense_rows[1:4:2].tolist()
    assert [bool(rows) for rows in sent] == [density == max(densities) for density in densities]
    for i, rows in enumerate(out.split(list(ROWS))):
        if sent[i]:
            assert sent[i] == ROWS[i] - TAIL
            assert bool((rows == 7.0).all())
            assert prefill.buffers.guarded(1)[:2].tolist() == [pairs[i], 1]
        else:
            torch.testing.assert_close(rows[:-TAIL], problem.expected(i)[0], atol=1e-5, rtol=1e-4)


def test_buffers_must_fit_the_estimator() -> None:
    problem = Problem(indexer=False, kept=False)
    prefill = problem.prefill()
    shape = Shape(HEADS.num_heads, HEADS.num_kv_heads, 256, 2, None)
    prefill.buffers = DeviceBuffers.allocate(
        shape, PATTERN, max_num_seqs=2, max_tokens=512, device=torch.device("cpu")
    )  # fmt: skip
    with pytest.raises(ValueError, match="without sampled_rows"):
        prefill.choose(problem.layer, problem.query, problem.kv, problem.part, scale=SCALE)
    with pytest.raises(ValueError, match="without recall_rows"):
        prefill.recall(problem.layer, problem.query, problem.kv, problem.part, scale=SCALE)


def test_arguments_are_checked_in_the_first_layer_before_anything_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_vsprefill.kernels.paged._INTERPRETED", True)  # these tensors are on the CPU
    problem = Problem(indexer=True, kept=True)
    prefill = problem.prefill()
    first = replace(problem.layer, place=0)
    prefill.choose(first, problem.query, problem.kv, problem.part, scale=SCALE)
    prefill.attend(first, problem.query, problem.kv, problem.part, scale=SCALE, out=torch.empty_like(problem.query))
    launched: list[str] = []

    def version(name: str) -> Callable[..., None]:
        return lambda *_, **__: launched.append(name)

    prefill.operations = PagedOperations(*(version(name) for name in PagedOperations._fields))
    wrong = replace(first, tau=first.tau.float())
    with pytest.raises(ValueError, match="tau"):
        prefill.choose(wrong, problem.query, problem.kv, problem.part, scale=SCALE)
    with pytest.raises(ValueError, match="out has dtype"):
        prefill.attend(first, problem.query, problem.kv, problem.part, scale=SCALE, out=problem.query.half())
    with pytest.raises(ValueError, match="scale"):
        prefill.recall(first, problem.query, problem.kv, problem.part, scale=0.0)
    assert launched == []
    prefill.choose(replace(wrong, place=1), problem.query, problem.kv, problem.part, scale=SCALE)
    assert launched == ["score_missing", "gather", "select", "build_index"]
