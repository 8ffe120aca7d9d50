# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The keys of one query tile: the plain reference."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_tile
from ..types import SparsePattern


def merge(
    columns: Tensor,
    diagonals: Tensor,
    *,
    tile_start: int,
    tile_end: int,
    seq_len: int,
    pattern: SparsePattern,
) -> Tensor:
    """Every key that some row of a query tile attends to, each once.

    A key belongs to the tile if it is a column, or if its granule holds ``i - d >= 0`` for a row ``i`` of the tile
    and a distance ``d`` that is selected or below ``max(window, 1)``, or a position below ``sinks``.

    Args:
        columns: int32 or int64 ``[C]``, key positions of one KV head.
        diagonals: int32 or int64 ``[S]``, diagonals of the same KV head.
        tile_start: first position of the tile.
        tile_end: one past its last position.
        seq_len: number of keys of the sequence.
        pattern: granularity, window and sinks.

    Returns:
        int64 ``[m]``, ascending, unique, all below ``tile_end``.

    Raises:
        ValueError: wrong dtype or shape, a tile outside the sequence, or a value out of range.
    """
    check_tile(columns, diagonals, tile_start, tile_end, seq_len, pattern)
    return pattern.tile_keys(columns, diagonals, tile_start, tile_end)
