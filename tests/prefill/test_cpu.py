# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The whole prefill of a sequence against a softmax over an explicit mask, written down here from the definition."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vllm_vsprefill.kernels.sampled.naive import sampled
from vllm_vsprefill.kernels.score.naive import score
from vllm_vsprefill.kernels.types import UNLIMITED, Budgets, IndexerLayerWeights, SparsePattern
from vllm_vsprefill.prefill.cpu import CPU, REFERENCE, CPUPrefill, Operations
from vllm_vsprefill.prefill.layer import Heads, SparseLayer

HEADS = Heads(4, 2, 16)
PATTERN = SparsePattern(block_q=32, block_k=8, window=20, sinks=5, dense_last=0)
COLUMNS, DIAGONALS, TAIL = 9, 3, 16
BUDGETS = Budgets(COLUMNS, COLUMNS, DIAGONALS, DIAGONALS)
N, ROWS, HIDDEN = 230, 150, 24


def problem(seed: int, indexer: bool) -> tuple[SparseLayer, Tensor, Tensor, Tensor]:
    """A layer, queries ``[ROWS, 4, 16]``, keys and values ``[N, 2, 16]``."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    weights = None
    if indexer:
        weights = IndexerLayerWeights(random(2, 32, HIDDEN), random(2, HIDDEN), random(2, HIDDEN, 2), random(2, 2))
    layer = SparseLayer(0, 0, HEADS, weights, torch.full((2, 2), 0.5, dtype=torch.float64))
    return layer, random(ROWS, 4, 16), random(N, 2, 16), random(N, 2, 16)


def mask(columns: Tensor, diagonals: Tensor, head: int) -> Tensor:
    """Bool ``[rows, keys]`` for the rows before the tail: the largest of ``[H, N]`` each, window and sinks."""
    seen, p = N - TAIL, PATTERN
    kept_columns = columns[head].topk(COLUMNS).indices
    kept_diagonals = diagonals[head].topk(DIAGONALS).indices.tolist()
    found = torch.zeros(ROWS - TAIL, seen, dtype=torch.bool)
    for row in range(ROWS - TAIL):
        position = N - ROWS + row
        tile = range(position // p.block_q * p.block_q, min((position // p.block_q + 1) * p.block_q, seen))
        along = [i - distance for i in tile for distance in (*range(p.window), *kept_diagonals) if i >= distance]
        for key in {*along, *range(p.sinks)}:  # whole granules
            found[row, key // p.block_k * p.block_k : (key // p.block_k + 1) * p.block_k] = True
        found[row, kept_columns[kept_columns < seen]] = True
        found[row, position + 1 :] = False
    return found


@pytest.mark.parametrize("indexer", [True, False], ids=["vsindexer", "sampled"])
@pytest.mark.parametrize("operations", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize("seed", range(3))
def test_prefill_is_attention_under_its_mask(seed: int, operations: Operations, indexer: bool) -> None:
    layer, query, key, value = problem(seed, indexer)
    prefill = CPUPrefill(PATTERN, BUDGETS, sampled_rows=12, operations=operations)
    rows = ROWS - TAIL
    chosen = prefill.choose(layer, query, key, value, rows, scale=0.25)
    assert chosen is not None
    out, visited = prefill.attend(query, key, value, chosen, rows, scale=0.25)
    if layer.weights is None:
        columns, diagonals = sampled(query, key, scale=0.25, num_rows=12)
    else:
        logits = score(key, value, layer.weights)
        columns, diagonals = logits[..., 0].T, logits[..., 1].T.flip(1)
    expected, pairs = torch.empty(rows, 4, 16), 0
    for head in range(4):
        seen = mask(columns, diagonals, head // 2)
        pairs += int(seen.sum())
        logits = query[:rows, head] @ key[: N - TAIL, head // 2].T * 0.25
        expected[:, head] = logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value[: N - TAIL, head // 2]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    pairs //= 2  # two query heads share a KV head
    assert int(visited) == pairs
    assert pairs < 0.9 * 2 * sum(range(N - ROWS + 1, N - TAIL + 1))


def test_recall_is_that_of_the_rows_that_are_attended() -> None:
    layer, query, key, value = problem(0, indexer=False)
    prefill = CPUPrefill(PATTERN, BUDGETS, sampled_rows=12)
    rows = ROWS - TAIL
    chosen = prefill.choose(layer, query, key, value, rows, scale=0.25)
    assert chosen is not None
    columns, diagonals = sampled(query, key, scale=0.25, num_rows=12)
    found = prefill.recall(query, key, chosen, rows, scale=0.25, num_rows=rows)
    for head in range(4):
        seen = mask(columns, diagonals, head // 2)
        causal = torch.arange(N - TAIL) <= torch.arange(N - ROWS, N - TAIL)[:, None]
        logits = query[:rows, head] @ key[: N - TAIL, head // 2].T * 0.25
        share = (logits.masked_fill(~causal, float("-inf")).softmax(-1) * seen).sum(-1).mean()
        other = prefill.recall(
            query[:, [head, head]], key[:, [head // 2]], type(chosen)(*(part[[head // 2]] for part in chosen)), rows,
            scale=0.25, num_rows=rows,
        )  # fmt: skip
        torch.testing.assert_close(other[0], share)
    assert 0.2 < float(found.mean()) < 0.8


def test_logits_are_kept_and_missing_ones_computed() -> None:
    layer, query, key, value = problem(0, indexer=True)
    weights = layer.weights
    assert weights is not None
    kept = torch.full((400, 4), float("nan"))
    slots = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:N]
    layer = SparseLayer(0, 0, HEADS, weights, layer.tau, SimpleNamespace(slots=kept))
    calls: list[int] = []

    def counting(k: Tensor, v: Tensor, weights: IndexerLayerWeights) -> Tensor:
        calls.append(len(k))
        return score(k, v, weights)

    prefill = CPUPrefill(PATTERN, BUDGETS, operations=REFERENCE._replace(score=counting))
    for forgotten in (slots, slots[:0], slots[100:], slots[3::7]):
        kept[forgotten] = float("nan")
        prefill.choose(layer, query, key, value, ROWS, scale=0.25, slots=slots)
        torch.testing.assert_close(kept[slots].view(N, 2, 2), score(key, value, weights))
    with pytest.raises(ValueError, match="slots must say where"):
        prefill.choose(layer, query, key, value, ROWS, scale=0.25)
    assert calls == [N, N - 100, len(slots[3::7])]
    assert int(kept.isnan().any(1).sum()) == 400 - N


def test_nothing_is_chosen_above_the_density() -> None:
    layer, query, key, value = problem(0, indexer=False)
    layer.tau.fill_(1.0)
    assert CPUPrefill(PATTERN, UNLIMITED, max_density=0.9).choose(layer, query, key, value, ROWS, scale=0.25) is None
    assert CPUPrefill(PATTERN, UNLIMITED).choose(layer, query, key, value, ROWS, scale=0.25) is not None


def test_the_prefill_knows_nothing_of_vllm() -> None:
    """It is imported, with everything it imports, in a process where importing vLLM fails."""
    code = "import sys; sys.modules['vllm'] = None; import vllm_vsprefill.prefill.cpu, vllm_vsprefill.prefill.cuda"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
