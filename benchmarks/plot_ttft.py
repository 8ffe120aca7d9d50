# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Draws the figures of ``benchmarks.cpu_ttft`` or ``benchmarks.ttft``: time to first token against prompt length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

NAMES = {"vsindexer": "VSPREFILL", "sampled": "VSPREFILL, training-free"}


def panel(record: dict[str, Any]) -> tuple[str, str, dict[str, list[tuple[int, float]]]]:
    """Title, name of the stock backend, and ``(tokens, seconds)`` of each backend, the stock one first."""
    if "rows" in record:  # benchmarks.cpu_ttft
        rows = record["rows"]
        series = {
            "stock": [(row["tokens"], row["stock_s"]) for row in rows],
            NAMES["vsindexer"]: [(row["tokens"], row["vsprefill_s"]) for row in rows],
        }
        return f"chunks of {record['chunk']:,} tokens", "stock CPU attention", series
    series = {"stock": []}
    for row in record["ttft"]:
        if "seconds" in row:
            series.setdefault(NAMES.get(row["backend"], row["backend"]), []).append((row["length"], row["seconds"]))
    (shape,) = record["shape"]
    return f"{shape} shape, {record['hardware']}", "stock FlashAttention 3", series


def main(
    results: Annotated[list[Path], typer.Argument(help="Files written by one of the two with --out.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("ttft.png"),
) -> None:
    """Write one picture with a panel per results file."""
    figure, axes = plt.subplots(1, len(results), figsize=(4.4 * len(results), 3.2), squeeze=False, sharey=True)
    panels = [panel(json.loads(file.read_text())) for file in results]
    least = min(seconds for _, _, series in panels for points in series.values() for _, seconds in points)
    for axis, (title, stock, series) in zip(axes[0], panels, strict=True):
        base = dict(series["stock"])
        axis.plot(*zip(*[(n / 1024, t) for n, t in base.items()], strict=True), "o-", color="#888888", label=stock)
        for (name, points), color in zip(list(series.items())[1:], ("#1667b7", "#c77f18"), strict=False):
            axis.plot(*zip(*[(n / 1024, t) for n, t in points], strict=True), "o-", color=color, label=name)
            if name == NAMES["vsindexer"]:
                for n, t in points:
                    axis.annotate(
                        f"{base[n] / t:.1f}x", (n / 1024, t), textcoords="offset points", xytext=(0, -13),
                        ha="center", fontsize=8, color=color,
                    )  # fmt: skip
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("prompt, thousand tokens")
        # Times grow a thousandfold over the lengths.
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([n / 1024 for n in base], [f"{n // 1024}" for n in base])
        axis.set_ylim(bottom=0.5 * least)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time to first token, s")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    typer.run(main)
