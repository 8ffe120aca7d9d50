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

from benchmarks.pareto.chunk import Chunk, Computed, Kept, attend, dense, pairs
from benchmarks.pareto.structures import Estimator

IMPLEMENTATION = "vsprefill_pareto"
TOP = 32
"""Likeliest tokens of dense attention over which the divergence is summed, the others taken together."""
ROWS = 512
"""Rows whose logits over the vocabulary are held at a time."""


@dataclass
class Readings:
    """What a pass says about its rows.

    Attributes:
        nll: float32 ``[rows]``: negative log-probability of the token that follows.
        best: int64 ``[rows]``: likeliest token.
        top: int64 ``[rows, TOP]``: likeliest tokens of dense attention.
        top_logprobs: float32 ``[rows, TOP]``: their log-probabilities in this pass.
    """

    nll: Tensor
    best: Tensor
    top: Tensor
    top_logprobs: Tensor


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
        self._keys: list[Tensor | None] = [None] * self.layers
        self._values: list[Tensor | None] = [None] * self.layers
        self._estimator: Estimator | None = None
        self._sparse: Collection[int] = ()
        self._judge = False
        self._first = 0
        _register()
        torch.set_float32_matmul_precision("high")  # TF32 holds what bfloat16 does
        model.set_attn_implementation(IMPLEMENTATION)
        with torch.inference_mode():
            self._pass(0, dense_first)
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
        ref = self.reference
        # What lies outside the likeliest tokens counts as one more.
        p, q = (torch.cat((r.top_logprobs, _rest(r.top_logprobs)), 1) for r in (ref, found))
        same = (found.best == ref.best).float()
        n, first = len(self.tokens), self.dense_first
        causal = n * (n + 1) / 2
        beginning = first * (first + 1) / 2
        densities = [float(sum(t.pairs)) / (causal - beginning) if t.pairs else 1.0 for t in self.tallies]
        mean = sum(densities) / len(densities)
        result = {
            "density": (beginning + mean * (causal - beginning)) / causal,
            "sparse_density": mean,
            "top1": float(same.mean()),
            "nll": float((found.nll - ref.nll).mean()),
            "kl": float((p.exp() * (p - q)).sum(1).mean()),
            "logprob": float((found.nll - ref.nll).abs().mean()),
            "by_quarter": [round(float(part.mean()), 5) for part in same.chunk(4)],
            "dense_nll": float(ref.nll.mean()),
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

    def _pass(self, first: int, end: int) -> Tensor:
        """Hidden states of the rows from ``first`` to ``end``."""
        global _current
        _current = self
        self._first = first
        rows = torch.arange(first, end, device=self.tokens.device)[None]
        body = self.model.get_decoder()
        return body(input_ids=self.tokens[None, first:end], position_ids=rows, use_cache=False).last_hidden_state[0]

    def _rows(self, estimator: Estimator | None) -> Readings:
        """A pass over the rows behind the beginning, chunk by chunk."""
        self._estimator = estimator
        parts: list[Readings] = []
        try:
            for first in range(self.dense_first, len(self.tokens), self.chunk):
                end = min(first + self.chunk, len(self.tokens))
                parts += self._read(self._pass(first, end), first)
        finally:
            self._estimator = None
        return Readings(*(torch.cat([getattr(part, name) for part in parts]) for name in Readings.__annotations__))

    def _read(self, hidden: Tensor, first: int) -> list[Readings]:
        head = self.model.get_output_embeddings()
        parts = []
        for r0 in range(0, len(hidden), ROWS):
            at = first + r0
            rows = hidden[r0 : r0 + ROWS]
            logits = head(rows)
            norm = torch.logsumexp(logits.float(), -1)
            # The last row has no next token; its likeliest one stands for it.
            best = logits.argmax(-1)
            following = torch.cat((self.tokens[at + 1 : at + 1 + len(rows)], best[-1:]))[: len(rows)]
            nll = norm - logits.gather(1, following[:, None])[:, 0].float()
            top = (
                self.reference.top[at - self.dense_first : at - self.dense_first + len(rows)]
                if self._estimator is not None
                else logits.topk(TOP, -1).indices
            )
            parts.append(Readings(nll, best, top, logits.gather(1, top).float() - norm[:, None]))
        return parts

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``[Hq, T, D]`` and ``[Hkv, T, D]`` twice, a pass's rows -> ``[Hq, T, D]``."""
        first, rows = self._first, q.shape[1]
        if self._keys[layer] is None:
            shape = (k.shape[0], len(self.tokens), k.shape[2])
            self._keys[layer], self._values[layer] = k.new_empty(shape), v.new_empty(shape)
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None
        assert values is not None
        keys[:, first : first + rows], values[:, first : first + rows] = k, v
        k, v = keys[:, : first + rows], values[:, : first + rows]
        kept: Kept | Computed | None = None
        sparse_rows = rows - self.dense_last
        if self._estimator is not None and layer in self._sparse and sparse_rows > 0:
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
        if self._estimator is not None:
            tally = self.tallies[layer]
            if kept is None:
                tally.pairs.append(_causal_pairs(first, first + rows))
            else:
                count = kept.pairs if isinstance(kept, Computed) else pairs(chunk, kept)
                tally.pairs += [count, _causal_pairs(first + sparse_rows, first + rows)]
        if kept is None:
            return dense(q, k, v, scale)
        sparse = kept.output if isinstance(kept, Computed) else attend(chunk, kept)
        out = torch.cat((sparse, dense(q[:, sparse_rows:], k, v, scale)), 1)
        if self._judge:
            want = dense(q, k, v, scale).float()
            tally.error.append((out.float() - want).square().sum())
            tally.size.append(want.square().sum())
        return out


def _rest(logprobs: Tensor) -> Tensor:
    """Log-probability of everything else, ``[rows, 1]``."""
    return torch.log((1 - logprobs.exp().sum(1, keepdim=True)).clamp(min=1e-6))


def _causal_pairs(first: int, end: int) -> float:
    """Pairs of the rows from ``first`` to ``end``."""
    return (end * (end + 1) - first * (first + 1)) / 2


_current: Runner | None = None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query ``[1, Hq, T, D]``, key and value ``[1, Hkv, T, D]``."""
    unusual = attention_mask is not None or sliding_window or softcap is not None or kwargs.get("s_aux") is not None
    if _current is None or unusual or query.shape[0] != 1:
        raise ValueError(f"{type(module).__name__} asks for more than ordinary causal attention over one sequence")
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    out = _current.attention(int(module.layer_idx), query[0], key[0], value[0], scale)  # type: ignore[arg-type]
    return out.transpose(0, 1)[None].contiguous(), None
