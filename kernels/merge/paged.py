# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The index of a round, or the lists of its tiles: the plain references over requests, and flags from selections that
were made elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..checks import check_selection
from ..index import NONE, RANK, Index, check_index
from ..paged import Batch, PagedKV, check_device, check_paged
from ..reference import cache_slots, with_rows
from ..tile_index import EVERYTHING, WORD_BITS, TileIndex, check_tiles
from ..types import Selection


def set_flags(index: Index, selections: list[Selection], batch: Batch) -> None:
    """Takes over selections that were made elsewhere, one per request, as ``select`` does with its own.

    Args:
        index: its flags are written.
        selections: as the contiguous versions return them; entries beyond the sequence are left out.
        batch: the requests.

    Raises:
        ValueError: wrong shape, dtype or device; names the argument.
    """
    device, num_heads = index.flags.device, index.flags.shape[2]
    check_index(index, batch, num_heads, device)
    if len(selections) != batch.num_requests:
        raise ValueError(f"selections has {len(selections)} entries for {batch.num_requests} requests")
    index.flags[: batch.num_requests].zero_()
    for i, (selection, n) in enumerate(zip(selections, batch.seq_len.tolist(), strict=True)):
        check_selection(selection, num_heads, device)
        lists = ((selection.columns, selection.num_columns), (selection.diagonals, selection.num_diagonals))
        for flags, (items, counts) in zip(index.flags[i], lists, strict=True):
            valid = torch.arange(items.shape[1], device=device) < counts.unsqueeze(1)
            head, entry = (valid & (items >= 0) & (items < n)).nonzero(as_tuple=True)
            flags[head, items[head, entry].long()] = 1


def check_build_index(index: Index, kv: PagedKV, batch: Batch) -> None:
    """Checks every argument of ``build_index``.

    Raises:
        ValueError: wrong shape, dtype or device; names the argument.
    """
    check_device("index", index.flags)
    check_paged(kv, batch, index.flags.device)
    check_index(index, batch, kv.num_kv_heads, index.flags.device)


def build_index(index: Index, kv: PagedKV, batch: Batch) -> Index:
    """Lists and tables from the flags.

    Args:
        index: flags are read, everything else is written, as far as the sequences reach.
        kv: its block table gives the slots.
        batch: the requests; rows are not looked at.

    Returns:
        ``index``.
    """
    pattern = index.pattern
    block_q, block_k = pattern.block_q, pattern.block_k
    for i, n in enumerate(batch.seq_len.tolist()):
        flags = index.flags[i, :, :, :n] != 0
        columns = flags[0].clone()
        columns[:, : pattern.sink_keys] = True
        slots = cache_slots(kv, i, n)
        # Granule r belongs to a tile iff one of `span` distances from r * block_k - block_k + 1 on is selected;
        # `near` is the first of them that is.
        span, granules = block_q + block_k - 1, n // block_k + 2
        room = granules * block_k + span
        distances = F.pad(flags[1], (block_k - 1, max(room - n, 0)))[:, :room]
        windows = distances.unfold(1, span, block_k)[:, :granules]
        near = torch.where(windows.any(-1), windows.to(torch.uint8).argmax(-1), NONE)
        index.near[i, :, :granules] = near.to(torch.uint8)
        beyond = torch.arange(granules, device=near.device) > pattern.window_granules
        for head in range(kv.num_kv_heads):
            for members, values, rank in (
                (columns[head], index.columns[i, head], index.rank[i, head]),
                ((near[head] != NONE) & beyond, index.granules[i, head], index.granule_rank[i, head]),
            ):
                found = members.nonzero().squeeze(1)
                values[: len(found)] = found.int()
                # How many lie below 64 * j, up to the first such position behind the last member.
                below = F.pad(members, (1, -len(members) % RANK)).cumsum(0)[::RANK]
                rank[: len(below)] = below.int()
            index.slots[i, head, : int(columns[head].sum())] = slots[columns[head]].int()
    return index


def check_build_tiles(index: TileIndex, kv: PagedKV, batch: Batch) -> None:
    """Checks every argument of ``build_tiles``.

    Raises:
        ValueError: wrong shape, dtype or device; names the argument.
    """
    check_device("index", index.bits)
    check_paged(kv, batch, index.bits.device)
    check_tiles(index, batch, kv.num_kv_heads, index.bits.device)


def build_tiles(index: TileIndex, kv: PagedKV, batch: Batch) -> TileIndex:
    """Lists of the tiles from their bits: sinks and marked keys before a tile's window, ascending, as cache slots.

    Args:
        index: ``bars`` and ``bits`` are read; ``used`` is written, and ``starts``, ``counts`` and ``slots`` of tiles
            that hold rows. A tile whose list finds no room attends to every key.
        kv: its block table gives the slots.
        batch: the requests. Those without rows are left out.

    Returns:
        ``index``.
    """
    pattern, room, used = index.pattern, index.slots.shape[0], 0
    bit = torch.arange(WORD_BITS, device=index.bits.device)
    for i, start, end, n in with_rows(batch):
        first, slots = n - (end - start), cache_slots(kv, i, n).int()
        for tile in pattern.tiles(end - start, n):
            place = index.place(start, i, first, tile)
            last = pattern.window_start(tile * pattern.block_q)
            for head, bar in enumerate(index.bars[i].tolist()):
                marked = (index.bits[head, place].unsqueeze(1) >> bit & 1).flatten()[:last] != 0
                if bar == float("inf"):
                    marked[:] = False
                marked[: pattern.sink_keys] = True
                count = int(marked.sum())
                everything = bar == -float("inf") or count > room - used
                index.starts[head, place] = 0 if everything else used
                index.counts[head, place] = EVERYTHING if everything else count
                if not everything:
                    index.slots[used : used + count] = slots[:last][marked]
                    used += count
    index.used.fill_(used)
    return index
