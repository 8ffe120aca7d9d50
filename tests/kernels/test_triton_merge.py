# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The index of the device against the plain reference, and the reference against the union of a tile."""

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
