# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Random problems for the kernel tests, and the definitions of what they compute written out with plain loops."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from torch import Tensor

from vllm_vsprefill.kernels.types import Selection, SparsePattern

# Relative error by norm that a result in this dtype may have.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make_selection(columns: list[list[int]], diagonals: list[list[int]], *, stale: int = 2**31 - 1) -> Selection:
    """A selection from one list per KV head; rows are longer than needed and end in ``stale``."""

    def pad(lists: list[list[int]]) -> Tensor:
        width = max(map(len, lists)) + 3
        return torch.tensor([row + [stale] * (width - len(row)) for row in lists], dtype=torch.int32)

    def count(lists: list[list[int]]) -> Tensor:
        return torch.tensor(list(map(len, lists)), dtype=torch.int32)

    return Selection(pad(columns), count(columns), pad(diagonals), count(diagonals))


def tile_of(i: int, n: int, pattern: SparsePattern) -> range:
    start = i // pattern.block_q * pattern.block_q
    return range(start, min(start + pattern.block_q, n))


def granules_of(tile: range, n: int, diagonals: list[int], pattern: SparsePattern) -> set[int]:
    kept = {*diagonals, *range(max(pattern.window, 1))}
    along = {(i - d) // pattern.block_k for i in tile for d in kept if i >= d}
    return along | {p // pattern.block_k for p in range(min(pattern.sinks, n))}


def brute_force_mask(
    n: int, num_rows: int, columns: list[int], diagonals: list[int], pattern: SparsePattern
) -> npt.NDArray[np.bool_]:
    """bool ``[num_rows, n]`` for one KV head, straight from the definition."""
    mask = np.zeros((num_rows, n), dtype=bool)
    granules: dict[range, set[int]] = {}
    for r in range(num_rows):
        i = n - num_rows + r
        tile = tile_of(i, n, pattern)
        if tile not in granules:
            granules[tile] = granules_of(tile, n, diagonals, pattern)
        for j in range(i + 1):
            mask[r, j] = j in columns or j // pattern.block_k in granules[tile] or i >= n - pattern.dense_last
    return mask


def masked_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, masks: list[npt.NDArray[np.bool_]], scale: float
) -> Tensor:
    """float64 ``[T, Hq, D]``; one mask per KV head."""
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    num_rows, num_heads, _ = queries.shape
    out = np.zeros(queries.shape)
    for g in range(num_heads):
        h = g // (num_heads // keys.shape[1])
        for r in range(num_rows):
            seen = masks[h][r]
            logits = keys[seen, h] @ queries[r, g] * scale
            weights = np.exp(logits - logits.max())
            out[r, g] = weights @ values[seen, h] / weights.sum()
    return torch.from_numpy(out)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert torch.isfinite(actual).all()
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@dataclass(frozen=True)
class Problem:
    """One call of ``attend``."""

    q: Tensor
    k: Tensor
    v: Tensor
    columns: list[list[int]]
    diagonals: list[list[int]]
    pattern: SparsePattern
    scale: float

    @property
    def selection(self) -> Selection:
        return make_selection(self.columns, self.diagonals)

    @property
    def seq_len(self) -> int:
        return self.k.shape[0]

    def masks(self) -> list[npt.NDArray[np.bool_]]:
        return [
            brute_force_mask(self.seq_len, self.q.shape[0], columns, diagonals, self.pattern)
            for columns, diagonals in zip(self.columns, self.diagonals, strict=True)
        ]

    def with_pattern(self, **changes: Any) -> Problem:
        return replace(self, pattern=replace(self.pattern, **changes))


def make_problem(
    *,
    n: int,
    num_rows: int | None = None,
    num_kv_heads: int = 2,
    group: int = 4,
    size: int = 64,
    dtype: torch.dtype = torch.float32,
    num_columns: int = 10,
    num_diagonals: int = 3,
    pattern: SparsePattern | None = None,
    seed: int = 0,
) -> Problem:
    """Normal q, k, v; per KV head up to that many columns and diagonals."""
    rng = torch.Generator().manual_seed(seed)
    num_rows = n if num_rows is None else num_rows

    def normal(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, size, generator=rng, dtype=torch.float64).to(dtype)

    def some(maximum: int) -> list[int]:
        count = int(torch.randint(0, min(maximum, n) + 1, (), generator=rng)) if seed else min(maximum, n)
        return sorted(torch.randperm(n, generator=rng)[:count].tolist())

    return Problem(
        q=normal(num_rows, num_kv_heads * group),
        k=normal(n, num_kv_heads),
        v=normal(n, num_kv_heads),
        columns=[some(num_columns) for _ in range(num_kv_heads)],
        diagonals=[some(num_diagonals) for _ in range(num_kv_heads)],
        pattern=pattern or SparsePattern(block_q=16, block_k=8, window=10, sinks=4, dense_last=0),
        scale=size**-0.5,
    )


@st.composite
def patterns(draw: st.DrawFn) -> SparsePattern:
    return SparsePattern(
        block_q=draw(st.sampled_from([1, 2, 7, 16, 32, 64])),
        block_k=draw(st.sampled_from([1, 3, 8, 16, 64])),
        window=draw(st.sampled_from([0, 1, 2, 9, 16, 50])),
        sinks=draw(st.sampled_from([0, 1, 3, 16, 100])),
        dense_last=draw(st.sampled_from([0, 1, 5, 64])),
        parts=draw(st.sampled_from([1, 2, 3])),
    )


@st.composite
def problems(
    draw: st.DrawFn,
    max_seq_len: int,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    sizes: tuple[int, ...] = (16,),
) -> Problem:
    n = draw(st.integers(1, max_seq_len))
    return make_problem(
        n=n,
        num_rows=draw(st.integers(1, n)),
        num_kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        size=draw(st.sampled_from(sizes)),
        dtype=draw(st.sampled_from(dtypes)),
        num_columns=draw(st.sampled_from([0, 1, 12, max_seq_len])),
        num_diagonals=draw(st.sampled_from([0, 1, 4, max_seq_len])),
        pattern=draw(patterns()),
        seed=draw(st.integers(1, 10**6)),
    )
