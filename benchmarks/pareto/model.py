# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A Hugging Face model whose attention is patched, fed a prompt in chunks as vLLM does it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.pareto.chunk import Chunk, Computed, Kept, attend, pairs
from benchmarks.pareto.structures import Estimator
from vllm_vsprefill.pricing.passes import LayerRows, Passes, attend_dense, dense
from vllm_vsprefill.pricing.readings import Readings, compare, read


@dataclass
class LayerTally:
    """Sums over a run's chunks of one layer."""

    pairs: list[Tensor | float] = field(default_factory=list)
    causal: float = 0.0
    error: list[Tensor] = field(default_factory=list)
    size: list[Tensor] = field(default_factory=list)


class Runner:
    """Runs one prompt through a model: once dense, then with one method after the other.

    Args:
        model: a causal language model of transformers, with ordinary causal attention in every layer.
        tokens: int64 ``[N]``, the prompt.
        dense_first: first rows, which are dense in every run and computed once.
        chunk: rows of a chunk.
        dense_last: last rows of a chunk, which are dense.
    """

    def __init__(self, model: Any, tokens: Tensor, *, dense_first: int, chunk: int, dense_last: int = 64) -> None:
        if not 0 < dense_first < len(tokens):
            raise ValueError(f"dense_first must be from 1 to {len(tokens) - 1}, got {dense_first}")
        self.model, self.tokens = model, tokens.to(model.device)
        self.dense_first, self.chunk, self.dense_last = dense_first, chunk, dense_last
        config = model.config.get_text_config()
        self.layers: int = config.num_hidden_layers
        self._estimator: Estimator | None = None
        self._sparse: Collection[int] = ()
        self._judge = False
        self._passes = Passes(model, len(tokens))
        torch.set_float32_matmul_precision("high")  # TF32 holds what bfloat16 does
        self._passes.run(self.tokens, 0, dense_first)
        self.dense_seconds, self.reference = self._timed(lambda: self._rows(None))

    @property
    def rows(self) -> int:
        """Rows that are judged: those behind the dense beginning."""
        return len(self.tokens) - self.dense_first

    @torch.inference_mode()
    def run(self, estimator: Estimator, layers: Collection[int] | None = None, judge: bool = False) -> dict[str, Any]:
        """The rows behind the beginning with ``estimator`` in ``layers`` (None: all), against the dense pass.

        Args:
            estimator: the method.
            layers: layers that run sparse.
            judge: also compare each layer's output with that of dense attention on the same input.

        Returns:
            density: computed pairs / causal pairs over the whole prompt, the dense beginning and last rows included;
                sparse_density: over the rows behind the beginning; both mean over all layers.
            top1: share of rows with the dense pass's likeliest token; nll: change of the mean; kl: mean divergence,
                over the 32 likeliest tokens and the rest; logprob: mean absolute change of the next token's.
            by_quarter: top1 of each quarter of the rows.
            layer_density, layer_error: per layer, of the rows behind the beginning.
        """
        self._sparse = range(self.layers) if layers is None else layers
        self._judge = judge
        self.tallies = [LayerTally() for _ in range(self.layers)]
        self._memory: list[dict[str, Any]] = [{} for _ in range(self.layers)]
        seconds, found = self._timed(lambda: self._rows(estimator))
        means = compare(self.reference, found).means()
        same = (found.best == self.reference.best).float()
        n, first = len(self.tokens), self.dense_first
        causal = n * (n + 1) / 2
        beginning = first * (first + 1) / 2
        densities = [float(sum(t.pairs)) / (causal - beginning) if t.pairs else 1.0 for t in self.tallies]
        mean = sum(densities) / len(densities)
        result = {
            "density": (beginning + mean * (causal - beginning)) / causal,
            "sparse_density": mean,
            "top1": means["top1"],
            "nll": means["nll"],
            "kl": means["kl"],
            "logprob": means["absolute"],
            "by_quarter": [round(float(part.mean()), 5) for part in same.chunk(4)],
            "dense_nll": float(self.reference.nll.mean()),
            "seconds": round(seconds, 2),
            "layer_density": [round(d, 5) for d in densities],
        }
        if judge:
            result["layer_error"] = [
                round(float(sum(t.error) / sum(t.size)) ** 0.5, 5) if t.error else 0.0 for t in self.tallies
            ]
        return result

    def _timed(self, call: Callable[[], Readings]) -> tuple[float, Readings]:
        start = time.perf_counter()
        found = call()
        if found.nll.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, found

    def _rows(self, estimator: Estimator | None) -> Readings:
        """A pass over the rows behind the beginning, chunk by chunk."""
        self._estimator = estimator
        parts: list[Readings] = []
        try:
            for first in range(self.dense_first, len(self.tokens), self.chunk):
                end = min(first + self.chunk, len(self.tokens))
                hidden = self._passes.run(
                    self.tokens, first, end, attend_dense if estimator is None else self.attention
                )
                rows = slice(first - self.dense_first, end - self.dense_first)
                known = None if estimator is None else self.reference[rows]
                parts.append(read(self._passes.logits, hidden, self.tokens[first + 1 : end + 1], known))
        finally:
            self._estimator = None
        return Readings.joined(parts)

    def attention(self, call: LayerRows) -> Tensor:
        """Attention of the rows of a chunk, ``[Hq, T, D]``."""
        layer, q, k, v, scale = call.layer, call.q, call.k, call.v, call.scale
        first, rows = call.first, q.shape[1]
        kept: Kept | Computed | None = None
        sparse_rows = rows - self.dense_last
        assert self._estimator is not None
        if layer in self._sparse and sparse_rows > 0:
            chunk = Chunk(
                layer,
                q[:, :sparse_rows],
                k[:, : first + sparse_rows],
                v[:, : first + sparse_rows],
                scale,
                self._estimator.block,
                self._memory[layer],
            )
            kept = self._estimator.keep(chunk)
        tally = self.tallies[layer]
        if kept is None:
            tally.pairs.append(_causal_pairs(first, first + rows))
            return dense(q, k, v, scale)
        count = kept.pairs if isinstance(kept, Computed) else pairs(chunk, kept)
        tally.pairs += [count, _causal_pairs(first + sparse_rows, first + rows)]
        sparse = kept.output if isinstance(kept, Computed) else attend(chunk, kept)
        out = torch.cat((sparse, dense(q[:, sparse_rows:], k, v, scale)), 1)
        if self._judge:
            want = dense(q, k, v, scale).float()
            tally.error.append((out.float() - want).square().sum())
            tally.size.append(want.square().sum())
        return out


def _causal_pairs(first: int, end: int) -> float:
    """Pairs of the rows from ``first`` to ``end``."""
    return (end * (end + 1) - first * (first + 1)) / 2
