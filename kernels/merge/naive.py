# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The keys of one query tile: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_tensor
from ..types import SparsePattern


def check_merge(
    columns: Tensor, distances: Tensor, tile_start: int, tile_end: int, context_len: int, pattern: SparsePattern
) -> None:
    """Checks every argument of ``merge``, including the range of the values."""
    integers = (torch.int32, torch.int64)
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
    if not 0 <= tile_start < tile_end <= context_len:
        raise ValueError(
            f"tile_start and tile_end must satisfy 0 <= tile_start < tile_end <= context_len, "
            f"got {tile_start}, {tile_end} and {context_len}"
        )
    for name, value in (("columns", columns), ("distances", distances)):
        check_tensor(name, value, 1, integers)
        if value.numel() and not (0 <= int(value.min()) and int(value.max()) < context_len):
            raise ValueError(f"{name} must lie in [0, {context_len})")


def merge(
    columns: Tensor,
    distances: Tensor,
    *,
    tile_start: int,
    tile_end: int,
    context_len: int,
    pattern: SparsePattern,
) -> Tensor:
    """Every key that some row of a query tile attends to, each once.

    A key belongs to the tile if it is a column, or if its granule holds ``i - d >= 0`` for a row ``i`` of the tile
    and a distance ``d`` that is selected or below ``max(window, 1)``, or a position below ``sinks``.

    Args:
        columns: int32 or int64 ``[C]``, key positions of one KV head.
        distances: int32 or int64 ``[S]``, distances of the same KV head.
        tile_start: first position of the tile.
        tile_end: one past its last position.
        context_len: number of keys of the sequence.
        pattern: granularity, window and sinks.

    Returns:
        int64 ``[m]``, ascending, unique, all below ``tile_end``.

    Raises:
        ValueError: wrong dtype or shape, a tile outside the context, or a value out of range.
    """
    check_merge(columns, distances, tile_start, tile_end, context_len, pattern)
    device = columns.device
    # Distance 0 is always in: a query attends to itself.
    near = torch.arange(max(pattern.window, 1), device=device)
    rows = torch.arange(tile_start, tile_end, device=device)
    # [rows, distances]
    touched = rows.unsqueeze(1) - torch.cat((near, distances.long())).unsqueeze(0)
    sinks = torch.arange(min(pattern.sinks, tile_end), device=device)
    granules = torch.cat((touched[touched >= 0], sinks)).div(pattern.block_k, rounding_mode="floor").unique()
    offsets = torch.arange(pattern.block_k, device=device)
    keys = torch.cat(((granules.unsqueeze(1) * pattern.block_k + offsets).flatten(), columns.long()))
    merged: Tensor = keys[keys < tile_end].unique()
    return merged
