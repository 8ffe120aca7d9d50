# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much each KV head keeps, by the output error of a few rows: the plain reference.

The damage that a head does to the model's next tokens is, to a good approximation, a constant times its squared output
error relative to the squared output of the layer (docs/selection.md, measured). So every head keeps what makes

    squared error of the head's output / squared output of the layer + price * density

smallest, over a few rows whose true attention is computed. What it can choose from is a ladder of bars on the score
that ``rank`` gives the keys of a tile: those at which so many keys are listed on average, none, and all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tile_index
from ..checks import check_like, check_prior, check_query_key, check_scale, check_tensor
from ..rows import check_num_rows, spread_rows
from ..tile_index import doublings
from ..tile_scores import listable, tile_scores
from ..types import Bars, SparsePattern

SIZES = (0, 128, 256, 512, 1024, 2048, 4096)
"""Keys a tile lists on average, on each step of the ladder but the last, which lists all; of long sequences more."""

LOWEST, HIGHEST, BINS = -20.0, 12.0, 256
"""Scores are told apart by bins of this range; what lies below it is listed by the last step only."""


def rows_of(num_rows: int, seq_len: int) -> int:
    """How many of ``num_rows`` rows are looked at: the longer the sequence, the fewer, so that pairs hardly grow."""
    return max(num_rows >> doublings(seq_len), 1)


def sizes_of(seq_len: int) -> list[int]:
    """Keys a tile lists on average on each step but the last: the longer the sequence, the more.

    The step before the last is a quarter of the keys at 16,384, 32,768 and 65,536. With 4,096 whatever the length,
    a head that wants a few more keys than that eighth of 32,768 would have to take all.
    """
    return [size << doublings(seq_len) for size in SIZES]


def kinds_of_length() -> list[int]:
    """A sequence length for every number of doublings, ascending."""
    full, last = tile_index.FULL_KEYS, tile_index.DOUBLINGS - 1
    return [full << i for i in range(last + 1)] + [(full << last) + 1]


def bin_of(scores: Tensor) -> Tensor:
    """int64, the bin of each score: -1 below all of them."""
    width = (HIGHEST - LOWEST) / BINS
    return ((scores - LOWEST) / width).floor().clamp(-1, BINS - 1).long()


def bar_of(bins: Tensor) -> Tensor:
    """float32, the lower end of each bin."""
    return LOWEST + bins.float() * ((HIGHEST - LOWEST) / BINS)


def check_price(q: Tensor, k: Tensor, v: Tensor, scale: float, price: float, num_rows: int) -> None:
    """Checks every argument of ``price``."""
    check_query_key(q, k)
    check_tensor("v", v, 3)
    check_like("v", v, "k", k, shape=True)
    check_scale(scale)
    if not math.isfinite(price) or price < 0:
        raise ValueError(f"price must be a finite number of at least 0, got {price!r}")
    check_num_rows(num_rows)


def ladder(bins: Tensor, num_rows: int, seq_len: int) -> Tensor:
    """The bars of the ladder, as bins: the lowest of which all bins together hold at most ``sizes_of`` keys a row.

    Args:
        bins: int64 ``[Hkv, BINS]``, how many keys of all rows lie in each bin.
        num_rows: rows.
        seq_len: keys of the sequence.

    Returns:
        int64 ``[Hkv, len(SIZES)]``; ``BINS`` lists none.
    """
    above = bins.flip(1).cumsum(1).flip(1)
    return torch.stack([(above > size * num_rows).sum(1) for size in sizes_of(seq_len)], 1)


def price(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    pattern: SparsePattern,
    price: float,
    num_rows: int = 64,
    prior: Tensor | None = None,
) -> Bars:
    """Decides for each KV head of a chunk from which score on its tiles list a key.

    Args:
        q: ``[T, Hq, D]``, the chunk's queries.
        k, v: ``[n, Hkv, D]``, the whole sequence, ``n >= T``; same dtype and device.
        scale: factor on ``q . k`` before the softmax.
        pattern: tiles, window and sinks.
        price: squared relative output error of the layer that all pairs of one head are worth.
        num_rows: rows to look at (``spread_rows``), of a long sequence fewer (``rows_of``).
        prior: float32 ``[Hkv, n]``, added to the scores of each key; None: nothing.

    Returns:
        Bars; 0 lists everything whatever it brings.

    Raises:
        ValueError: dtype, shape or device mismatch; the message names the argument.
    """
    check_price(q, k, v, scale, price, num_rows)
    check_prior(prior, k)
    n, first, num_kv_heads = k.shape[0], k.shape[0] - q.shape[0], k.shape[1]
    rows = torch.tensor(spread_rows(q.shape[0], rows_of(num_rows, n)), device=q.device)
    tiles = ((rows + first) // pattern.block_q).tolist()
    scores = tile_scores(q, k, tiles, scale=scale, pattern=pattern, prior=prior)
    position = torch.arange(n, device=q.device)
    seen = position <= (rows + first).unsqueeze(1)
    listed = listable(pattern, tiles, n, q.device)
    bins = bin_of(scores)
    counts = torch.stack([torch.bincount(b[listed & (b >= 0)], minlength=BINS) for b in bins])
    steps = ladder(counts, len(rows), n)
    # [Hkv, group, R, D] x [Hkv, 1, D, n]
    queries = q[rows].unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).float()
    logits = torch.matmul(queries, k.permute(1, 2, 0).float().unsqueeze(1)) * scale
    probs = torch.softmax(logits.masked_fill_(~seen, float("-inf")), dim=-1)
    values = v.transpose(0, 1).float().unsqueeze(1)
    true = torch.matmul(probs, values)
    errors, density = [], []
    for step in range(len(SIZES)):
        kept = seen & (~listed | (bins >= steps[:, step].view(-1, 1, 1)))  # [Hkv, R, n]
        some = probs * kept.unsqueeze(1)
        out = torch.matmul(some, values) / some.sum(-1, keepdim=True)
        errors.append((out - true).square().sum((1, 2, 3)))
        density.append(kept.sum((1, 2)) / seen.sum())
    errors.append(torch.zeros(num_kv_heads, device=q.device))
    density.append(torch.ones(num_kv_heads, device=q.device))
    total = true.square().sum().clamp(min=1e-30)
    best = (torch.stack(errors, 1) / total + price * torch.stack(density, 1)).argmin(1, keepdim=True)
    bars = bar_of(steps).masked_fill(steps == BINS, float("inf"))
    bars = torch.cat((bars, torch.full_like(bars[:, :1], float("-inf"))), 1)
    return Bars(bars.gather(1, best).squeeze(1), torch.stack(density, 1).gather(1, best).squeeze(1))
