# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What ``price`` decides, ``rank`` marks, ``merge`` lists and ``attend_tiles`` reads: lists of keys for every tile of
every request of a round.

Tiles of all requests lie one behind the other: the tile around position ``p`` of request ``r``, whose rows begin at
position ``first = seq_len - (row_end - row_start)``, has the place::

    row_start // block_q + 2 * r  +  p // block_q - first // block_q

so that no two requests share a place, however their rows lie in their tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_tensor
from .launch import cdiv
from .paged import Batch
from .types import SparsePattern

WORD_BITS = 32
WORDS = 128  # a row of bits is a multiple of so many words: 4,096 keys
LISTED = 5120
"""Keys for which the list of a tile has room, on average: a quarter more than the last step of ``price``'s ladder, and
twice as many for each of a sequence's ``doublings``."""

FULL_KEYS, DOUBLINGS = 16384, 2
"""Up to how many keys ``price`` looks at all rows and its ladder is as it is written, and how often, as the sequence
doubles beyond, it looks at half as many rows and lists are twice as long."""

EVERYTHING = -1
"""In ``counts``: the tile attends to every key; it has no list."""


class TileIndex(NamedTuple):
    """Lists of keys of a round. ``T`` is the room for tiles.

    Attributes:
        bars: float32 ``[requests, Hkv]``, the least score of a listed key; +inf lists none, -inf all.
        density: float32 ``[requests, Hkv]``, share of the chunk's causal pairs that is to be expected.
        bits: int32 ``[Hkv, T, words]``, bit ``j % 32`` of word ``j // 32`` set where key ``j`` is listed. Words of keys
            that the tile must not list, and those behind its sequence, may hold anything.
        starts: int32 ``[Hkv, T]``, where in ``slots`` the tile's list begins.
        counts: int32 ``[Hkv, T]``, its length, sinks included; ``EVERYTHING`` where it attends to every key.
        slots: int32 ``[room]``, cache slots, ascending in position within a list.
        used: int32 ``[1]``, how much of ``slots`` is taken; a tile whose list finds no room attends to every key.
        pattern: tiles, window and sinks.
    """

    bars: Tensor
    density: Tensor
    bits: Tensor
    starts: Tensor
    counts: Tensor
    slots: Tensor
    used: Tensor
    pattern: SparsePattern

    @staticmethod
    def tiles_of(block_q: int, num_rows: int, num_requests: int) -> int:
        """Room for the tiles, of ``block_q`` positions, of so many rows of so many requests."""
        return num_rows // block_q + 2 * num_requests

    def place(self, row_start: int, request: int, first: int, tile: int) -> int:
        """Place of a tile, ``position // block_q``, of a request whose rows begin at position ``first``."""
        return row_start // self.pattern.block_q + 2 * request + tile - first // self.pattern.block_q


class TileStorage(NamedTuple):
    """Memory of indexes, allocated once.

    Attributes:
        bars, density: as in ``TileIndex``, for the largest round.
        bits, starts, counts, slots, used: flat.
    """

    bars: Tensor
    density: Tensor
    bits: Tensor
    starts: Tensor
    counts: Tensor
    slots: Tensor
    used: Tensor

    def view(self, pattern: SparsePattern, num_rows: int, num_requests: int, max_seq_len: int) -> TileIndex:
        """An index for a round, in this memory.

        Args:
            pattern: tiles, window and sinks.
            num_rows: one past the last row of the round.
            num_requests: requests of the round.
            max_seq_len: its longest sequence.

        Raises:
            ValueError: there is no room for it.
        """
        heads = self.bars.shape[1]
        tiles, words = TileIndex.tiles_of(pattern.block_q, num_rows, num_requests), words_of(max_seq_len)
        if heads * tiles * words > self.bits.shape[0] or heads * tiles > self.starts.shape[0]:
            raise ValueError(f"no room for {tiles} tiles of {num_rows} rows over {max_seq_len} keys")
        if num_requests > self.bars.shape[0]:
            raise ValueError(f"there is room for {self.bars.shape[0]} requests, not {num_requests}")
        return TileIndex(
            self.bars[:num_requests],
            self.density[:num_requests],
            self.bits[: heads * tiles * words].view(heads, tiles, words),
            self.starts[: heads * tiles].view(heads, tiles),
            self.counts[: heads * tiles].view(heads, tiles),
            self.slots,
            self.used,
            pattern,
        )


def doublings(seq_len: int) -> int:
    """How often a sequence has doubled beyond ``FULL_KEYS``, ``DOUBLINGS`` at most."""
    return sum(seq_len > FULL_KEYS << i for i in range(DOUBLINGS))


def words_of(seq_len: int) -> int:
    """Words of a row of bits for so many keys."""
    return cdiv(cdiv(seq_len, WORD_BITS), WORDS) * WORDS


def allocate_tiles(
    num_requests: int,
    num_kv_heads: int,
    max_rows: int,
    shapes: list[tuple[SparsePattern, int]],
    device: torch.device | str,
) -> TileStorage:
    """Memory for indexes; allocate it once.

    Args:
        num_requests: requests of a round.
        num_kv_heads: KV heads.
        max_rows: rows of a round.
        shapes: the patterns that will be used, each with the longest sequence that it is used for.
        device: device.
    """
    tiles = [TileIndex.tiles_of(pattern.block_q, max_rows, num_requests) for pattern, _ in shapes]
    bits = max(count * words_of(longest) for count, (_, longest) in zip(tiles, shapes, strict=True))
    listed = max(
        count * min(longest, (LISTED << doublings(longest)) + pattern.sink_keys)
        for count, (pattern, longest) in zip(tiles, shapes, strict=True)
    )

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return TileStorage(
        room(num_requests, num_kv_heads, dtype=torch.float32),
        room(num_requests, num_kv_heads, dtype=torch.float32),
        room(num_kv_heads * bits),
        room(num_kv_heads * max(tiles)),
        room(num_kv_heads * max(tiles)),
        room(num_kv_heads * listed),
        room(1),
    )


def check_tiles(index: TileIndex, batch: Batch, num_kv_heads: int, device: torch.device) -> None:
    """Checks that an index has room for a batch.

    Raises:
        ValueError: names the argument.
    """
    bits = check_tensor("index.bits", index.bits, 3, (torch.int32,))
    if bits.device != device:
        raise ValueError(f"index is on {bits.device}, expected {device}")
    if bits.shape[0] != num_kv_heads or index.bars.shape[1] != num_kv_heads:
        raise ValueError(f"index has room for {bits.shape[0]} KV heads, not {num_kv_heads}")
    if index.bars.shape[0] < batch.num_requests:
        raise ValueError(f"index has room for {index.bars.shape[0]} requests, not {batch.num_requests}")
    if bits.shape[1] < TileIndex.tiles_of(index.pattern.block_q, batch.max_rows, batch.num_requests):
        raise ValueError(f"index has no room for {batch.max_rows} rows")
    if bits.shape[2] < words_of(batch.max_seq_len):
        raise ValueError(f"index has no room for sequences of {batch.max_seq_len} tokens")
