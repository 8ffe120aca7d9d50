# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Keys that a tile of queries lists, by the attention of its mean queries: the fast path for CPUs."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ..checks import check_prior, check_query_key, check_scale
from ..parallel import run_pieces
from ..tiles_cpu import TILES, TileScores
from ..types import SparsePattern


def rank(
    q: Tensor, k: Tensor, bars: Tensor, *, scale: float, pattern: SparsePattern, prior: Tensor | None = None
) -> Tensor:
    """Same contract as ``naive.rank``, for CPU tensors.

    The product of mean queries and keys is in the dtype of the inputs, so that a key whose score differs from the bar
    by the rounding of float32 may be on the other side of it; with a prior, by the rounding of this dtype.
    """
    check_query_key(q, k)
    check_scale(scale)
    check_prior(prior, k)
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}; this version runs on the CPU only")
    n, num_kv_heads = k.shape[0], k.shape[1]
    tiles = pattern.tiles(q.shape[0], n)
    found = torch.zeros(num_kv_heads, len(tiles), n, dtype=torch.bool)
    listing = [head for head, bar in enumerate(bars.tolist()) if bar != math.inf]
    if not listing:
        return found
    call = TileScores(q, k, scale=scale, pattern=pattern)
    sinks = pattern.sink_keys

    # What a key's score has to reach at least: the bar without its prior, above the lowest of these. None is negative.
    lowest, above = bars, None
    if prior is not None:
        most = prior.amax(1)
        lowest, above = bars - most, (most.unsqueeze(1) - prior).to(call.k.dtype)

    def piece(head: int, first: int, end: int) -> None:
        some, bar = tiles[first:end], float(lowest[head])
        marks = found[head, first:end]
        if bar == -math.inf:
            marks[:, sinks : call.width(some)] = True
        else:
            for start, scores in call.scores(head, some, bar):
                # Not negative is what has no sign bit, which integers are searched for six times as fast; and those
                # without one are in the order of the numbers.
                short = scores.element_size() == 2
                best = (scores.view(torch.int16) if short else scores).amax(1)
                width = scores.shape[2]
                if above is None:
                    marks[:, start : start + width] = best >= 0
                else:
                    limit = above[head, start : start + width]
                    marks[:, start : start + width] = best >= (limit.view(torch.int16) if short else limit)
            marks[:, :sinks] = False
        for mark, tile in zip(marks, some, strict=True):
            mark[pattern.window_start(tile * pattern.block_q) :] = False

    step = max(min(len(tiles) // 4, TILES // pattern.parts), 1)
    run_pieces(
        [partial(piece, head, i, min(i + step, len(tiles))) for i in range(0, len(tiles), step) for head in listing]
    )
    return found
