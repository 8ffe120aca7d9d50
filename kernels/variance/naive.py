# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What single queries of a tile may find in a key that their mean does not: the plain reference.

The logits of a key over the queries of a tile have a mean, which is the logit of the mean query, and a variance. Were
they normal, the mean of their exponentials would be that of the mean query times ``exp(variance / 2)``: the mean of
``exp(x)`` for normal ``x`` (the log-normal distribution). With ``S`` the covariance of queries around the mean of their
tile, which is taken to be the same for all tiles of a chunk, and for all query heads of a KV head::

    variance of scale * q . k[j] / 2 = scale^2 / 2 * k[j] . S k[j]

A key that only some rows of a tile look for is rated too low by their mean query; this is what it lacks on average.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_query_key, check_scale
from ..types import SparsePattern


def covariance(q: Tensor, num_kv_heads: int, tiles: Sequence[int], *, seq_len: int, pattern: SparsePattern) -> Tensor:
    """Covariance of queries around the mean of their part, float32 ``[Hkv, D, D]``.

    Args:
        q: ``[T, Hq, D]``, the chunk's queries; the last row is the query at position ``seq_len - 1``.
        num_kv_heads: KV heads.
        tiles: which tiles to look at, on the absolute grid; each holds a row of the chunk.
        seq_len: tokens of the sequence.
        pattern: tiles and their parts.
    """
    first, apart = seq_len - q.shape[0], []
    for tile in tiles:
        for part in range(pattern.parts):
            low, high = pattern.part(tile, part, first, seq_len)
            if low < high:
                rows = q[low - first : high - first].float()
                apart.append(rows - rows.mean(0))
    # [Hkv, rows * group, D]
    queries = torch.cat(apart).unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)
    products: Tensor = queries.mT @ queries / queries.shape[1]
    return products


def variance(q: Tensor, k: Tensor, *, scale: float, pattern: SparsePattern) -> Tensor:
    """Half the variance of every key's logits over the queries of a tile, for ``price`` and ``rank`` as ``prior``.

    Args:
        q: ``[T, Hq, D]``, the chunk's queries; the last row is the query at position ``n - 1``.
        k: ``[n, Hkv, D]``, the whole sequence, ``n >= T``; same dtype and device.
        scale: factor on ``q . k`` before the softmax.
        pattern: tiles and their parts. Queries are seen around the mean of their part.

    Returns:
        float32 ``[Hkv, n]``, none negative.

    Raises:
        ValueError: dtype, shape or device mismatch; the message names the argument.
    """
    check_query_key(q, k)
    check_scale(scale)
    n = k.shape[0]
    spread = covariance(q, k.shape[1], pattern.tiles(q.shape[0], n), seq_len=n, pattern=pattern)
    keys = k.transpose(0, 1).float()
    squares: Tensor = (keys @ spread * keys).sum(-1)
    return squares.clamp_(min=0.0).mul_(scale * scale / 2)
