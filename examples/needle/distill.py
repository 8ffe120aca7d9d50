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

import numpy as np
import typer
from pydantic import BaseModel, Field

from examples.needle.tasks import HAYSTACKS, TASKS, make_problem, training_sequence
from vllm_vsprefill.command_line import takes
from vllm_vsprefill.distil.calibrate import Goal
from vllm_vsprefill.distil.data import Ids
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.options import ModelOptions, StudentOptions, train_options

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


class DistilOptions(BaseModel):
    """Options of this command. Lengths in tokens."""

    out: Path | None = Field(None, description="Folder for the checkpoint.")
    work: Path | None = Field(None, description="Folder of the run; by default OUT.run.")
    student: StudentOptions = Field(
        StudentOptions(hidden_size=256, target="peak", peak_power=2.0, exclude_window=256), description="Indexer"
    )
    steps: int = Field(2000, ge=1, description="Optimiser steps.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak of the cosine schedule.")
    max_length: int = Field(32768, ge=16, description="Longest sequence.")
    min_length: int = Field(2048, ge=16, description="Shortest sequence.")
    validate_every: int = Field(250, ge=1, description="Steps between validations.")
    calibration_length: int = Field(32768, ge=16, description="Tokens of a prompt to calibrate with.")
    calibration_prompts: int = Field(6, ge=1, description="Prompts to calibrate with.")
    per_head: bool = Field(False, description="Calibrate thresholds for each KV head.")
    seed: int = Field(1, ge=0, description="Of weights and prompts.")
    resume: bool = Field(False, description="Go on with the run.")
    write: Path | None = Field(None, description="Only write prompts to this .jsonl file.")
    prompts: int = Field(100, ge=1, description="How many --write writes, of --max-length tokens.")


@takes(DistilOptions, DistilError, program="distill")
def main(options: DistilOptions) -> None:
    """Train, calibrate and store the needle model's indexer."""
    if options.write is not None:
        write_prompts(options.write, options.prompts, options.max_length, options.seed)
        return
    if options.out is None:
        raise DistilError("--out: say where the checkpoint goes")
    from vllm_vsprefill.distil.trainer import Interrupted

    try:
        _run(options, options.out)
    except Interrupted as stop:
        typer.echo(f"distill: {stop}", err=True)
        raise typer.Exit(130) from None


def _run(options: DistilOptions, out: Path) -> None:
    import torch
    from accelerate import Accelerator

    from vllm_vsprefill.checkpoint import load_checkpoint
    from vllm_vsprefill.distil import calibrate
    from vllm_vsprefill.distil.model import load
    from vllm_vsprefill.distil.trainer import Trainer
    from vllm_vsprefill.tuning import CPU

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    folder = options.work or out.with_name(out.name + ".run")
    seed = options.seed
    run = train_options(
        options.student.model_dump(),
        max_length=options.max_length,
        min_length=min(options.min_length, options.max_length),
        steps=options.steps,
        learning_rate=options.learning_rate,
        seed=seed,
        validate_every=options.validate_every,
        save_every=options.validate_every,
        calibrate=False,
    )
    teacher = load(ModelOptions(model=str(MODEL)), accelerator.device)
    Trainer(
        run, teacher, Prompts(seed), Prompts(seed, held_out=True), folder, accelerator, resume=options.resume,
        log=typer.echo,
    ).run()  # fmt: skip
    loaded = load_checkpoint(folder)
    held_out = Prompts(seed + 1, held_out=True)
    tables = calibrate.measure(
        teacher,
        {i: [w.to(teacher.device) for w in weights] for i, weights in loaded.layers.items()},
        [held_out.sequence(i, options.calibration_length) for i in range(options.calibration_prompts)],
        # The CPU's tiles, the larger ones: a density found with them is not exceeded elsewhere.
        {preset: calibrate.preset_budgets(preset, CPU) for preset in GOALS},
        chunks=(8192, 2048),
        min_seq_len=calibrate.MIN_SEQ_LEN,
        seed=seed,
    )
    found = calibrate.calibrate(tables, GOALS, options.per_head)
    calibrate.store(loaded, {preset: c.thresholds for preset, c in found.items()})
    for preset, c in found.items():
        typer.echo(f"{preset}: recall {c.recall.mean():.1%} ({GOALS[preset].metric}), density {c.density.mean():.1%}")
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copy(folder / name, out / name)
    typer.echo(f"checkpoint: {out}")


if __name__ == "__main__":
    typer.run(main)
