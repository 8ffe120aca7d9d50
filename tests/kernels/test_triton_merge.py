# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The index of the device against the plain reference, and the reference against the union of a tile; lists of tiles
against their bits."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import PagedProblem, make_paged
from vllm_vsprefill.kernels.index import NONE, RANK, Index, allocate_index
from vllm_vsprefill.kernels.merge import paged, triton
from vllm_vsprefill.kernels.merge.naive import merge
from vllm_vsprefill.kernels.reference import selection_of
from vllm_vsprefill.kernels.tile_index import EVERYTHING, TileIndex, allocate_tiles
from vllm_vsprefill.kernels.types import SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)


def random_problem(seed: int) -> PagedProblem:
    rng = random.Random(seed)
    block_q = rng.choice([16, 32, 64])
    pattern = SparsePattern(
        block_q=block_q,
        block_k=rng.choice([k for k in (1, 2, 4, 16, 32) if k <= block_q]),
        window=rng.choice([0, 1, 5, 40, 70]),
        sinks=rng.choice([0, 1, 16, 40]),
        dense_last=0,
    )
    seq_lens = [rng.choice([rng.randint(1, 150), 63, 64, 65, 1023, 1024, 1025]) for _ in range(rng.randint(1, 3))]
    return make_paged(
        seq_lens=seq_lens, rows=[1] * len(seq_lens), pattern=pattern, heads=rng.randint(1, 2), size=16, group=1,
        columns=rng.choice([0, 1, 20, 300]), diagonals=rng.choice([0, 1, 4, 300]), seed=seed,
    )  # fmt: skip


def index_of(problem: PagedProblem) -> Index:
    """Flags only; whatever else is read has to be written first."""
    batch = problem.batch
    index = allocate_index(batch.num_requests, problem.kv.num_kv_heads, batch.max_seq_len, problem.pattern, DEVICE)
    for tensor in index[:-1]:
        tensor.fill_(77)
    paged.set_flags(index, problem.selections, batch)
    return index


@pytest.mark.parametrize("seed", range(16))
def test_equals_the_reference(seed: int) -> None:
    problem = random_problem(seed)
    index, plain = index_of(problem), index_of(problem)
    paged.check_build_index(index, problem.kv, problem.batch)
    triton.build_index(index, problem.kv, problem.batch)
    paged.build_index(plain, problem.kv, problem.batch)
    for i, n in enumerate(problem.seq_lens()):
        granules = n // problem.pattern.block_k + 2
        for ranks, length in (("rank", n), ("granule_rank", granules)):
            last = -(-length // RANK)
            assert torch.equal(getattr(index, ranks)[i, :, : last + 1], getattr(plain, ranks)[i, :, : last + 1])
        assert torch.equal(index.near[i, :, :granules], plain.near[i, :, :granules])
        for head in range(problem.kv.num_kv_heads):
            columns = int(plain.rank[i, head, -(-n // RANK)])
            listed = int(plain.granule_rank[i, head, -(-granules // RANK)])
            for name, count in (("columns", columns), ("slots", columns), ("granules", listed)):
                assert torch.equal(getattr(index, name)[i, head, :count], getattr(plain, name)[i, head, :count]), name


@pytest.mark.parametrize("seed", range(16))
def test_the_lists_of_the_reference_are_the_union_of_every_tile(seed: int) -> None:
    problem = random_problem(seed)
    pattern, index = problem.pattern, index_of(problem)
    paged.build_index(index, problem.kv, problem.batch)
    block_q, block_k = pattern.block_q, pattern.block_k
    for i, n in enumerate(problem.seq_lens()):
        for head in range(problem.kv.num_kv_heads):
            one = problem.selections[i].below(n)
            wanted = (
                one.columns[head, : int(one.num_columns[head])], one.diagonals[head, : int(one.num_diagonals[head])],
            )  # fmt: skip
            count = int(index.rank[i, head, -(-n // RANK)])
            for start in range(0, n, block_q):
                end = min(start + block_q, n)
                keys = set(index.columns[i, head, :count].tolist())
                keys |= set(range(max(start - pattern.reach + 1, 0) // block_k * block_k, end))
                for granule in range(start // block_k + 1):
                    # `near` counts from the lower end of the interval of diagonals that a granule stands for.
                    near = int(index.near[i, head, granule])
                    if near != NONE and near <= end - start + block_k - 2:
                        first = (start // block_k - granule) * block_k
                        keys |= set(range(first, first + block_k))
                merged = merge(*wanted, tile_start=start, tile_end=end, seq_len=n, pattern=pattern)
                assert sorted(key for key in keys if key < end) == merged.tolist()


def test_flags_hold_the_selection() -> None:
    problem = random_problem(3)
    index = index_of(problem)
    for i, n in enumerate(problem.seq_lens()):
        found, wanted = selection_of(index, i, n), problem.selections[i].below(n)
        assert torch.equal(found.num_columns, wanted.num_columns)
        assert torch.equal(found.num_diagonals, wanted.num_diagonals)
        for head in range(problem.kv.num_kv_heads):
            for items, counts in ((0, 1), (2, 3)):
                count = int(wanted[counts][head])
                assert torch.equal(found[items][head, :count], wanted[items][head, :count])


def test_wrong_selections_are_named() -> None:
    problem = random_problem(0)
    index = index_of(problem)
    with pytest.raises(ValueError, match=r"^selections has 0 entries"):
        paged.set_flags(index, [], problem.batch)
    wrong = [one._replace(columns=one.columns.long()) for one in problem.selections]
    with pytest.raises(ValueError, match=r"^selection\.columns must have dtype"):
        paged.set_flags(index, wrong, problem.batch)
    with pytest.raises(ValueError, match=r"^index has room for"):
        paged.check_build_index(index._replace(flags=index.flags[:0]), problem.kv, problem.batch)


def tiles_problem(seed: int) -> tuple[PagedProblem, TileIndex]:
    """Random bits, some heads without; whatever else is read has to be written first."""
    rng = random.Random(seed)
    block_q = rng.choice([1, 7, 16, 20, 64])
    pattern = SparsePattern(
        block_q=block_q, block_k=rng.choice([1, 4, 16]), window=rng.choice([0, 1, 5, 40]),
        sinks=rng.choice([0, 1, 16, 40, 300]), dense_last=0,
    )  # fmt: skip
    seq_lens = [rng.choice([rng.randint(1, 250), 128, 129, 700]) for _ in range(rng.randint(1, 3))]
    most = 6 * block_q
    rows = [rng.choice([0, 1, rng.randint(1, min(n, most)), min(n, most)]) for n in seq_lens]
    problem = make_paged(
        seq_lens=seq_lens, rows=rows, pattern=pattern, heads=rng.randint(1, 2), size=16, group=1, seed=seed,
    )  # fmt: skip
    return problem, tile_index(problem, rng)


def tile_index(problem: PagedProblem, rng: random.Random) -> TileIndex:
    batch, heads = problem.batch, problem.kv.num_kv_heads
    total = max(problem.q.shape[0], batch.max_rows)
    storage = allocate_tiles(batch.num_requests, heads, total, [(problem.pattern, batch.max_seq_len)], DEVICE)
    index = storage.view(problem.pattern, total, batch.num_requests, batch.max_seq_len)
    for tensor in (index.starts, index.counts, index.slots, index.used):
        tensor.fill_(77)
    seed = torch.Generator().manual_seed(rng.randrange(1000))
    bits = torch.randint(-(2**31), 2**31, index.bits.shape, generator=seed)
    if rng.random() < 0.5:  # few bits, at both ends of words and anywhere
        bits &= torch.tensor([-(2**31), 1, 0, 0, 1 << 17])[torch.randint(0, 5, bits.shape, generator=seed)]
    index.bits.copy_(bits)
    for i in range(batch.num_requests):
        for head in range(heads):
            index.bars[i, head] = rng.choice([-3.0, -1.0, -3.0, float("inf"), -float("inf")])
    return index


def copied(index: TileIndex) -> TileIndex:
    return TileIndex(
        index.bars.clone(), index.density.clone(), index.bits.clone(), index.starts.clone(), index.counts.clone(),
        index.slots.clone(), index.used.clone(), index.pattern,
    )  # fmt: skip


def wanted_lists(problem: PagedProblem, index: TileIndex) -> dict[tuple[int, int], list[int] | None]:
    """The list of every tile, by KV head and place, bit by bit; None where it attends to every key."""
    found: dict[tuple[int, int], list[int] | None] = {}
    pattern, kv = problem.pattern, problem.kv
    for i, n in enumerate(problem.seq_lens()):
        start, end = int(problem.batch.row_start[i]), int(problem.batch.row_end[i])
        table = kv.block_table[i].tolist()
        for position in range(n - (end - start), n):
            tile = position // pattern.block_q
            window = max(tile * pattern.block_q - max(pattern.window, 1) + 1, 0) // pattern.block_k * pattern.block_k
            sinks = -(-pattern.sinks // pattern.block_k) * pattern.block_k
            for head, bar in enumerate(index.bars[i].tolist()):
                place = index.place(start, i, n - (end - start), tile)
                if (head, place) in found:
                    continue
                words = index.bits[head, place].tolist()
                keys = [
                    j for j in range(window) if j < sinks or (bar < float("inf") and words[j // 32] >> (j % 32) & 1)
                ]  # fmt: skip
                slots = [table[j // kv.block_size] * kv.block_size + j % kv.block_size for j in keys]
                found[head, place] = None if bar == -float("inf") else slots
    return found


def check_lists(index: TileIndex, wanted: dict[tuple[int, int], list[int] | None], room: int | None = None) -> int:
    """Compares lists; with ``room`` some may be missing. Returns how many are."""
    taken, missing = [], 0
    for head in range(index.counts.shape[0]):
        for place in range(index.counts.shape[1]):
            start, count = int(index.starts[head, place]), int(index.counts[head, place])
            if (head, place) not in wanted:
                assert (start, count) == (77, 77)
                continue
            slots = wanted[head, place]
            if slots is None:
                assert count == EVERYTHING
            elif count == EVERYTHING:
                missing += 1
            else:
                assert index.slots[start : start + count].tolist() == slots
                taken += list(range(start, start + count))
    assert len(set(taken)) == len(taken)
    assert all(at < index.slots.shape[0] for at in taken)
    assert int(index.used) >= len(taken)
    if room is None:
        assert missing == 0
        assert int(index.used) == len(taken)
    return missing


@pytest.mark.parametrize("seed", range(12))
def test_lists_of_tiles_are_their_bits(seed: int) -> None:
    problem, index = tiles_problem(seed)
    wanted = wanted_lists(problem, index)
    paged.check_build_tiles(index, problem.kv, problem.batch)
    for version in (paged, triton):
        found = copied(index)
        assert version.build_tiles(found, problem.kv, problem.batch) is found
        check_lists(found, wanted)


def test_lists_of_more_words_than_a_program_takes_at_once() -> None:
    pattern = SparsePattern(block_q=20, block_k=1, window=30, sinks=4, dense_last=0)
    problem = make_paged(seq_lens=[33000, 40], rows=[10, 40], pattern=pattern, heads=1, size=16, group=1, block=64)
    index = tile_index(problem, random.Random(1))
    index.bars.fill_(-1.0)
    index.bits.fill_(0)
    index.bits[:, :, ::3] = 1 << 9
    index.bits[:, :, 700:1000:7] = -(2**31) + 1
    index.bits[:, :, 900] = -1
    wanted = wanted_lists(problem, index)
    index = index._replace(slots=torch.full((100000,), 77, dtype=torch.int32, device=DEVICE))
    for version in (paged, triton):
        found = copied(index)
        version.build_tiles(found, problem.kv, problem.batch)
        check_lists(found, wanted)


@pytest.mark.parametrize("room", [0, 1, 100, 500])
def test_tiles_whose_lists_find_no_room_attend_to_every_key(room: int) -> None:
    pattern = SparsePattern(block_q=16, block_k=1, window=8, sinks=4, dense_last=0)
    problem = make_paged(seq_lens=[150, 90], rows=[64, 90], pattern=pattern, heads=2, size=16, group=1)
    index = tile_index(problem, random.Random(0))
    index.bars.fill_(-1.0)
    index.bits.fill_(0x5555555)
    wanted = wanted_lists(problem, index)
    behind = torch.full((room + 64,), 77, dtype=torch.int32, device=DEVICE)
    for version in (paged, triton):
        behind.fill_(77)
        found = copied(index)._replace(slots=behind[:room])
        version.build_tiles(found, problem.kv, problem.batch)
        assert check_lists(found, wanted, room) > 0
        assert (behind[room:] == 77).all()


def test_no_rows_no_lists() -> None:
    pattern = SparsePattern(block_q=16, block_k=1, window=8, sinks=4, dense_last=0)
    problem = make_paged(seq_lens=[150], rows=[0], pattern=pattern, heads=1, size=16, group=1)
    index = tile_index(problem, random.Random(0))
    for version, most in ((paged, 0), (triton, 0), (triton, 3)):
        found = copied(index)
        version.build_tiles(found, problem.kv, problem.batch._replace(max_rows=most))
        check_lists(found, {})


def test_wrong_tiles_are_named() -> None:
    problem, index = tiles_problem(0)
    with pytest.raises(ValueError, match=r"^index has room for 0 KV heads"):
        paged.check_build_tiles(index._replace(bits=index.bits[:0]), problem.kv, problem.batch)
