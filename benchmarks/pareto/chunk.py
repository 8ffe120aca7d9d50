# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A chunk of a prompt in one layer, what a method keeps of it, and attention over that."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass
class Chunk:
    """Rows of one layer that run sparse, and the keys they may look at.

    Attributes:
        layer: index of the layer.
        q: ``[Hq, T, D]``, the rows' queries with RoPE.
        k: ``[Hkv, n, D]``, every key of the sequence up to the last row, with RoPE.
        v: ``[Hkv, n, D]``.
        scale: factor on ``q . k`` before the softmax.
        block: rows that are computed at a time and share a list of keys; ``blocks`` of them cover the chunk.
        memory: a method's own notes on this layer, kept from chunk to chunk of one run.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    block: int = 128
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows, T."""
        return self.q.shape[1]

    @property
    def seq_len(self) -> int:
        """Number of keys, n."""
        return self.k.shape[1]

    @property
    def first(self) -> int:
        """Position of the first row."""
        return self.seq_len - self.rows

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one may be short."""
        return -(-self.rows // self.block)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[0] // self.k.shape[0]

    @property
    def device(self) -> torch.device:
        return self.q.device

    def bounds(self, block: int) -> tuple[int, int]:
        """First row of a block and the row behind its last."""
        return block * self.block, min((block + 1) * self.block, self.rows)

    @cached_property
    def starts(self) -> Tensor:
        """int64 ``[blocks]``: position of each block's first row."""
        return self.first + self.block * torch.arange(self.blocks, device=self.device)

    @cached_property
    def ends(self) -> Tensor:
        """int64 ``[blocks]``: position behind each block's last row."""
        return (self.starts + self.block).clamp(max=self.seq_len)

    @cached_property
    def positions(self) -> Tensor:
        """int64 ``[n]``: 0 to n - 1."""
        return torch.arange(self.seq_len, device=self.device)

    def nearby(self, window: int, sinks: int) -> Tensor:
        """bool ``[blocks, n]``: sinks, and what lies less than ``window`` before any row of the block."""
        j = self.positions
        near = (j > self.starts[:, None] - max(window, 1)) & (j < self.ends[:, None])
        return near | ((j < sinks) & (j < self.ends[:, None]))

    @cached_property
    def visible_rows(self) -> Tensor:
        """int64 ``[blocks, n]``: rows of each block that causality lets see each key."""
        return (self.ends[:, None] - torch.maximum(self.positions, self.starts[:, None])).clamp(min=0)

    def true_mass(self, over: str = "mean") -> Tensor:
        """Attention of all rows: float32 ``[Hkv, blocks, n]``, mean over the group, summed over a block's rows.

        With ``over="max"`` the largest of the rows and query heads instead. Costs as much as dense attention: for
        oracles only.
        """
        mass = torch.zeros(self.k.shape[0], self.blocks, self.seq_len, device=self.device)
        for b in range(self.blocks):
            r0, r1 = self.bounds(b)
            end = self.first + r1
            for h in range(self.k.shape[0]):
                q = self.q[h * self.group : (h + 1) * self.group, r0:r1]
                logits = products(q, self.k[h, :end]) * self.scale
                logits[..., self.first + r0 :] += _causal(r1 - r0, logits)
                probs = torch.softmax(logits, dim=-1)
                mass[h, b, :end] = probs.amax((0, 1)) if over == "max" else probs.sum((0, 1)) / self.group
        return mass


@dataclass
class Kept:
    """What a method keeps of a chunk.

    Attributes:
        keys: bool ``[L, blocks, n]``, L lists: one a KV head, or one a query head. Window and sinks are among
            them; causality is applied behind it.
        diagonals: bool ``[L, n]``: distances that every row looks at besides; None: none.
        residual: keys in a block of those that enter the softmax once more as the mean of what the list leaves out
            of them; 0: none.
        extra_pairs: pairs per head that the method computes besides (what the means of a residual cost).
    """

    keys: Tensor
    diagonals: Tensor | None = None
    residual: int = 0
    extra_pairs: float = 0.0


@dataclass
class Computed:
    """What a method that has its own attention returns: the rows' output, ``[Hq, T, D]``, and pairs per head."""

    output: Tensor
    pairs: Tensor | float


def _causal(rows: int, like: Tensor) -> Tensor:
    """float32 ``[rows, rows]``: minus infinity where a key lies behind its row."""
    return torch.full((rows, rows), float("-inf"), device=like.device).triu(1)


def products(q: Tensor, k: Tensor) -> Tensor:
    """float32 ``q @ k`` transposed. The products must not be rounded to the model's dtype: logits reach hundreds.

    On CUDA the caller allows TF32, which holds bfloat16 exactly and sums in float32.
    """
    return q.float() @ k.float().mT


def pairs(chunk: Chunk, kept: Kept) -> Tensor:
    """(query, key) pairs per head that ``attend`` computes, mean over the lists: float64 scalar on the device."""
    seen = chunk.visible_rows.double()
    count = torch.stack([(keys * seen).sum() for keys in kept.keys]).mean()
    if kept.diagonals is not None:
        rows = torch.arange(chunk.rows, device=chunk.device)
        for b in range(chunk.blocks):
            r0, r1 = chunk.bounds(b)
            distance = (chunk.first + rows[r0:r1])[:, None] - chunk.positions
            for keys, diagonals in zip(kept.keys[:, b], kept.diagonals, strict=True):
                on = diagonals[distance.clamp(min=0)] & (distance >= 0) & ~keys
                count = count + on.sum() / len(kept.keys)
    return count + kept.extra_pairs


def attend(chunk: Chunk, kept: Kept) -> Tensor:
    """Attention of the chunk's rows over what is kept: ``[Hq, T, D]``.

    A row looks at the keys of its block's list and at its diagonals, as far as causality lets it, each key once.
    With a residual every block of keys adds one more logit, that of the mean of the keys left out of it plus the
    logarithm of their number, with their mean value (FlashPrefill 2, HyperAttention).
    """
    out = torch.empty_like(chunk.q)
    lists = kept.keys.shape[0]
    heads = chunk.q.shape[0] // lists
    wanted = kept.keys
    if kept.diagonals is not None:
        wanted = wanted | _touched(chunk, kept.diagonals)
    where = wanted.nonzero()[:, 2]
    counts = wanted.sum(-1).tolist()
    at = 0
    for h in range(lists):
        kv = h * heads // chunk.group
        for b in range(chunk.blocks):
            r0, r1 = chunk.bounds(b)
            index = where[at : at + counts[h][b]]
            at += counts[h][b]
            q = chunk.q[h * heads : (h + 1) * heads, r0:r1]
            logits = products(q, chunk.k[kv, index]) * chunk.scale
            distance = (chunk.first + torch.arange(r0, r1, device=q.device))[:, None] - index
            hidden = distance < 0
            if kept.diagonals is not None:
                hidden |= ~(kept.keys[h, b, index] | kept.diagonals[h][distance.clamp(min=0)])
            logits.masked_fill_(hidden, float("-inf"))
            values = chunk.v[kv, index]
            if kept.residual:
                k_mean, v_mean, bias = _left_out(chunk, kept.keys[h, b], kv, chunk.first + r0, kept.residual)
                rest = products(q, k_mean) * chunk.scale + bias
                logits, values = torch.cat((logits, rest), -1), torch.cat((values, v_mean))
            probs = torch.softmax(logits, dim=-1).to(values.dtype)
            out[h * heads : (h + 1) * heads, r0:r1] = probs @ values
    return out


def _touched(chunk: Chunk, diagonals: Tensor) -> Tensor:
    """bool ``[L, blocks, n]``: keys that a diagonal meets in any row of a block."""
    touched = torch.zeros(len(diagonals), chunk.blocks, chunk.seq_len, dtype=torch.bool, device=chunk.device)
    for b in range(chunk.blocks):
        r0, r1 = chunk.bounds(b)
        distance = (chunk.first + torch.arange(r0, r1, device=chunk.device))[:, None] - chunk.positions
        touched[:, b] = (diagonals[:, distance.clamp(min=0)] & (distance >= 0)).any(1)
    return touched


def _left_out(chunk: Chunk, keys: Tensor, kv: int, before: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key, mean value and log count of the keys below ``before`` that a list leaves out, per block of keys."""
    whole = before // size * size
    left = (~keys[:whole]).view(-1, size)
    count = left.sum(1)
    weights = left.to(chunk.k.dtype).unsqueeze(1) / count.clamp(min=1)[:, None, None].to(chunk.k.dtype)
    k_mean, v_mean = ((weights @ x[kv, :whole].view(-1, size, x.shape[-1])).squeeze(1) for x in (chunk.k, chunk.v))
    return k_mean, v_mean, torch.log(count.float())
