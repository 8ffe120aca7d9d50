# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Random batches of requests on a paged cache whose unused parts are poisoned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE
from tests.kernels.problems import make_selection
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.types import Selection, SparsePattern


@dataclass(frozen=True)
class PagedProblem:
    """Several requests; ``q`` has a row of no request before, between and behind theirs."""

    q: Tensor
    kv: PagedKV
    batch: Batch
    selections: list[Selection]
    pattern: SparsePattern

    @property
    def scale(self) -> float:
        return float(self.q.shape[2]) ** -0.5

    def seq_lens(self) -> list[int]:
        return [int(n) for n in self.batch.seq_len]


def paged_cache(
    seq_lens: list[int], heads: int, size: int, block: int, rng: torch.Generator, *, layout: str = "NHD",
    dtype: torch.dtype = torch.float32,
) -> PagedKV:  # fmt: skip
    """Blocks in random order; slots behind a sequence and blocks of nobody are NaN, table tails point far outside."""
    counts = [-(-n // block) for n in seq_lens]
    total = sum(counts) + 3
    order = torch.randperm(total, generator=rng)[: sum(counts)].split(counts)
    shape = (total, block, heads, 2 * size) if layout == "NHD" else (total, heads, block, 2 * size)
    storage = torch.full(shape, float("nan"), dtype=torch.float64)
    cache = storage.transpose(1, 2) if layout == "NHD" else storage
    table = torch.full((len(seq_lens), max(counts) + 2), 2**31 - 1, dtype=torch.int32)
    for i, n in enumerate(seq_lens):
        values = torch.randn(counts[i] * block, heads, 2 * size, generator=rng, dtype=torch.float64)
        values[n:] = float("nan")
        cache[order[i]] = values.view(counts[i], block, heads, 2 * size).transpose(1, 2)
        table[i, : counts[i]] = order[i]
    return PagedKV(cache.to(dtype).to(DEVICE), table.to(DEVICE))


def random_selection(n: int, heads: int, columns: int, diagonals: int, rng: torch.Generator) -> Selection:
    """Up to that many of each per head; short lists in front of stale entries."""

    def some(maximum: int) -> list[int]:
        count = int(torch.randint(0, min(maximum, n) + 1, (), generator=rng))
        return sorted(torch.randperm(n, generator=rng)[:count].tolist())

    selection = make_selection([some(columns) for _ in range(heads)], [some(diagonals) for _ in range(heads)])
    return Selection(*(x.to(DEVICE) for x in selection))


def make_batch(rows: list[int], seq_lens: list[int]) -> tuple[Batch, int]:
    """Requests with one unused row before each; also returns the number of rows in all."""
    starts, at = [], 0
    for count in rows:
        starts.append(at + 1)
        at += count + 1
    start = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor(rows, dtype=torch.int32, device=DEVICE)
    length = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    # Bounds may be generous.
    return Batch(start, start + lengths, length, max(rows) + 3, max(seq_lens) + 5), at + 1


def make_paged(
    *, seq_lens: list[int], rows: list[int], pattern: SparsePattern, heads: int = 2, group: int = 4, size: int = 64,
    block: int = 16, columns: int = 20, diagonals: int = 4, layout: str = "NHD", dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PagedProblem:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)
    batch, total = make_batch(rows, seq_lens)
    kv = paged_cache(seq_lens, heads, size, block, rng, layout=layout, dtype=dtype)
    q = torch.randn(total, heads * group, size, generator=rng, dtype=torch.float64).to(dtype).to(DEVICE)
    # Rows of no request are not read.
    used = torch.zeros(total, dtype=torch.bool)
    for start, count in zip(batch.row_start.tolist(), rows, strict=True):
        used[start : start + count] = True
    q[~used.to(DEVICE)] = float("nan")
    selections = [random_selection(n, heads, columns, diagonals, rng) for n in seq_lens]
    return PagedProblem(q, kv, batch, selections, pattern)


def random_priors(problem: PagedProblem, seed: int) -> Tensor:
    """What is added to the scores of keys, float32 ``[requests, Hkv, positions]``; behind each sequence NaN."""
    gen = torch.Generator().manual_seed(seed)
    shape = problem.batch.num_requests + 1, problem.kv.num_kv_heads + 1, problem.batch.max_seq_len + 3
    prior = torch.randn(shape, generator=gen)[:-1, 1:]
    for i, n in enumerate(problem.seq_lens()):
        prior[i, :, n:] = float("nan")
    return prior.to(DEVICE)
