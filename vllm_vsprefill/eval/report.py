# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Writes figures: ``results.json``, ``report.md`` and plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_vsprefill.eval.settings import DENSE

Figures = list[dict[str, Any]]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def _layers(densities: dict[str, float]) -> str:
    if min(densities.values()) == 1:
        return "100 % in all"
    return " ".join(f"{layer}:{share:.1%}" for layer, share in densities.items())


def _fidelity(figures: Figures) -> list[str]:
    lines = ["## Fidelity: against dense attention, all rows", ""]
    times = {f["length"]: f.get("ttft") for f in figures if f["target"] == DENSE}
    head = ["tokens", "setting", "prompts", "density", "top-1", "of single prompts", "change of NLL"]
    head += ["mean abs. difference", "KL", "time to first token", "ratio"]
    rows = []
    for f in figures:
        row = [f"{f['length']:,}", f["target"], str(f["samples"]), _percent(f["density"])]
        if "top1" in f:
            low, high = f["top1_of_prompts"]
            row += [f"{f['top1']:.2%}", f"{low:.1%} to {high:.1%}", f"{f['nll_change']:+.4f}"]
            row += [f"{f['absolute']:.4f}", f"{f['kl']:.5f}"]
        else:
            row += ["", "", f"NLL {f['nll']:.4f}", "", ""]
        dense, own = times.get(f["length"]), f.get("ttft")
        row += [f"{own:.3f} s" if own else "", f"{dense / own:.2f}x" if own and dense else ""]
        rows.append(row)
    lines += _table(head, rows)
    lines += [
        "*top-1*: rows whose likeliest next token is that of dense attention. Change of NLL and difference are of the "
        "log-probability of the token that stands there, in nats; KL(dense || setting) is over the top tokens and the "
        "rest together, a lower bound. *floor*: what rounding alone changes.",
        "",
    ]
    layers = [
        f"- {f['target']}, {f['length']:,} tokens: {_layers(f['density_per_layer'])}"
        for f in figures
        if f["density_per_layer"] and f["target"] != DENSE
    ]
    return [*lines, *(["Density of single layers:", "", *layers, ""] if layers else [])]


def _scores(title: str, figures: Figures) -> list[str]:
    lines = [f"## {title}", ""]
    targets = list(dict.fromkeys(f["target"] for f in figures))
    for length in dict.fromkeys(f["length"] for f in figures):
        here = [f for f in figures if f["length"] == length]
        tasks = list(dict.fromkeys(f["task"] for f in here))
        by = {(f["task"], f["target"]): f for f in here}
        rows = []
        for task in tasks:
            row = [task]
            for target in targets:
                f = by.get((task, target))
                row.append("" if f is None else _score(f))
            row.append(next((f["remark"] for f in here if f["task"] == task and f.get("remark")), ""))
            rows.append(row)
        means = ["mean of the above"]
        for target in targets:
            all_of = [by[task, target]["score"] for task in tasks if (task, target) in by]
            mean = f"{statistics.fmean(all_of):.1%}" if len(all_of) == len(tasks) else "incomplete"
            kept = _kept([by[t, target] for t in tasks if (t, target) in by], [by.get((t, DENSE)) for t in tasks])
            means.append(mean + kept if len(all_of) == len(tasks) and target != DENSE else mean)
        rows.append([*means, ""])
        density = ["density"]
        for target in targets:
            known = [f["density"] for f in here if f["target"] == target and f["density"] is not None]
            density.append(f"{min(known):.1%} to {max(known):.1%}" if known else "unknown")
        rows.append([*density, ""])
        lines += [f"### {length:,} tokens", "", *_table(["task", *targets, "remark"], rows)]
    lines += [
        "Score, its 95 % interval (Wilson) and number of answers; in brackets the share of the dense score on the "
        "same samples. "
        "Where dense attention scores near 0 or 1, the row says nothing about the settings.",
        "",
    ]
    return lines


def _score(f: dict[str, Any]) -> str:
    low, high = f["interval"]
    kept = f" [{f['retention']:.1%}]" if f.get("retention") is not None else ""
    return f"{f['score']:.1%} ({low:.0%} to {high:.0%}, n={f['answers']}){kept}"


def _kept(own: Figures, dense: list[dict[str, Any] | None]) -> str:
    base = sum(f["score"] for f in dense if f is not None)
    if not base or None in dense:
        return ""
    return f" [{sum(f['score'] for f in own) / base:.1%}]"


TITLES: dict[str, str] = {
    "ruler": "RULER",
    "in-prompt": "Answers inside the prompt: ranked first by the model, token by token",
}


def render(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# vsprefill eval", ""]
    lines += [f"- {name}: {value}" for name, value in results["about"].items()]
    lines += [f"- {note}" for note in results["notes"]]
    if not results["complete"]:
        lines.append("- **Not complete**: the same command goes on.")
    lines.append("")
    for suite in dict.fromkeys(f["suite"] for f in results["figures"]):
        figures = [f for f in results["figures"] if f["suite"] == suite]
        lines += _fidelity(figures) if suite == "fidelity" else _scores(TITLES[suite], figures)
    return "\n".join(lines).rstrip() + "\n"


def write(folder: Path, results: dict[str, Any], say: Callable[[str], None]) -> None:
    """Write all of it into a folder; plots where matplotlib is installed."""
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(render(results), encoding="utf-8")
    try:
        from vllm_vsprefill.eval import plots
    except ImportError:
        say("no plots: matplotlib is not installed")
        return
    plots.draw(folder, results["figures"])
