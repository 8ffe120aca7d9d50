# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Keys that a tile of queries lists, by the attention of its mean queries: the plain reference.

The scores are those of ``tile_scores.py``; a tile lists what reaches the bar of its KV head.
"""

from __future__ import annotations

from torch import Tensor

from ..checks import check_prior, check_query_key, check_scale
from ..tile_scores import listable, tile_scores
from ..types import SparsePattern


def rank(
    q: Tensor, k: Tensor, bars: Tensor, *, scale: float, pattern: SparsePattern, prior: Tensor | None = None
) -> Tensor:
    """Which keys the tiles of a chunk list.

    Args:
        q: ``[T, Hq, D]``, the chunk's queries.
        k: ``[n, Hkv, D]``, the whole sequence, ``n >= T``; same dtype and device.
        bars: float32 ``[Hkv]``, the least score of a listed key; -inf lists all.
        scale: factor on ``q . k`` before the softmax.
        pattern: tiles, window and sinks.
        prior: float32 ``[Hkv, n]``, added to the scores of each key; None: nothing.

    Returns:
        bool ``[Hkv, tiles, n]``, of ``pattern.tiles(T, n)``; True only between the sinks and a tile's window.

    Raises:
        ValueError: dtype, shape or device mismatch; the message names the argument.
    """
    check_query_key(q, k)
    check_scale(scale)
    check_prior(prior, k)
    tiles = pattern.tiles(q.shape[0], k.shape[0])
    scores = tile_scores(q, k, list(tiles), scale=scale, pattern=pattern, prior=prior)
    return (scores >= bars.view(-1, 1, 1)) & listable(pattern, tiles, k.shape[0], q.device)
