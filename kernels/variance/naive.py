# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What single queries of a tile may find in a key that their mean does not: the plain reference.

The logits of a key over the queries of a tile have a mean, which is the logit of the mean query, and a variance. Were
they normal, the mean of their exponentials would be that of the mean query times ``exp(variance / 2)``: the mean of
``exp(x)`` for normal ``x`` (the log-normal distribution). With ``S`` the covariance of queries around the mean of their
tile, taken to be the same for all tiles of a chunk and all heads of a KV head, and ``c`` the mean of the keys::

    half the variance of scale * q . (k[j] - c) = scale^2 / 2 * (k[j] - c) . S (k[j] - c)

What all keys have in common changes all logits of a query alike, and the softmax not at all: it is left out. So is
the mean of this number over the keys, for scores are told apart within a range. A key that only some rows of a tile
look for is rated too low by their mean query; this is what it lacks, compared with other keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_query_key, check_scale
from ..rows import spread_rows
from ..types import SparsePattern

CENTRE_KEYS, LEVEL_KEYS = 1024, 256
"""Keys whose mean stands for that of all, and whose mean result does."""

ENOUGH_ROWS = 1024
"""Rows of a chunk beyond which tiles are left out: a covariance of channels needs a thousand queries, not all."""

MOST = 1000.0
"""Results are between this and its negative."""


def tiles_of_variance(pattern: SparsePattern, rows: int, seq_len: int) -> range:
    """The tiles of a chunk that are looked at: all, or of more than ``ENOUGH_ROWS`` rows every so manieth."""
    return pattern.tiles(rows, seq_len)[:: max(rows // ENOUGH_ROWS, 1)]


def centre(k: Tensor) -> Tensor:
    """The mean of some keys, spread over the sequence: ``[n, Hkv, D]`` -> float32 ``[Hkv, D]``."""
    return k[spread_rows(k.shape[0], CENTRE_KEYS)].float().mean(0)


def halves(k: Tensor, spread: Tensor, scale: float) -> Tensor:
    """Half the variance of logits without its mean, float32 ``[Hkv, n]``.

    Args:
        k: ``[n, Hkv, D]``.
        spread: float32 ``[Hkv, D, D]``, covariance of queries.
        scale: factor on ``q . k`` before the softmax.
    """
    n, middle = k.shape[0], centre(k)
    found = torch.empty(k.shape[1], n, device=k.device)
    for head, line in enumerate(found):  # a copy in float32 of one head's keys at a time
        keys = k[:, head].float() - middle[head]
        line.copy_(((keys @ spread[head]).mul_(keys)).sum(-1))
    found.mul_(scale * scale / 2)
    found -= found[:, spread_rows(n, LEVEL_KEYS)].mean(1, keepdim=True)
    return found.clamp_(-MOST, MOST).nan_to_num_(0.0)


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
        float32 ``[Hkv, n]``, less the mean over some of the keys; 0 where it is not a number. Of the tiles of
        ``tiles_of_variance``.

    Raises:
        ValueError: dtype, shape or device mismatch; the message names the argument.
    """
    check_query_key(q, k)
    check_scale(scale)
    n = k.shape[0]
    tiles = tiles_of_variance(pattern, q.shape[0], n)
    spread = covariance(q, k.shape[1], tiles, seq_len=n, pattern=pattern)
    return halves(k, spread, scale)
