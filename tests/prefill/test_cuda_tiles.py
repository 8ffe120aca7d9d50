# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The prefill of a round with a list for every tile, by the references of its operations, against each sequence alone.

The kernels take the place of the references in ``tests/backends/test_cuda_layer.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.prefill import operations
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.price.naive import rows_of
from vllm_vsprefill.kernels.tile_index import TileIndex
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.plan import RequestRows
from vllm_vsprefill.prefill.cpu_tiles import REFERENCE, CPUTilePrefill
from vllm_vsprefill.prefill.cuda import Round
from vllm_vsprefill.prefill.cuda_tiles import CudaTilePrefill
from vllm_vsprefill.prefill.layer import Heads, SparseLayer
from vllm_vsprefill.prefill.tiles import LONGER, TileBuffers, TileShape, Tiling, tile_positions

HEADS, BLOCK, SCALE = Heads(6, 2, 16), 16, 0.5
PATTERN = SparsePattern(block_q=20, block_k=4, window=24, sinks=6, dense_last=0)
LENGTHS, ROWS = (430, 380), (150, 64)  # tokens of each sequence, rows of each chunk
LAYER = SparseLayer(1, 1, HEADS, None, torch.full((2, 2), 0.5, dtype=torch.float64))


class Problem:
    """Two sequences in one cache whose blocks lie in random order."""

    def __init__(self, pattern: SparsePattern = PATTERN) -> None:
        self.pattern = pattern
        rng = torch.Generator().manual_seed(3)
        cache = torch.randn((60, 2, BLOCK, 32), generator=rng)
        table = torch.randperm(60, generator=rng)[:54].view(2, 27).int()
        self.kv = PagedKV(cache, table)
        self.slots = [(table[i, :, None] * BLOCK + torch.arange(BLOCK)).flatten()[:n] for i, n in enumerate(LENGTHS)]
        self.query = 1.5 * torch.randn((sum(ROWS), *HEADS[::2]), generator=rng)
        self.rows = Batch.from_lists(list(ROWS), list(LENGTHS))

    def prefill(self, price: float, max_density: float = 1.0) -> tuple[CudaTilePrefill, Round]:
        shape = TileShape(HEADS, torch.float32, 512, 2, 16)
        tiling = Tiling(self.pattern, HEADS, 512, fixed=True)
        buffers = TileBuffers.allocate(shape, tiling, max_num_seqs=2, max_tokens=512, device=torch.device("cpu"))
        prefill = CudaTilePrefill(price, buffers, max_density=max_density, operations=operations.TILE_REFERENCE)
        requests = [RequestRows(0, 0, ROWS[0], LENGTHS[0]), RequestRows(1, ROWS[0], sum(ROWS), LENGTHS[1])]
        assert prefill.rounds(requests) == [tuple(requests)]
        guarded = self.rows._replace(row_end=buffers.sparse_end[:2]) if max_density < 1.0 else None
        return prefill, Round(self.rows, self.rows, guarded, prefill.index(requests))

    def expected(self, i: int, price: float) -> tuple[Tensor, int]:
        """The rows of a sequence, and the pairs visited."""
        prefill = CPUTilePrefill(self.pattern, price, priced_rows=16, operations=REFERENCE)
        both = self.kv.cache.transpose(1, 2).flatten(0, 1)[self.slots[i]]
        key, value = both[..., :16], both[..., 16:]
        query = self.query.split(list(ROWS))[i]
        chosen = prefill.choose(LAYER, query, key, value, ROWS[i], scale=SCALE)
        assert chosen is not None
        return prefill.attend(query, key, value, chosen, ROWS[i], scale=SCALE)


@pytest.mark.parametrize(
    ("price", "variance"), [(0.0, False), (1.0, False), (2.0, False), (100.0, False), (1.0, True), (2.0, True)]
)
def test_a_round_is_its_sequences(price: float, variance: bool) -> None:
    problem = Problem(dataclasses.replace(PATTERN, variance=variance))
    prefill, requests = problem.prefill(price)
    out = torch.full_like(problem.query, 7.0)
    prefill.choose(LAYER, problem.query, problem.kv, requests, scale=SCALE)
    prefill.attend(LAYER, problem.query, problem.kv, requests, scale=SCALE, out=out)
    shares = []
    for i, rows in enumerate(out.split(list(ROWS))):
        expected, visited = problem.expected(i, price)
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-4)
        assert int(prefill.buffers.visited(1)[i]) == visited
        shares.append(visited / 2 / PATTERN.causal_pairs(ROWS[i], LENGTHS[i]))
    assert not prefill.buffers.counts[0].any()
    assert not prefill.buffers.guarded(1).any()
    if price == 0.0:
        assert shares == [1.0, 1.0]
    if price == 100.0:
        assert max(shares) < 0.2
    if price == 2.0:
        assert 0.1 < min(shares) < 0.9


def test_variance_takes_memory_only_where_it_is_asked_for() -> None:
    shape = TileShape(HEADS, torch.bfloat16, 1024, 2, 16)
    sizes = []
    for variance in (False, True):
        tiling = Tiling(dataclasses.replace(PATTERN, variance=variance), HEADS, 1024)
        buffers = TileBuffers.allocate(shape, tiling, max_num_seqs=2, max_tokens=512, device=torch.device("meta"))
        assert (buffers.prior is not None) is variance
        sizes.append(buffers.num_bytes)
    # Requests, KV heads and positions; places of sums, channels squared; covariances, mean keys and levels
    each = 2 * 2
    assert sizes[1] - sizes[0] == each * (1024 * 4 + 32 * 16 * 16 * 4 + 16 * 16 * 2 + 16 * 4 + 8 * 4)


def test_the_guard_keeps_rows_for_the_dense_kernel() -> None:
    problem = Problem()
    prefill, requests = problem.prefill(0.0, max_density=0.9)
    out = torch.full_like(problem.query, 7.0)
    prefill.choose(LAYER, problem.query, problem.kv, requests, scale=SCALE)
    prefill.attend(LAYER, problem.query, problem.kv, requests, scale=SCALE, out=out)
    assert prefill.buffers.dense_rows[:4].tolist() == [0, ROWS[0], 0, ROWS[1]]
    assert bool((out == 7.0).all())
    assert int(prefill.buffers.guarded(1)[1]) == 2


def test_what_is_wrong_with_the_variance_is_named() -> None:
    problem = Problem(dataclasses.replace(PATTERN, variance=True))
    prefill, requests = problem.prefill(1.0)
    first = dataclasses.replace(LAYER, place=0)
    assert prefill.buffers.variance is not None
    prefill.buffers.variance = prefill.buffers.variance._replace(prior=torch.empty(2, 2, 100))
    with pytest.raises(ValueError, match=r"^prior has room for 100 tokens but max_seq_len is 430"):
        prefill.choose(first, problem.query, problem.kv, requests, scale=SCALE)


@pytest.mark.parametrize(("group", "positions"), [(1, 128), (3, 42), (4, 32), (6, 20), (7, 18), (8, 16), (64, 2)])
def test_tiles_fill_a_program_and_grow_with_the_sequence(group: int, positions: int) -> None:
    assert tile_positions(group, 1) == tile_positions(group, LONGER[0]) == positions
    assert tile_positions(group, LONGER[0] + 1) == 2 * positions
    tiling = Tiling(PATTERN, Heads(2 * group, 2, 64), 131072)
    assert [limit for _, limit in tiling.patterns] == [LONGER[0], 131072]
    assert tiling.of(LONGER[0]).block_q == positions
    assert tiling.of(131072).block_q == 2 * positions


def test_large_heads_and_groups_have_tiles_of_one_part() -> None:
    pattern = dataclasses.replace(PATTERN, parts=2)
    for heads, parts in (((12, 2, 128), 2), ((32, 2, 128), 2), ((34, 2, 128), 1), ((12, 2, 192), 1)):
        assert {p.parts for p, _ in Tiling(pattern, Heads(*heads), 131072).patterns} == {parts}
        assert Tiling(pattern, Heads(*heads), 131072, any_parts=True).of(1).parts == 2


def test_requests_with_other_tiles_are_another_round() -> None:
    tiling = Tiling(PATTERN, HEADS, 131072)
    shape = TileShape(HEADS, torch.bfloat16, 131072, 2, 16)
    buffers = TileBuffers.allocate(shape, tiling, max_num_seqs=16, max_tokens=1024, device=torch.device("meta"))
    prefill = CudaTilePrefill(0.1, buffers, operations=operations.TILE_REFERENCE)
    lengths = (40000, 20000, 70000, 30000)
    requests = [RequestRows(i, 100 * i, 100 * i + 100, n) for i, n in enumerate(lengths)]
    found = [[rows.seq_len for rows in one] for one in prefill.rounds(requests)]
    assert found == [[40000, 20000], [70000], [30000]]
    for one in prefill.rounds(requests):
        index = prefill.index(one)
        assert index.bits.shape[2] * 32 >= max(rows.seq_len for rows in one)


def test_warming_up_comes_by_every_number_of_priced_rows() -> None:
    """Kernels depend on how long a round may be; none of them is to be compiled with the first long prompt."""
    problem, seen = Problem(), []
    others: set[SparsePattern] = set()

    def variance(
        query: Tensor, kv: PagedKV, batch: Batch, pattern: SparsePattern, *args: Any, **kwargs: Any
    ) -> None:  # fmt: skip
        others.add(pattern)
        operations.TILE_REFERENCE.variance(query, kv, batch, pattern, *args, **kwargs)

    def price(query: Tensor, kv: PagedKV, batch: Batch, index: TileIndex, *args: Any, **kwargs: Any) -> None:
        seen.append((index.pattern.block_q, rows_of(64, batch.max_seq_len)))
        assert kv.block_table.shape[1] * BLOCK >= batch.max_seq_len
        operations.TILE_REFERENCE.price(query, kv, batch, index, *args, **kwargs)

    tiling = Tiling(dataclasses.replace(PATTERN, variance=True), HEADS, 131072)
    shape = TileShape(HEADS, torch.float32, 131072, 2, 64)
    buffers = TileBuffers.allocate(shape, tiling, max_num_seqs=1, max_tokens=128, device=torch.device("cpu"))
    replaced = operations.TILE_REFERENCE._replace(price=price, variance=variance)
    prefill = CudaTilePrefill(0.1, buffers, operations=replaced)
    prefill.warm_up(LAYER, problem.kv, torch.float32, scale=SCALE)
    tiles = {pattern.block_q for pattern, _ in tiling.patterns}
    assert {(tile, rows) for tile in tiles for rows in (64, 32, 16)} == set(seen)
    assert others == {pattern for pattern, _ in tiling.patterns}
    assert prefill.is_warm
    assert not buffers.counts.any()
