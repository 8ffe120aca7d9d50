# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The prefill over contiguous keys and values, one sequence at a time: on the CPU, or by the references anywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_vsprefill.kernels.attend import cpu as attend_cpu
from vllm_vsprefill.kernels.attend import naive as attend_naive
from vllm_vsprefill.kernels.guard import expected_density
from vllm_vsprefill.kernels.recall import cpu as recall_cpu
from vllm_vsprefill.kernels.recall import naive as recall_naive
from vllm_vsprefill.kernels.sampled import cpu as sampled_cpu
from vllm_vsprefill.kernels.sampled import naive as sampled_naive
from vllm_vsprefill.kernels.score import cpu as score_cpu
from vllm_vsprefill.kernels.score import naive as score_naive
from vllm_vsprefill.kernels.select import cpu as select_cpu
from vllm_vsprefill.kernels.select import naive as select_naive
from vllm_vsprefill.kernels.types import Budgets, Selection, SparsePattern
from vllm_vsprefill.prefill.layer import SparseLayer


class Operations(NamedTuple):
    """One version of every operation; the contracts are those of the functions in each ``naive.py``."""

    score: Callable[..., Tensor]
    sampled: Callable[..., tuple[Tensor, Tensor]]
    distributions: Callable[[Tensor], tuple[Tensor, Tensor]]
    select: Callable[..., Selection]
    attend: Callable[..., tuple[Tensor, int]]
    recall: Callable[..., Tensor]


CPU = Operations(
    score_cpu.score,
    sampled_cpu.sampled,
    select_cpu.distributions,
    select_cpu.select,
    attend_cpu.attend,
    recall_cpu.recall,
)
REFERENCE = Operations(
    score_naive.score,
    sampled_naive.sampled,
    select_naive.distributions,
    select_naive.select,
    attend_naive.attend,
    recall_naive.recall,
)
"""Plain PyTorch, for tensors of any device; slow."""


class CPUPrefill:
    """Estimate, select, guard, merge, attend: once, for the layers of one model. Merging is a part of ``attend`` here.

    Args:
        pattern: tiles, window, sinks.
        budgets: how many columns and diagonals are kept at least and at most.
        sampled_rows: rows that the training-free estimator looks at.
        max_density: share of the causal pairs above which nothing is chosen.
        operations: the versions to use.

    Attributes:
        cached, scored: tokens whose index logits were found and computed so far, over all layers.
    """

    def __init__(
        self,
        pattern: SparsePattern,
        budgets: Budgets,
        *,
        sampled_rows: int = 64,
        max_density: float = 1.0,
        operations: Operations = CPU,
    ) -> None:
        self.pattern = pattern
        self.budgets = budgets
        self.sampled_rows = sampled_rows
        self.max_density = max_density
        self.operations = operations
        self.cached = self.scored = 0

    def choose(
        self,
        layer: SparseLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: int,
        *,
        scale: float,
        slots: Tensor | None = None,
    ) -> Selection | None:
        """Choose the keys of a chunk, with the whole sequence in view.

        Args:
            layer: the layer.
            query: ``[T, num_heads, head_size]``, the chunk's rows.
            key, value: ``[n, num_kv_heads, head_size]``, the whole sequence; the last ``T`` positions are the chunk's.
            rows: how many of the rows run sparse, the first ones.
            scale: factor on ``q . k`` before the softmax.
            slots: int64 ``[n]``, where the tokens lie in the cache; needed where the layer keeps its logits.

        Returns:
            What was chosen, for ``attend``, or None where it would compute more than ``max_density``.
        """
        tail = query.shape[0] - rows
        columns, diagonals = self.estimate(layer, query, key, value, scale=scale, slots=slots)
        selection = self.select(layer.tau, columns, diagonals, tail)
        # A choice for each tile among what was selected belongs here.
        return self.guard(selection, rows, key.shape[0] - tail)

    def estimate(
        self,
        layer: SparseLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Importance of columns and of diagonals, float ``[num_kv_heads, n]`` each, every row adds up to one."""
        if layer.weights is None:
            return self.operations.sampled(query, key, scale=scale, num_rows=self.sampled_rows)
        if layer.logits is None:
            self.scored += key.shape[0]
            logits = _finite(self.operations.score(key, value, layer.weights))
        else:
            if slots is None:
                raise ValueError("the layer keeps its logits; slots must say where")
            logits = self._kept_logits(layer, layer.logits.slots, key, value, slots)
        return self.operations.distributions(logits)

    def select(self, tau: Tensor, columns: Tensor, diagonals: Tensor, tail: int) -> Selection:
        """The fewest columns and diagonals that reach the thresholds, for rows in front of a dense ``tail``."""
        chosen = self.operations.select(
            columns, diagonals, tau_columns=tau[0], tau_diagonals=tau[1], budgets=self.budgets
        )
        return chosen.below(columns.shape[1] - tail)

    def guard(self, selection: Selection, rows: int, seq_len: int) -> Selection | None:
        """The selection, or None where the last ``rows`` of ``seq_len`` would compute more than ``max_density``."""
        if self.max_density < 1.0 and expected_density(selection, self.pattern, rows, seq_len) > self.max_density:
            return None
        return selection

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        selection: Selection,
        rows: int,
        *,
        scale: float,
        out: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Attend to what ``choose`` chose for the same chunk; only the first ``rows`` rows are computed.

        Returns:
            ``[rows, num_heads, head_size]``, in ``out`` if given, and the (row, key) pairs visited, over all KV heads.
        """
        seq_len = key.shape[0] - query.shape[0] + rows
        return self.operations.attend(
            query[:rows], key[:seq_len], value[:seq_len], selection, self.pattern, scale=scale, out=out
        )

    def recall(
        self, query: Tensor, key: Tensor, selection: Selection, rows: int, *, scale: float, num_rows: int
    ) -> Tensor:
        """Share of the true attention of ``num_rows`` of the rows that ``attend`` covers: float32 ``[num_kv_heads]``.

        The other arguments are those of ``attend``.
        """
        seq_len = key.shape[0] - query.shape[0] + rows
        return self.operations.recall(
            query[:rows], key[:seq_len], selection, self.pattern, scale=scale, num_rows=num_rows
        )  # fmt: skip

    def _kept_logits(self, layer: SparseLayer, cache: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> Tensor:
        """Logits ``[n, num_kv_heads, 2]``: the kept ones, and the missing ones computed now and kept."""
        n, heads, _ = key.shape
        logits = cache.index_select(0, slots)  # [n, 2H]
        missing = logits[:, 0].isnan().nonzero().squeeze(1)
        self.cached += n - len(missing)
        self.scored += len(missing)
        if len(missing):
            first, end = int(missing[0]), int(missing[-1]) + 1
            # The usual case is the chunk's own tokens: no copy of keys and values.
            where = slice(first, end) if end - first == len(missing) else missing
            fresh = _finite(self.operations.score(key[where], value[where], layer.weights)).flatten(1)
            logits.index_copy_(0, missing, fresh)
            cache.index_copy_(0, slots[missing], fresh)
        return logits.view(n, heads, 2)


def _finite(logits: Tensor) -> Tensor:
    """Logits without NaN, which marks a missing slot, and without infinities, which a softmax turns into NaN."""
    limit = 1e30
    return torch.nan_to_num(logits, nan=limit, posinf=limit, neginf=-limit)
