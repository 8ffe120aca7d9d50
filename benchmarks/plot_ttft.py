# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Draws the figures of ``benchmarks.cpu_ttft``: time to first token against prompt length, stock and VSPREFILL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt


def main(
    results: Annotated[list[Path], typer.Argument(help="Files written by benchmarks.cpu_ttft --out.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("ttft.png"),
) -> None:
    """Write one picture with a panel per results file."""
    figure, axes = plt.subplots(1, len(results), figsize=(4.4 * len(results), 3.2), squeeze=False, sharey=True)
    for axis, file in zip(axes[0], results, strict=True):
        record = json.loads(file.read_text())
        rows = record["rows"]
        tokens = [row["tokens"] / 1024 for row in rows]
        axis.plot(tokens, [row["stock_s"] for row in rows], "o-", color="#888888", label="stock CPU attention")
        axis.plot(tokens, [row["vsprefill_s"] for row in rows], "o-", color="#1667b7", label="VSPREFILL")
        for x, row in zip(tokens, rows, strict=True):
            axis.annotate(
                f"{row['ratio']:.1f}x",
                (x, row["vsprefill_s"]),
                textcoords="offset points",
                xytext=(0, -13),
                ha="center",
                fontsize=8,
                color="#1667b7",
            )
        axis.set_title(f"chunks of {record['chunk']:,} tokens", fontsize=10)
        axis.set_xlabel("prompt, thousand tokens")
        axis.set_ylim(bottom=-0.8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time to first token, s")
    axes[0][0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    typer.run(main)
