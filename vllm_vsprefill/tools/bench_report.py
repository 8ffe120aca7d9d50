# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Writes figures: ``results.json``, ``report.md`` and ``bench.png``.

``python -m vllm_vsprefill.tools.bench_report FOLDER...`` draws the plot where matplotlib was missing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS, REPORT, PLOT = "results.json", "report.md", "bench.png"

Figures = list[dict[str, Any]]


def write(folder: Path, results: dict[str, Any], say: Callable[[str], None] | None) -> None:
    """Write JSON and tables; the plot, too, where there is somebody to tell what is missing.

    Raises:
        OSError: a file cannot be written.
    """
    for name, text in ((RESULTS, json.dumps(results, indent=1) + "\n"), (REPORT, render(results))):
        partial = folder / f"{name}.part"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)
    if say is None or not results["figures"]:
        return
    try:
        draw(folder / PLOT, results["figures"])
    except ImportError:
        say(
            "matplotlib is not installed, so there is no plot; where it is: "
            f"python -m vllm_vsprefill.tools.bench_report {folder.name}"
        )


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def render(results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = ["# Time to first token and throughput", ""]
    lines += [f"- {name.replace('_', ' ')}: {_shown(value)}" for name, value in results["about"].items() if value]
    lines += [f"- {note}" for note in results["notes"]]
    lines += ["", *([] if results["complete"] else ["**Not complete**: the same command goes on.", ""])]
    for loop, made in (("closed", _closed), ("open", _open)):
        if found := [f for f in results["figures"] if f["loop"] == loop]:
            lines += made(found)
    lines += [
        "*density*: share of the causal attention that was computed; empty where the server does not count it. "
        "*ratio*: time of the first target over this one's; above 1 is faster.",
        "",
    ]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return ", ".join(f"{part:,}" for part in value) if isinstance(value, list) else str(value)


def _ratio(base: float | None, own: float) -> str:
    return f"{base / own:.2f}x" if base and own else ""


def _closed(figures: Figures) -> list[str]:
    first = figures[0]["target"]
    base = {f["length"]: f["ttft"] for f in figures if f["target"] == first}
    rows = [
        [
            f"{f['length']:,}",
            f["target"],
            f"{f['requests']}{_failed(f)}",
            _seconds(f["ttft"]),
            " to ".join(map(_seconds, f["ttft_quartiles"])),
            "" if f["target"] == first else _ratio(base.get(f["length"]), f["ttft"]),
            f"{f['tokens_per_second']:,.0f}",
            _percent(f["density"]),
        ]
        for f in figures
    ]
    head = ["tokens", "target", "requests", "time to first token", "quartiles", "ratio", "tokens/s", "density"]
    return ["## By length: a request when the one before is finished", "", *_table(head, rows)]


def _failed(figure: dict[str, Any]) -> str:
    return f", {figure['failed']} failed" if figure["failed"] else ""


def _open(figures: Figures) -> list[str]:
    first = figures[0]["target"]
    base = {f["rate"]: f["ttft_p50"] for f in figures if f["target"] == first}
    limited = "goodput" in figures[0]
    rows = []
    for f in figures:
        row = [f"{f['rate']:g}", f["target"], f"{f['requests']}{_failed(f)}", _seconds(f["ttft_p50"])]
        row += [_seconds(f["ttft_p99"]), "" if f["target"] == first else _ratio(base.get(f["rate"]), f["ttft_p50"])]
        row += [f"{f['requests_per_second']:.3g}", f"{f['tokens_per_second']:,.0f}"]
        row += [_percent(f["within_limit"]), f"{f['goodput']:.3g}"] if limited else []
        rows.append([*row, _percent(f["prefix_hits"]), _percent(f["density"])])
    head = ["requests/s sent", "target", "requests", "TTFT P50", "TTFT P99", "ratio of P50", "requests/s", "tokens/s"]
    head += ["within the limit", "requests/s within it"] if limited else []
    head += ["prefix hits", "density"]
    return ["## Under load: requests of mixed lengths arrive by themselves", "", *_table(head, rows)]


def draw(file: Path, figures: Figures) -> None:
    """Plot times to first token: by length with quartiles, by rate P50 and P99.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [loop for loop in ("closed", "open") if any(f["loop"] == loop for f in figures)]
    figure = Figure(figsize=(5.5 * len(parts), 4))
    for axes, loop in zip(figure.subplots(1, len(parts), squeeze=False).flat, parts, strict=True):
        here = [f for f in figures if f["loop"] == loop]
        for number, target in enumerate(dict.fromkeys(f["target"] for f in here)):
            of, colour = [f for f in here if f["target"] == target], f"C{number}"
            if loop == "closed":
                of.sort(key=lambda f: f["length"])
                middle = [f["ttft"] for f in of]
                low = [max(f["ttft"] - f["ttft_quartiles"][0], 0) for f in of]
                high = [max(f["ttft_quartiles"][1] - f["ttft"], 0) for f in of]
                x = [f["length"] for f in of]
                axes.errorbar(x, middle, yerr=[low, high], marker=".", capsize=2, color=colour, label=target)
            else:
                rates = [f["rate"] for f in of]
                axes.plot(rates, [f["ttft_p50"] for f in of], marker=".", color=colour, label=f"{target}, P50")
                p99 = [f["ttft_p99"] for f in of]
                axes.plot(rates, p99, marker="^", linestyle="--", color=colour, label=f"{target}, P99")
        axes.set(ylabel="time to first token, s", yscale="log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        if loop == "closed":
            axes.set(xlabel="tokens of prompt and answer", xscale="log")
            axes.set_xticks(sorted({f["length"] for f in here}))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}k")
            axes.xaxis.set_minor_formatter(lambda value, _: "")
        else:
            axes.set(xlabel="requests sent a second")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
    figure.tight_layout()
    FigureCanvasAgg(figure)
    figure.savefig(file, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        draw(Path(name) / PLOT, json.loads((Path(name) / RESULTS).read_text(encoding="utf-8"))["figures"])
