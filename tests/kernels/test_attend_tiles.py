# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Attention to lists of tiles: the plain reference against loops."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.problems import TOLERANCE, make_problem, masked_softmax_attention, patterns, relative_error
from vllm_vsprefill.kernels.attend_tiles.naive import attend_tiles
from vllm_vsprefill.kernels.types import SparsePattern


def definition(keys: Tensor, num_rows: int, pattern: SparsePattern) -> list[npt.NDArray[np.bool_]]:
    """bool ``[num_rows, n]`` of each KV head, straight from the definition."""
    heads, _, n = keys.shape
    masks = [np.zeros((num_rows, n), dtype=bool) for _ in range(heads)]
    first_tile = (n - num_rows) // pattern.block_q
    for head in range(heads):
        for r in range(num_rows):
            i = n - num_rows + r
            tile_start = i // pattern.block_q * pattern.block_q
            # The first key that the tile's first row has in its window, and the granules of that and of the sinks.
            oldest = max(tile_start - max(pattern.window, 1) + 1, 0) // pattern.block_k * pattern.block_k
            sinks = -(-pattern.sinks // pattern.block_k) * pattern.block_k
            for j in range(i + 1):
                masks[head][r, j] = j < sinks or j >= oldest or bool(keys[head, i // pattern.block_q - first_tile, j])
    return masks


@settings(max_examples=150)
@given(
    n=st.integers(1, 70),
    part=st.floats(0, 1),
    group=st.sampled_from([1, 3, 6]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    pattern=patterns(),
    seed=st.integers(1, 10**6),
)
def test_definition(n: int, part: float, group: int, share: float, pattern: SparsePattern, seed: int) -> None:
    num_rows = max(1, int(part * n))
    problem = make_problem(n=n, num_rows=num_rows, group=group, size=16, dtype=torch.float64, seed=seed)
    shape = (problem.k.shape[1], len(pattern.tiles(num_rows, n)), n)
    keys = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    masks = definition(keys, num_rows, pattern)
    out, visited = attend_tiles(problem.q, problem.k, problem.v, keys, pattern, scale=problem.scale)
    assert visited == sum(int(mask.sum()) for mask in masks)
    expected = masked_softmax_attention(problem.q, problem.k, problem.v, masks, problem.scale)
    # The reference computes in float32.
    assert relative_error(out, expected) < TOLERANCE[torch.float32]


def test_output_is_written() -> None:
    problem = make_problem(n=20, dtype=torch.float32)
    pattern = SparsePattern(block_q=8, block_k=1, window=2, sinks=1)
    out = torch.full_like(problem.q, float("nan"))
    keys = torch.zeros(2, 3, 20, dtype=torch.bool)
    found, _ = attend_tiles(problem.q, problem.k, problem.v, keys, pattern, scale=1.0, out=out)
    assert found is out
    assert out.isfinite().all()
    with pytest.raises(ValueError, match=r"^keys must have shape"):
        attend_tiles(problem.q, problem.k, problem.v, keys[:, 1:], pattern, scale=1.0)
