# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Divides a density over layers by the damage that each removes there, from runs with one layer sparse at a time.

    python -m benchmarks.pareto.budgets results.json --setting keys --mean 512 --out budgets.json

The damage of layers is taken as a sum (which the runs with all layers sparse check), so the best division follows from
the layers' own curves: the next step always goes where it removes most per pair.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any


def curves(runs: list[dict[str, Any]], setting: str) -> dict[int, list[tuple[float, float, float]]]:
    """By layer: (value of the setting, its density in that layer, damage as KL), ascending in density, damage falling.

    Runs of several texts are averaged. Points that another one beats in both are left out, then those above the
    straight line between their neighbours.
    """
    cells: dict[tuple[int, float], list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        if run["layers"] is None or len(run["layers"]) != 1 or "error" in run or " only=" in run["method"]:
            continue
        name, *settings = run["method"].split()
        value = re.search(rf"{setting}=(\S+)", run["method"])
        if name != "structure" or len(settings) != (value is not None):
            continue
        layer = run["layers"][0]
        cells[layer, float(value[1]) if value else 0.0].append((run["layer_density"][layer], run["kl"]))
    by_layer: dict[int, list[tuple[float, float, float]]] = defaultdict(list)
    for (layer, size), found in cells.items():
        density, damage = (sum(x) / len(found) for x in zip(*found, strict=True))
        by_layer[layer].append((size, density, damage))
    return {layer: _hull(sorted(points, key=lambda p: p[1])) for layer, points in sorted(by_layer.items())}


def _hull(points: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    hull: list[tuple[float, float, float]] = []
    for point in points:
        if hull and point[2] >= hull[-1][2]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    """Damage removed per density."""
    return (a[2] - b[2]) / (b[1] - a[1])


def divide(by_layer: dict[int, list[tuple[float, float, float]]], mean: float) -> dict[int, float]:
    """Value of the setting by layer, whose mean over layers is at most ``mean``; the last step is taken in part."""
    steps = sorted(
        ((_slope(a, b), layer, a[0], b[0]) for layer, c in by_layer.items() for a, b in itertools.pairwise(c)),
        reverse=True,
    )
    sizes = {layer: c[0][0] for layer, c in by_layer.items()}
    left = mean * len(sizes) - sum(sizes.values())
    for _, layer, before, after in steps:
        taken = min(after - before, left)
        sizes[layer] = before + taken
        left -= taken
        if left <= 0:
            break
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto.budgets")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--setting", default="keys")
    parser.add_argument("--mean", type=float, required=True, help="mean of the setting over all layers")
    parser.add_argument("--out", type=Path, required=True, help="JSON: the setting by layer; used as scales=file:PATH")
    options = parser.parse_args()
    by_layer = curves(
        [run for path in options.results for run in json.loads(path.read_text())["runs"]], options.setting
    )
    sizes = divide(by_layer, options.mean)
    options.out.write_text(json.dumps([round(sizes[layer], 1) for layer in sorted(sizes)]) + "\n")
    for layer, points in by_layer.items():
        print(f"layer {layer}: {sizes[layer]:.0f}  " + "  ".join(f"{s:g}: {k:.5f} at {d:.1%}" for s, d, k in points))


if __name__ == "__main__":
    main()
