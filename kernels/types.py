# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Data types shared by every operation of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SparsePattern:
    """The part of the sparsity pattern that does not depend on the prompt.

    Positions are absolute positions in the sequence; query tiles and key granules lie on the absolute grids
    ``position // block_q`` and ``position // block_k``, so the pattern does not move with the chunk boundaries.

    Attributes:
        block_q: query tile, in positions. All rows of a tile share one list of keys.
        block_k: key granule, in positions, to which diagonals, local window and sinks are rounded outwards.
        window: local window, in positions: diagonals ``0 .. window - 1`` are always kept. A query attends to itself
            even with 0.
        sinks: the first positions of the sequence that are always kept.
        dense_last: last rows of the call that attend to every key up to their own position.

    Raises:
        ValueError: a field is not an integer or is out of range; the message names the field.
    """

    block_q: int = 128
    block_k: int = 64
    window: int = 1024
    sinks: int = 64
    dense_last: int = 64

    def __post_init__(self) -> None:
        for name, minimum in (("block_q", 1), ("block_k", 1), ("window", 0), ("sinks", 0), ("dense_last", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an int, got {value!r}")
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")


class Selection(NamedTuple):
    """Columns and diagonals chosen for one sequence, per KV head.

    Every row of ``columns`` and ``diagonals`` is valid up to its count only; what follows is undefined and may lie
    outside the sequence.

    Attributes:
        columns: int32 ``[H_kv, max_cols]``, ascending key positions.
        num_columns: int32 ``[H_kv]``.
        diagonals: int32 ``[H_kv, max_diags]``, ascending diagonals in positions; 0 is the query itself.
        num_diagonals: int32 ``[H_kv]``.
    """

    columns: Tensor
    num_columns: Tensor
    diagonals: Tensor
    num_diagonals: Tensor

    def below(self, seq_len: int) -> Selection:
        """The same choice for the first ``seq_len`` tokens only: later columns and longer diagonals are gone.

        The arrays are shared, only the counts are new.
        """

        def count(values: Tensor, counts: Tensor) -> Tensor:
            valid = torch.arange(values.shape[1], device=values.device) < counts.unsqueeze(1)
            return (valid & (values < seq_len)).sum(1, dtype=torch.int32)

        return Selection(
            self.columns,
            count(self.columns, self.num_columns),
            self.diagonals,
            count(self.diagonals, self.num_diagonals),
        )


class IndexerLayerWeights(NamedTuple):
    """Weights of the two linear layers of the VSIndexer for one attention layer, stacked over KV heads.

    Attributes:
        w1: ``[H_kv, 2 * D, hidden]``.
        b1: ``[H_kv, hidden]``.
        w2: ``[H_kv, hidden, 2]``; the last axis is (column, diagonal).
        b2: ``[H_kv, 2]``.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
