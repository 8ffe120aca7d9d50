# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Train the needle model's VSIndexer with the package's own trainer, on generated prompts.

    python -m examples.needle.distill --out indexer_ckpts/needle --steps 2000

The same as ``vsprefill train --model examples/needle/model --data PROMPTS.jsonl``, but that prompts are generated as
they are needed; ``--write PROMPTS.jsonl`` writes some to a file that ``vsprefill train`` reads. Most prompts have
questions and answers all along, so that keys are needed by rows in the middle.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from examples.needle.tasks import HAYSTACKS, TASKS, make_problem, training_sequence
from vllm_vsprefill.distil.calibrate import Goal
from vllm_vsprefill.distil.data import Ids
from vllm_vsprefill.distil.errors import DistilError

MODEL = Path(__file__).parent / "model"
# What the presets are calibrated to, by the recall of entries weighted by their own probability: a row that looks for
# one key counts, a row that looks everywhere does not.
GOALS = {
    "accurate": Goal(density=0.12, metric="strong"),
    "balanced": Goal(density=0.07, metric="strong"),
    "fast": Goal(density=0.045, metric="strong"),
}
FILES = ("config.json", "indexer.safetensors")


class Prompts:
    """Generated prompts as a training stream; position ``i`` is the ``i``-th prompt."""

    def __init__(self, seed: int, held_out: bool = False, ends: float = 0.3) -> None:
        self.description = "generated retrieval prompts (examples/needle/tasks.py)"
        self._seed, self._held_out, self._ends = seed, held_out, ends

    def sequence(self, position: int, length: int) -> Ids:
        rng = np.random.default_rng([self._seed, int(self._held_out), position])
        if rng.random() < self._ends:  # one question, at the end
            task, haystack = TASKS[int(rng.integers(len(TASKS)))], HAYSTACKS[int(rng.integers(len(HAYSTACKS)))]
            return make_problem(rng, task, haystack, length).prompt_ids.astype(np.int64)
        return training_sequence(rng, length)[0].astype(np.int64)

    def after(self, position: int, length: int) -> int:
        del length
        return position + 1

    def identity(self) -> str:
        return f"needle-{self._seed}-{self._held_out}-{self._ends}"


def write_prompts(file: Path, count: int, length: int, seed: int) -> None:
    """Prompts as JSON lines with ``input_ids``, which ``vsprefill train --data`` reads."""
    prompts = Prompts(seed)
    with file.open("w") as out:
        for i in range(count):
            out.write(json.dumps({"input_ids": prompts.sequence(i, length).tolist()}) + "\n")


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for the checkpoint.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of the run; by default OUT.run.")] = None,
    steps: Annotated[int, typer.Option()] = 2000,
    learning_rate: Annotated[float, typer.Option()] = 2e-3,
    hidden_size: Annotated[int, typer.Option()] = 256,
    target: Annotated[str, typer.Option(help="mass, peak or mixed.")] = "peak",
    peak_power: Annotated[float, typer.Option(help="Power that peaks are raised to.")] = 2.0,
    exclude_window: Annotated[int, typer.Option(help="Diagonals below this do not count.")] = 256,
    max_length: Annotated[int, typer.Option()] = 32768,
    min_length: Annotated[int, typer.Option()] = 2048,
    validate_every: Annotated[int, typer.Option()] = 250,
    calibration_length: Annotated[int, typer.Option()] = 32768,
    calibration_prompts: Annotated[int, typer.Option()] = 6,
    per_head: Annotated[bool, typer.Option("--per-head", help="Calibrate thresholds for each KV head.")] = False,
    seed: Annotated[int, typer.Option()] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run.")] = False,
    write: Annotated[Path | None, typer.Option(help="Only write prompts to this .jsonl file.")] = None,
    prompts: Annotated[int, typer.Option(help="How many --write writes, of MAX_LENGTH tokens.")] = 100,
) -> None:
    """Train, calibrate and store the indexer."""
    if write is not None:
        write_prompts(write, prompts, max_length, seed)
        return
    if out is None:
        raise typer.BadParameter("say where the checkpoint goes", param_hint="--out")
    folder = work or out.with_name(out.name + ".run")
    from vllm_vsprefill.distil.trainer import Interrupted

    try:
        _run(
            out, folder, steps, learning_rate, hidden_size, target, peak_power, exclude_window, max_length, min_length,
            validate_every, calibration_length, calibration_prompts, per_head, seed, resume,
        )  # fmt: skip
    except DistilError as error:
        typer.echo(f"distill: {error}", err=True)
        raise typer.Exit(1) from None
    except Interrupted as stop:
        typer.echo(f"distill: {stop}", err=True)
        raise typer.Exit(130) from None


def _run(
    out: Path,
    folder: Path,
    steps: int,
    learning_rate: float,
    hidden_size: int,
    target: str,
    peak_power: float,
    exclude_window: int,
    max_length: int,
    min_length: int,
    validate_every: int,
    calibration_length: int,
    calibration_prompts: int,
    per_head: bool,
    seed: int,
    resume: bool,
) -> None:
    import torch
    from accelerate import Accelerator

    from vllm_vsprefill.checkpoint import load_checkpoint
    from vllm_vsprefill.distil import calibrate
    from vllm_vsprefill.distil.model import load
    from vllm_vsprefill.distil.options import ModelOptions, train_options
    from vllm_vsprefill.distil.trainer import Trainer
    from vllm_vsprefill.tuning import CPU

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    student: dict[str, Any] = {
        "hidden_size": hidden_size,
        "target": target,
        "peak_power": peak_power,
        "exclude_window": exclude_window,
    }
    options = train_options(
        student,
        max_length=max_length,
        min_length=min(min_length, max_length),
        steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        compute_dtype="bfloat16" if torch.cuda.is_available() else "float32",
        validate_every=validate_every,
        save_every=validate_every,
        calibrate=False,
    )
    teacher = load(ModelOptions(model=str(MODEL)), accelerator.device)
    Trainer(
        options, teacher, Prompts(seed), Prompts(seed, held_out=True), folder, accelerator, resume=resume,
        log=typer.echo,
    ).run()  # fmt: skip
    loaded = load_checkpoint(folder)
    held_out = Prompts(seed + 1, held_out=True)
    tables = calibrate.measure(
        teacher,
        {i: [w.to(teacher.device) for w in weights] for i, weights in loaded.layers.items()},
        [held_out.sequence(i, calibration_length) for i in range(calibration_prompts)],
        # The CPU's tiles, the larger ones: a density found with them is not exceeded elsewhere.
        {preset: calibrate.preset_budgets(preset, CPU) for preset in GOALS},
        chunks=(8192, 2048),
        min_seq_len=calibrate.MIN_SEQ_LEN,
        seed=seed,
    )
    found = calibrate.calibrate(tables, GOALS, per_head)
    calibrate.store(loaded, {preset: c.thresholds for preset, c in found.items()})
    for preset, c in found.items():
        typer.echo(f"{preset}: recall {c.recall.mean():.1%} ({GOALS[preset].metric}), density {c.density.mean():.1%}")
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(folder / name, out / name)
    typer.echo(f"checkpoint: {out}")


if __name__ == "__main__":
    typer.run(main)
