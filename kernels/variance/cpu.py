# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What single queries of a tile may find in a key that their mean does not: the fast path for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_query_key, check_scale
from ..types import SparsePattern
from .naive import halves, tiles_of_variance


def variance(q: Tensor, k: Tensor, *, scale: float, pattern: SparsePattern) -> Tensor:
    """Same contract as ``naive.variance``, for CPU tensors."""
    check_query_key(q, k)
    check_scale(scale)
    if q.device.type != "cpu":
        raise ValueError(f"q is on {q.device}; this version runs on the CPU only")
    rows, n, num_kv_heads = q.shape[0], k.shape[0], k.shape[1]
    # Which part of which tile each row belongs to; they follow one another
    position = torch.arange(n - rows, n)
    tile = position // pattern.block_q
    looked_at = tiles_of_variance(pattern, rows, n)
    if looked_at.step > 1:
        some = (tile - looked_at.start) % looked_at.step == 0
        position, tile, q = position[some], tile[some], q[some]
    part = tile * pattern.parts + position % pattern.block_q // pattern.part_positions
    _, place, count = part.unique_consecutive(return_inverse=True, return_counts=True)
    # [Hkv, T, group * D]
    queries = q.float().unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(2)
    means = queries.new_zeros(num_kv_heads, len(count), queries.shape[2]).index_add_(1, place, queries)
    means /= count.view(1, -1, 1)
    apart = (queries - means.index_select(1, place)).reshape(num_kv_heads, -1, q.shape[2])
    covariance = apart.mT @ apart / apart.shape[1]
    return halves(k, covariance, scale)
