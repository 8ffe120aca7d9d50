# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Divides keys over layers and KV heads by the damage that they remove there, from runs with one of them sparse.

    python -m benchmarks.pareto.budgets results.json --mean 512,1024 --out budgets_{}.json

The runs are those of a line such as ``structure keys={0,512,2048,16384} @ heads``, of one ranking. Damage is taken as
a sum over heads (which runs with all of them sparse check), so the best division follows from the heads' own curves:
the next step always goes where it removes most per key.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

Place = tuple[int, int]
Point = tuple[float, float]


def curves(runs: list[dict[str, Any]]) -> dict[Place, list[Point]]:
    """By layer and KV head: (keys, damage as KL), ascending in keys, damage falling ever more slowly.

    Runs of several texts are averaged. Points that do not improve on a smaller one, and those above the straight line
    between their neighbours, are left out.
    """
    cells: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for run in runs:
        only, keys = (re.search(rf" {name}=(\d+)", run["method"]) for name in ("only", "keys"))
        if "error" not in run and only and keys:
            cells[run["layers"][0], int(only[1]), int(keys[1])].append(run["kl"])
    places: dict[Place, list[Point]] = defaultdict(list)
    for (layer, head, count), found in cells.items():
        places[layer, head].append((float(count), sum(found) / len(found)))
    return {place: _hull(sorted(points)) for place, points in sorted(places.items())}


def _hull(points: list[Point]) -> list[Point]:
    hull: list[Point] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: Point, b: Point) -> float:
    """Damage removed per key."""
    return (a[1] - b[1]) / (b[0] - a[0])


def divide(places: dict[Place, list[Point]], mean: float) -> dict[Place, float]:
    """Keys by layer and KV head, whose mean is at most ``mean``; the last step is taken in part."""
    steps = sorted(
        ((_slope(a, b), place, a[0], b[0]) for place, curve in places.items() for a, b in pairwise(curve)), reverse=True
    )
    sizes = {place: curve[0][0] for place, curve in places.items()}
    left = mean * len(sizes) - sum(sizes.values())
    for _, place, before, after in steps:
        taken = min(after - before, left)
        sizes[place] = before + taken
        left -= taken
        if left <= 0:
            break
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto.budgets")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument(
        "--mean", required=True, help="mean number of keys over all layers and heads; several with commas"
    )
    parser.add_argument("--out", required=True, help="JSON files, {} for the mean; used as keys=1 scales=file:PATH")
    options = parser.parse_args()
    places = curves([run for path in options.results for run in json.loads(path.read_text())["runs"]])
    layers, heads = (1 + max(place[i] for place in places) for i in (0, 1))
    for mean in options.mean.split(","):
        sizes = divide(places, float(mean))
        rows = [[round(sizes[layer, head]) for head in range(heads)] for layer in range(layers)]
        Path(options.out.format(mean)).write_text(json.dumps(rows) + "\n", encoding="utf-8")
        print(mean, rows)


if __name__ == "__main__":
    main()
