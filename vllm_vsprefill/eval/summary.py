# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Figures from a journal."""

from __future__ import annotations

import statistics
from typing import Any

from vllm_vsprefill.eval import intervals
from vllm_vsprefill.eval.density import Densities
from vllm_vsprefill.eval.fidelity import Differences, unpack
from vllm_vsprefill.eval.journal import Journal
from vllm_vsprefill.eval.run import PORTION
from vllm_vsprefill.eval.settings import DENSE
from vllm_vsprefill.eval.suites import Cell

NEAR = 0.05
"""A dense score this near 0 or 1 leaves nothing to lose, or nothing to see."""


def _samples(journal: Journal, cell: Cell, target: str) -> list[dict[str, Any]]:
    keys = (f"{cell.key(target)}/{i}" for i in range(cell.samples))
    return [journal.records[key] for key in keys if key in journal]


def density(journal: Journal, cell: Cell, target: str) -> Densities | None:
    """What was counted while the cell was measured; None if the server counts nothing (it is dense)."""
    prefix = f"{cell.key(target)}/{PORTION}-"
    computed: dict[int, float] = {}
    causal: dict[int, float] = {}
    for name, record in journal.records.items():
        if name.startswith(prefix):
            for total, part in ((computed, record["computed"]), (causal, record["causal"])):
                for layer, pairs in part.items():
                    total[int(layer)] = total.get(int(layer), 0.0) + pairs
    return Densities(computed, causal, {}) if causal else None


def _densities(journal: Journal, cell: Cell, target: str) -> dict[str, Any]:
    found = density(journal, cell, target)
    if found is None:
        return {"density": 1.0 if target == DENSE else None, "density_per_layer": {}}
    return {
        "density": round(found.mean, 4),
        "density_per_layer": {str(layer): round(d, 4) for layer, d in found.layers.items()},
    }


def _head(cell: Cell, target: str, samples: int) -> dict[str, Any]:
    return {"target": target, "suite": cell.suite, "task": cell.task, "length": cell.length, "samples": samples}


def fidelity(journal: Journal, cell: Cell, target: str) -> dict[str, Any] | None:
    """Agreement with dense attention over all prompts of a length; None if nothing was measured."""
    samples = _samples(journal, cell, target)
    if not samples:
        return None
    figures = _head(cell, target, len(samples)) | _densities(journal, cell, target)
    figures["nll"] = round(statistics.fmean(sample["nll"] for sample in samples), 5)
    if times := [sample["ttft"] for sample in samples if "ttft" in sample]:
        figures["ttft"] = round(statistics.median(times), 4)
    prompts = [unpack(sample["parts"]) for sample in samples if "parts" in sample]
    if not prompts:
        return figures
    totals = [sum(parts, Differences()) for parts in prompts]
    means = sum(totals, Differences()).means()
    each = [total.means()["top1"] for total in totals]
    figures |= {name: round(value, 5) for name, value in means.items() if name != "nll"}
    figures["nll_change"] = round(means["nll"], 5)
    figures["top1_of_prompts"] = [round(min(each), 5), round(max(each), 5)]
    bins = [sum(column, Differences()).means() for column in zip(*prompts, strict=True)]
    figures["by_position"] = [{name: round(value, 5) for name, value in part.items()} for part in bins]
    by_text: dict[str, Differences] = {}
    for sample, total in zip((s for s in samples if "parts" in s), totals, strict=True):
        by_text[sample["text"]] = by_text.get(sample["text"], Differences()) + total
    figures["top1_by_text"] = {name: round(total.means()["top1"], 5) for name, total in by_text.items()}
    return figures


def scores(journal: Journal, cell: Cell, target: str) -> dict[str, Any] | None:
    """Mean score of a task with its interval, and the share of the dense score that is kept."""
    samples = _samples(journal, cell, target)
    if not samples:
        return None
    figures = _head(cell, target, len(samples)) | _densities(journal, cell, target)
    # A sample may be several questions, of each of which the interval counts one answer.
    count = sum(sample.get("of", 1) for sample in samples)
    right = sum(sample["score"] * sample.get("of", 1) for sample in samples)
    low, high = intervals.wilson(right, count)
    figures |= {"score": round(right / count, 5), "interval": [round(low, 4), round(high, 4)], "answers": count}
    if times := [sample["seconds"] for sample in samples if "seconds" in sample]:
        figures["seconds"] = round(statistics.median(times), 4)
    if tokens := [sample["tokens"] for sample in samples if "tokens" in sample]:
        figures["tokens"] = [min(tokens), max(tokens)]
    dense = {sample["key"].rsplit("/", 1)[1]: sample for sample in _samples(journal, cell, DENSE)}
    pairs = [(s["score"], dense[i]["score"]) for s in samples if (i := s["key"].rsplit("/", 1)[1]) in dense]
    if target != DENSE and pairs:
        base = sum(other for _, other in pairs)
        figures["retention"] = round(sum(own for own, _ in pairs) / base, 5) if base else None
        share = base / len(pairs)
        figures["remark"] = "dense near 0" if share <= NEAR else "dense near 1" if share >= 1 - NEAR else ""
    return figures


def summarise(journal: Journal, cells: list[Cell], targets: list[str]) -> list[dict[str, Any]]:
    """Figures of all cells on all targets, as far as they have been measured."""
    found = []
    for cell in cells:
        for target in targets:
            figures = (fidelity if cell.suite == "fidelity" else scores)(journal, cell, target)
            if figures is not None:
                found.append(figures)
    return found
