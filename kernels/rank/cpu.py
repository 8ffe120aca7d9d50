# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Keys that tiles list, a few tiles of a KV head at a time: the fast path for CPUs."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..checks import check_query_key, check_scale
from ..parallel import run_pieces
from ..types import SparsePattern

# Mean queries of one piece of work: its logits [ROWS, n] are 8 MiB at n = 131072, bfloat16.
ROWS = 32


def rank(q: Tensor, k: Tensor, bars: Tensor, *, scale: float, pattern: SparsePattern) -> Tensor:
    """Same contract as ``naive.rank``.

    Products of mean queries and keys are in the dtype of the inputs: with bfloat16 they carry its rounding (2**-9 of
    their size), and keys whose score is as close to the bar may be listed or not.
    """
    check_query_key(q, k)
    check_scale(scale)
    n, num_kv_heads, _ = k.shape
    first = n - q.shape[0]
    tiles = pattern.tiles(q.shape[0], n)
    queries = q.unflatten(1, (num_kv_heads, -1))
    found = torch.zeros(num_kv_heads, len(tiles), n, dtype=torch.bool, device=q.device)
    step = max(ROWS // queries.shape[2], 1)

    def piece(head: int, bar: float, some: range) -> None:
        windows = [pattern.window_start(tile * pattern.block_q) for tile in some]
        places = range(some[0] - tiles[0], some[0] - tiles[0] + len(some))
        if bar == -math.inf:
            for place, window in zip(places, windows, strict=True):
                found[head, place, pattern.sink_keys : window] = True
        if math.isinf(bar) or windows[-1] <= pattern.sink_keys:
            return
        ends = [min((tile + 1) * pattern.block_q, n) for tile in some]
        means = torch.stack(
            [
                queries[max(tile * pattern.block_q - first, 0) : end - first, head].float().mean(0)
                for tile, end in zip(some, ends, strict=True)
            ]
        )
        # [tiles, group, keys]
        logits = (means.to(q.dtype).flatten(0, 1) @ k[: ends[-1], head].T).unflatten(0, means.shape[:2])
        for place, window, end, one in zip(places, windows, ends, logits, strict=True):
            near = torch.cat((one[:, : min(pattern.sink_keys, window)], one[:, window:end]), 1).float() * scale
            # A logit is compared instead of the score that it makes.
            least = ((bar + near.logsumexp(1, keepdim=True)) / scale).to(one.dtype)
            listed = one[:, pattern.sink_keys : window] >= least
            found[head, place, pattern.sink_keys : window] = listed.any(0)

    run_pieces(
        [
            partial(piece, head, bar, tiles[i : i + step])
            for i in reversed(range(0, len(tiles), step))  # the long ones first
            for head, bar in enumerate(bars.tolist())
        ]
    )
    return found
