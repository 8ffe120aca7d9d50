# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Methods of the field, from their papers, with their published defaults.

Each keeps a list per query head and is given a chunk as if its own prefill began there: what it looks at are the rows
of the chunk and all keys before them. Rows that are dense in every run (the dense beginning, the last 64 of a chunk)
are so here, too. Where a paper keeps window or sinks by blocks, its blocks are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.pareto.chunk import Chunk, Kept, products
from benchmarks.pareto.structures import UNWANTED, residual_pairs, smallest_set, top_keys


def _grid(chunk: Chunk) -> Tensor:
    """int64 ``[blocks]``: which block of the keys' grid each block of rows lies in."""
    if chunk.first % chunk.block:
        raise ValueError(f"a chunk that begins at {chunk.first} is not on the grid of blocks of {chunk.block}")
    return chunk.first // chunk.block + torch.arange(chunk.blocks, device=chunk.device)


def _key_blocks(chunk: Chunk) -> int:
    return -(-chunk.seq_len // chunk.block)


def _spread(chunk: Chunk, blocks: Tensor) -> Tensor:
    """bool ``[..., key blocks]`` -> bool ``[..., n]``."""
    return blocks.repeat_interleave(chunk.block, -1)[..., : chunk.seq_len]


def _pooled_keys(chunk: Chunk) -> Tensor:
    """Mean key of each block, ``[Hkv, key blocks, D]``; the last block may be short."""
    padded = F.pad(chunk.k.float(), (0, 0, 0, -chunk.seq_len % chunk.block)).unflatten(1, (-1, chunk.block)).sum(2)
    sizes = torch.full((padded.shape[1], 1), chunk.block, device=chunk.device)
    sizes[-1] = chunk.seq_len - chunk.block * (len(sizes) - 1)
    return (padded / sizes).to(chunk.k.dtype)


def _pooled_queries(chunk: Chunk) -> Tensor:
    """Mean query of each block of rows, ``[Hq, blocks, D]``."""
    padded = F.pad(chunk.q.float(), (0, 0, 0, -chunk.rows % chunk.block)).unflatten(1, (-1, chunk.block)).sum(2)
    return (padded / (chunk.ends - chunk.starts)[:, None]).to(chunk.q.dtype)


def _last_rows(chunk: Chunk, h: int, count: int) -> Tensor:
    """Attention of a head's last rows, float32 ``[count, n]``."""
    q = chunk.q[h, -count:]
    logits = products(q, chunk.k[h // chunk.group]) * chunk.scale
    at = chunk.seq_len - len(q) + torch.arange(len(q), device=chunk.device)[:, None]
    return torch.softmax(logits.masked_fill_(chunk.positions > at, float("-inf")), -1)


def _by_distance(probs: Tensor) -> Tensor:
    """Sums along diagonals of the last rows, ``[count, n]`` -> ``[n]`` by distance."""
    count, n = probs.shape
    total = torch.zeros(n, device=probs.device)
    for i in range(count):
        last = n - count + i
        total[: last + 1] += probs[i, : last + 1].flip(0)
    return total


@dataclass
class VerticalSlash:
    """MInference's vertical-slash heads (arXiv 2407.02490): columns and diagonals by the last 64 rows.

    The paper searches each head's pattern and sizes offline; 1,000 columns and 6,096 diagonals are what its code
    gives heads that were not searched. Its kernel rounds diagonals to blocks of 64; here they are exact.
    """

    vertical: int = 1000
    slash: int = 6096
    rows: int = 64
    block: int = 128

    def keep(self, chunk: Chunk) -> Kept:
        heads = chunk.q.shape[0]
        columns = torch.zeros(heads, chunk.seq_len, dtype=torch.bool, device=chunk.device)
        diagonals = torch.zeros_like(columns)
        for h in range(heads):
            probs = _last_rows(chunk, h, self.rows)
            mass = probs.sum(0)
            mass[:30] = float("inf")  # the first 30 columns and the nearest 100 distances are always kept
            distance = _by_distance(probs)
            distance[:100] = float("inf")
            columns[h], diagonals[h] = top_keys(mass, self.vertical), top_keys(distance, self.slash)
        keys = columns[:, None] & (chunk.positions < chunk.ends[:, None])
        return Kept(keys, diagonals)


@dataclass
class FlexPrefill:
    """FlexPrefill (arXiv 2502.20766): each head by query-aware blocks or by columns and diagonals, in blocks.

    The last block of rows decides: where mean query times mean keys gives nearly the true distribution over blocks
    (square root of the Jensen-Shannon divergence below ``tau``), every block of rows takes key blocks by its pooled
    scores, else columns and diagonals of blocks by these rows' attention. Each by the smallest set with the share
    ``gamma``; at least ``min_budget`` keys for a block of rows; first and own block always.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    block: int = 128

    def keep(self, chunk: Chunk) -> Kept:
        own, width = _grid(chunk), _key_blocks(chunk)
        j = torch.arange(width, device=chunk.device)
        causal = j <= own[:, None]
        keys, queries = _pooled_keys(chunk), _pooled_queries(chunk)
        chosen = ((j == own[:, None]) | (j == 0)).expand(chunk.q.shape[0], -1, -1).clone()
        least = self.min_budget // self.block
        for h in range(chunk.q.shape[0]):
            pooled = products(queries[h], keys[h // chunk.group]) * chunk.scale
            pooled = torch.softmax(pooled.masked_fill(~causal, float("-inf")), -1)
            probs = _last_rows(chunk, h, self.block)
            true = F.pad(probs.mean(0), (0, -chunk.seq_len % self.block)).unflatten(0, (-1, self.block)).sum(1)
            if _divergence(pooled[-1], true) < self.tau:
                flat = (pooled / pooled.sum()).flatten()
                picked = smallest_set(flat, (1 - self.gamma) * flat.sum()).view_as(pooled)
                picked |= top_keys(torch.where(causal, pooled, UNWANTED), least)
            else:
                columns = smallest_set(true, (1 - self.gamma) * true.sum())
                columns |= top_keys(true, least)
                distance = _by_distance(probs)
                distance = F.pad(distance, (0, -len(distance) % self.block)).unflatten(0, (-1, self.block)).sum(1)
                slashes = smallest_set(distance, (1 - self.gamma) * distance.sum()) | top_keys(distance, least)
                picked = columns | slashes[(own[:, None] - j).clamp(min=0)]
            chosen[h] |= picked & causal
        return Kept(_spread(chunk, chosen))


def _divergence(p: Tensor, q: Tensor) -> float:
    """Square root of the Jensen-Shannon divergence."""
    mean = (p + q) / 2
    parts = [(x * (x.clamp(min=1e-12) / mean.clamp(min=1e-12)).log()).sum() for x in (p, q)]
    return float(((parts[0] + parts[1]) / 2).clamp(min=0).sqrt())


@dataclass
class XAttention:
    """XAttention (arXiv 2503.16428): blocks of 128 by sums along antidiagonals of every ``stride``-th position.

    ``threshold`` of the estimated mass of each block of rows; first and own block always.
    """

    stride: int = 8
    threshold: float = 0.9
    block: int = 128

    def keep(self, chunk: Chunk) -> Kept:
        own, width = _grid(chunk), _key_blocks(chunk)
        s = self.stride
        rows, n = -(-chunk.rows // self.block) * self.block, width * self.block
        q = F.pad(chunk.q, (0, 0, 0, rows - chunk.rows)).unflatten(1, (-1, s)).flip(2).flatten(2)
        k = F.pad(chunk.k, (0, 0, 0, n - chunk.seq_len)).unflatten(1, (-1, s)).flatten(2)
        at = chunk.first // s + torch.arange(q.shape[1], device=chunk.device)
        hidden = torch.arange(k.shape[1], device=chunk.device) > at[:, None]
        j = torch.arange(width, device=chunk.device)
        always = (j == own[:, None]) | (j == 0)
        chosen = always.expand(chunk.q.shape[0], -1, -1).clone()
        for h in range(chunk.q.shape[0]):
            logits = products(q[h], k[h // chunk.group]) * (chunk.scale / s)
            probs = torch.softmax(logits.masked_fill_(hidden, float("-inf")), -1)
            mass = probs.unflatten(0, (-1, self.block // s)).sum(1).unflatten(1, (-1, self.block // s)).sum(2)
            may_leave = (1 - self.threshold) * mass.sum(1)
            chosen[h] |= smallest_set(mass.masked_fill(always, 0.0), may_leave)
        return Kept(_spread(chunk, chosen & (j <= own[:, None])))


@dataclass
class Anchor:
    """AnchorAttention (arXiv 2505.23520): single keys for ``step`` blocks of rows by difference from an anchor.

    The anchor of a row is its largest logit over the first block and the keys from the beginning of its group of
    blocks; a key is kept where the logit of a block's mean query is at most ``theta`` below the block's mean anchor.
    The group shares what any of its blocks keeps.
    """

    theta: float = 12.0
    step: int = 16
    block: int = 128

    def keep(self, chunk: Chunk) -> Kept:
        _grid(chunk)
        queries = _pooled_queries(chunk)
        group_start = chunk.starts // (self.block * self.step) * (self.block * self.step)
        j = chunk.positions
        near = (j < self.block) | ((j >= group_start[:, None]) & (j < chunk.ends[:, None]))
        keys = near.expand(chunk.q.shape[0], -1, -1).clone()
        groups = (chunk.starts // (self.block * self.step)).tolist()
        for h in range(chunk.q.shape[0]):
            k = chunk.k[h // chunk.group]
            logits = products(queries[h], k) * chunk.scale
            for b in range(chunk.blocks):
                r0, r1 = chunk.bounds(b)
                index = near[b].nonzero()[:, 0]
                local = products(chunk.q[h, r0:r1], k[index]) * chunk.scale
                at = chunk.first + torch.arange(r0, r1, device=chunk.device)[:, None]
                anchor = local.masked_fill_(index > at, float("-inf")).amax(1).mean()
                keys[h, b] |= (logits[b] >= anchor - self.theta) & (j < group_start[b])
            for group in set(groups):
                members = [b for b, other in enumerate(groups) if other == group]
                keys[h, members] |= keys[h, members].any(0) & (j < group_start[members[0]])
        return Kept(keys)


@dataclass
class FlashPrefill:
    """FlashPrefill (arXiv 2603.06199): blocks whose score reaches ``alpha`` of the largest one.

    A block's score is the sum over a block's rows of the exponentials of query times mean key. The first two and the
    nearest four blocks are kept, and the last two blocks of rows see everything. ``alpha`` is what its code uses for
    RULER with Qwen2. ``mean`` adds the second version's correction: pruned blocks enter as mean key and mean value.
    """

    alpha: float = 0.08
    sinks: int = 2
    window: int = 4
    last: int = 2
    mean: bool = False
    block: int = 128

    def keep(self, chunk: Chunk) -> Kept:
        own, pooled = _grid(chunk), _pooled_keys(chunk)
        j = torch.arange(pooled.shape[1], device=chunk.device)
        causal = j <= own[:, None]
        always = ((j < self.sinks) | (own[:, None] - j < self.window)) & causal
        if self.last:
            always[-self.last :] = causal[-self.last :]
        chosen = always.expand(chunk.q.shape[0], -1, -1).clone()
        at = chunk.first + torch.arange(chunk.rows, device=chunk.device)[:, None]
        hidden = (j + 1) * self.block - 1 > at
        for h in range(chunk.q.shape[0]):
            logits = products(chunk.q[h], pooled[h // chunk.group]) * chunk.scale
            logits = F.pad(
                logits.masked_fill_(hidden, float("-inf")), (0, 0, 0, -chunk.rows % self.block), value=-torch.inf
            )
            score = torch.logsumexp(logits.unflatten(0, (-1, self.block)), 1)
            bar = score.amax(1, keepdim=True) + torch.log(torch.tensor(self.alpha))
            chosen[h] |= (score >= bar) & causal
        kept = Kept(_spread(chunk, chosen))
        if self.mean:
            kept.residual = self.block
            kept.extra_pairs = residual_pairs(chunk, self.block)
        return kept
