# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Random lists of keys for the tiles of a paged problem, in an index whose unused parts are poisoned."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE
from tests.kernels.paged_problems import PagedProblem
from vllm_vsprefill.kernels.reference import cache_slots
from vllm_vsprefill.kernels.tile_index import EVERYTHING, TileIndex, allocate_tiles

NOWHERE = 2**31 - 1


def random_keys(problem: PagedProblem, share: float, seed: int = 0) -> list[Tensor]:
    """Of each request, bool ``[Hkv, tiles, n]``, as ``rank`` gives: about so many of all keys. Some tiles list nothing,
    some everything."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    counts = (problem.batch.row_end - problem.batch.row_start).tolist()
    for rows, n in zip(counts, problem.seq_lens(), strict=True):
        shape = (problem.kv.num_kv_heads, len(problem.pattern.tiles(rows, n)) if rows else 0)
        shares = share * torch.rand(*shape, 1, generator=rng) * 2
        kind = torch.rand(*shape, 1, generator=rng)
        shares = torch.where(kind < 0.2, 0.0, torch.where(kind > 0.85, 1.0, shares))
        found.append((torch.rand(*shape, n, generator=rng) < shares).to(DEVICE))
    return found


def tile_index(problem: PagedProblem, keys: list[Tensor]) -> TileIndex:
    """An index that lists these keys and the sinks. A tile that lists all keys below its window is said to attend to
    everything; lists lie in random order with rubbish between them."""
    pattern, heads, batch = problem.pattern, problem.kv.num_kv_heads, problem.batch
    num_rows = max(problem.q.shape[0], batch.max_rows)
    storage = allocate_tiles(batch.num_requests, heads, num_rows, [(pattern, batch.max_seq_len)], DEVICE)
    for tensor in storage:
        tensor.fill_(NOWHERE)
    index = storage.view(pattern, num_rows, batch.num_requests, batch.max_seq_len)
    lists: list[tuple[int, int, Tensor]] = []
    bounds = zip(batch.row_start.tolist(), batch.row_end.tolist(), problem.seq_lens(), keys, strict=True)
    for i, (start, end, n, wanted) in enumerate(bounds):
        if start == end:
            continue
        slots, first = cache_slots(problem.kv, i, n), n - (end - start)
        for t, tile in enumerate(pattern.tiles(end - start, n)):
            window = pattern.window_start(tile * pattern.block_q)
            for head in range(heads):
                place = index.place(start, i, first, tile)
                listed = wanted[head, t, :window].clone()
                if window > pattern.sink_keys and bool(listed[pattern.sink_keys :].all()):
                    index.counts[head, place] = EVERYTHING
                    continue
                listed[: pattern.sink_keys] = True
                lists.append((head, place, slots[listed.nonzero().squeeze(1)].int()))
    at, parts = 0, []
    for which in torch.randperm(len(lists), generator=torch.Generator().manual_seed(0)).tolist():
        head, place, some = lists[which]
        index.starts[head, place], index.counts[head, place] = at, len(some)
        parts += [some, some.new_full((which % 3,), NOWHERE)]
        at += len(some) + which % 3
    return index._replace(slots=torch.cat(parts) if parts else index.slots[:1])
