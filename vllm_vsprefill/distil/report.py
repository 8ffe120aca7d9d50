# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A run's report as one page: recall against density per layer, losses, thresholds; pictures are part of the file."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

PAGE = "report.html"


def _picture(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110, bbox_inches="tight")
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _recall_figure(record: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    layers, curve = record["layers"], record["recall_at_density"]
    densities = [float(d) for d in curve]
    columns = min(4, len(layers))
    lines = -(-len(layers) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * lines))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for place, axis in enumerate(axes.flat):
        if place >= len(layers):
            axis.set_axis_off()
            continue
        heads = len(curve[next(iter(curve))][place])
        for head in range(heads):
            axis.plot(densities, [curve[d][place][head] for d in curve], linewidth=0.8, alpha=0.6)
        mean = [sum(curve[d][place]) / heads for d in curve]
        axis.plot(densities, mean, color="black", linewidth=1.6)
        axis.set_xscale("log")
        axis.set_title(f"layer {layers[place]}", fontsize=9)
        axis.grid(alpha=0.3)
    figure.supxlabel("density")
    figure.supylabel("recall")
    figure.tight_layout()
    return figure


def _loss_figure(log: list[dict[str, Any]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3))
    axis = figure.subplots()
    steps = [e for e in log if "loss" in e]
    axis.plot([e["step"] for e in steps], [e["loss"] for e in steps], linewidth=0.8, label="training")
    checked = [e for e in log if "validation" in e]
    axis.plot([e["step"] for e in checked], [e["validation"]["loss"] for e in checked], "o-", label="validation")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend()
    axis.grid(alpha=0.3)
    return figure


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _threshold_rows(record: dict[str, Any]) -> list[list[str]]:
    def shown(entry: Any) -> str:
        return " ".join(f"{x:.3g}" for x in entry) if isinstance(entry, list) else f"{entry:.3g}"

    rows = [["preset", "layer", "columns", "diagonals", "recall", "density"]]
    for preset, found in record["thresholds"].items():
        parts = zip(
            record["layers"],
            found["tau_columns"],
            found["tau_diagonals"],
            found["recall"],
            found["density"],
            strict=True,
        )
        rows += [[preset, str(i), shown(c), shown(d), f"{r:.1%}", f"{x:.1%}"] for i, c, d, r, x in parts]
    return rows


def write_report(folder: Path) -> Path | None:
    """Write ``report.html`` from the run's ``report.json`` and ``training.jsonl``; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg", force=False)
    record = json.loads((folder / "report.json").read_text())
    log = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    progress, student = record["progress"], record["options"]["student"]
    facts = [
        ["what", "value"],
        ["model", record["model"]],
        ["data", record["data"]],
        ["steps, best", f"{progress['step']}, {progress['best_step']}"],
        ["tokens", f"{progress['tokens']:,}"],
        ["seconds", f"{progress['seconds']:.0f}"],
        ["device", record["device"]],
        ["inputs, width", f"{'+'.join(student['inputs'])}, {student['hidden_size']}"],
        [
            "loss, target",
            f"{student['loss']}, {student['target']} (diagonals below {student['exclude_window']} left out)",
        ],
        ["layers left out", "; ".join(f"{i}: {why}" for i, why in record["left_out"].items()) or "none"],
    ]
    parts = [
        "<h1>Indexer training</h1>",
        _table(facts),
        "<h2>Loss</h2>",
        _picture(_loss_figure(log)),
        "<h2>Recall against density, held-out text</h2>",
        "<p>Share of the true attention of sampled rows that the chosen keys cover, at the best pair of thresholds for "
        "each density; one thin line per KV head, the black one is their mean. Local window 256, sinks 64; below the "
        "density that these take in short sequences the curves are flat.</p>",
        _picture(_recall_figure(record)),
        "<h2>Thresholds</h2>",
        _table(_threshold_rows(record)) if record["thresholds"] else "<p>Not calibrated: run vsprefill calibrate.</p>",
    ]
    style = (
        "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.2em .6em;text-align:right}td:first-child,th:first-child{text-align:left}"
        "img{max-width:100%}"
    )
    page = folder / PAGE
    page.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Indexer training</title><style>{style}</style>'
        + "\n".join(parts)
        + "</html>\n",
        encoding="utf-8",
    )
    return page
