#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Writes the tables of README.md and docs/ anew, from the options' model and from benchmarks/results/.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``.

    .venv/bin/python scripts/make_docs.py            # rewrite
    .venv/bin/python scripts/make_docs.py --check    # exit status 1 if something is not up to date
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from vllm_vsprefill.config import PRESETS, VSPrefillConfig  # noqa: E402

BLOCK = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, with blank lines around it."""
    head = list(header)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n" + "".join("| " + " | ".join(line).replace("  ", " ") + " |\n" for line in lines) + "\n"


def value(given: object) -> str:
    """An option's value as JSON spells it."""
    return json.dumps(list(given) if isinstance(given, tuple) else given).strip('"')


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def density(share: float) -> str:
    return "dense" if share == 1 else percent(share)


def seconds(time: float) -> str:
    return f"{time:.3f} s" if time < 10 else f"{time:.2f} s"


# --- tables


def options() -> str:
    defaults = VSPrefillConfig.from_sources()
    rows = [
        (f"`{name}`", value(getattr(defaults, name)), field.description or "")
        for name, field in VSPrefillConfig.model_fields.items()
    ]
    return table(("option", "default", "meaning"), rows)


def presets() -> str:
    names = list(next(iter(PRESETS.values())))
    rows = [(f"`{preset}`", *(value(values[name]) for name in names)) for preset, values in PRESETS.items()]
    return table(("preset", *(f"`{name}`" for name in names)), rows)


def ttft_rows(name: str, backend: str) -> dict[int, dict[str, Any]]:
    return {row["length"]: row for row in results(name)["ttft"] if row["backend"] == backend}


def sparse_cells(row: dict[str, Any] | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    return seconds(row["seconds"]), f"{row['times_stock']:.2f}x", density(row["density"])


def ttft_gpu() -> str:
    qwen, llama = "ttft_qwen3_4b_h100", "ttft_llama31_8b_h100"
    stock = ttft_rows(qwen, "stock")
    trained, free = ttft_rows(qwen, "vsindexer"), ttft_rows(qwen, "sampled")
    rows = [
        (f"{n:,}", seconds(stock[n]["seconds"]), *sparse_cells(trained[n]), *sparse_cells(free.get(n))[:2])
        for n in sorted(stock)
    ]
    header = ("prompt tokens", "stock", "VSPREFILL", "ratio", "density", "training-free", "ratio")
    other, theirs = ttft_rows(llama, "stock"), ttft_rows(llama, "vsindexer")
    others = [(f"{n:,}", seconds(other[n]["seconds"]), *sparse_cells(theirs[n])) for n in sorted(other)]
    return (
        "\nQwen3-4B shape:\n"
        + table(header, rows)
        + "Llama-3.1-8B shape:\n"
        + table(("prompt tokens", "stock", "VSPREFILL", "ratio", "density"), others)
    )


def ttft_summary() -> str:
    stock, sparse = (ttft_rows("ttft_qwen3_4b_h100", backend) for backend in ("stock", "vsindexer"))
    rows = [(f"{n:,}", seconds(stock[n]["seconds"]), *sparse_cells(sparse[n])) for n in (8192, 32768, 131072)]
    return table(("prompt tokens", "stock vLLM", "VSPREFILL", "ratio", "attention computed"), rows)


def ttft_real() -> str:
    """A real model on a GPU, by setting."""
    rows = results("real_ttft_32k_h100")["ttft"]
    stock = {row["length"]: row["seconds"] for row in rows if row["setting"] == "dense"}
    lines = []
    for length, dense in sorted(stock.items()):
        cells = [f"{length:,}", seconds(dense)]
        for setting in ("balanced", "fast"):
            (row,) = (row for row in rows if row["setting"] == setting and row["length"] == length)
            cells += [seconds(row["seconds"]), f"{dense / row['seconds']:.2f}x", percent(row["density"])]
        lines.append(cells)
    header = ("prompt tokens", "stock", "`balanced`", "ratio", "density", "`fast`", "ratio", "density")
    return table(header, lines)


def ttft_cpu() -> str:
    records = [{row["tokens"]: row for row in results(f"cpu_ttft_chunk{n}")["rows"]} for n in (8192, 2048)]
    rows = []
    for n in records[0]:
        cells = [f"{n:,}"]
        for record in records:
            row = record[n]
            cells += [seconds(row["stock_s"]), seconds(row["vsprefill_s"]), f"{row['ratio']:.2f}x"]
            cells += [density(row["density"])]
        rows.append(cells)
    part = ("VSPREFILL", "ratio", "density")
    return table(("prompt tokens", "chunks of 8,192: stock", *part, "chunks of 2,048: stock", *part), rows)


def inside_answers() -> str:
    rows = []
    for name in ("distil_quality_16k_h100", "distil_quality_32k_h100"):
        record = results(name)
        found = {row["setting"]: row for row in record["rows"] if row["indexer"] in ("none", "needle")}
        settings = ("accurate, calibrated", "balanced, calibrated", "fast, calibrated", "window and sinks only")
        cells = [f"{percent(found[s]['accuracy'])} at {percent(found[s]['density'])}" for s in settings]
        rows.append((f"{record['length']:,}", percent(found["dense"]["accuracy"], 0), *cells))
    return table(("prompt tokens", "dense", "`accurate`", "`balanced`", "`fast`", "window and sinks only"), rows)


def crossover() -> str:
    found = {(row["context"], row["rows"]): row for row in results("crossover_h100")["rows"].values()}
    columns = [("vsindexer", n) for n in (1024, 2048, 4096, 8192)] + [("sampled", n) for n in (1024, 8192)]
    rows = [
        (f"{n:,}", *(f"{found[n, rows][f'{kind}_times_stock']:#.2g}" for kind, rows in columns))
        for n in (16384, 32768, 65536, 131072)
    ]
    names = [f"{'training-free, ' if kind == 'sampled' else ''}{n:,} rows" for kind, n in columns]
    return table(("sequence, tokens", *names), rows)


KERNELS = {
    "FA3 dense, last 8k of 128k": "FA3, dense",
    "attend, 4096 columns + 2048 local": "attend, 4,096 columns and 2,048 local keys a row",
    "attend, 1024 columns + 64 diagonals + 1024 local": "attend, 1,024 columns, 64 diagonals, 1,024 local keys",
    "score, 8192 tokens": "score, hidden width 1,024",
    "select, 128k": "select, 8 KV heads",
    "score + select + attend": "score, select, index and attend",
    "sampled, 64 rows, 128k": "training-free estimate, 64 rows",
    "FA3 dense, whole 128k": "FA3, dense, whole prompt of 131,072 rows",
    "attend, whole 128k": "attend, whole prompt, 4,096 columns and 2,048 local keys",
    "FA3 dense, whole 32k": "FA3, dense, whole prompt of 32,768 rows",
    "mass sums, 32k": "attention mass sums of it (training), log-sum-exp given",
    "select, 1048576": "select, sequence of 1,048,576 tokens",
    "attend, 1048576, 4096 columns + 2048 local": "attend, 4,096 columns and 2,048 local keys, same sequence",
}


def kernels() -> str:
    records = [results(name)["rows"] for name in ("kernels_h100", "kernels_h200")]
    rows = []
    for name, shown in KERNELS.items():
        cells = [shown]
        for record in records:
            row = record[name]
            cells += [f"{row['ms']:#.3g} ms", f"{row['tflops']:.0f}" if "tflops" in row else ""]
        rows.append(cells)
    return table(("what", "H100", "TFLOP/s", "H200", "TFLOP/s"), rows)


SHAPES = {"qwen3-4b": "Qwen3-4B", "llama31-8b": "Llama-3.1-8B"}


def training_speed() -> str:
    rows = []
    for row in results("distil_speed_h100")["rows"]:
        shares = (percent(row["share_of_bare_speed"], 0), percent(row["target_share"], 0))
        speeds = (f"{row['bare_tokens_per_second']:,.0f} tokens/s", f"{row['tokens_per_second']:,.0f} tokens/s")
        rows.append((SHAPES[row["shape"]], f"{row['length']:,}", *speeds, *shares, f"{row['peak_gib']:.1f} GiB"))
    bare = ("bare forward pass", "training", "share of the bare speed", "targets' share of a step", "peak memory")
    return table(("shape", "tokens", *bare), rows)


VARIANTS = {
    "mass, all distances": "**targets**: mass, all diagonals (the paper's)",
    "mass": "mass, window excluded",
    "peak, all distances": "peak, all diagonals",
    "peak": "peak, window excluded",
    "peak squared": "peak squared, window excluded",
    "peak to the 4th": "peak to the 4th, window excluded",
    "mixed": "mixed, window excluded",
    "inputs k": "**inputs** (mass, all diagonals): k",
    "inputs v": "v",
    "inputs q": "q",
    "inputs k+q": "k+q",
    "inputs k+v+q": "k+v+q",
    "loss mse": "**loss** (mass, all diagonals): mse",
    "loss cosine": "cosine",
    "width 64": "**width** (mass, all diagonals): 64",
    "width 1024": "1,024",
}


def training_choices() -> str:
    found = {row["variant"]: row for row in results("distil_ablation_h100")["rows"]}
    rows = []
    for variant, shown in VARIANTS.items():
        told, answers = found[variant]["validation"], found[variant]["answers"]
        cells = [shown, f"{told['kl_columns']:.2f}, {told['kl_diagonals']:.2f}"]
        cells += [f"{percent(told[k]['0.05'])}, {percent(told[k]['0.1'])}" for k in ("recall", "recall_strong")]
        rows.append([*cells, *(percent(answers[columns]["accuracy"]) for columns in ("256", "1024"))])
    recalls = ("recall at 5 %, 10 %", "strong recall at 5 %, 10 %")
    answers = ("answers, 256 columns", "answers, 1,024 columns")
    return table(("variant", "KL, columns and diagonals", *recalls, *answers), rows)


SETTINGS = {
    "window and sinks only": "window and sinks only",
    "64 columns": "64 columns everywhere",
    "256 columns": "256 columns",
    "1024 columns": "1,024 columns",
    "accurate, its own thresholds": "`accurate`, before calibration",
    "accurate, calibrated": "`accurate`, calibrated",
    "balanced, its own thresholds": "`balanced`, before calibration",
    "balanced, calibrated": "`balanced`, calibrated",
    "fast, its own thresholds": "`fast`, before calibration",
    "fast, calibrated": "`fast`, calibrated",
    "density 10% by strong": "calibrated to 10 % by strong recall",
}


def needle_indexers() -> str:
    records = [results(f"distil_quality_{length}_h100") for length in ("16k", "32k")]
    pairs = [(record, indexer) for record in records for indexer in ("old_indexer", "needle")]
    rows = []
    for setting, shown in SETTINGS.items():
        cells = [shown]
        for record, indexer in pairs:
            rated = {row["setting"]: row for row in record["rows"] if row["indexer"] in ("none", indexer)}[setting]
            cells.append(f"{percent(rated['accuracy'])} at {percent(rated['density'])}")
        rows.append(cells)
    for kind, shown in (("mass", "recall at density 10 %"), ("strong", "strong recall at density 10 %")):
        layers = [record["recall"][indexer][kind]["0.1"] for record, indexer in pairs]
        rows.append([shown, *(percent(sum(recalls) / len(recalls)) for recalls in layers)])
    return table(("", "16k: before", "16k: now", "32k: before", "32k: now"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "options": options,
    "presets": presets,
    "ttft summary": ttft_summary,
    "ttft gpu": ttft_gpu,
    "ttft real": ttft_real,
    "ttft cpu": ttft_cpu,
    "answers inside prompts": inside_answers,
    "crossover": crossover,
    "kernels": kernels,
    "training speed": training_speed,
    "training choices": training_choices,
    "needle indexers": needle_indexers,
}


def renewed(text: str) -> str:
    """A page with its tables as they should be; KeyError for a table that nobody makes."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> int:
    stale = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        new = renewed(text)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                page.write_text(new, encoding="utf-8")
    if "--check" in sys.argv[1:] and stale:
        print(f"not up to date: {', '.join(stale)}; run python scripts/make_docs.py")
        return 1
    print(f"tables: {'written: ' + ', '.join(stale) if stale else 'up to date'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
