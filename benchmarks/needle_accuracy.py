# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Accuracy of the needle model per task, haystack and length, with dense attention or through its indexer.

    python benchmarks/needle_accuracy.py --length 32768 --samples 50
    python benchmarks/needle_accuracy.py --preset balanced --chunk 8192 --length 32768 --samples 20 --out sparse.json

Greedy decoding, exact match. Runs in plain PyTorch on any device, without vLLM; the sparse attention is that of
``vllm_vsprefill.kernels`` (columns exact; diagonals, window and sinks by granule; decoding dense). Density is the share
of the causal (query, key) pairs of the prefill that were computed, over all layers and KV heads, dense rows included.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.needle.evaluate import Cell, answer_all, evaluate, problems, summary
from examples.needle.modeling import NeedleModel, load_model
from examples.needle.sparse import SparseAttention, SparseSettings
from examples.needle.tasks import HAYSTACKS, TASKS, Problem
from vllm_vsprefill.checkpoint import LoadedIndexer, load_checkpoint
from vllm_vsprefill.config import PRESETS

ROOT = Path(__file__).resolve().parents[1]
WINDOW_ONLY = "window-only"
SEED = 20_000


def settings_of(preset: str, loaded: LoadedIndexer, **changes: Any) -> SparseSettings:
    """A preset with the checkpoint's calibrated thresholds, as the plugin applies it.

    ``window-only`` is ``fast`` with a single column and a single distance: what the indexer has to beat.
    """
    if preset == WINDOW_ONLY:
        values: dict[str, Any] = {**PRESETS["fast"], "tau_columns": 1e-9, "tau_diagonals": 1e-9}
        values |= {"min_columns": 0, "max_columns": 1, "min_diagonals": 0, "max_diagonals": 1}
    else:
        values = dict(PRESETS[preset])
        for name, calibrated in zip(
            ("tau_columns", "tau_diagonals"),
            zip(*(loaded.thresholds(preset, layer) for layer in loaded.config.layers), strict=True),
            strict=True,
        ):
            if None not in calibrated:
                values[name] = calibrated
    return SparseSettings(**{**values, **changes})


def run_sparse(
    model: NeedleModel,
    loaded: LoadedIndexer,
    settings: SparseSettings,
    chunk: int,
    length: int,
    samples: int,
    dense: dict[tuple[str, str, int], list[bool]],
    deadline: float,
) -> dict[str, Any]:
    """One configuration over all tasks and haystacks; ``dense`` remembers the dense answers to the same problems."""
    attention = SparseAttention(loaded.layers, settings)
    cells: list[Cell] = []
    dense_right = 0
    for task in TASKS:
        for haystack in HAYSTACKS:
            if time.time() > deadline:
                break
            batch = problems(task, haystack, length, samples, SEED)
            key = (task, haystack, length)
            if len(dense.get(key, [])) < samples:
                dense[key] = [p.is_correct(a) for p, a in zip(batch, answer_all(model, batch), strict=True)]
            dense_right += sum(dense[key][:samples])
            answers = [answer_all(model, [p], attention=attention, chunk=chunk)[0] for p in batch]
            cells.append(Cell(task, haystack, length, samples, sum(map(Problem.is_correct, batch, answers))))
            typer.echo(f"  {task:18s} {haystack:7s} {cells[-1].correct}/{samples}  density {attention.density:.4f}")
    total = sum(c.samples for c in cells)
    right = sum(c.correct for c in cells)
    return {
        "length": length,
        "chunk": chunk,
        "settings": settings.to_json(),
        "density": round(attention.density, 5),
        "density_per_layer": attention.layer_densities(),
        "columns_per_layer": attention.mean_counts(attention.columns),
        "diagonals_per_layer": attention.mean_counts(attention.diagonals),
        "problems": total,
        "correct": right,
        "correct_dense": dense_right,
        "share_of_dense": round(right / max(1, dense_right), 4),
        **summary(cells).get(str(length), {}),
    }


def main(
    length: Annotated[list[int] | None, typer.Option(help="Tokens of prompt and answer; repeatable.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task, if dense; repeatable.")] = None,
    samples: Annotated[int, typer.Option(help="Problems per task and haystack.")] = 20,
    preset: Annotated[
        list[str] | None, typer.Option(help=f"Sparse, with this preset; repeatable. Also '{WINDOW_ONLY}'.")
    ] = None,
    chunk: Annotated[list[int] | None, typer.Option(help="Tokens per prefill chunk, if sparse; repeatable.")] = None,
    model: Annotated[Path, typer.Option(help="Model folder.")] = ROOT / "examples" / "needle" / "model",
    indexer: Annotated[Path, typer.Option(help="Indexer checkpoint.")] = ROOT / "indexer_ckpts" / "needle",
    device: Annotated[str, typer.Option()] = "cuda" if torch.cuda.is_available() else "cpu",
    seconds: Annotated[float, typer.Option(help="Stop starting new cells after this long.")] = float("inf"),
    out: Annotated[Path | None, typer.Option(help="JSON file, rewritten as results come in.")] = None,
) -> None:
    """Measure and print; with --out also write JSON."""
    deadline = time.time() + seconds
    stored = load_model(model, device)
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    common = {
        "command": "python benchmarks/needle_accuracy.py " + " ".join(sys.argv[1:]),
        "hardware": hardware,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "scoring": "greedy decoding, exact match (multi_value: its values in any order)",
    }

    def write(content: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(json.dumps({**common, **content}, indent=1) + "\n")

    lengths = length or [2048, 4096, 8192]
    if not preset:
        cells: list[Cell] = []

        def report(cell: Cell, wrong: list[tuple[Problem, str]]) -> None:
            cells.append(cell)
            shown = [(p.answer_text, answer[:60]) for p, answer in wrong[:2]]
            typer.echo(
                f"{cell.length:6d} {cell.task:18s} {cell.haystack:7s} {cell.correct}/{cell.samples} {shown or ''}"
            )
            write({"attention": "dense", "lengths": summary(cells)})

        tasks = [t for t in TASKS if not task or t in task]
        evaluate(stored, lengths, lambda _: samples, tasks=tasks, report=report, deadline=deadline, seed=SEED)
        return
    loaded = load_checkpoint(indexer, device=device)
    dense: dict[tuple[str, str, int], list[bool]] = {}
    runs: list[dict[str, Any]] = []
    for n in lengths:
        for rows in chunk or [8192]:
            for name in preset:
                if time.time() > deadline:
                    break
                begin = time.time()
                typer.echo(f"{name}, chunks of {rows}, {n} tokens")
                result = run_sparse(stored, loaded, settings_of(name, loaded), rows, n, samples, dense, deadline)
                runs.append({"preset": name, "seconds": round(time.time() - begin, 1), **result})
                typer.echo(
                    f"{name}, chunks of {rows}, {n} tokens: {result['correct']}/{result['problems']} "
                    f"(dense {result['correct_dense']}), density {result['density']:.4f}, "
                    f"columns {result['columns_per_layer']}, diagonals {result['diagonals_per_layer']}"
                )
                write({"attention": "sparse", "runs": runs})


if __name__ == "__main__":
    typer.run(main)
