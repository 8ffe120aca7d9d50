# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The estimate of a selection's density: against what attention visits, and on the device against the reference."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from vllm_vsprefill.kernels.attend.naive import attend
from vllm_vsprefill.kernels.guard import paged
from vllm_vsprefill.kernels.guard.naive import expected_density, upper_bound
from vllm_vsprefill.kernels.types import Budgets, Selection, SparsePattern

if USABLE:
    from vllm_vsprefill.kernels.guard.triton import guard, guard_tiles
    from vllm_vsprefill.kernels.index import allocate_index
    from vllm_vsprefill.kernels.merge.paged import set_flags
    from vllm_vsprefill.kernels.merge.triton import build_index
    from vllm_vsprefill.kernels.paged import Batch, PagedKV
    from vllm_vsprefill.kernels.tile_index import allocate_tiles

BOUNDS = ((200, 6), (None, 6), (200, None))  # columns and diagonals at most

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


def random_selection(seed: int, n: int, heads: int, columns: int, diagonals: int) -> Selection:
    rng = torch.Generator().manual_seed(seed)

    def some(maximum: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts = torch.randint(0, maximum + 1, (heads,), generator=rng)
        items = torch.full((heads, max(maximum, 1)), n, dtype=torch.int32)
        for head, count in enumerate(counts.tolist()):
            items[head, :count] = torch.randperm(n, generator=rng)[:count].sort().values.int()
        return items, counts.int()

    return Selection(*some(min(columns, n)), *some(min(diagonals, n)))


@pytest.mark.parametrize("seed", range(30))
def test_granules_are_those_that_hold_a_selected_distance(seed: int) -> None:
    rng = random.Random(seed)
    block_k = rng.choice([1, 2, 4, 8, 16])
    pattern = SparsePattern(block_k * rng.choice([1, 2, 4]), block_k, rng.randrange(40), 0, 0)
    n = rng.randrange(1, 200)
    diagonals = torch.tensor(sorted(rng.sample(range(n), rng.randrange(min(n, 6) + 1))), dtype=torch.int32)
    near = max(pattern.window, 1) - 1
    count = 0
    for granule in range(n + 2):
        low, high = granule * block_k - block_k + 1, granule * block_k + pattern.block_q - 1
        count += low > near and any(low <= d <= high for d in diagonals.tolist())
    assert pattern.granules_of(diagonals, n) == count


@pytest.mark.parametrize("seed", range(12))
def test_estimate_is_near_what_attention_visits(seed: int) -> None:
    """Columns and diagonals spread over a long sequence, as the estimate assumes; and the bound holds."""
    n, rows, heads = 1024, 256, 2
    pattern = SparsePattern(16, 4, 64, 16, 0)
    selection = random_selection(seed, n, heads, 200, 6)
    q = torch.zeros(rows, heads, 4)
    k = torch.zeros(n, heads, 4)
    _, visited = attend(q, k, k, selection, pattern, scale=1.0)
    measured = visited / (heads * pattern.causal_pairs(rows, n))
    expected = expected_density(selection, pattern, rows, n)
    assert measured == pytest.approx(expected, rel=0.34)
    both, diagonals, columns = (upper_bound(pattern, rows, n, Budgets(0, c, 0, d)) for c, d in BOUNDS)
    assert expected <= both <= diagonals
    assert expected <= columns


def test_everything_selected_is_dense() -> None:
    n = 100
    full = torch.arange(n, dtype=torch.int32).unsqueeze(0)
    count = torch.tensor([n], dtype=torch.int32)
    assert expected_density(Selection(full, count, full, count), SparsePattern(16, 4, 8, 4, 0), 50, n) == 1.0


@pytest.mark.skipif(not USABLE, reason=REASON)
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("limit", [0.05, 0.3, 0.9])
def test_device_decides_as_the_reference(seed: int, limit: float) -> None:
    rng = random.Random(seed)
    heads, block_k = rng.choice([1, 2, 3]), rng.choice([1, 4, 16])
    pattern = SparsePattern(max(16, block_k), block_k, rng.choice([0, 16, 70]), rng.choice([0, 5, 64]), 0)
    seq_lens = [rng.choice([1, 63, 64, 65, 500, 1023, 1024, 1025, 3000]) for _ in range(3)]
    rows = [rng.randrange(1, n + 1) for n in seq_lens]
    rows[rng.randrange(3)] = 0
    batch = Batch.from_lists(rows, seq_lens, DEVICE)
    selections = [random_selection(seed + i, n, heads, n // 2, 5) for i, n in enumerate(seq_lens)]
    index = allocate_index(4, heads, 3000, pattern, DEVICE)
    blocks = -(-3000 // 16)
    table = torch.arange(3 * blocks, dtype=torch.int32, device=DEVICE).view(3, blocks)
    kv = PagedKV(torch.zeros(3 * blocks, heads, 16, 32, dtype=torch.float16, device=DEVICE), table)
    set_flags(index, [Selection(*(part.to(DEVICE) for part in one)) for one in selections], batch)
    build_index(index, kv, batch)
    dense_rows = torch.full((8,), -7, dtype=torch.int32, device=DEVICE)
    sparse_end = torch.full((4,), -7, dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([5, 1], device=DEVICE)
    guard(index, batch, limit, dense_rows=dense_rows, sparse_end=sparse_end, counts=counts)
    pairs = chunks = 0
    close = False
    for i, (count, n) in enumerate(zip(rows, seq_lens, strict=True)):
        dense = False
        if count:
            density = expected_density(selections[i].below(n), pattern, count, n)
            if abs(density - limit) < 1e-5:
                close = True
                continue  # the device works in float32
            dense = density > limit
        start, end = int(batch.row_start[i]), int(batch.row_end[i])
        assert dense_rows[2 * i : 2 * i + 2].tolist() == [0, count if dense else 0]
        assert int(sparse_end[i]) == (start if dense else end)
        pairs += dense * heads * pattern.causal_pairs(count, n)
        chunks += dense
    assert counts.tolist() == [5 + pairs, 1 + chunks]
    assert [*dense_rows[6:].tolist(), int(sparse_end[3])] == [-7, -7, -7]
    # The plain reference over the same index, which computes in float64
    found = torch.full_like(dense_rows, -7), torch.full_like(sparse_end, -7), torch.tensor([5, 1], device=DEVICE)
    paged.guard(index, batch, limit, dense_rows=found[0], sparse_end=found[1], counts=found[2])
    if not close:
        for one, other in zip(found, (dense_rows, sparse_end, counts), strict=True):
            assert one.tolist() == other.tolist()


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_wrong_arguments_are_named() -> None:
    index = allocate_index(1, 1, 100, SparsePattern(16, 4, 8, 4, 0), DEVICE)
    batch = Batch.from_lists([10], [100], DEVICE)
    good = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    wrong = ((0.0, good, "max_density"), (0.5, good.long(), "dense_rows"), (0.5, good[:1], "dense_rows"))
    for limit, bounds, named in wrong:
        with pytest.raises(ValueError, match=named):
            paged.check_guard(index, batch, limit, bounds, good, None)
    with pytest.raises(ValueError, match="counts"):
        paged.check_guard(index, batch, 0.5, good, good, good[:1].long())


@pytest.mark.skipif(not USABLE, reason=REASON)
@pytest.mark.parametrize("seed", range(10))
def test_lists_of_tiles_are_judged_by_the_mean_over_heads(seed: int) -> None:
    rng = random.Random(seed)
    heads, pattern = rng.choice([1, 2, 3, 8]), SparsePattern(16, 4, 30, 8, 0)
    seq_lens = [rng.randrange(1, 3000) for _ in range(4)]
    rows = [rng.randrange(1, n + 1) for n in seq_lens]
    rows[rng.randrange(4)] = 0
    batch = Batch.from_lists(rows, seq_lens, DEVICE)
    index = allocate_tiles(4, heads, sum(rows), [(pattern, 3000)], DEVICE).view(pattern, sum(rows), 4, 3000)
    limit = 0.4
    wanted = [rng.random() < 0.5 for _ in range(4)]
    for i, dense in enumerate(wanted):  # one head may be far on the other side of the limit
        index.density[i] = limit + (0.01 if dense else -0.01)
        if heads > 1:
            index.density[i, 0] += 0.3
            index.density[i, -1] -= 0.3
    index.density[rows.index(0)] = float("nan")  # nobody has written it
    found = []
    for version in (guard_tiles, paged.guard_tiles):
        dense_rows, sparse_end = (torch.full((size,), -7, dtype=torch.int32, device=DEVICE) for size in (10, 5))
        counts = torch.tensor([5, 1], device=DEVICE)
        paged.check_guard_tiles(index, batch, limit, dense_rows, sparse_end, counts)
        version(index, batch, limit, dense_rows=dense_rows, sparse_end=sparse_end, counts=counts)
        found.append([x.tolist() for x in (dense_rows, sparse_end, counts)])
        version(index, batch, limit, dense_rows=dense_rows, sparse_end=sparse_end)
        assert counts.tolist() == found[-1][2]
    bounds, ends, pairs, chunks = [], [], 0, 0
    for i, (count, n) in enumerate(zip(rows, seq_lens, strict=True)):
        dense = count > 0 and wanted[i]
        bounds += [0, count if dense else 0]
        ends.append(int(batch.row_start[i] if dense else batch.row_end[i]))
        pairs += dense * heads * pattern.causal_pairs(count, n)
        chunks += dense
    assert found == [[[*bounds, -7, -7], [*ends, -7], [5 + pairs, 1 + chunks]]] * 2


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_a_density_that_is_no_number_is_dense() -> None:
    pattern = SparsePattern(16, 4, 30, 8, 0)
    index = allocate_tiles(1, 2, 10, [(pattern, 100)], DEVICE).view(pattern, 10, 1, 100)
    index.density[0] = torch.tensor([0.1, float("nan")])
    for version in (guard_tiles, paged.guard_tiles):
        dense_rows, sparse_end = (torch.full((size,), -7, dtype=torch.int32, device=DEVICE) for size in (2, 1))
        version(index, Batch.from_lists([10], [100], DEVICE), 0.5, dense_rows=dense_rows, sparse_end=sparse_end)
        assert [*dense_rows.tolist(), *sparse_end.tolist()] == [0, 10, 0]


@pytest.mark.skipif(not USABLE, reason=REASON)
def test_wrong_arguments_of_tiles_are_named() -> None:
    pattern = SparsePattern(16, 4, 30, 8, 0)
    index = allocate_tiles(2, 1, 20, [(pattern, 100)], DEVICE).view(pattern, 20, 2, 100)
    batch = Batch.from_lists([10, 10], [100, 50], DEVICE)
    good = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    paged.check_guard_tiles(index, batch, 0.5, good, good, None)
    wrong = ((index, 0.0, good, "max_density"), (index, 0.5, good[:3], "dense_rows"),
             (index._replace(density=index.density[:1]), 0.5, good, r"index\.density"))  # fmt: skip
    for one, limit, bounds, named in wrong:
        with pytest.raises(ValueError, match=named):
            paged.check_guard_tiles(one, batch, limit, bounds, good, None)
