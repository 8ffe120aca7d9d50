# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""One training run from its first step to its report, on one process or several."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from vllm_vsprefill.checkpoint import CheckpointConfig, Thresholds, save_checkpoint
from vllm_vsprefill.command_line import option_problems
from vllm_vsprefill.distil import state
from vllm_vsprefill.distil.calibrate import (
    DEFAULT_GOALS,
    MIN_SEQ_LEN,
    Calibration,
    calibrate,
    measure,
    platform_tuning,
    preset_budgets,
    shortfall,
)
from vllm_vsprefill.distil.coverage import Budgets
from vllm_vsprefill.distil.data import Ids, Source
from vllm_vsprefill.distil.distiller import Distiller
from vllm_vsprefill.distil.errors import INSTALL, DistilError
from vllm_vsprefill.distil.model import Teacher
from vllm_vsprefill.distil.options import TrainOptions
from vllm_vsprefill.distil.student import Student
from vllm_vsprefill.distil.targets import draw_ranges
from vllm_vsprefill.distil.validate import DENSITIES, Validation, validate
from vllm_vsprefill.kernels.types import SparsePattern

LOG = "training.jsonl"
REPORT = "report.json"
# What validation keeps besides the choice: the same in every run, so that runs can be compared.
VALIDATION_BUDGETS = Budgets(SparsePattern(block_q=16, block_k=4, window=256))


def learning_rate(options: TrainOptions, step: int) -> float:
    """Rate of a step, counted from 0: linear warm-up, then a cosine down to a share of the peak."""
    warmup = max(1, round(options.warmup_share * options.steps))
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, options.steps - warmup)
    share = options.final_share + (1 - options.final_share) * 0.5 * (1 + math.cos(math.pi * done))
    return options.learning_rate * share


@dataclass
class Progress:
    """Where a run stands; stored with its state."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0  # validations since the best


class Interrupted(Exception):
    """The user stopped the run; its state was saved."""


def _step_of(line: str) -> float:
    """The step that a line of the log is about; infinity for one that was cut off when the disk was full."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class Trainer:
    """Trains one indexer.

    Args:
        options: settings of the run.
        teacher: the frozen model.
        train: training stream.
        held_out: validation stream.
        out: folder of the run and of the checkpoint.
        accelerator: accelerate's, which knows the processes.
        resume: go on from the state in ``out``.
        log: takes a line for the user; called on the main process only.

    Raises:
        DistilError: the state is not there, or is of another run.
    """

    def __init__(
        self,
        options: TrainOptions,
        teacher: Teacher,
        train: Source,
        held_out: Source,
        out: Path,
        accelerator: Any,
        *,
        resume: bool = False,
        log: Callable[[str], None] = print,
    ) -> None:
        options = options.on(teacher.device.type)
        self.options, self.teacher, self.train_source, self.held_out = options, teacher, train, held_out
        self.out, self.accelerator = out, accelerator
        self.main = bool(accelerator.is_main_process)
        self._log = log
        shape = teacher.fingerprint
        student = Student(
            "indexer", options.student, teacher.layers.covered, shape.num_kv_heads, shape.head_size, options.seed
        )
        self.student = student.to(teacher.device)
        self.optimiser = torch.optim.AdamW(
            self.student.parameters(),
            lr=options.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=options.weight_decay,
            fused=teacher.device.type == "cuda",
        )
        self.distiller = Distiller(teacher, [self.student], getattr(torch, str(options.compute_dtype)))
        self.progress = Progress()
        self._identity = {
            "data": train.identity(),
            "processes": accelerator.num_processes,
            "model_weights": teacher.digest(),
        }
        # A signal has come here; all processes know of one.
        self._asked, self._stop = False, False
        self._writer: Any = None
        if resume:
            self._restore()
        elif self.main:
            state.check_unused(out)

    # -- state ---------------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        tensors, found = state.load(self.out)
        try:
            stored = TrainOptions.model_validate(found["options"])
        except ValidationError as error:
            differing = "; ".join(option_problems(TrainOptions, error))
            raise DistilError(
                f"--resume: another version of this package wrote the state in {self.out} ({differing}); go on "
                "with that one, or start anew in another folder"
            ) from None
        problems = self.options.differences(stored)
        fingerprint = self.teacher.fingerprint.model_dump(mode="json")
        if found["fingerprint"] != fingerprint:
            problems.append(f"model: {found['model']!r} in the run so far, one of other shapes now")
        problems += [
            f"{name}: {found[name]!r} in the run so far, {value!r} now"
            for name, value in self._identity.items()
            if found.get(name, value) != value
        ]
        if problems:
            raise DistilError(
                "--resume: this would not be the same run:\n" + "\n".join(f"  - {problem}" for problem in problems)
            )
        state.restore(self.student, self.optimiser, tensors)
        self.progress = Progress(**found["progress"])

    def save_state(self) -> None:
        """Write the state after the last complete step.

        Raises:
            DistilError: it cannot be written; the state before it is intact.
        """
        if not self.main:
            return
        description = {
            "options": self.options.model_dump(mode="json"),
            "model": self.teacher.name,
            "fingerprint": self.teacher.fingerprint.model_dump(mode="json"),
            **self._identity,
            "progress": vars(self.progress),
        }
        state.save(self.out, self.progress.step, state.optimiser_tensors(self.student, self.optimiser), description)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self) -> tuple[Tensor, float]:
        """One optimiser step over all processes.

        Returns:
            KL divergences and losses, float32 ``[layers, 4]``, mean over the step's sequences, and the rate.

        Raises:
            DistilError: a loss or gradient is not finite; the weights are those before the step.
        """
        o, p, world = self.options, self.progress, self.accelerator.num_processes
        self.optimiser.zero_grad(set_to_none=True)
        found = torch.zeros(len(self.teacher.layers.covered), 4, device=self.teacher.device)
        position, tokens = p.position, 0
        for micro in range(o.accumulation):
            # Every process draws the same length, so that none waits for another's longer sequence.
            rng = np.random.default_rng([o.seed, 1, p.step, micro])
            length = int(rng.choice(o.lengths()))
            for rank in range(world):
                here, position = position, self.train_source.after(position, length)
                if rank != self.accelerator.process_index:
                    continue
                ids = self.train_source.sequence(here, length)
                own = np.random.default_rng([o.seed, 2, p.step, micro, rank])
                ranges = draw_ranges(own, len(ids), o.chunk_lengths, o.chunks_per_sequence)
                found += self.distiller.learn(torch.from_numpy(ids), ranges, 1 / o.accumulation)[0]
                tokens += len(ids)
        found /= o.accumulation
        self._mean_gradients()
        figures = self._reduced(torch.cat((found.flatten(), found.new_tensor([float(tokens), float(self._asked)]))))
        figures, (tokens_mean, stop) = figures[:-2].view_as(found), figures[-2:].tolist()
        norm = torch.nn.utils.get_total_norm([w.grad for w in self.student.parameters() if w.grad is not None])
        if not (bool(torch.isfinite(figures).all()) and math.isfinite(float(norm))):
            bad = [
                self.teacher.layers.covered[i] for i in (~torch.isfinite(figures)).any(1).nonzero().flatten().tolist()
            ]
            raise DistilError(
                f"the loss is not a number at step {p.step + 1} (layers {bad or 'none: only a gradient'}); what was "
                "saved before is intact. Lower --learning-rate, or look for NaN in the model's own activations "
                "(float16 models overflow: --dtype bfloat16)"
            )
        rate = learning_rate(o, p.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        p.step, p.position, p.tokens = p.step + 1, position, p.tokens + round(tokens_mean * world)
        self._stop = stop > 0
        return figures, rate

    def _mean_gradients(self) -> None:
        if self.accelerator.num_processes == 1:
            return
        gradients = [w.grad for w in self.student.parameters() if w.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        mean = self.accelerator.reduce(flat, reduction="mean")
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _reduced(self, values: Tensor, how: str = "mean") -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        out: Tensor = self.accelerator.reduce(values, reduction=how)
        return out

    # -- validation ----------------------------------------------------------------------------------------------------

    def held_out_sequences(self) -> list[Ids]:
        """The validation sequences, longest length, the same at every call."""
        position, out = 0, []
        for _ in range(self.options.validation_sequences):
            out.append(self.held_out.sequence(position, self.options.max_length))
            position = self.held_out.after(position, self.options.max_length)
        return out

    def validate(self) -> Validation:
        """Figures on the held-out sequences, over all processes."""
        o, acc = self.options, self.accelerator
        (own,), count = validate(
            self.distiller,
            self.held_out_sequences(),
            VALIDATION_BUDGETS,
            chunks=o.chunk_lengths,
            chunks_per_sequence=o.chunks_per_sequence,
            seed=o.seed,
            share=(acc.process_index, acc.num_processes),
        )
        total = float(self._reduced(torch.tensor([count], device=self.teacher.device), "sum"))
        kl, loss = (self._reduced(x, "sum") / total for x in (own.kl, own.loss))
        return Validation(kl.cpu(), loss.cpu(), self._reduced(own.table, "sum").cpu())

    def _validated(self, found: Validation) -> None:
        """Log a validation; keep the weights as the checkpoint if they are the best so far."""
        p = self.progress
        if not math.isfinite(found.total):
            bad = [
                layer
                for layer, loss in zip(self.teacher.layers.covered, found.loss.sum(1).tolist(), strict=True)
                if not math.isfinite(loss)
            ]
            raise DistilError(
                f"the validation loss is not a number at step {p.step} (layers {bad}); what was saved before is "
                "intact. Look for NaN in the model's own activations on long sequences (float16 models overflow: "
                "--dtype bfloat16)"
            )
        recall = found.recall(self.options.density)
        better = p.best_loss is None or found.total < p.best_loss
        if better:
            p.best_loss, p.best_step, p.worse = found.total, p.step, 0
            self.publish(found, {})
        else:
            p.worse += 1
        self._record({"step": p.step, "validation": found.to_json(self.options.density)})
        self._scalars("validation", {"loss": found.total, "recall": float(recall.mean())})
        for i, layer in enumerate(self.teacher.layers.covered):
            self._scalars(f"recall_layer_{layer}", {f"head_{h}": float(r) for h, r in enumerate(recall[i])})
        worst = int(recall.mean(1).argmin())
        self.log(
            f"step {p.step}/{self.options.steps}: validation loss {found.total:.4f}{' (best)' if better else ''}, "
            f"recall {recall.mean():.1%} at density {found.reached(self.options.density):.0%} (lowest: layer "
            f"{self.teacher.layers.covered[worst]}, {recall[worst].mean():.1%})"
        )

    def publish(self, found: Validation | None, thresholds: dict[str, Thresholds]) -> None:
        """Write the weights as a checkpoint that the server reads.

        Raises:
            DistilError: it cannot be written; what was there before is intact.
        """
        if not self.main:
            return
        o, p = self.options, self.progress
        training: dict[str, str | bool | int | float] = {
            "data": self.train_source.description,
            "loss": o.student.loss,
            "target": o.student.target,
            "peak_power": o.student.peak_power,
            "exclude_window": o.student.exclude_window,
            "steps": p.step,
            "tokens": p.tokens,
            "learning_rate": o.learning_rate,
            "max_length": o.max_length,
            "seed": o.seed,
        }
        if found is not None:
            recall = found.recall(o.density)
            training |= {
                "validation_kl_columns": round(float(found.kl[:, 0].mean()), 5),
                "validation_kl_diagonals": round(float(found.kl[:, 1].mean()), 5),
                "validation_recall": round(float(recall.mean()), 5),
                "validation_density": round(found.reached(o.density), 5),
            }
        config = CheckpointConfig(
            model=self.teacher.name,
            fingerprint=self.teacher.fingerprint,
            identity=self.teacher.identity,
            hidden_size=o.student.hidden_size,
            dtype="bfloat16",
            layers=self.teacher.layers.covered,
            inputs=o.student.inputs,
            training=training,
            thresholds=thresholds,
        )
        with state.writing(f"the checkpoint {self.out}", "An earlier checkpoint and the run's last state are intact."):
            save_checkpoint(self.out, self.student.tensors(), config)

    # -- logs ----------------------------------------------------------------------------------------------------------

    def log(self, line: str) -> None:
        """Tell the user, once for all processes."""
        if self.main:
            from tqdm import tqdm

            # A bar in progress makes way for the line.
            with tqdm.external_write_mode():
                self._log(line)

    def _record(self, entry: dict[str, Any]) -> None:
        if self.main:
            with state.writing("the log", "The run's last state is intact."), (self.out / LOG).open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _scalars(self, group: str, values: dict[str, float]) -> None:
        if self._writer is not None:
            with state.writing("the TensorBoard log", "The run's last state is intact."):
                for name, value in values.items():
                    self._writer.add_scalar(f"{group}/{name}", value, self.progress.step)

    def _open_logs(self) -> None:
        if not self.main:
            return
        log = self.out / LOG
        if log.exists():
            # Steps that came after the state this run goes on from happen again.
            lines = [line for line in log.read_text().splitlines() if _step_of(line) <= self.progress.step]
            with state.writing("the log", "The run's last state is intact."):
                partial = log.with_name(f".writing.{LOG}")
                partial.write_text("".join(f"{line}\n" for line in lines))
                partial.rename(log)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.log(f"no TensorBoard logs: {INSTALL} brings the library")
            return
        with state.writing("the TensorBoard log", "The run's last state is intact."):
            self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.progress.step + 1)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to the end, calibrate, report.

        Returns:
            The checkpoint's folder.

        Raises:
            DistilError: something that the user can mend; the last good checkpoint and state are intact.
            Interrupted: stopped by a signal, after its state was saved.
        """
        o, p = self.options, self.progress
        if self.main:
            with state.writing(f"--out {self.out}", "Nothing was trained."):
                self.out.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self._open_logs()
        done_before, begin = p.step, time.perf_counter()
        earlier = p.seconds
        stopped_early = o.patience > 0 and p.worse >= o.patience
        with self._signals(), self._bar() as bar:
            while p.step < o.steps and not stopped_early:
                figures, rate = self.step()
                p.seconds = earlier + time.perf_counter() - begin
                means = figures.mean(0).tolist()
                entry = {
                    "step": p.step,
                    "kl_columns": means[0],
                    "kl_diagonals": means[1],
                    "loss": means[2] + means[3],
                    "learning_rate": rate,
                }
                self._record(entry)
                self._scalars("train", {k: v for k, v in entry.items() if k != "step"})
                bar(p.step, means[2] + means[3], p.tokens / max(p.seconds, 1e-9))
                last = p.step == o.steps
                if p.step % o.validate_every == 0 or last:
                    self._validated(self.validate())
                    stopped_early = o.patience > 0 and p.worse >= o.patience
                stopping = self._stopping  # a signal may come at any line
                if p.step % o.save_every == 0 or last or stopped_early or stopping:
                    self.save_state()
                if stopping and not last:
                    raise Interrupted(f"stopped after step {p.step} of {o.steps}; go on with --resume")
        if stopped_early:
            self.log(f"stopped early: no better validation in {p.worse} since step {p.best_step}")
        if p.step > done_before:
            self.log(f"{p.tokens:,} tokens in {p.seconds:.0f} s; best validation at step {p.best_step}")
        if p.step == done_before and (self.out / REPORT).is_file():
            # Its thresholds may have been calibrated since.
            self.log(f"the run was complete: {self.out} is as it was (vsprefill calibrate sets other thresholds)")
        else:
            self._finish()
        if self._writer is not None:
            with state.writing("the TensorBoard log", "The checkpoint is complete."):
                self._writer.close()
        self.accelerator.wait_for_everyone()
        return self.out

    def _finish(self) -> None:
        """Take up the best weights, calibrate the presets with them and write the report."""
        from safetensors.torch import load_file

        from vllm_vsprefill.distil.report import write_report

        self.accelerator.wait_for_everyone()
        best = {name: t.float() for name, t in load_file(self.out / "indexer.safetensors").items()}
        self.student.load(best)
        found = self.validate()
        calibrations: dict[str, Calibration] = {}
        wanted = self.options.calibrate and self.options.student.inputs == "kv"
        if wanted and self.options.max_length < MIN_SEQ_LEN:
            # There the local window covers nearly everything: thresholds would keep nothing of a long prompt.
            self.log(
                f"not calibrated: sequences of {self.options.max_length:,} tokens are shorter than the "
                f"{MIN_SEQ_LEN:,} from which prompts run sparse; run vsprefill calibrate with longer text"
            )
        elif wanted and self.main:
            self.log("calibrating the presets' thresholds")
            calibrations = calibrate(
                measure(
                    self.teacher,
                    {i: self.student.layer(i) for i in self.student.layer_indices},
                    self.held_out_sequences(),
                    {preset: preset_budgets(preset, platform_tuning(self.teacher.device)) for preset in DEFAULT_GOALS},
                    chunks=self.options.chunk_lengths,
                    chunks_per_sequence=self.options.chunks_per_sequence,
                    min_seq_len=MIN_SEQ_LEN,
                    seed=self.options.seed,
                    dtype=getattr(torch, str(self.options.compute_dtype)),
                ),
                DEFAULT_GOALS,
                per_head=False,
            )
            for preset, c in calibrations.items():
                if note := shortfall(c, DEFAULT_GOALS[preset], preset):
                    self.log(f"note on {preset}: {note}")
        if self.main:
            self.publish(found, {preset: c.thresholds for preset, c in calibrations.items()})
            curve = {f"{d:g}": found.recall(d).tolist() for d in DENSITIES}
            record = {
                "model": self.teacher.name,
                "options": self.options.model_dump(mode="json"),
                "layers": list(self.teacher.layers.covered),
                "left_out": {str(i): why for i, why in self.teacher.layers.skipped.items()},
                "data": self.train_source.description,
                "progress": vars(self.progress),
                "device": str(self.teacher.device),
                "torch": torch.__version__,
                "validation": found.to_json(self.options.density),
                "recall_at_density": curve,
                "thresholds": {
                    preset: {
                        **c.thresholds.model_dump(mode="json"),
                        "recall": c.recall.mean(1).tolist(),
                        "density": c.density.mean(1).tolist(),
                    }
                    for preset, c in calibrations.items()
                },
            }
            with state.writing("the report", "The checkpoint is complete."):
                (self.out / REPORT).write_text(json.dumps(record, indent=1) + "\n")
                page = write_report(self.out)
            self.log(f"checkpoint: {self.out}")
            self.log(f"report: {page}" if page else f"no report.html: {INSTALL} brings matplotlib")

    @property
    def _stopping(self) -> bool:
        """Processes stop after the same step: each learns of a signal that another got at the end of the next one."""
        return self._stop or (self._asked and self.accelerator.num_processes == 1)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step in progress; a second one ends it at once."""

        def stop(number: int, frame: Any) -> None:
            del frame
            if self._asked:
                raise KeyboardInterrupt
            self._asked = True
            self.log(f"\n{signal.Signals(number).name}: stopping after this step (again: at once, losing it)")

        before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                before[number] = signal.signal(number, stop)
            except ValueError:  # not in the main thread
                break
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int, float, float], None]]:
        from tqdm import tqdm

        # Where output is no terminal, the validation lines are the log.
        hidden = not self.main or not sys.stderr.isatty()
        with tqdm(
            total=self.options.steps, initial=self.progress.step, unit="step", disable=hidden, dynamic_ncols=True
        ) as bar:

            def update(step: int, loss: float, rate: float) -> None:
                bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
                bar.update(step - bar.n)

            yield update
