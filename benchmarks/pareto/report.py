# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Tables and plots of what ``python -m benchmarks.pareto`` wrote.

python -m benchmarks.pareto.report results.json [--text code_a] [--length 16384] [--plot pareto.png]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

FAMILY = "keys columns level theta threshold alpha gamma vertical slash tau_columns scales window".split()
"""Settings that only move a method along its own curve."""


NAMED = {"structure": "window and sinks", "structure rule=floor level=0": "everything selected"}
WORDS = (
    ("keys probes=8 over=max scales", "keys by 8 sub-means, budgets calibrated by head"),
    ("rule=error level", "keys, budgets by output error"),
    ("probes=8 over=max", "by 8 sub-means"),
    ("structure ", ""),
)
"""How the legend says it."""


def family(method: str) -> str:
    """A method without the settings that say how much it keeps."""
    if method in NAMED:
        return NAMED[method]
    name, *settings = method.split()
    kinds = [s if s.split("=")[0] not in FAMILY else s.split("=")[0] for s in settings]
    return " ".join([name, *kinds])


def whole(runs: list[dict[str, Any]], text: str | None, length: int | None) -> list[dict[str, Any]]:
    """Runs of all layers that did not fail."""
    return [
        r
        for r in runs
        if r["layers"] is None and "error" not in r and text in (None, r["text"]) and length in (None, r["length"])
    ]


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, one line a run; the densities are those of the whole prompt and of the rows that run sparse."""
    lines = [
        "| text | length | method | density | of sparse rows | top-1 | change of NLL | KL | output error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in runs:
        errors = r.get("layer_error")
        error = f"{sum(errors) / len(errors):.3f}" if errors else ""
        lines.append(
            f"| {r['text']} | {r['length']} | {r['method']} | {r['density']:.1%} | {r['sparse_density']:.1%} "
            f"| {r['top1']:.2%} | {r['nll']:+.4f} | {r['kl']:.4f} | {error} |"
        )
    return "\n".join(lines)


def at_density(runs: list[dict[str, Any]], density: float, what: str) -> dict[str, float]:
    """A figure of each family at one density of the sparse rows, between its two nearest runs.

    KL and density are taken as straight lines in their logarithms, everything else as straight in that of the
    density. Families whose runs do not enclose the density are left out.
    """
    curves: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        curves[family(run["method"])].append(run)
    found = {}
    for name, points in curves.items():
        points = sorted(points, key=lambda r: r["sparse_density"])
        for low, high in itertools.pairwise(points):
            if low["sparse_density"] <= density <= high["sparse_density"]:
                span = math.log(high["sparse_density"] / low["sparse_density"])
                share = math.log(density / low["sparse_density"]) / span if span else 0.0
                if what == "kl":
                    found[name] = math.exp((1 - share) * math.log(low[what]) + share * math.log(high[what]))
                else:
                    found[name] = (1 - share) * low[what] + share * high[what]
                break
    return found


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Divergence and top-1 against the density of the sparse rows, a line a family."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        curves[family(run["method"])].append(run)
    figure, axes = plt.subplots(1, 2, figsize=(14, 6))
    colors = plt.get_cmap("tab20").colors
    for number, (name, points) in enumerate(sorted(curves.items())):
        points = sorted(points, key=lambda r: r["sparse_density"])
        ideal = "oracle" in name or (name.startswith("structure columns") and "columns_by" not in name)
        label = name + " (ideal)" * ideal
        for word, said in WORDS:
            label = label.replace(word, said)
        density = [100 * r["sparse_density"] for r in points]
        for axis, values in zip(axes, ([r["kl"] for r in points], [100 * r["top1"] for r in points]), strict=True):
            axis.plot(
                density,
                values,
                "--" if ideal else "-",
                marker="osd^v<>pP*"[number % 10],
                color=colors[number % 20],
                label=label,
                markersize=6,
                linewidth=1,
            )
    for axis, title in zip(axes, ("KL divergence from dense attention", "top-1 agreement, %"), strict=True):
        axis.set(xscale="log", xlim=(3, 100), xlabel="density of the rows that run sparse, %", title=title)
        axis.grid(alpha=0.3)
        axis.set_xticks([3, 5, 10, 20, 50, 100], ["3", "5", "10", "20", "50", "100"])
    axes[0].set_yscale("log")
    axes[1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto.report")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--length", type=int)
    parser.add_argument("--at", type=float, help="also compare families at this density of the sparse rows")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    runs = [run for path in options.results for run in json.loads(path.read_text())["runs"]]
    runs = whole(runs, options.text, options.length)
    print(table(runs))
    if options.at:
        for what in ("kl", "top1", "nll"):
            found = at_density(runs, options.at, what)
            print(f"\n{what} at a density of {options.at:.1%}:")
            for name, value in sorted(found.items(), key=lambda item: item[1], reverse=what == "top1"):
                print(f"  {value:8.4f}  {name}")
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
