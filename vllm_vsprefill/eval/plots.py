# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Plots of an evaluation: fidelity by position and against density, scores by length. Needs matplotlib.

``python -m vllm_vsprefill.eval.plots FOLDER...`` draws those of figures that were measured where it is not installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vllm_vsprefill.eval.settings import DENSE

Figures = list[dict[str, Any]]


def draw(folder: Path, figures: Figures) -> list[Path]:
    """Write ``fidelity.png`` and one plot for each other suite; returns what was written."""
    made = []
    if compared := [f for f in figures if f["suite"] == "fidelity" and "by_position" in f]:
        made.append(_fidelity(folder / "fidelity.png", compared))
    others = dict.fromkeys(f["suite"] for f in figures if f["suite"] != "fidelity")
    return made + [_scores(folder / f"{suite}.png", [f for f in figures if f["suite"] == suite]) for suite in others]


def _save(figure: Figure, file: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=120, bbox_inches="tight")
    return file


def _fidelity(file: Path, figures: Figures) -> Path:
    figure = Figure(figsize=(11, 4))
    position, against = figure.subplots(1, 2)
    for f in figures:
        parts = f["by_position"]
        x = [(i + 0.5) / len(parts) * f["length"] for i in range(len(parts))]
        label = f"{f['target']}, {f['length']:,}"
        position.plot(x, [part["top1"] for part in parts], marker=".", label=label)
        if f["density"] is not None:
            against.scatter([f["density"]], [f["top1"]], label=label)
    position.set(xlabel="position in the prompt", ylabel="same likeliest token as dense", title="by position")
    against.set(xlabel="density", ylabel="same likeliest token as dense", title="against density", xlim=(0, 1.05))
    for axes in (position, against):
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
    against.xaxis.set_major_formatter(PercentFormatter(1))
    position.legend(fontsize="small")
    return _save(figure, file)


def _scores(file: Path, figures: Figures) -> Path:
    tasks = list(dict.fromkeys(f["task"] for f in figures))
    across = min(4, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(3.2 * across, 2.6 * down))
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in grid.flat[len(tasks) :]:
        axes.set_visible(False)
    targets = list(dict.fromkeys(f["target"] for f in figures))
    for axes, task in zip(grid.flat, tasks, strict=False):
        for number, target in enumerate(targets):
            here = sorted(
                (f for f in figures if f["task"] == task and f["target"] == target), key=lambda f: f["length"]
            )
            aside = 1 + 0.04 * (number - (len(targets) - 1) / 2)  # intervals would lie on top of each other
            x, y = [f["length"] * aside for f in here], [f["score"] for f in here]
            low = [max(0.0, f["score"] - f["interval"][0]) for f in here]
            high = [max(0.0, f["interval"][1] - f["score"]) for f in here]
            style = "--" if target == DENSE else "-"
            axes.errorbar(x, y, yerr=[low, high], marker=".", linestyle=style, capsize=2, label=target)
        axes.set(title=task, xscale="log", ylim=(-0.03, 1.03))
        axes.set_xticks(sorted({f["length"] for f in figures}))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
    grid.flat[0].legend(fontsize="x-small")
    figure.tight_layout()
    return _save(figure, file)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(Path(name), json.loads((Path(name) / "results.json").read_text(encoding="utf-8"))["figures"])
