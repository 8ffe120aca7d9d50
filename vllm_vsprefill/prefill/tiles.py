# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Tiles of queries that share a list of keys, and the device memory for their lists."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.kernels.price.paged import PriceWorkspace, allocate_price
from vllm_vsprefill.kernels.rank.paged import RankWorkspace, allocate_rank
from vllm_vsprefill.kernels.tile_index import TileIndex, TileStorage, allocate_tiles
from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.kernels.variance.paged import VarianceWorkspace, allocate_variance
from vllm_vsprefill.plan import MIN_ROWS
from vllm_vsprefill.prefill.buffers import MAX_REQUESTS, RoundBuffers, round_buffers
from vllm_vsprefill.prefill.layer import Heads
from vllm_vsprefill.tuning import PlatformTuning

PIECE_ROWS = 128
"""Rows, positions times heads of a group, that a program of ``attend_tiles`` multiplies at a time."""

MOST_MEANS, MOST_CHANNELS = 32, 128
"""Mean queries of a tile and KV head, and their channels, where tiles have parts: a program of ``price`` multiplies all
of them at a time. Of larger heads and groups tiles have one part."""

LONGER = (65536, 262144)
"""Tokens of the sequence beyond which a tile has twice the positions: ranking costs rows times keys by positions of a
tile, and lists are read by more than one program then."""


def tile_positions(group: int, seq_len: int) -> int:
    """Positions of a tile on a GPU: what fills the rows of one program, more where sequences are long."""
    piece = 2 * max(PIECE_ROWS // 2 // group, 1)
    return piece << sum(seq_len > limit for limit in LONGER)


class Tiling:
    """Which tiles a sequence is cut into, by its length.

    Args:
        pattern: window, sinks and granules; its ``block_q`` counts where ``fixed`` is set.
        heads: of a layer.
        max_seq_len: tokens of the longest sequence.
        fixed: the user has said how long tiles are.
        any_parts: tiles may have any number of parts, as on a CPU; otherwise as many as a program holds.
    """

    def __init__(
        self, pattern: SparsePattern, heads: Heads, max_seq_len: int, *, fixed: bool = False, any_parts: bool = False
    ) -> None:
        group = heads.num_heads // heads.num_kv_heads
        most = MOST_MEANS // group if heads.head_size <= MOST_CHANNELS else 1
        if any_parts:
            most = pattern.parts
        pattern = dataclasses.replace(pattern, parts=max(1, min(pattern.parts, most)))
        limits = [*(limit for limit in LONGER if limit < max_seq_len), max_seq_len]
        if fixed:
            self._patterns = [(pattern, max_seq_len)]
        else:
            self._patterns = [
                (dataclasses.replace(pattern, block_q=tile_positions(group, limit)), limit) for limit in limits
            ]

    @property
    def patterns(self) -> list[tuple[SparsePattern, int]]:
        """All of them, each with the longest sequence that it is for."""
        return self._patterns

    def of(self, seq_len: int) -> SparsePattern:
        """The pattern for a sequence."""
        return next((pattern for pattern, limit in self._patterns if seq_len <= limit), self._patterns[-1][0])


def tiling_of(
    options: VSPrefillConfig, tuning: PlatformTuning, heads: Heads, longest: int, *, any_parts: bool = True
) -> Tiling:
    """How a server cuts sequences of at most ``longest`` tokens, without the dense last rows of a chunk.

    Args:
        options: with the platform's defaults filled in.
        tuning: the platform's.
        heads: of a layer.
        longest: tokens.
        any_parts: False where kernels compute that a program limits, whatever the platform would allow.
    """
    pattern = dataclasses.replace(options.tile_pattern(tuning), dense_last=0)
    fixed = bool(tuning.tile_q) or "block_q" in options.model_fields_set
    return Tiling(pattern, heads, longest, fixed=fixed, any_parts=any_parts and tuning.tile_any_parts)


class TileShape(NamedTuple):
    """What decides how large the buffers are.

    Attributes:
        heads: of a layer on this rank.
        dtype: of queries.
        max_seq_len: tokens of the longest sequence.
        num_layers: layers that run sparse.
        priced_rows: rows of a chunk whose true attention is computed.
    """

    heads: Heads
    dtype: torch.dtype
    max_seq_len: int
    num_layers: int
    priced_rows: int


class VarianceBuffers(NamedTuple):
    """What ``variance`` works with and writes.

    Attributes:
        workspace: of the operation.
        prior: float32 ``[requests, Hkv, positions]``, what it adds to the scores of the keys of a round.
    """

    workspace: VarianceWorkspace
    prior: Tensor

    @classmethod
    def allocate(cls, requests: int, shape: TileShape, device: torch.device) -> VarianceBuffers:
        """Buffers for so many requests."""
        _, kv_heads, head_size = shape.heads
        return cls(
            allocate_variance(requests, kv_heads, head_size, shape.dtype, device),
            torch.empty(requests, kv_heads, shape.max_seq_len, dtype=torch.float32, device=device),
        )


@dataclass
class TileBuffers(RoundBuffers):
    """Buffers where every tile has a list of its own.

    Attributes:
        tiling: which tiles.
        storage: lists.
        price, rank: workspaces of these operations.
        variance: what this operation takes where ``SparsePattern.variance`` asks for it, else None.
    """

    tiling: Tiling
    storage: TileStorage
    price: PriceWorkspace
    rank: RankWorkspace
    variance: VarianceBuffers | None = None

    @classmethod
    def allocate(
        cls, shape: TileShape, tiling: Tiling, *, max_num_seqs: int, max_tokens: int, device: torch.device
    ) -> TileBuffers:
        """Buffers for all requests that a step can have, ``MAX_REQUESTS`` at most."""
        requests = max(1, min(MAX_REQUESTS, max_num_seqs, max_tokens // MIN_ROWS))
        heads = shape.heads
        smallest = min(pattern.block_q for pattern, _ in tiling.patterns)
        parts, with_variance = tiling.patterns[0][0].parts, tiling.patterns[0][0].variance
        return cls(
            requests,
            tiling=tiling,
            storage=allocate_tiles(requests, heads.num_kv_heads, max_tokens, tiling.patterns, device),
            price=allocate_price(
                requests, heads.num_heads, heads.num_kv_heads, heads.head_size, shape.max_seq_len, shape.priced_rows,
                shape.dtype, device, parts,
            ),
            rank=allocate_rank(
                max_tokens, requests, heads.num_heads, heads.head_size, smallest, shape.dtype, device, parts
            ),
            variance=VarianceBuffers.allocate(requests, shape, device) if with_variance else None,
            **round_buffers(shape.num_layers, device),
        )  # fmt: skip

    def workspaces(self) -> list[Tensor]:
        """Scratch of the kernels."""
        parts: list[object] = [*self.storage, *self.price, *self.rank]
        if self.variance is not None:
            parts += [*self.variance.workspace, self.variance.prior]
        return [part for part in parts if isinstance(part, Tensor)]

    @property
    def prior(self) -> Tensor | None:
        """What is added to the scores of the keys of a round, if anything."""
        return None if self.variance is None else self.variance.prior

    def index(self, row_end: int, requests: int, longest: int) -> TileIndex:
        """Lists of a round, in this memory; all of its sequences have the same tiles."""
        return self.storage.view(self.tiling.of(longest), row_end, requests, longest)
