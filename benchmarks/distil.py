# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Distillation: its speed beside the bare forward pass, what its choices are worth, what an indexer is worth.

    python -m benchmarks.distil speed --shape qwen3-4b --length 32768 --length 131072 --out speed.json
    python -m benchmarks.distil ablation --seconds 70 --out ablation.json
    python -m benchmarks.distil quality --indexer indexer_ckpts/needle --indexer NEW --out quality.json

Runs in PyTorch and transformers, without vLLM. ``ablation`` and ``quality`` use the needle model; accuracy there is the
share of retrieved answer tokens inside prompts that the model ranks first, as in ``benchmarks/in_prompt_answers.py``,
with the backend emulated by ``examples/needle/sparse.py``. Every result file is rewritten as figures come in.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import environment
from examples.needle.distill import Prompts
from examples.needle.modeling import KVCache, NeedleModel, dense_attention, load_model
from examples.needle.sparse import SparseAttention, SparseSettings
from examples.needle.tasks import KIND_COUNTED, training_sequence
from vllm_vsprefill.checkpoint import load_checkpoint
from vllm_vsprefill.config import PRESETS
from vllm_vsprefill.distil import attention, calibrate
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.coverage import Budgets, best_recall
from vllm_vsprefill.distil.distiller import Distiller
from vllm_vsprefill.distil.model import Teacher, load, wrap
from vllm_vsprefill.distil.options import ModelOptions, StudentOptions
from vllm_vsprefill.distil.student import Student, features, initial_weights
from vllm_vsprefill.distil.targets import chunk_ranges, draw_ranges
from vllm_vsprefill.distil.validate import Validation, validate
from vllm_vsprefill.kernels.types import SparsePattern

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPUTE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
START = time.perf_counter()


def say(line: str) -> None:
    print(f"[{time.perf_counter() - START:7.1f}] {line}", flush=True)


def write(out: Path | None, record: dict[str, Any]) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object]) -> float:
    synchronise()
    begin = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - begin


def peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None


# ----------------------------------------------------------------------------------------------------------------------
# speed


def shape_config(shape: str, layers: int | None) -> Any:
    """transformers' configuration of a well-known model's shape; the weights are random."""
    import transformers

    common = {"max_position_embeddings": 262144, "num_key_value_heads": 8, "head_dim": 128, "num_attention_heads": 32}
    if shape == "qwen3-4b":
        return transformers.Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=layers or 36, **common
        )
    if shape == "llama31-8b":
        return transformers.LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers or 32, **common
        )
    if shape == "tiny":
        small = {"num_key_value_heads": 2, "head_dim": 32, "num_attention_heads": 4}
        return transformers.Qwen3Config(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers or 2, **{**common, **small}
        )
    raise typer.BadParameter("expected qwen3-4b, llama31-8b or tiny", param_hint="--shape")


def random_teacher(shape: str, layers: int | None) -> Teacher:
    from transformers import AutoModel

    config = shape_config(shape, layers)
    config.dtype = COMPUTE
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(COMPUTE)
    try:
        with torch.device(DEVICE):
            model = AutoModel.from_config(config)
    finally:
        torch.set_default_dtype(before)
    return wrap(model, f"{shape}, random weights")


def attention_times(config: Any, length: int, repeats: int) -> dict[str, float]:
    """Seconds of each causal kernel on one layer's shape; those that do not run are left out."""
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (torch.randn(1, length, h, size, device=DEVICE, dtype=COMPUTE).transpose(1, 2) for h in (heads, kv, kv))
    out = {}
    for name, kernel in attention.KERNELS.items():
        try:
            kernel(q, k, v, size**-0.5)
            out[name] = min(timed(partial(kernel, q, k, v, size**-0.5)) for _ in range(repeats))
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
    return out


def shape_rows(
    name: str, lengths: list[int], layers: int | None, chunk: int, hidden_size: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Figures of one shape, one row per length; the model is gone when they are all read."""
    teacher = random_teacher(name, layers)
    fingerprint = teacher.fingerprint
    chosen = attention.lse_kernel(
        DEVICE, COMPUTE, fingerprint.num_query_heads, fingerprint.num_kv_heads, fingerprint.head_size
    )
    say(f"{name}: {len(teacher.layers.covered)} layers; attention with log-sum-exp by {chosen}")
    settings = StudentOptions(hidden_size=hidden_size)
    student = Student("speed", settings, teacher.layers.covered, fingerprint.num_kv_heads, fingerprint.head_size, 0).to(
        DEVICE
    )
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=DEVICE.type == "cuda")
    distiller = Distiller(teacher, [student], COMPUTE)

    def step(ids: Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        distiller.learn(ids, chunk_ranges(len(ids), chunk), 1.0)
        optimiser.step()

    # Kernels are compiled, and the optimiser's state is made, before anything is timed.
    ids = torch.randint(teacher.vocabulary, (max(lengths),), generator=torch.Generator().manual_seed(1))
    teacher.run(ids[:16384])
    step(ids[:16384])
    for n in lengths:
        ids = torch.randint(teacher.vocabulary, (n,), generator=torch.Generator().manual_seed(1))
        count = repeats if n <= 32768 else 1
        # First, for libraries that plan a kernel anew for each length; everything else takes any length.
        kernels = attention_times(shape_config(name, layers), n, count)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        bare = min(timed(partial(teacher.run, ids)) for _ in range(count))
        bare_gib = peak_gib()
        distiller.timing, spent, targets = True, float("inf"), 0.0
        for _ in range(count):
            distiller.target_seconds = []
            seconds = timed(partial(step, ids))
            if seconds < spent:
                spent, targets = seconds, sum(measured() for measured in distiller.target_seconds)
        gib = peak_gib()
        say(
            f"{name} {n:,}: bare {n / bare:,.0f} tokens/s, training {n / spent:,.0f} ({bare / spent:.0%} of bare), "
            f"targets {targets / spent:.0%} of a step, peak {gib or 0:.1f} GiB; attention {kernels}"
        )
        yield {
            "shape": name,
            "length": n,
            "layers": len(teacher.layers.covered),
            "attention": chosen,
            "attention_seconds": kernels,
            "bare_seconds": bare,
            "bare_tokens_per_second": n / bare,
            "step_seconds": spent,
            "tokens_per_second": n / spent,
            "share_of_bare_speed": bare / spent,
            "target_seconds": targets,
            "target_share": targets / spent,
            "peak_gib": gib,
            "bare_peak_gib": bare_gib,
        }


@app.command()
def speed(
    shape: Annotated[list[str], typer.Option(help="qwen3-4b, llama31-8b (or tiny); repeatable.")],
    length: Annotated[list[int], typer.Option(help="Tokens of a sequence; repeatable.")],
    layers: Annotated[int | None, typer.Option(help="Layers, if not all of the shape's.")] = None,
    chunk: Annotated[int, typer.Option(help="Prefill chunk of the targets; all rows count.")] = 8192,
    hidden_size: Annotated[int, typer.Option()] = 1024,
    repeats: Annotated[int, typer.Option(help="Timed runs up to 32k tokens; one beyond.")] = 2,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Tokens/s and peak memory of training steps and of the bare forward pass; every row counts in the targets."""
    rows: list[dict[str, Any]] = []
    record = {**environment.describe(), "chunk": chunk, "hidden_size": hidden_size, "rows": rows}
    for name in shape:
        for row in shape_rows(name, length, layers, chunk, hidden_size, repeats):
            rows.append(row)
            write(out, record)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------------------
# in-prompt answers


class StudentAttention(SparseAttention):
    """Sparse attention through an indexer in training, whatever it reads."""

    def __init__(self, student: Student, settings: SparseSettings) -> None:
        super().__init__(None, settings)  # type: ignore[arg-type] # only score() uses it
        self._student = student

    def score(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = LayerCall(layer, q, k, v, 1.0, None)
        with torch.no_grad():
            x = features(self._student.options.inputs, call, COMPUTE)
            return self._student.logits(call, x).transpose(0, 1)


@torch.no_grad()
def in_prompt_answers(model: NeedleModel, run: Any, length: int, prompts: int, chunk: int) -> tuple[int, int]:
    """Answer tokens inside prompts that are ranked first, and all of them, beyond the first chunk."""
    rng = np.random.default_rng(7)
    right = total = 0
    for _ in range(prompts):
        ids, kinds = training_sequence(rng, length)
        tokens = torch.from_numpy(ids.astype(np.int64)).to(DEVICE)
        cache = KVCache(model.config, 1, length, DEVICE)
        places = torch.from_numpy(np.flatnonzero(kinds >= KIND_COUNTED)).to(DEVICE)
        places = places[places >= chunk]
        for start in range(0, length, chunk):
            hidden = model.extend(tokens[None, start : start + chunk], cache, run)[0]
            # The row before an answer token predicts it.
            here = places[(places > start) & (places <= min(start + chunk, length - 1))]
            if len(here):
                best = model.logits(hidden[here - 1 - start]).argmax(-1)
                right += int((best == tokens[here]).sum())
                total += len(here)
    return right, total


def budget_settings(columns: int) -> SparseSettings:
    """So many columns in every layer and head, no distance but the window."""
    return SparseSettings(
        tau_columns=1e-9, tau_diagonals=1e-9, min_columns=columns, max_columns=columns, max_diagonals=0, min_seq_len=0
    )


def answer_row(model: NeedleModel, run: Any, length: int, prompts: int, chunk: int) -> dict[str, Any]:
    right, total = in_prompt_answers(model, run, length, prompts, chunk)
    density = run.density if isinstance(run, SparseAttention) else 1.0
    return {"right": right, "answers": total, "accuracy": right / max(1, total), "density": density}


# ----------------------------------------------------------------------------------------------------------------------
# ablation

BASE = StudentOptions(hidden_size=256)
TARGETS = {
    "mass, all diagonals": BASE,
    "mass": BASE.model_copy(update={"exclude_window": 256}),
    "peak, all diagonals": BASE.model_copy(update={"target": "peak"}),
    "peak": BASE.model_copy(update={"target": "peak", "exclude_window": 256}),
    "peak squared": BASE.model_copy(update={"target": "peak", "exclude_window": 256, "peak_power": 2.0}),
    "peak to the 4th": BASE.model_copy(update={"target": "peak", "exclude_window": 256, "peak_power": 4.0}),
    "mixed": BASE.model_copy(update={"target": "mixed", "exclude_window": 256}),
}
INPUTS = {f"inputs {'+'.join(x)}": BASE.model_copy(update={"inputs": x}) for x in ("k", "v", "q", "kq", "kvq")}
LOSSES = {f"loss {x}": BASE.model_copy(update={"loss": x}) for x in ("mse", "cosine")}
WIDTHS = {f"width {x}": BASE.model_copy(update={"hidden_size": x}) for x in (64, 1024)}
VARIANTS = {**TARGETS, **INPUTS, **LOSSES, **WIDTHS}


def train_together(
    teacher: Teacher, variants: dict[str, StudentOptions], seconds: float, longest: int, rate: float, seed: int
) -> tuple[list[Student], dict[str, Any]]:
    """Students that learn from one stream for so long, each with its own optimiser."""
    shape = teacher.fingerprint
    students = [
        Student(name, o, teacher.layers.covered, shape.num_kv_heads, shape.head_size, seed).to(DEVICE)
        for name, o in variants.items()
    ]
    fused = DEVICE.type == "cuda"
    optimisers = [
        torch.optim.AdamW(s.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=fused) for s in students
    ]
    distiller = Distiller(teacher, students, COMPUTE)
    prompts = Prompts(seed)
    lengths = [n for n in (2048, 4096, 8192, 16384, 32768) if n <= longest] or [longest]
    begin = last = time.perf_counter()
    step = tokens = 0
    while (elapsed := time.perf_counter() - begin) < seconds:
        now = rate * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * elapsed / seconds)))
        rng = np.random.default_rng([seed, 9, step])
        n = int(rng.choice(lengths))
        ids = torch.from_numpy(prompts.sequence(step, n))
        for optimiser in optimisers:
            optimiser.param_groups[0]["lr"] = float(now)
            optimiser.zero_grad(set_to_none=True)
        figures = distiller.learn(ids, draw_ranges(rng, n, (2048, 8192, 0), 4), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        step, tokens = step + 1, tokens + n
        if time.perf_counter() - last > 10:
            last = time.perf_counter()
            kl = figures[..., :2].mean(1).tolist()
            say(f"step {step}: KL columns {[round(c, 3) for c, _ in kl]}")
    return students, {"steps": step, "tokens": tokens, "seconds": time.perf_counter() - begin}


def validation_row(found: Validation) -> dict[str, Any]:
    return {
        "kl_columns": float(found.kl[:, 0].mean()),
        "kl_diagonals": float(found.kl[:, 1].mean()),
        "recall": {f"{d:g}": float(found.recall(d).mean()) for d in (0.03, 0.05, 0.1, 0.2)},
        "recall_strong": {f"{d:g}": float(found.recall(d, 2).mean()) for d in (0.03, 0.05, 0.1, 0.2)},
    }


def markdown(rows: list[dict[str, Any]], columns: list[int]) -> str:
    head = ["variant", "KL columns", "recall at 5 %, 10 %", "strong recall at 5 %, 10 %"]
    head += [f"answers with {c} columns" for c in columns]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        v = row["validation"]
        cells = [row["variant"], f"{v['kl_columns']:.3f}"]
        cells += [", ".join(f"{v[kind][d]:.1%}" for d in ("0.05", "0.1")) for kind in ("recall", "recall_strong")]
        cells += [f"{row['answers'][str(c)]['accuracy']:.1%}" for c in columns if str(c) in row["answers"]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@app.command()
def ablation(
    seconds: Annotated[float, typer.Option(help="Training time of each group of variants.")] = 70.0,
    length: Annotated[int, typer.Option(help="Tokens of a prompt whose answers are looked at.")] = 32768,
    prompts: Annotated[int, typer.Option()] = 2,
    chunk: Annotated[int, typer.Option()] = 8192,
    columns: Annotated[list[int] | None, typer.Option(help="Columns per head; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Variants; repeatable; all by default.")] = None,
    learning_rate: Annotated[float, typer.Option()] = 2e-3,
    seed: Annotated[int, typer.Option()] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file, and a table beside it.")] = None,
) -> None:
    """Inputs, losses, widths and targets on the needle model: all trained on one stream, for equally long."""
    budgets = columns or [256, 1024]
    unknown = set(only or ()) - set(VARIANTS)
    if unknown:
        raise typer.BadParameter(f"no variant {sorted(unknown)}; there are {list(VARIANTS)}", param_hint="--only")
    variants = {name: VARIANTS[name] for name in only} if only else VARIANTS
    teacher = load(ModelOptions(model=str(environment.NEEDLE_MODEL)), DEVICE)
    model = load_model(environment.NEEDLE_MODEL, DEVICE)
    students, effort = train_together(teacher, variants, seconds, length, learning_rate, seed)
    say(f"trained {len(students)} variants together: {effort}")
    held_out = Prompts(seed, held_out=True)
    found, _ = validate(
        Distiller(teacher, students, COMPUTE),
        [held_out.sequence(i, length) for i in range(4)],
        Budgets(SparsePattern(window=256)),
        chunks=(8192, 2048),
        chunks_per_sequence=2,
        seed=seed,
        rows=16,
    )
    rows: list[dict[str, Any]] = []
    record = {**environment.describe(), **effort, "length": length, "prompts": prompts, "chunk": chunk, "rows": rows}
    for student, figures in zip(students, found, strict=True):
        figures.kl /= 4
        figures.loss /= 4
        answers = {}
        for count in budgets:
            run = StudentAttention(student, budget_settings(count))
            answers[str(count)] = answer_row(model, run, length, prompts, chunk)
        rows.append(
            {
                "variant": student.name,
                "options": student.options.model_dump(),
                "validation": validation_row(figures),
                "answers": answers,
            }
        )
        shown = {c: f"{a['accuracy']:.1%} at {a['density']:.1%}" for c, a in answers.items()}
        say(f"{student.name}: {rows[-1]['validation']['recall_strong']} {shown}")
        write(out, record)
    table = markdown(rows, budgets)
    print(table)
    if out is not None:
        out.with_suffix(".md").write_text(table + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# quality


def quality_table(rows: list[dict[str, Any]], recalls: dict[str, Any], names: list[str]) -> str:
    """Accuracy and density of every setting, and mean recall at a density, an indexer a column."""
    lines = ["| answers inside prompts | " + " | ".join(names) + " |", "|" + "---|" * (1 + len(names))]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["setting"], {})[row["indexer"]] = f"{row['accuracy']:.1%} at {row['density']:.1%}"
    for setting, by_name in cells.items():
        # What needs no indexer is the same for all.
        shown = [by_name.get(name, by_name.get("none", "")) for name in names]
        lines.append(f"| {setting} | " + " | ".join(shown) + " |")
    for kind, label in (("mass", "recall"), ("strong", "strong recall")):
        for density in next((recall[kind] for recall in recalls.values() if kind in recall), {}):
            shown = [f"{np.mean(recalls[name][kind][density]):.1%}" if name in recalls else "" for name in names]
            lines.append(f"| {label} at density {float(density):.0%} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


@app.command()
def quality(
    indexer: Annotated[list[Path], typer.Option(help="Checkpoint of the needle model; repeatable.")],
    length: Annotated[int, typer.Option()] = 32768,
    prompts: Annotated[int, typer.Option()] = 3,
    chunk: Annotated[int, typer.Option()] = 8192,
    columns: Annotated[list[int] | None, typer.Option(help="Columns per head; repeatable.")] = None,
    density: Annotated[list[float] | None, typer.Option(help="Densities to calibrate to; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Answers inside prompts and recall against density, before and after calibration, for each checkpoint."""
    names = [folder.name for folder in indexer]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names, 1)]
    teacher = load(ModelOptions(model=str(environment.NEEDLE_MODEL)), DEVICE)
    model = load_model(environment.NEEDLE_MODEL, DEVICE)
    rows: list[dict[str, Any]] = []
    recalls: dict[str, Any] = {}
    record = {
        **environment.describe(), "length": length, "prompts": prompts, "chunk": chunk, "recall": recalls, "rows": rows,
    }  # fmt: skip
    known: dict[tuple[str, SparseSettings], dict[str, Any]] = {}

    def measured(name: str, setting: str, run: Any) -> None:
        # Goals that lead to the same thresholds give the same answers.
        key = (name, run.settings) if isinstance(run, SparseAttention) else None
        figures = known.get(key) if key is not None else None
        if figures is None:
            figures = answer_row(model, run, length, prompts, chunk)
        if key is not None:
            known[key] = figures
        rows.append({"indexer": name, "setting": setting, **figures})
        say(f"{name}, {setting}: {rows[-1]['accuracy']:.1%} of {rows[-1]['answers']} at {rows[-1]['density']:.2%}")
        write(out, record)

    measured("none", "dense", dense_attention)
    held_out = Prompts(991, held_out=True)
    sequences = [held_out.sequence(i, length) for i in range(4)]
    for name, folder in zip(names, indexer, strict=True):
        loaded = load_checkpoint(folder, dtype=torch.float32, device=DEVICE)
        if not recalls:
            measured("none", "window and sinks only", SparseAttention(loaded.layers, budget_settings(0)))
        for count in columns or [64, 256, 1024, 2048, 4096]:
            measured(name, f"{count} columns", SparseAttention(loaded.layers, budget_settings(count)))
        table = calibrate.measure(
            teacher,
            {i: list(weights) for i, weights in loaded.layers.items()},
            sequences,
            {"all": Budgets(SparsePattern(window=256))},
            chunks=(8192, 2048),
            min_seq_len=calibrate.MIN_SEQ_LEN,
        )["all"]
        kept = table.shares().cpu()
        recalls[name] = {
            kind: {
                f"{d:g}": [round(float(x), 4) for x in best_recall(kept, d, place)[0].mean(1)]
                for d in (0.02, 0.03, 0.05, 0.1, 0.2)
            }
            for kind, place in (("mass", 1), ("strong", 2))
        }
        say(f"{name}: recall at density, per layer: {recalls[name]}")
        for preset in ("accurate", "balanced", "fast"):
            values: dict[str, Any] = {**PRESETS[preset], "min_seq_len": 0}
            plain = {k: v for k, v in values.items() if k in SparseSettings.__dataclass_fields__}
            measured(name, f"{preset}, its own thresholds", SparseAttention(loaded.layers, SparseSettings(**plain)))
            stored = [loaded.thresholds(preset, i) for i in loaded.config.layers]
            if all(None not in pair for pair in stored):
                taus: dict[str, Any] = dict(
                    zip(("tau_columns", "tau_diagonals"), map(tuple, zip(*stored, strict=True)), strict=True)
                )
                settings = SparseSettings(**{**plain, **taus})
                measured(name, f"{preset}, calibrated", SparseAttention(loaded.layers, settings))
        for wanted in density or [0.05, 0.1, 0.2]:
            for metric in ("mass", "strong"):
                for per_head in (False, True):
                    goal = calibrate.Goal(density=wanted, metric=metric)
                    t = calibrate.choose(table.table, goal, per_head).thresholds
                    assert t.tau_columns is not None
                    assert t.tau_diagonals is not None
                    settings = SparseSettings(t.tau_columns, t.tau_diagonals, 0, None, 0, None, min_seq_len=0)
                    label = f"density {wanted:.0%} by {metric}{', per head' if per_head else ''}"
                    measured(name, label, SparseAttention(loaded.layers, settings))
    table_text = quality_table(rows, recalls, names)
    print(table_text)
    if out is not None:
        out.with_suffix(".md").write_text(table_text + "\n")


@app.command()
def check(length: Annotated[int, typer.Option()] = 3000) -> None:
    """Compare what capture and the target kernels give on this device with plain PyTorch on the same tensors."""
    from vllm_vsprefill.distil.mass import cpu as mass
    from vllm_vsprefill.distil.targets import Range, TargetKind, compute

    teacher = load(ModelOptions(model=str(environment.NEEDLE_MODEL)), DEVICE)
    ids = torch.from_numpy(Prompts(5).sequence(0, length))
    part, worst = Range(length // 3, length - 100), 0.0

    def layer(call: LayerCall) -> None:
        nonlocal worst
        rows: dict[str, Any] = {"scale": call.scale, "row_start": part.start, "row_end": part.end}
        found = compute(call, part, [TargetKind("mass", 0), TargetKind("peak", 64)])
        columns, diagonals = mass.mass_sums(call.q, call.k, **rows)
        peaks = mass.column_weights(call.q, call.k, min_distance=64, **rows)
        peaks = peaks / peaks.sum(-1, keepdim=True)
        pairs = [
            (found[TargetKind("mass", 0)].columns, columns[:, : part.end]),
            (found[TargetKind("mass", 0)].diagonals, diagonals[:, : part.end]),
            (found[TargetKind("peak", 64)].columns, peaks[:, : part.end]),
        ]
        for one, other in pairs:
            # Half the L1 distance of two distributions.
            worst = max(worst, float((one - other).abs().sum(-1).max()) / 2)
        if call.lse is not None:
            say(f"layer {call.layer}: log-sum-exp from the attention kernel")

    teacher.run(ids, layer)
    say(f"largest distance of a target from plain PyTorch: {worst:.2e} of the mass")
    if worst > 5e-3:
        raise typer.Exit(1)


@app.command()
def untrained(out: Annotated[Path, typer.Option()], seed: Annotated[int, typer.Option()] = 0) -> None:
    """Write an indexer with random weights for the needle model: what any training has to beat."""
    from vllm_vsprefill.checkpoint import save_checkpoint

    known = load_checkpoint(environment.ROOT / "indexer_ckpts" / "needle").config
    shape = known.fingerprint
    fresh = initial_weights(known.layers, shape.num_kv_heads, 2 * shape.head_size, known.hidden_size, seed)
    save_checkpoint(out, fresh, known.model_copy(update={"training": {}, "thresholds": {}}))


if __name__ == "__main__":
    app()
