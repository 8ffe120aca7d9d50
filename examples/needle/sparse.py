# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""VSPrefill's sparse attention on any device in plain PyTorch, to measure accuracy and density where vLLM does not run.

The semantics are those of ``vllm_vsprefill.kernels.attend``: all rows of a query tile share one list of keys, gathered
here per tile. Scores, distributions and selection are the package's own reference functions.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.needle.modeling import dense_attention
from vllm_vsprefill.indexer import VSIndexer
from vllm_vsprefill.kernels.score.naive import score
from vllm_vsprefill.kernels.select.naive import distributions, select
from vllm_vsprefill.kernels.types import Budgets, Selection, SparsePattern


@dataclass(frozen=True, slots=True)
class SparseSettings:
    """What decides how much is computed; the names are those of the plugin's options."""

    # One for all layers, or one per layer; that of a layer is a number, or one number per KV head.
    tau_columns: float | tuple[float | tuple[float, ...], ...] = 0.9
    tau_diagonals: float | tuple[float | tuple[float, ...], ...] = 0.9
    min_columns: int = 64
    max_columns: int | None = 1024
    min_diagonals: int = 0
    max_diagonals: int | None = 16
    min_seq_len: int = 4096
    window: int = 256
    sinks: int = 64
    dense_last: int = 64
    block_q: int = 128
    block_k: int = 64

    def pattern(self) -> SparsePattern:
        return SparsePattern(self.block_q, self.block_k, self.window, self.sinks, self.dense_last)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tile_keys(selection: Selection, head: int, first_tile: int, tiles: int, n: int, pattern: SparsePattern) -> Tensor:
    """Keys of each tile before causality, bool ``[tiles, n]``."""
    device = selection.columns.device
    bq, bk = pattern.block_q, pattern.block_k
    granules = -(-n // bk)
    starts = (first_tile + torch.arange(tiles, device=device)) * bq
    last = (starts + bq).clamp(max=n) - 1
    # How many ranges of granules begin minus end, per granule; a running sum > 0 marks a granule inside a range.
    edges = torch.zeros(tiles, granules + 1, dtype=torch.int32, device=device)

    def add(low: Tensor, high: Tensor, valid: Tensor) -> None:
        one = valid.to(torch.int32)
        edges.scatter_add_(1, low.clamp(min=0) // bk, one)
        edges.scatter_add_(1, high.clamp(min=0) // bk + 1, -one)

    d = selection.diagonals[head, : int(selection.num_diagonals[head])].long()
    high = last[:, None] - d[None]
    add(starts[:, None] - d[None], high, high >= 0)
    everywhere = torch.ones(tiles, 1, dtype=torch.bool, device=device)
    add((starts - pattern.reach + 1)[:, None], last[:, None], everywhere)
    if pattern.sinks:
        zero = torch.zeros(tiles, 1, dtype=torch.long, device=device)
        add(zero, zero + min(pattern.sinks, n) - 1, everywhere)
    seen = (edges.cumsum(1)[:, :granules] > 0).repeat_interleave(bk, 1)[:, :n]
    columns = selection.columns[head, : int(selection.num_columns[head])].long()
    seen[:, columns] = True
    return seen


def sparse_rows(q: Tensor, k: Tensor, v: Tensor, selection: Selection, pattern: SparsePattern) -> tuple[Tensor, int]:
    """``kernels.attend`` for q ``[Hq, T, D]``, k and v ``[Hkv, n, D]``; returns out ``[Hq, T, D]`` and visited pairs.

    The first row must lie on the tile grid, as it does for chunks that are multiples of the tile.
    """
    hq, t, size = q.shape
    hkv, n, _ = k.shape
    group, first = hq // hkv, n - t
    if first % pattern.block_q:
        raise ValueError(f"the chunk starts at {first}, not on the grid of {pattern.block_q}")
    out = torch.empty_like(q)
    dense_row = max(first, n - pattern.dense_last)
    visited = 0
    if dense_row > first:
        bq = pattern.block_q
        tiles = -(-t // bq)
        rows = torch.arange(first, first + tiles * bq, device=q.device).view(tiles, bq)
        padded = F.pad(q, (0, 0, 0, tiles * bq - t))
        for head in range(hkv):
            seen = tile_keys(selection, head, first // bq, tiles, n, pattern)
            # Nothing behind a tile's last row.
            seen &= torch.arange(n, device=q.device)[None] <= rows[:, -1:]
            counts = seen.sum(1)
            width = int(counts.max())
            index = torch.sort(seen.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :width]
            valid = torch.arange(width, device=q.device)[None] < counts[:, None]
            mask = valid[:, None] & (index[:, None] <= rows[..., None])  # [tiles, bq, width]
            visited += int((mask & (rows < dense_row)[..., None]).sum())
            # Rows beyond the context see every key of the tile; their output is dropped.
            queries = padded[head * group : (head + 1) * group].unflatten(1, (tiles, bq)).transpose(0, 1)
            keys, values = (x[head][index][:, None].expand(-1, group, -1, -1) for x in (k, v))
            result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None])
            out[head * group : (head + 1) * group] = result.transpose(0, 1).reshape(group, tiles * bq, size)[:, :t]
    count = n - dense_row
    if count:
        out[:, t - count :] = dense_attention(0, q[None, :, t - count :], k[None], v[None])[0]
        visited += hkv * (count * dense_row + count * (count + 1) // 2)
    return out, visited


class SparseAttention:
    """Attention of a chunked prefill through the indexer, one prompt at a time; counts what it visits.

    Pass it to ``evaluate.generate`` for a batch of one. Contexts shorter than ``min_seq_len`` run dense and count as
    such.
    """

    def __init__(self, indexer: VSIndexer, settings: SparseSettings) -> None:
        self.indexer, self.settings = indexer, settings
        self._logits: dict[int, Tensor] = {}
        self.visited: dict[int, int] = defaultdict(int)
        self.total: dict[int, int] = defaultdict(int)
        self.columns: dict[int, list[int]] = defaultdict(list)
        self.diagonals: dict[int, list[int]] = defaultdict(list)

    @property
    def density(self) -> float:
        """Visited over causal pairs, over all layers, KV heads, rows and prompts so far."""
        return sum(self.visited.values()) / max(1, sum(self.total.values()))

    def layer_densities(self) -> list[float]:
        return [round(self.visited[i] / max(1, self.total[i]), 5) for i in sorted(self.total)]

    @staticmethod
    def mean_counts(counts: dict[int, list[int]]) -> list[float]:
        """Mean of ``columns`` or ``diagonals`` per layer, over KV heads, chunks and prompts."""
        return [round(sum(counts[i]) / max(1, len(counts[i])), 1) for i in sorted(counts)]

    def score(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Index logits ``[T, Hkv, 2]`` of new tokens: q ``[T, Hq, D]``, k and v ``[T, Hkv, D]``."""
        del q
        return score(k, v, self.indexer.layer_weights(layer))

    def select(self, layer: int, logits: Tensor) -> Selection:
        s = self.settings
        tau_columns, tau_diagonals = (
            torch.tensor(tau[layer] if isinstance(tau, tuple) else tau, dtype=torch.float64)
            for tau in (s.tau_columns, s.tau_diagonals)
        )
        return select(
            *distributions(logits),
            tau_columns=tau_columns,
            tau_diagonals=tau_diagonals,
            budgets=Budgets(s.min_columns, s.max_columns, s.min_diagonals, s.max_diagonals),
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, t, _ = q.shape
        hkv, n = k.shape[1], k.shape[2]
        if b != 1:
            raise ValueError(f"one prompt at a time, got a batch of {b}")
        first = n - t
        # A token's logits depend on its own key and value only: score what is new, keep the rest.
        new = self.score(layer, *(x.transpose(0, 1) for x in (q[0], k[0, :, first:], v[0, :, first:])))
        self._logits[layer] = new if first == 0 else torch.cat((self._logits[layer], new))
        total = hkv * (t * first + t * (t + 1) // 2)
        self.total[layer] += total
        if n < self.settings.min_seq_len:
            self.visited[layer] += total
            return dense_attention(layer, q, k, v)
        selection = self.select(layer, self._logits[layer])
        self.columns[layer] += selection.num_columns.tolist()
        self.diagonals[layer] += selection.num_diagonals.tolist()
        out, visited = sparse_rows(q[0], k[0], v[0], selection, self.settings.pattern())
        self.visited[layer] += visited
        return out[None]
