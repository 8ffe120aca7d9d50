# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Keys that the tiles of a round list: the plain reference over requests, its workspace and its checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_scale
from ..paged import Batch, PagedKV, check_device, check_priors, check_queries
from ..reference import keys_values, with_rows
from ..tile_index import WORD_BITS, TileIndex, check_tiles
from ..tile_scores import tile_scores


class RankWorkspace(NamedTuple):
    """Scratch of ``rank``, allocated once. ``T`` is the room for tiles, whose places are those of ``TileIndex``.

    Attributes:
        means: ``[Hq * parts, T, D]``, mean queries in the model's type; those of a head's parts lie together.
        near: float32 ``[Hq * parts, T]``, natural logarithm of what a mean query pays to sinks and window.
    """

    means: Tensor
    near: Tensor


def allocate_rank(
    max_rows: int, num_requests: int, num_query_heads: int, head_size: int, block_q_min: int, dtype: torch.dtype,
    device: torch.device | str, parts: int = 1,
) -> RankWorkspace:  # fmt: skip
    """Room for the tiles of a round.

    Args:
        max_rows: one past the last row of a round.
        num_requests: requests of a round.
        num_query_heads: query heads.
        head_size: channels of a head.
        block_q_min: the smallest tiles that will be used.
        dtype: of the queries.
        device: device.
        parts: of a tile, at most.
    """
    tiles = TileIndex.tiles_of(block_q_min, max_rows, num_requests)
    return RankWorkspace(
        torch.empty(num_query_heads * parts, tiles, head_size, dtype=dtype, device=device),
        torch.empty(num_query_heads * parts, tiles, dtype=torch.float32, device=device),
    )


def check_rank(
    q: Tensor, kv: PagedKV, batch: Batch, index: TileIndex, workspace: RankWorkspace, scale: float,
    prior: Tensor | None = None,
) -> None:  # fmt: skip
    """Checks every argument of ``rank``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch; names the argument.
    """
    check_queries(q, kv, batch)
    check_scale(scale)
    check_priors(prior, kv, batch)
    check_tiles(index, batch, kv.num_kv_heads, q.device)
    heads, tiles, size = workspace.means.shape
    if workspace.means.dtype != q.dtype or workspace.means.device != q.device:
        raise ValueError(f"workspace is of {workspace.means.dtype} on {workspace.means.device}, q is not")
    wanted = q.shape[1] * index.pattern.parts
    if (heads, size) != (wanted, q.shape[2]):
        raise ValueError(
            f"workspace is for {heads} mean queries of size {size} a tile, expected {wanted} of {q.shape[2]}"
        )
    if tiles < index.bits.shape[1]:
        raise ValueError(f"workspace has room for {tiles} tiles, index for {index.bits.shape[1]}")
    check_device("q", q)


def rank(
    q: Tensor, kv: PagedKV, batch: Batch, index: TileIndex, workspace: RankWorkspace, *, scale: float,
    prior: Tensor | None = None,
) -> None:  # fmt: skip
    """Marks the keys whose score reaches the bar of their request and KV head.

    Args:
        q: ``[rows, Hq, D]``, contiguous channels.
        kv: the cache, of the same dtype or fp8.
        batch: which rows belong to which request. Requests without rows are left out.
        index: ``bars`` are read, ``bits`` written. Heads with a bar of -inf or inf get no bits, for nobody reads them;
            nor do keys that a tile must not list.
        workspace: from ``allocate_rank``.
        scale: factor on ``q . k`` before the softmax.
        prior: float32 ``[requests, Hkv, positions]``, contiguous positions, added to the scores of each key; None:
            nothing.
    """
    pattern = index.pattern
    weights = (1 << torch.arange(WORD_BITS, dtype=torch.int64, device=q.device)).view(1, 1, 1, -1)
    for i, start, end, n in with_rows(batch):
        k, _ = keys_values(kv, i, n)
        tiles, first = pattern.tiles(end - start, n), n - (end - start)
        added = None if prior is None else prior[i, :, :n]
        scores = tile_scores(q[start:end].to(k.dtype), k, list(tiles), scale=scale, pattern=pattern, prior=added)
        marks = scores >= index.bars[i].view(-1, 1, 1)
        words = (F.pad(marks, (0, -n % WORD_BITS)).unflatten(2, (-1, WORD_BITS)) * weights).sum(-1)
        words = torch.where(words >= 2**31, words - 2**32, words).int()
        place = index.place(start, i, first, tiles[0])
        for head in index.bars[i].isfinite().nonzero().flatten().tolist():
            index.bits[head, place : place + len(tiles), : words.shape[2]] = words[head]
