# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""VSPrefill's sparse attention on any device in plain PyTorch, to measure accuracy and density where vLLM does not run.

The semantics are those of ``vllm_vsprefill.kernels.attend``: all rows of a query tile share one list of keys, gathered
here per tile. Everything before is the package's own prefill, with its reference operations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.needle.modeling import dense_attention
from vllm_vsprefill.kernels.score.naive import score
from vllm_vsprefill.kernels.types import Budgets, IndexerLayerWeights, Selection, SparsePattern
from vllm_vsprefill.prefill.cpu import REFERENCE, CPUPrefill


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


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    pattern: SparsePattern,
    *,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Same contract as ``kernels.attend.naive.attend``, on any device, with the tiles of a head in one call.

    The first row must lie on the tile grid, as it does for chunks that are multiples of the tile.
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # [heads, positions, D]
    hq, t, size = q.shape
    hkv, n, _ = k.shape
    group, first = hq // hkv, n - t
    if first % pattern.block_q:
        raise ValueError(f"the chunk starts at {first}, not on the grid of {pattern.block_q}")
    result = torch.empty_like(q)
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
            found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None], scale=scale)
            result[head * group : (head + 1) * group] = found.transpose(0, 1).reshape(group, tiles * bq, size)[:, :t]
    count = n - dense_row
    if count:
        result[:, t - count :] = dense_attention(0, q[None, :, t - count :], k[None], v[None])[0]
        visited += hkv * SparsePattern.causal_pairs(count, n)
    result = result.transpose(0, 1)
    return (result if out is None else out.copy_(result)), visited


OPERATIONS = REFERENCE._replace(attend=attend)


class SparseAttention:
    """Attention of a chunked prefill through the indexer, one prompt at a time; counts what it visits.

    Pass it to ``evaluate.generate`` for a batch of one. Contexts shorter than ``min_seq_len`` run dense and count as
    such.
    """

    def __init__(self, indexer: Mapping[int, IndexerLayerWeights], settings: SparseSettings) -> None:
        self.indexer, self.settings = indexer, settings
        budgets = Budgets(
            settings.min_columns, settings.max_columns, settings.min_diagonals, settings.max_diagonals
        )  # fmt: skip
        self._prefill = CPUPrefill(settings.pattern(), budgets, operations=OPERATIONS)
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
        return score(k, v, self.indexer[layer])

    def thresholds(self, layer: int, heads: int) -> Tensor:
        """float64 ``[2, Hkv]``: columns, diagonals."""
        taus = (self.settings.tau_columns, self.settings.tau_diagonals)
        each = [torch.as_tensor(t[layer] if isinstance(t, tuple) else t, dtype=torch.float64) for t in taus]
        return torch.stack([tau.expand(heads) for tau in each])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, _, t, _ = q.shape
        hkv, n = k.shape[1], k.shape[2]
        if b != 1:
            raise ValueError(f"one prompt at a time, got a batch of {b}")
        first = n - t
        # A token's logits depend on its own key and value only: score what is new, keep the rest.
        new = self.score(layer, *(x.transpose(0, 1) for x in (q[0], k[0, :, first:], v[0, :, first:])))
        self._logits[layer] = new if first == 0 else torch.cat((self._logits[layer], new))
        total = hkv * SparsePattern.causal_pairs(t, n)
        self.total[layer] += total
        if n < self.settings.min_seq_len:
            self.visited[layer] += total
            return dense_attention(layer, q, k, v)
        tau = self.thresholds(layer, hkv)
        selection = self._prefill.select(tau, *OPERATIONS.distributions(self._logits[layer]), 0)
        self.columns[layer] += selection.num_columns.tolist()
        self.diagonals[layer] += selection.num_diagonals.tolist()
        one, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
        out, visited = self._prefill.attend(one, keys, values, selection, t, scale=q.shape[-1] ** -0.5)
        self.visited[layer] += visited
        return out.transpose(0, 1)[None]
