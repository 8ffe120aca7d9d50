# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Validation during training: KL divergences and recall at a density, on sequences that training does not see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_vsprefill.distil.calibrate import sample_rows
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.coverage import Budgets, Coverage, best_recall, shares, true_rows
from vllm_vsprefill.distil.data import Ids
from vllm_vsprefill.distil.distiller import Distiller
from vllm_vsprefill.distil.student import Student
from vllm_vsprefill.distil.targets import spread_ranges

# Densities of the curve in the report.
DENSITIES = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass
class Validation:
    """Figures of one student.

    Attributes:
        kl: ``[layers, 2]``, KL divergences of columns and diagonals, natural logarithm, mean over heads and sequences.
        loss: ``[layers, 2]``, the loss that is trained, same means.
        table: coverage, ``[layers, H, 3, columns + 1, diagonals + 1]``.
    """

    kl: Tensor
    loss: Tensor
    table: Tensor

    @property
    def total(self) -> float:
        """What early stopping looks at: loss of columns and diagonals, mean over layers."""
        return float(self.loss.sum(1).mean())

    def recall(self, density: float, kind: int = 1) -> Tensor:
        """Share of the true attention within a density, per layer and head ``[layers, H]``; kind 2: of its squares."""
        return best_recall(shares(self.table), density, kind)[0]

    def reached(self, density: float) -> float:
        """Mean density of that choice; above the wanted one where the local window alone exceeds it."""
        return float(best_recall(shares(self.table), density)[1].mean())

    def to_json(self, density: float) -> dict[str, Any]:
        recall, strong = self.recall(density), self.recall(density, 2)
        return {
            "loss": self.total,
            "kl_columns": self.kl[:, 0].tolist(),
            "kl_diagonals": self.kl[:, 1].tolist(),
            "density": density,
            "reached_density": self.reached(density),
            "recall": recall.tolist(),
            "recall_strong": strong.tolist(),
        }


def validate(
    distiller: Distiller,
    sequences: Sequence[Ids],
    budgets: Budgets,
    *,
    chunks: Sequence[int],
    chunks_per_sequence: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
    rows: int = 32,
) -> tuple[list[Validation], float]:
    """Figures of every student.

    Args:
        distiller: teacher and students.
        sequences: held-out token ids.
        budgets: what is kept besides the choice.
        chunks: prefill chunk lengths, taken in turns.
        chunks_per_sequence: chunks measured of each sequence, evenly spread.
        seed: of the sampled rows.
        share: index of this process and number of processes; each takes its part of the sequences.
        rows: rows sampled of each chunk.

    Returns:
        Sums over this process's sequences (divide ``kl`` and ``loss`` by the number of sequences), and that number.
    """
    covered = distiller.teacher.layers.covered
    device, heads = distiller.teacher.device, distiller.teacher.fingerprint.num_kv_heads
    tables = {student.name: Coverage(len(covered), heads, budgets, device) for student in distiller.students}
    figures = torch.zeros(len(distiller.students), len(covered), 4, device=device)
    count = 0
    for number, ids in enumerate(sequences):
        rng = np.random.default_rng([seed, 4, number])
        parts = spread_ranges(len(ids), chunks[number % len(chunks)], chunks_per_sequence)
        picked = [sample_rows(part, rows, rng, device) for part in parts]
        if number % share[1] != share[0]:
            continue
        shared: dict[int, list[tuple[Tensor, Tensor]]] = {}

        def each(
            student: Student,
            call: LayerCall,
            logits: Tensor,
            parts: Any = parts,
            picked: Any = picked,
            shared: dict[int, list[tuple[Tensor, Tensor]]] = shared,
        ) -> None:
            if call.layer not in shared:
                shared.clear()  # one layer's rows at a time
                pairs = zip(parts, picked, strict=True)
                shared[call.layer] = [true_rows(call, positions, part.end) for part, positions in pairs]
            for part, positions, true in zip(parts, picked, shared[call.layer], strict=True):
                tables[student.name].add(covered.index(call.layer), logits, part.end, positions, *true)

        with torch.no_grad():
            figures += distiller.evaluate(torch.from_numpy(ids), parts, each)
        count += 1
    out = [
        Validation(figures[s, :, :2], figures[s, :, 2:], tables[student.name].table)
        for s, student in enumerate(distiller.students)
    ]
    return out, float(count)
