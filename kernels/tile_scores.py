# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a tile's mean queries say of every key, in plain PyTorch: what ``rank`` and ``price`` order keys by.

Let ``m`` be the mean query of a part of a tile, one for each query head. The score of key ``j`` is::

    score[j] = max over the tile's parts and the heads of the group of (scale * m . k[j] - near)
    near     = log(sum of exp(scale * m . k[i]) over sinks and the tile's window, its own rows included)

the logarithm of the attention that a mean query pays to ``j``, in units of what it pays to the keys that are kept in
any case. These hold most of the attention nearly everywhere, so that the unit is close to the sum over all keys, and
costs next to nothing.

A *prior* is a number for each key, the same for all tiles, that is added to its scores: what is known of the key that
mean queries do not tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .types import SparsePattern


def listable(pattern: SparsePattern, tiles: Sequence[int], seq_len: int, device: torch.device) -> Tensor:
    """Keys that a tile may list: those between the sinks and its window, bool ``[tiles, seq_len]``."""
    starts = torch.tensor([pattern.window_start(tile * pattern.block_q) for tile in tiles], device=device)
    position = torch.arange(seq_len, device=device)
    return (position >= pattern.sink_keys) & (position < starts.unsqueeze(1))


def tile_scores(
    q: Tensor, k: Tensor, tiles: list[int], *, scale: float, pattern: SparsePattern, prior: Tensor | None = None
) -> Tensor:
    """Scores of all keys for some tiles of a chunk; those of keys behind a tile's last row mean nothing.

    Args:
        q: ``[T, Hq, D]``, the chunk's queries; the last row is the query at position ``n - 1``.
        k: ``[n, Hkv, D]``, the whole sequence.
        tiles: indices on the absolute grid; each holds a row of the chunk. Rows of other chunks are left out of means.
        scale: factor on ``q . k`` before the softmax.
        pattern: tiles, window and sinks.
        prior: float32 ``[Hkv, n]``, added to the scores of each key; None: nothing.

    Returns:
        float32 ``[Hkv, tiles, n]``.
    """
    n, first = k.shape[0], k.shape[0] - q.shape[0]
    num_kv_heads = k.shape[1]
    queries = q.unflatten(1, (num_kv_heads, -1))
    keys = k.transpose(0, 1).float()
    found = torch.empty(num_kv_heads, len(tiles), n, device=q.device)
    position = torch.arange(n, device=q.device)
    for i, tile in enumerate(tiles):
        end = min((tile + 1) * pattern.block_q, n)
        near = (position < pattern.sink_keys) | (position >= pattern.window_start(tile * pattern.block_q))
        near &= position < end
        found[:, i] = float("-inf")
        for part in range(pattern.parts):
            low, high = pattern.part(tile, part, first, n)
            if low >= high:
                continue
            # [Hkv, group, D], in the model's type like the queries
            mean = queries[low - first : high - first].float().mean(0).to(q.dtype).float()
            logits = torch.matmul(mean, keys.transpose(1, 2)) * scale
            unit = logits.masked_fill(~near, float("-inf")).logsumexp(-1, keepdim=True)
            found[:, i] = torch.maximum(found[:, i], (logits - unit).amax(1))
    return found if prior is None else found + prior.unsqueeze(1)
