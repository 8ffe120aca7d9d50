# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What bars cost, worked out row by row in float64, for the tests of ``price``; and problems whose heads differ."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vllm_vsprefill.kernels.price.naive import rows_of, sizes_of
from vllm_vsprefill.kernels.rows import spread_rows
from vllm_vsprefill.kernels.types import SparsePattern


class Priced:
    """Exact squared errors and densities of a chunk at its sampled rows."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, pattern: SparsePattern, num_rows: int,
        prior: Tensor | None = None,
    ) -> None:  # fmt: skip
        rounding = q.dtype
        q, k, v = (x.double().cpu() for x in (q, k, v))
        n, self.heads, rows = k.shape[0], k.shape[1], q.shape[0]
        group = q.shape[1] // self.heads
        self.rows = spread_rows(rows, rows_of(num_rows, n))
        self.scores: list[list[Tensor]] = []  # by row and head, of the keys that may be listed
        self.places: list[Tensor] = []
        self.probs: list[list[Tensor]] = []
        self.values, self.group = v, group
        first = n - rows
        for row in self.rows:
            position = first + row
            start = position // pattern.block_q * pattern.block_q
            end = min(start + pattern.block_q, n)
            window = pattern.window_start(start)
            self.places.append(torch.arange(min(pattern.sink_keys, window), window))
            scores, probs = [], []
            for head in range(self.heads):
                heads = slice(head * group, (head + 1) * group)
                best = torch.full((end,), -math.inf, dtype=torch.float64)
                for part in range(start, end, -(-pattern.block_q // pattern.parts)):
                    low, high = max(part, first), min(part - (-pattern.block_q // pattern.parts), end)
                    if low >= high:
                        continue
                    mean = q[low - first : high - first, heads].mean(0).to(rounding).double()
                    logits = mean @ k[:end, head].T * scale
                    near = torch.cat((logits[:, : min(pattern.sink_keys, window)], logits[:, window:]), 1)
                    best = torch.maximum(best, (logits - near.logsumexp(1, keepdim=True)).amax(0))
                added = 0.0 if prior is None else prior[head, self.places[-1]].double().cpu()
                scores.append(best[self.places[-1]] + added)
                probs.append((q[row, heads] @ k[: position + 1, head].T * scale).softmax(1))
            self.scores.append(scores)
            self.probs.append(probs)
        self.total = sum(float((probs @ v[: probs.shape[1], h]).square().sum()) for p in self.probs
                         for h, probs in enumerate(p))  # fmt: skip

    def of(self, bars: list[float]) -> tuple[list[float], list[float]]:
        """Relative squared error and density of each head at a bar for each."""
        errors, kept, seen = [0.0] * self.heads, [0] * self.heads, 0
        for scores, places, probs in zip(self.scores, self.places, self.probs, strict=True):
            seen += probs[0].shape[1]
            for head, bar in enumerate(bars):
                values = self.values[: probs[head].shape[1], head]
                keep = torch.ones(len(values), dtype=torch.bool)
                keep[places] = scores[head] >= bar
                some = probs[head] * keep
                out = some @ values / some.sum(1, keepdim=True)
                errors[head] += float((out - probs[head] @ values).square().sum())
                kept[head] += int(keep.sum())
        return [error / max(self.total, 1e-30) for error in errors], [count / seen for count in kept]

    def costs(self, bars: list[float], price: float) -> list[float]:
        """What the choice makes smallest, of each head."""
        errors, density = self.of(bars)
        return [error + price * share for error, share in zip(errors, density, strict=True)]

    def ladder(self) -> list[list[float]]:
        """Bars of every step, by head: multiples of 1/8 from -20 to below 12."""
        steps = []
        for size in sizes_of(len(self.values)):
            bars = []
            for head in range(self.heads):
                scores = torch.cat([row[head] for row in self.scores])
                bar = -20.0
                while bar < 12.0 and int((scores >= bar).sum()) > size * len(self.rows):
                    bar += 0.125
                bars.append(bar if bar < 12.0 else math.inf)
            steps.append(bars)
        return [*steps, [-math.inf] * self.heads]

    def best(self, price: float) -> list[float]:
        """The least cost of each head on the ladder."""
        costs = [self.costs(bars, price) for bars in self.ladder()]
        return [min(cost[head] for cost in costs) for head in range(self.heads)]


def planted(n: int, size: int, rng: torch.Generator, group: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[n, 3 * group, size]``, keys and values of three heads: one that looks at what is near, one that looks
    at a few keys far behind, and one that looks at everything, whose values change with the distance."""
    position = torch.arange(n, dtype=torch.float64)
    angles = position[:, None] / torch.logspace(0.7, 2.2, size // 2, dtype=torch.float64)
    places = torch.cat((angles.cos(), angles.sin()), 1)
    k = torch.randn(n, 3, size, generator=rng, dtype=torch.float64) * 0.1
    v = torch.randn(n, 3, size, generator=rng, dtype=torch.float64)
    q = torch.randn(n, 3, group, size, generator=rng, dtype=torch.float64) * 0.3
    k[:, 0] += places
    q[:, 0] += 3 * places[:, None]
    needles = torch.arange(n // 8, n // 3, max(n // 200, 1))
    k[needles, 1] = 4.0
    q[:, 1] += 1.5
    v[needles, 1] += 1.0
    v[:, 2] += (2 - 4 * position / n)[:, None]
    return q.flatten(1, 2), k, v
