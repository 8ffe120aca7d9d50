# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Thresholds per layer, or per KV head, that reach a recall or keep to a density on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_vsprefill.checkpoint import CheckpointConfig, LoadedIndexer, Thresholds, save_checkpoint
from vllm_vsprefill.config import PRESETS, VSPrefillConfig
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.coverage import COLUMN_GRID, DISTANCE_GRID, Budgets, Coverage, true_rows
from vllm_vsprefill.distil.data import Ids
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import Teacher
from vllm_vsprefill.distil.options import Metric
from vllm_vsprefill.distil.scoring import score
from vllm_vsprefill.distil.state import writing
from vllm_vsprefill.distil.student import features
from vllm_vsprefill.distil.targets import Range, spread_ranges
from vllm_vsprefill.thresholds import RECALL_GOALS
from vllm_vsprefill.tuning import CPU, PlatformTuning, cuda_tuning

Weights = Mapping[int, Sequence[Tensor]]  # layer -> w1, b1, w2, b2

ROWS = 32
# Shorter contexts run dense with every preset.
MIN_SEQ_LEN = min(int(values["min_seq_len"] or 0) for values in PRESETS.values())


@dataclass(frozen=True)
class Goal:
    """What thresholds are to reach: a recall in every layer, or a density over all layers.

    Attributes:
        recall: share of the true attention; each layer (or head) reaches it with as few keys as it can.
        density: share of the causal entries; it is spent where it brings most recall.
        metric: what recall counts: ``mass``, or ``strong``, in which each entry weighs as much as its probability.
    """

    recall: float | None = None
    density: float | None = None
    metric: Metric = "mass"

    def __post_init__(self) -> None:
        if (self.recall is None) == (self.density is None):
            raise ValueError("give either a recall or a density")


DEFAULT_GOALS = {preset: Goal(recall=recall) for preset, recall in RECALL_GOALS.items()}


@dataclass(frozen=True)
class Calibration:
    """Thresholds of one preset and what they reach on the text they were calibrated with.

    Attributes:
        thresholds: to store in the checkpoint.
        recall: ``[layers, H]``.
        density: ``[layers, H]``.
        reached: what the goal is about: the lowest recall of a layer (or head), or the density over all.
    """

    thresholds: Thresholds
    recall: Tensor
    density: Tensor
    reached: float


def platform_tuning(device: torch.device) -> PlatformTuning:
    """Tile sizes of the kernels that run on a device; the least CUDA row where there is none to ask."""
    if device.type != "cuda":
        return CPU
    return cuda_tuning(torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None)


def preset_budgets(preset: str, tuning: PlatformTuning) -> Budgets:
    """What a preset keeps on a platform besides what its thresholds choose."""
    config = VSPrefillConfig.from_sources({"preset": preset}).resolved(tuning)
    return Budgets(config.pattern(), config.min_columns, config.max_columns, config.min_diagonals, config.max_diagonals)


def sample_rows(part: Range, count: int, rng: np.random.Generator, device: torch.device) -> Tensor:
    """Positions of some rows of a range, ascending."""
    size = part.end - part.start
    picked = np.sort(rng.choice(size, min(count, size), replace=False)) + part.start
    return torch.from_numpy(picked).to(device)


@torch.no_grad()
def measure(
    teacher: Teacher,
    weights: Weights,
    sequences: Sequence[Ids],
    budgets: Mapping[str, Budgets],
    *,
    chunks: Sequence[int],
    chunks_per_sequence: int = 4,
    min_seq_len: int = 0,
    rows: int = ROWS,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Callable[[], None] | None = None,
) -> dict[str, Coverage]:
    """Coverage tables of an indexer on some sequences, for several budgets at once.

    Args:
        teacher: the model.
        weights: the indexer's.
        sequences: held-out token ids.
        budgets: by name.
        chunks: prefill chunk lengths, taken in turns; 0 is the whole sequence.
        chunks_per_sequence: chunks measured of each sequence, evenly spread.
        min_seq_len: contexts shorter than this are left out: they run dense.
        rows: rows sampled of each chunk.
        seed: of the rows.
        dtype: of the indexer's products; None for bfloat16 on CUDA and float32 elsewhere.
        progress: called after each sequence.
    """
    device, covered = teacher.device, tuple(sorted(weights))
    heads = teacher.fingerprint.num_kv_heads
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tables = {name: Coverage(len(covered), heads, b, device) for name, b in budgets.items()}
    rng = np.random.default_rng([seed, 3])
    for number, ids in enumerate(sequences):
        parts = spread_ranges(len(ids), chunks[number % len(chunks)], chunks_per_sequence, min_seq_len)
        picked = [sample_rows(part, rows, rng, device) for part in parts]

        def layer(call: LayerCall, parts: Sequence[Range] = parts, picked: Sequence[Tensor] = picked) -> None:
            if call.layer not in weights:
                return
            logits = score(features("kv", call, dtype), *(w.float() for w in weights[call.layer]))
            for part, positions in zip(parts, picked, strict=True):
                truth, squares = true_rows(call, positions, part.end)
                for table in tables.values():
                    table.add(covered.index(call.layer), logits, part.end, positions, truth, squares)

        teacher.run(torch.from_numpy(ids), layer)
        if progress is not None:
            progress()
    return tables


def _for_recall(shares: Tensor, kind: int, recall: float) -> Tensor:
    """Per row of ``[items, 3, C, D]``, the pair with the lowest density that reaches the recall, as a flat index."""
    density, found = shares[:, 0].flatten(1), shares[:, kind].flatten(1)
    enough = found >= recall - 1e-9
    cheapest = density.masked_fill(~enough, 2.0)
    return torch.where(enough.any(1), cheapest.argmin(1), density.shape[1] - 1)


def _for_density(shares: Tensor, kind: int, density: float) -> Tensor:
    """Pairs that bring most recall for a mean density, by one price of density for all items."""
    dense, found = shares[:, 0].flatten(1), shares[:, kind].flatten(1)
    low, high = 1e-6, 1e6
    choice = (found - high * dense).argmax(1)
    for _ in range(80):
        price = (low * high) ** 0.5
        pick = (found - price * dense).argmax(1)
        if float(dense.gather(1, pick[:, None]).mean()) <= density:
            high, choice = price, pick
        else:
            low = price
    return choice


def choose(table: Tensor, goal: Goal, per_head: bool) -> Calibration:
    """Thresholds for a goal.

    Args:
        table: ``[layers, H, 3, columns + 1, diagonals + 1]``, from ``Coverage``.
        goal: what to reach.
        per_head: one pair of thresholds for each KV head instead of one for a layer.

    Raises:
        DistilError: the table holds values that are no numbers.
    """
    from vllm_vsprefill.distil.coverage import shares as kept_shares

    wrong = int((~table.flatten(1).isfinite().all(1)).sum())
    if wrong:
        raise DistilError(
            f"attention or scores that are no numbers, in {wrong} of {len(table)} layers with an indexer: "
            "there is nothing to calibrate by, and nothing was stored. float16 overflows in some models (--dtype "
            "bfloat16 or float32); otherwise the model's weights or the indexer's are damaged"
        )
    layers, heads = table.shape[:2]
    kind = 1 if goal.metric == "mass" else 2
    by_head = kept_shares(table.cpu())
    items = by_head.flatten(0, 1)
    if not per_head:
        # Heads share a threshold, not a recall: their entries are added up, each head's mass in equal parts.
        totals = table.cpu().sum((-2, -1), keepdim=True).clamp(min=1e-300)
        joined = table.cpu() / totals if kind == 1 else table.cpu()
        items = kept_shares(joined.sum(1))
    pick = (
        _for_recall(items, kind, goal.recall)
        if goal.recall is not None
        else _for_density(items, kind, goal.density or 0)
    )
    width = len(DISTANCE_GRID)
    columns = torch.tensor(COLUMN_GRID, dtype=torch.float64)[pick // width].view(layers, -1)
    diagonals = torch.tensor(DISTANCE_GRID, dtype=torch.float64)[pick % width].view(layers, -1)
    each = pick.view(layers, -1, 1, 1).expand(layers, heads, 1, 1) if per_head else pick.view(layers, 1, 1, 1)
    reached = by_head.flatten(-2).gather(-1, each.expand(layers, heads, 3, 1)).squeeze(-1)

    got = items.flatten(-2).gather(-1, pick[:, None, None].expand(-1, 3, 1)).squeeze(-1)

    def listed(values: Tensor) -> tuple[Any, ...]:
        return tuple(tuple(row) if per_head else row[0] for row in values.tolist())

    return Calibration(
        Thresholds(
            tau_columns=listed(columns),
            tau_diagonals=listed(diagonals),
            recall=tuple(round(share, 4) for share in reached[..., 1].mean(1).clamp(0, 1).tolist()),
        ),
        reached[..., kind],
        reached[..., 0],
        float(got[:, kind].min() if goal.recall is not None else got[:, 0].mean()),
    )


def calibrate(tables: Mapping[str, Coverage], goals: Mapping[str, Goal], per_head: bool) -> dict[str, Calibration]:
    """Thresholds of every preset that has a goal; raises as ``choose`` does."""
    unknown = set(goals) - set(PRESETS)
    if unknown:
        raise ValueError(f"no such preset: {', '.join(sorted(unknown))}")
    return {preset: choose(tables[preset].table, goal, per_head) for preset, goal in goals.items()}


def shortfall(found: Calibration, goal: Goal, preset: str) -> str | None:
    """Why thresholds do not reach their goal, for people to read; None if they do."""
    if goal.recall is not None and found.reached < goal.recall - 1e-6:
        return (
            f"some layers reach {found.reached:.1%} at most: the preset {preset} caps columns and diagonals "
            "(max_columns, max_diagonals)"
        )
    if goal.density is not None and found.reached > goal.density + 1e-6:
        return (
            f"{found.reached:.1%} is the least: the local window, the first tokens and the least number of columns of "
            f"the preset {preset} take that at this length; use longer sequences or a higher density"
        )
    return None


def store(loaded: LoadedIndexer, thresholds: Mapping[str, Thresholds]) -> None:
    """Put thresholds into a checkpoint on disk; those of other presets and the weights stay as they are.

    Raises:
        DistilError: it cannot be written; it is then as it was.
    """
    config = loaded.config.model_copy(update={"thresholds": {**loaded.config.thresholds, **thresholds}})
    tensors = {f"layers.{i}.{part}": tensor for i, w in loaded.layers.items() for part, tensor in w._asdict().items()}
    with writing(f"the checkpoint {loaded.folder}", "It is as it was."):
        save_checkpoint(loaded.folder, tensors, CheckpointConfig.model_validate(config.model_dump()))
