# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much each KV head of each request keeps: the plain reference over requests, its workspace and its checks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_scale
from ..launch import cdiv, next_power_of_2
from ..paged import Batch, PagedKV, check_device, check_priors, check_queries
from ..reference import keys_values, with_rows
from ..rows import check_num_rows
from ..tile_index import TileIndex, check_tiles
from . import naive

STEPS = len(naive.SIZES) + 1  # of the ladder, the last one included, which lists all
SKETCH = 16  # channels that stand for an output: one less of the sketch, and the sum of probabilities
MAX_ROWS = 128  # of a tile: rows times heads of the group
CHUNK_ROWS = 4  # of them whose splits a program puts together
PROGRAMS = 256  # that look at a request at a time, about: two for each multiprocessor of a large device
PARTIAL_BYTES = 128 * 2**20  # room for results of splits; more requests than fit take turns


class PriceWorkspace(NamedTuple):
    """Scratch of ``price``, allocated once. ``M``: sampled rows times heads of the group, the latter padded.

    Attributes:
        means: the queries' dtype, ``[requests, Hkv, M * parts, D]``, mean queries of the tiles of the sampled rows;
            those of all parts of a row's tile lie together.
        near: float32 ``[requests, Hkv, M * parts]``, log-sum-exp over what each of them keeps in any case.
        counts: int32 ``[requests, Hkv, BINS]``, keys of all sampled rows by score.
        bars: int32 ``[requests, Hkv, STEPS]``, the ladder as bins.
        density: float32 ``[requests, Hkv, STEPS]``, share of the sampled rows' pairs that each step keeps.
        maxima: float32 ``[turn, Hkv, splits, M]``, of the logits of a split, base 2.
        sums: float32 ``[turn, Hkv, splits, M, STEPS, SKETCH]``, sketches of the outputs of each step.
        errors: float32 ``[requests, Hkv, M / CHUNK_ROWS, STEPS]``, squared errors; in place of the last, which is 0,
            the square of the output.
        num_rows: rows to look at.
        parts: of a tile.
    """

    means: Tensor
    near: Tensor
    counts: Tensor
    bars: Tensor
    density: Tensor
    maxima: Tensor
    sums: Tensor
    errors: Tensor
    num_rows: int
    parts: int = 1


def allocate_price(
    num_requests: int, num_query_heads: int, num_kv_heads: int, head_size: int, max_seq_len: int, num_rows: int,
    dtype: torch.dtype, device: torch.device | str, parts: int = 1,
) -> PriceWorkspace:  # fmt: skip
    """Room for the prices of ``num_rows`` rows a request.

    Args:
        num_requests: requests of a round.
        num_query_heads: query heads.
        num_kv_heads: KV heads.
        head_size: channels of a head.
        max_seq_len: the longest sequence.
        num_rows: rows to look at.
        dtype: of the queries.
        device: device.
        parts: of a tile.

    Raises:
        ValueError: ``num_rows`` is not a positive int, or more rows than a counter of pairs can take; ``parts`` is no
            power of two.
    """
    check_num_rows(num_rows)
    if parts != next_power_of_2(parts):
        raise ValueError(f"parts must be a power of two, got {parts}")
    if num_rows * max_seq_len >= 2**31:
        raise ValueError(f"num_rows must be below {2**31 // max_seq_len} for {max_seq_len} keys, got {num_rows}")
    pack = next_power_of_2(num_query_heads // num_kv_heads)
    rows = cdiv(num_rows * pack, MAX_ROWS) * MAX_ROWS
    tiles = rows // MAX_ROWS * num_kv_heads
    splits = min(max(next_power_of_2(cdiv(PROGRAMS, tiles)), 4), 64)
    turn = max(1, min(num_requests, PARTIAL_BYTES // (4 * num_kv_heads * splits * rows * STEPS * SKETCH)))

    def room(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    each = num_requests, num_kv_heads
    return PriceWorkspace(
        room(*each, rows * parts, head_size, dtype=dtype),
        room(*each, rows * parts),
        room(*each, naive.BINS, dtype=torch.int32),
        room(*each, STEPS, dtype=torch.int32),
        room(*each, STEPS),
        room(turn, num_kv_heads, splits, rows),
        room(turn, num_kv_heads, splits, rows, STEPS, SKETCH),
        room(*each, rows // CHUNK_ROWS, STEPS),
        num_rows,
        parts,
    )


def check_price(
    q: Tensor, kv: PagedKV, batch: Batch, index: TileIndex, workspace: PriceWorkspace, scale: float, price: float,
    prior: Tensor | None = None,
) -> None:  # fmt: skip
    """Checks every argument of ``price``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch; names the argument.
    """
    check_queries(q, kv, batch)
    check_scale(scale)
    if not math.isfinite(price) or price < 0:
        raise ValueError(f"price must be a finite number of at least 0, got {price!r}")
    check_priors(prior, kv, batch)
    heads = kv.num_kv_heads
    check_tiles(index, batch, heads, q.device)
    means = workspace.means
    if means.device != q.device or means.dtype != q.dtype:
        raise ValueError(f"workspace is for {means.dtype} on {means.device}, expected {q.dtype} on {q.device}")
    if means.shape[0] < batch.num_requests or means.shape[1] != heads or means.shape[3] != kv.head_size:
        requests, has, _, size = means.shape
        raise ValueError(f"workspace is for {requests} requests and {has} heads of size {size}")
    if workspace.parts != index.pattern.parts:
        raise ValueError(f"workspace is for {workspace.parts} parts of a tile, index for {index.pattern.parts}")
    if means.shape[2] < workspace.num_rows * next_power_of_2(q.shape[1] // heads) * workspace.parts:
        raise ValueError(f"workspace has no room for groups of {q.shape[1] // heads} heads")
    check_device("q", q)


def price(
    q: Tensor,
    kv: PagedKV,
    batch: Batch,
    index: TileIndex,
    workspace: PriceWorkspace,
    *,
    scale: float,
    price: float,
    prior: Tensor | None = None,
) -> None:
    """Decides for each KV head of each request from which score on its tiles list a key: ``naive.price``.

    Args:
        q: ``[rows, Hq, D]``, contiguous channels.
        kv: the cache, of the same dtype or fp8.
        batch: which rows belong to which request. Requests without rows are left out.
        index: ``bars`` and ``density`` are written.
        workspace: from ``allocate_price``; it says how many rows to look at.
        scale: factor on ``q . k`` before the softmax.
        price: squared relative output error of the layer that all pairs of one head are worth.
        prior: float32 ``[requests, Hkv, positions]``, contiguous positions, added to the scores of each key; None:
            nothing.
    """
    for i, start, end, n in with_rows(batch):
        k, v = keys_values(kv, i, n)
        found = naive.price(
            q[start:end].to(k.dtype), k, v, scale=scale, pattern=index.pattern, price=price,
            num_rows=workspace.num_rows, prior=None if prior is None else prior[i, :, :n],
        )  # fmt: skip
        index.bars[i], index.density[i] = found.scores, found.density
