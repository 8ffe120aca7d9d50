# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Methods of the field against their definitions, spelled out on small problems."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.pareto.chunk import Chunk
from benchmarks.pareto.field import Anchor, FlashPrefill, FlexPrefill, VerticalSlash, XAttention
from benchmarks.pareto.structures import mean_query_mass

BLOCK, ROWS, N = 16, 40, 120  # five blocks of keys before the chunk, three blocks of rows, the last one short
FIRST = N - ROWS


@pytest.fixture
def chunk() -> Chunk:
    torch.manual_seed(3)
    return Chunk(0, torch.randn(4, ROWS, 8), torch.randn(2, N, 8), torch.randn(2, N, 8), 0.7, BLOCK)


def logit(c: Chunk, h: int, row: int, key: int) -> float:
    return float(c.q[h, row] @ c.k[h // 2, key]) * c.scale


def probabilities(c: Chunk, h: int, row: int) -> Tensor:
    return torch.tensor([logit(c, h, row, j) for j in range(FIRST + row + 1)]).softmax(0)


def blocks_of(keys: Tensor) -> list[list[bool]]:
    """``[blocks, n]`` -> whether each block of keys is kept, which is whole or not at all."""
    parts = list(keys.split(BLOCK, 1))
    assert all(bool((part.any(1) == part.all(1)).all()) for part in parts)
    return torch.stack([part.any(1) for part in parts], 1).tolist()


def test_vertical_slash(chunk: Chunk) -> None:
    kept = VerticalSlash(vertical=40, slash=106, rows=8, block=BLOCK).keep(chunk)
    assert kept.diagonals is not None
    for h in range(4):
        columns, distances = torch.zeros(N), torch.zeros(N)
        for row in range(ROWS - 8, ROWS):
            for j, p in enumerate(probabilities(chunk, h, row)):
                columns[j] += p
                distances[FIRST + row - j] += p
        columns[:30], distances[:100] = 99, 99
        assert set(columns.topk(40).indices.tolist()) == set(kept.keys[h, -1].nonzero()[:, 0].tolist())
        assert set(distances.topk(106).indices.tolist()) == set(kept.diagonals[h].nonzero()[:, 0].tolist())


def test_xattention(chunk: Chunk) -> None:
    stride, threshold = 4, 0.6
    kept = XAttention(stride=stride, threshold=threshold, block=BLOCK).keep(chunk)
    for h in range(4):
        found = blocks_of(kept.keys[h])
        for b in range(3):
            mass = torch.zeros(8)
            for group in range(b * BLOCK // stride, (b + 1) * BLOCK // stride):
                at = FIRST // stride + group
                sums = []
                for other in range(at + 1):
                    pairs = ((group * stride + stride - 1 - i, other * stride + i) for i in range(stride))
                    sums.append(sum(logit(chunk, h, r, j) for r, j in pairs if r < ROWS and j < N) / stride)
                for other, p in enumerate(torch.tensor(sums).softmax(0)):
                    mass[other * stride // BLOCK] += p
            own = FIRST // BLOCK + b
            want = {0, own}
            goal = float(mass.sum()) * threshold
            for block in mass.argsort(descending=True).tolist():
                if float(mass[list(want)].sum()) >= goal - 1e-5:
                    break
                want.add(block)
            assert {i for i, on in enumerate(found[b]) if on} == want


def test_anchor(chunk: Chunk) -> None:
    theta, step = 1.5, 2
    kept = Anchor(theta=theta, step=step, block=BLOCK).keep(chunk)
    for h in range(4):
        want = torch.zeros(3, N, dtype=torch.bool)
        begins = [(FIRST // BLOCK + b) // step * step * BLOCK for b in range(3)]
        for b in range(3):
            rows = range(b * BLOCK, min((b + 1) * BLOCK, ROWS))
            end = FIRST + rows[-1] + 1
            near = [j for j in range(end) if j < BLOCK or j >= begins[b]]
            want[b, near] = True
            anchor = sum(max(logit(chunk, h, r, j) for j in near if j <= FIRST + r) for r in rows) / len(rows)
            mean = chunk.q[h, rows[0] : rows[-1] + 1].mean(0)
            for j in range(begins[b]):
                if float(mean @ chunk.k[h // 2, j]) * chunk.scale >= anchor - theta:
                    for other in range(3):
                        want[other, j] |= begins[other] == begins[b]
        assert torch.equal(kept.keys[h], want)


@pytest.mark.parametrize("mean", [False, True])
def test_flashprefill(chunk: Chunk, mean: bool) -> None:
    kept = FlashPrefill(alpha=0.5, sinks=1, window=2, last=1, mean=mean, block=BLOCK).keep(chunk)
    assert kept.residual == (BLOCK if mean else 0)
    means = [[chunk.k[h, i * BLOCK : (i + 1) * BLOCK].mean(0) for i in range(8)] for h in range(2)]
    for h in range(4):
        found = blocks_of(kept.keys[h])
        for b in range(3):
            own = FIRST // BLOCK + b
            scores = [
                sum(
                    math.exp(float(chunk.q[h, r] @ means[h // 2][i]) * chunk.scale)
                    for r in range(b * BLOCK, min((b + 1) * BLOCK, ROWS))
                    if (i + 1) * BLOCK - 1 <= FIRST + r
                )
                for i in range(own + 1)
            ]
            want = {i for i, score in enumerate(scores) if score >= 0.5 * max(scores)} | {0, own, own - 1}
            want |= set(range(own + 1)) if b == 2 else set()
            assert {i for i, on in enumerate(found[b]) if on} == want


def test_flexprefill_takes_blocks_or_lines(chunk: Chunk) -> None:
    by_lines = FlexPrefill(gamma=0.5, tau=0.0, min_budget=BLOCK, block=BLOCK).keep(chunk)
    for h in range(4):
        found = blocks_of(by_lines.keys[h])
        blocks, distances = torch.zeros(8), torch.zeros(8)
        for row in range(ROWS - BLOCK, ROWS):
            for j, p in enumerate(probabilities(chunk, h, row)):
                blocks[j // BLOCK] += p / BLOCK
                distances[(FIRST + row - j) // BLOCK] += p / BLOCK
        columns, slashes = ({int(i) for i in _smallest(x, 0.5)} for x in (blocks, distances))
        for b in range(3):
            own = FIRST // BLOCK + b
            want = {i for i in range(own + 1) if i in columns or own - i in slashes} | {0, own}
            assert {i for i, on in enumerate(found[b]) if on} == want
    by_blocks = FlexPrefill(gamma=1.1, tau=2.0, min_budget=BLOCK, block=BLOCK).keep(chunk)
    assert blocks_of(by_blocks.keys[0]) == [[i <= FIRST // BLOCK + b for i in range(8)] for b in range(3)]


def _smallest(mass: Tensor, share: float) -> list[int]:
    order = mass.argsort(descending=True)
    count = int((mass[order].cumsum(0) < share * mass.sum() - 1e-6).sum()) + 1
    return order[:count].tolist()


def test_the_second_term_of_a_ranking_sees_keys_that_few_rows_look_at() -> None:
    """Rows that look in opposite directions cancel in the mean query, not in their variance."""
    q = torch.zeros(1, 16, 8)
    q[0, ::2, 0], q[0, 1::2, 0] = 3.0, -3.0
    k = torch.zeros(1, 64, 8)
    k[0, 7, 0] = 3.0
    c = Chunk(0, q, k, torch.zeros_like(k), 1.0, 16)
    assert float(mean_query_mass(c, 16, 1, 1)[0, 0, 7]) == pytest.approx(1 / 64)
    assert float(mean_query_mass(c, 16, 1, 1, spread=1.0)[0, 0, 7]) > 0.99


@pytest.mark.parametrize("score", ["fp8", "int4"])
def test_fewer_bits_rank_nearly_alike(chunk: Chunk, score: str) -> None:
    full, few = (mean_query_mass(chunk, 16, 1, 2, score=s) for s in ("bf16", score))
    assert not torch.equal(full, few)
    torch.testing.assert_close(full, few, rtol=0.8, atol=0.02)
