# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Keys of a query tile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.problems import granules_of, patterns
from vllm_vsprefill.kernels.merge import merge
from vllm_vsprefill.kernels.types import SparsePattern


def run(columns: list[int], diagonals: list[int], tile: range, n: int, pattern: SparsePattern) -> list[int]:
    keys = merge(
        torch.tensor(columns, dtype=torch.int32),
        torch.tensor(diagonals, dtype=torch.int32),
        tile_start=tile.start,
        tile_end=tile.stop,
        seq_len=n,
        pattern=pattern,
    )
    assert keys.dtype == torch.int64
    return keys.tolist()


@given(data=st.data(), n=st.integers(1, 200), pattern=patterns())
def test_each_key_once_sorted_causal_and_as_defined(data: st.DataObject, n: int, pattern: SparsePattern) -> None:
    positions = st.lists(st.integers(0, n - 1), unique=True, max_size=12).map(sorted)
    columns, diagonals = data.draw(positions), data.draw(positions)
    first = data.draw(st.integers(0, (n - 1) // pattern.block_q)) * pattern.block_q
    tile = range(first, min(first + pattern.block_q, n))
    keys = run(columns, diagonals, tile, n, pattern)
    assert keys == sorted(set(keys))
    assert 0 <= keys[0]
    assert keys[-1] < tile.stop
    granules = granules_of(tile, n, diagonals, pattern)
    assert keys == [j for j in range(tile.stop) if j in columns or j // pattern.block_k in granules]
    assert set(tile) <= set(keys)


def test_example() -> None:
    pattern = SparsePattern(block_q=4, block_k=2, window=3, sinks=1, dense_last=0)
    # Tile 20..23: window 18..23, distance 9 touches 11..14 and so granules 10..15, sink 0 touches 0..1.
    assert run([5, 11, 23], [9], range(20, 24), 30, pattern) == [0, 1, 5, *range(10, 16), *range(18, 24)]


def test_columns_behind_the_tile_are_dropped() -> None:
    pattern = SparsePattern(block_q=4, block_k=1, window=0, sinks=0, dense_last=0)
    assert run([3, 4, 7], [], range(4), 8, pattern) == [0, 1, 2, 3]


def test_granule_is_cut_at_the_end_of_the_context() -> None:
    pattern = SparsePattern(block_q=4, block_k=64, window=1, sinks=500, dense_last=0)
    assert run([], [], range(4, 6), 6, pattern) == [0, 1, 2, 3, 4, 5]


PATTERN = SparsePattern(block_q=4, block_k=2)
GOOD: dict[str, Any] = {
    "columns": torch.tensor([1], dtype=torch.int32),
    "diagonals": torch.tensor([2], dtype=torch.int32),
    "tile_start": 4,
    "tile_end": 8,
    "seq_len": 9,
    "pattern": PATTERN,
}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"columns": torch.tensor([9], dtype=torch.int32)}, "columns must lie in"),
        ({"columns": torch.tensor([-1], dtype=torch.int32)}, "columns must lie in"),
        ({"columns": torch.tensor([1.0])}, "columns must have dtype"),
        ({"diagonals": torch.tensor([[1]])}, "diagonals must have 1 axes"),
        ({"diagonals": torch.tensor([9])}, "diagonals must lie in"),
        ({"diagonals": [1]}, "diagonals must be a tensor"),
        ({"tile_start": 8}, "tile_start"),
        ({"tile_end": 10}, "tile_end"),
        ({"tile_start": -1}, "tile_start"),
        ({"pattern": None}, "pattern must be a SparsePattern"),
    ],
)
def test_bad_argument_is_named(bad: dict[str, Any], message: str) -> None:
    merge(**GOOD)
    with pytest.raises(ValueError, match=message):
        merge(**{**GOOD, **bad})


def test_64_bit_positions_are_accepted() -> None:
    wide = {name: GOOD[name].long() for name in ("columns", "diagonals")}
    assert torch.equal(merge(**{**GOOD, **wide}), merge(**GOOD))
    assert replace(PATTERN) == PATTERN
