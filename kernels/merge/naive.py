# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The keys of one query tile: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor
from ..types import SparsePattern


def check_merge(
    columns: Tensor, diagonals: Tensor, tile_start: int, tile_end: int, seq_len: int, pattern: SparsePattern
) -> None:
    """Checks every argument of ``merge``, including the range of the values."""
    integers = (torch.int32, torch.int64)
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
    if not 0 <= tile_start < tile_end <= seq_len:
        raise ValueError(
            f"tile_start and tile_end must satisfy 0 <= tile_start < tile_end <= seq_len, "
            f"got {tile_start}, {tile_end} and {seq_len}"
        )
    for name, value in (("columns", columns), ("diagonals", diagonals)):
        check_tensor(name, value, 1, integers)
        if value.numel() and not (0 <= int(value.min()) and int(value.max()) < seq_len):
            raise ValueError(f"{name} must lie in [0, {seq_len})")


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
        ValueError: wrong dtype or shape, a tile outside the context, or a value out of range.
    """
    check_merge(columns, diagonals, tile_start, tile_end, seq_len, pattern)
    device = columns.device
    # Distance 0 is always in: a query attends to itself.
    near = torch.arange(max(pattern.window, 1), device=device)
    rows = torch.arange(tile_start, tile_end, device=device)
    # [rows, diagonals]
    touched = rows.unsqueeze(1) - torch.cat((near, diagonals.long())).unsqueeze(0)
    sinks = torch.arange(min(pattern.sinks, tile_end), device=device)
    granules = torch.cat((touched[touched >= 0], sinks)).div(pattern.block_k, rounding_mode="floor").unique()
    offsets = torch.arange(pattern.block_k, device=device)
    keys = torch.cat(((granules.unsqueeze(1) * pattern.block_k + offsets).flatten(), columns.long()))
    merged: Tensor = keys[keys < tile_end].unique()
    return merged
