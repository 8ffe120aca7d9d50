# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What ``vsprefill train`` and ``vsprefill calibrate`` do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_vsprefill.checkpoint import CheckpointError, load_checkpoint
from vllm_vsprefill.distil import calibrate as calibration
from vllm_vsprefill.distil import estimate, prepare
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import check, load, positions, read_config, text_config
from vllm_vsprefill.distil.options import CalibrateCommand, ThresholdOptions, TrainCommand
from vllm_vsprefill.distil.rehearsal import rehearse
from vllm_vsprefill.distil.trainer import Trainer

SEQUENCES = 8
"""That thresholds are calibrated on by default."""


def fits(config: Any, option: str, length: int) -> None:
    """DistilError if a model has fewer positions than an option says."""
    longest = positions(config)
    if longest is not None and length > longest:
        raise DistilError(f"{option} {length}: the model has {longest} positions")


def train(options: TrainCommand, say: Callable[[str], None]) -> None:
    """Train an indexer, or estimate what that takes.

    Args:
        options: of the command.
        say: takes a line for the user.

    Raises:
        DistilError: the run cannot start or go on.
        Interrupted: stopped by a signal, after its state was saved.
    """
    place = prepare.device(options.model.device)
    run = options.run
    config = read_config(options.model)
    fingerprint, layers = check(config)
    rehearse(config, fingerprint, layers, options.model.trust_remote_code)
    fits(config, "--max-length", run.max_length)
    if options.dry_run:
        own = options.model.dtype
        if own == "auto":
            own = str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")  # type: ignore[assignment]
        found = estimate.estimate(config, run, 4 if own == "float32" else 2, options.model.trust_remote_code)
        rate = estimate.matmul_rate(place, torch.bfloat16 if place.type == "cuda" else torch.float32)
        say(layers.describe())
        say(estimate.describe(found, run, place, rate, 1))
        return
    prepare.check_out(options.out, options.model.model, options.resume)
    accelerator = prepare.accelerator(place)

    def log(line: str) -> None:
        if accelerator.is_main_process:
            say(line)

    log(layers.describe())
    share = options.packing.validation_share
    wanted = run.steps * run.accumulation * accelerator.num_processes + run.validation_sequences
    source, held_out, longest = prepare.sources(
        options.data,
        options.model,
        text_config(config).vocab_size,
        tokens=int(wanted * run.max_length / (1 - share)),
        min_length=run.min_length,
        max_length=run.max_length,
        packing=options.packing.packing,
        validation_share=share,
        seed=run.seed,
        log=log,
    )
    teacher = load(options.model, accelerator.device)
    trainer = Trainer(
        run.shortened(longest), teacher, source, held_out, options.out, accelerator, resume=options.resume, log=say
    )
    try:
        trainer.run()
    finally:
        # A process that ends while its group lives may be aborted by the group's threads, and its launcher then calls
        # the whole run failed.
        accelerator.end_training()


def _goals(options: ThresholdOptions, density: float | None) -> dict[str, calibration.Goal]:
    """What is wanted of each preset."""
    if options.preset is not None and (options.recall is not None or density is not None):
        return {options.preset: calibration.Goal(options.recall, density, options.metric)}
    which = [options.preset] if options.preset is not None else calibration.DEFAULT_GOALS
    return {name: calibration.Goal(calibration.DEFAULT_GOALS[name].recall, None, options.metric) for name in which}


def calibrate(options: CalibrateCommand, say: Callable[[str], None]) -> None:
    """Set the thresholds of a checkpoint.

    Args:
        options: of the command, with a checkpoint.
        say: takes a line for the user.

    Raises:
        DistilError: nothing could be measured; the checkpoint is as it was.
    """
    goal, wanted = options.goal, options.thresholds
    assert options.checkpoint is not None
    count = goal.sequences or SEQUENCES
    goals = _goals(wanted, goal.density)
    config = read_config(options.model)
    fingerprint, layers = check(config)
    try:
        loaded = load_checkpoint(options.checkpoint, expected=fingerprint)
    except CheckpointError as error:
        raise DistilError(str(error)) from None
    place = prepare.device(options.model.device)
    rehearse(config, fingerprint, layers, options.model.trust_remote_code)
    tuning = calibration.platform_tuning(torch.device(goal.platform) if goal.platform is not None else place)
    fits(config, "--length", goal.length)
    # Text that is too short for a sparse prompt says nothing about one, unless it is asked for by --length.
    length = max(goal.length, 16)
    # The held-out stream: the documents of a generated one are not those of training, text is all held out.
    _, source, longest = prepare.sources(
        options.data,
        options.model,
        text_config(config).vocab_size,
        tokens=2 * count * length,  # documents are shuffled: a choice of them, not just the first
        min_length=min(length, calibration.MIN_SEQ_LEN),
        max_length=length,
        seed=goal.seed,
        log=say,
    )
    position, sequences = 0, []
    for _ in range(count):
        sequences.append(source.sequence(position, longest))
        position = source.after(position, longest)
    if longest < calibration.MIN_SEQ_LEN:
        say(
            f"note: contexts below {calibration.MIN_SEQ_LEN:,} tokens run dense; thresholds found on shorter ones "
            "may not suit longer ones"
        )
    teacher = load(options.model, place)
    from tqdm import tqdm

    with tqdm(total=count, unit="sequence", disable=None) as bar:
        tables = calibration.measure(
            teacher,
            {i: [w.to(place) for w in loaded.layers[i]] for i in loaded.config.layers},
            sequences,
            {name: calibration.preset_budgets(name, tuning) for name in goals},
            chunks=goal.chunk_lengths,
            min_seq_len=calibration.MIN_SEQ_LEN,
            rows=wanted.rows,
            seed=goal.seed,
            progress=bar.update,
        )
    found = calibration.calibrate(tables, goals, wanted.per_head)
    calibration.store(loaded, {name: c.thresholds for name, c in found.items()})
    for name, c in found.items():
        for line in _described(name, goals[name], c, loaded.config.layers):
            say(line)
    say(f"stored in {options.checkpoint}")


def _described(
    preset: str, goal: calibration.Goal, found: calibration.Calibration, layers: tuple[int, ...]
) -> list[str]:
    wanted = f"recall {goal.recall:g}" if goal.recall is not None else f"density {goal.density:g}"
    lines = [f"{preset} (wanted: {wanted}): recall {found.recall.mean():.1%}, density {found.density.mean():.1%}"]
    if note := calibration.shortfall(found, goal, preset):
        lines.append(f"  note: {note}")
    columns, diagonals = found.thresholds.tau_columns, found.thresholds.tau_diagonals
    assert columns is not None
    assert diagonals is not None
    return lines + [
        f"  layer {layer}: columns {_shown(columns[i])}, diagonals {_shown(diagonals[i])}, "
        f"recall {found.recall[i].mean():.1%}, density {found.density[i].mean():.1%}"
        for i, layer in enumerate(layers)
    ]


def _shown(entry: float | tuple[float, ...]) -> str:
    return " ".join(f"{x:g}" for x in entry) if isinstance(entry, tuple) else f"{entry:g}"
