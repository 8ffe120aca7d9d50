# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The density counters on a server's ``/metrics``."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Densities:
    """Counters of ``vsprefill_*`` at one moment, or between two, by layer."""

    computed: dict[int, float]
    causal: dict[int, float]
    sparse_chunks: dict[int, float]

    @classmethod
    def parse(cls, metrics: str) -> Densities:
        """Read them from the text of ``/metrics``."""

        def series(pattern: str) -> dict[int, float]:
            found: dict[int, float] = {}
            for layer, value in re.findall(pattern, metrics, re.M):
                found[int(layer)] = found.get(int(layer), 0.0) + float(value)
            return found

        return cls(
            series(r'^vsprefill_pairs_computed_total\{.*?layer="(\d+)".*?\} (\S+)'),
            series(r'^vsprefill_pairs_causal_total\{.*?layer="(\d+)".*?\} (\S+)'),
            series(r'^vsprefill_chunks_total\{.*?layer="(\d+)".*?path="sparse".*?\} (\S+)'),
        )

    def since(self, earlier: Densities) -> Densities:
        """What was counted after ``earlier``."""

        def minus(now: dict[int, float], before: dict[int, float]) -> dict[int, float]:
            return {layer: value - before.get(layer, 0.0) for layer, value in now.items()}

        return Densities(
            minus(self.computed, earlier.computed),
            minus(self.causal, earlier.causal),
            minus(self.sparse_chunks, earlier.sparse_chunks),
        )

    @property
    def layers(self) -> dict[int, float]:
        """Density of each layer that attended to anything."""
        return {layer: self.computed[layer] / pairs for layer, pairs in sorted(self.causal.items()) if pairs}

    @property
    def mean(self) -> float:
        """Density over all layers; 1 if nothing was counted."""
        total = sum(self.causal.values())
        return sum(self.computed.values()) / total if total else 1.0

    @property
    def ran_sparse(self) -> bool:
        """Whether any layer computed a chunk sparsely."""
        return any(chunks > 0 for chunks in self.sparse_chunks.values())
