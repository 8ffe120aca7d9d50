# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What is kept of one layer's attention, against all of it: ``vsprefill inspect`` without model and pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.kernels.recall.naive import probabilities
from vllm_vsprefill.kernels.types import IndexerLayerWeights, Selection, SparsePattern
from vllm_vsprefill.prefill.cpu import CPUPrefill
from vllm_vsprefill.prefill.cpu_tiles import CPUTilePrefill
from vllm_vsprefill.prefill.layer import Heads, SparseLayer

BINS = 256
"""Side of a heat map at most."""


@dataclass(frozen=True)
class HeadReport:
    """One KV head of a layer, for the rows that run sparse.

    Attributes:
        columns: int64 ``[C]``, positions kept for every row; none where every tile has a list of its own.
        diagonals: int64 ``[S]``, distances kept beside the window; likewise.
        recall: share of the attention mass that was kept, the mean over rows and query heads.
        density: pairs computed, of the causal ones.
        error: norm of the difference of outputs, relative to the norm of the true ones.
        attention: float32 ``[B, B]``, attention mass a row, summed over the keys of a bin and averaged over its rows.
        kept: float32 ``[B, B]``, share of a bin's causal pairs that are computed.
        shares: float32 ``[n]``, of the tiles that could list a key, those that do; None without lists of tiles.
        tile_keys: keys that a tile lists, on average; None likewise.
    """

    columns: Tensor
    diagonals: Tensor
    recall: float
    density: float
    error: float
    attention: Tensor
    kept: Tensor
    shares: Tensor | None = None
    tile_keys: float | None = None


@dataclass(frozen=True)
class LayerReport:
    """One layer; ``handed_back``: a server would run it dense, as more than ``max_density`` was chosen."""

    index: int
    handed_back: bool
    heads: tuple[HeadReport, ...]


class _Pool:
    """Sums over bins of rows and keys. Memory: one strip of rows and two maps."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.size = -(-rows // BINS)  # positions of a bin
        self.bins = -(-rows // self.size)
        self.mass = torch.zeros(self.bins, self.bins, device=device)
        self.pairs = torch.zeros(self.bins, self.bins, device=device)
        self.causal = torch.zeros(self.bins, self.bins, device=device)
        self.rows = torch.zeros(self.bins, device=device)

    def add(self, start: int, mass: Tensor, kept: Tensor, causal: Tensor) -> None:
        """Rows from ``start``: float32 ``[b, m]`` each, of the first ``m`` keys."""
        at = torch.arange(start, start + len(mass), device=mass.device) // self.size
        for total, part in ((self.mass, mass), (self.pairs, kept), (self.causal, causal)):
            padded = torch.nn.functional.pad(part, (0, self.bins * self.size - part.shape[1]))
            total.index_add_(0, at, padded.view(len(part), self.bins, self.size).sum(-1))
        self.rows.index_add_(0, at, torch.ones(len(mass), device=mass.device))


def inspect_layer(
    call: LayerCall,
    prefill: CPUPrefill,
    weights: IndexerLayerWeights | None,
    tau: Tensor,
    tail: int,
) -> LayerReport:
    """Choose as a server does for a prompt that is one chunk, attend to that, and compare.

    Args:
        call: the layer's queries, keys and values.
        prefill: how keys are chosen; its pattern has no dense last rows of its own.
        weights: of the indexer, or None for the training-free estimator.
        tau: float64 ``[2, Hkv]``, thresholds of columns and diagonals.
        tail: last rows of the chunk, which attend to everything and are not looked at.
    """
    q, k, v = (x.cpu().contiguous() for x in (call.q, call.k, call.v))
    rows, heads = len(q) - tail, k.shape[1]
    layer = SparseLayer(call.layer, 0, Heads(q.shape[1], heads, q.shape[2]), weights, tau)
    columns, diagonals = prefill.estimate(layer, q, k, v, scale=call.scale)
    chosen = prefill.select(tau, columns, diagonals, tail)
    handed_back = prefill.guard(chosen, rows, rows) is None
    out, _ = prefill.attend(q, k, v, chosen, rows, scale=call.scale)
    reports = [
        _head(head, q[:rows], k[:rows], v[:rows], out, chosen, prefill.pattern, call.scale) for head in range(heads)
    ]
    return LayerReport(call.layer, handed_back, tuple(reports))


def inspect_tiles(call: LayerCall, prefill: CPUTilePrefill, tail: int) -> LayerReport:
    """As ``inspect_layer``, where every tile has a list of its own.

    Args:
        call: the layer's queries, keys and values.
        prefill: how keys are chosen.
        tail: last rows of the chunk, which attend to everything and are not looked at.
    """
    q, k, v = (x.cpu().contiguous() for x in (call.q, call.k, call.v))
    rows = len(q) - tail
    q, k, v = q[:rows], k[:rows], v[:rows]
    prior = prefill.prior(q, k, scale=call.scale)
    bars = prefill.bars(q, k, v, prior, scale=call.scale)
    listed = prefill.listed(q, k, bars, prior, scale=call.scale)
    out, _ = prefill.attend(q, k, v, listed, rows, scale=call.scale)
    reports = [_head(head, q, k, v, out, listed[head], prefill.pattern, call.scale) for head in range(k.shape[1])]
    return LayerReport(call.layer, prefill.exceeds(bars), tuple(reports))


def _head(
    head: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    chosen: Selection | Tensor,
    pattern: SparsePattern,
    scale: float,
) -> HeadReport:
    """``chosen``: of all heads, or lists of the tiles of this one, bool ``[tiles, n]``."""
    rows, group = len(q), q.shape[1] // k.shape[1]
    mine = slice(head * group, (head + 1) * group)
    queries, keys, values = q[:, mine].float(), k[:, head].float(), v[:, head].float()
    columns = diagonals = torch.zeros(0, dtype=torch.int64)
    shares = tile_keys = None
    if isinstance(chosen, Tensor):
        starts = torch.tensor([pattern.window_start(start) for start in range(0, rows, pattern.block_q)])
        could = (torch.arange(rows) < starts[:, None]).sum(0)
        shares, tile_keys = chosen.sum(0) / could.clamp(min=1), float(chosen.sum(1).double().mean())
    else:
        columns = chosen.columns[head, : int(chosen.num_columns[head])].long()
        diagonals = chosen.diagonals[head, : int(chosen.num_diagonals[head])].long()
    pool = _Pool(rows, q.device)
    recall = visited = difference = norm = 0.0
    for start in range(0, rows, pattern.block_q):
        end = min(start + pattern.block_q, rows)
        causal = torch.arange(end) <= torch.arange(start, end)[:, None]  # [b, end]
        probs = probabilities(queries[start:end], keys[:end], torch.arange(start, end), scale)  # [g, b, end]
        if isinstance(chosen, Tensor):
            kept = chosen[start // pattern.block_q, :end].clone()
            kept[: pattern.sink_keys] = True
            kept[pattern.window_start(start) :] = True
        else:
            kept = torch.zeros(end, dtype=torch.bool)
            kept[pattern.tile_keys(columns, diagonals, start, end)] = True
        seen = (causal & kept).float()
        mass = probs.mean(0)
        recall += float((mass * seen).sum())
        visited += float(seen.sum())
        truth = torch.einsum("gbm,md->bgd", probs, values[:end])
        difference += float((out[start:end, mine].float() - truth).square().sum())
        norm += float(truth.square().sum())
        pool.add(start, mass, seen, causal.float())
    return HeadReport(
        columns,
        diagonals,
        recall / rows,
        visited / SparsePattern.causal_pairs(rows, rows),
        (difference / norm) ** 0.5 if norm else 0.0,
        pool.mass / pool.rows.clamp(min=1)[:, None],
        pool.pairs / pool.causal.clamp(min=1),
        shares,
        tile_keys,
    )
