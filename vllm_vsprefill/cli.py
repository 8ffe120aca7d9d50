# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The ``vsprefill`` command."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_vsprefill.distil.errors import INSTALL, DistilError, first_line
from vllm_vsprefill.distil.options import StudentOptions, TrainOptions, train_options

if TYPE_CHECKING:
    from vllm_vsprefill.distil.data import Source

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train and calibrate indexers for VSPREFILL, look at and switch a running server.",
)

_TRAIN = TrainOptions()
_STUDENT = StudentOptions()


def _inputs(value: str) -> str:
    return value.replace("+", "").replace(",", "").lower()


def _numbers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(" ", "").split(",")]
    except ValueError:
        raise DistilError(f"{flag}: expected whole numbers with commas between them, found {text!r}") from None


def _device(name: str | None) -> Any:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DistilError(f"--device {name}: {first_line(error)}") from None
    if device.type not in ("cpu", "cuda"):
        raise DistilError(f"--device {name}: expected cpu, cuda or one GPU, cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DistilError(f"--device {name}: there is no CUDA device that PyTorch can use")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DistilError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device


def _fail(error: DistilError) -> typer.Exit:
    typer.echo(f"vsprefill: {error}", err=True)
    return typer.Exit(1)


def _accelerator(device: str | None) -> Any:
    try:
        from accelerate import Accelerator
    except ImportError:
        raise DistilError(f"training needs accelerate: {INSTALL}") from None
    place = _device(device)
    accelerator = Accelerator(cpu=place.type == "cpu")
    if place.type == "cuda" and place.index is not None:
        import torch

        if accelerator.num_processes > 1:
            raise DistilError(f"--device {device}: each of several processes takes a GPU of its own; say cuda")
        # A single process's accelerator takes whatever device is the current one.
        torch.cuda.set_device(place)
    return accelerator


def _sources(
    options: TrainOptions,
    *,
    data: str,
    text_field: str,
    split: str,
    subset: str | None,
    packing: bool,
    validation_share: float,
    tokenizer: str,
    vocabulary: int,
    processes: int,
    log: Any,
) -> tuple[Source, Source, int]:
    """Training and held-out stream, and the longest sequence they can give."""
    from vllm_vsprefill.distil.data import DataOptions, PackedTokens, open_sources
    from vllm_vsprefill.distil.model import load_tokenizer
    from vllm_vsprefill.distil.synthetic import Synthetic

    if data == "synthetic":
        made = load_tokenizer(tokenizer)
        pair = [Synthetic(made, vocabulary, options.seed, held) for held in (False, True)]
        return pair[0], pair[1], options.max_length
    held = options.validation_sequences * options.max_length
    budget = options.steps * options.accumulation * processes * options.max_length
    from tqdm import tqdm

    with tqdm(unit="token", unit_scale=True, desc="reading", disable=None) as bar:
        train, out = open_sources(
            DataOptions(data, text_field, split, subset, packing, validation_share, options.seed),
            lambda: load_tokenizer(tokenizer),
            min_length=options.min_length,
            max_length=options.max_length,
            vocabulary=vocabulary,
            most=int((budget + held) / (1 - validation_share)),
            progress=lambda total: bar.update(total - bar.n) and None,
        )
    log(train.description)
    most = options.max_length
    if isinstance(train, PackedTokens) and isinstance(out, PackedTokens):
        most = min(most, len(train.tokens), len(out.tokens))
        if most < options.max_length:
            log(f"the text suffices for {most:,} tokens a sequence: they are cut to that")
    return train, out, most


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Model to train an indexer for: Hugging Face id or folder.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text file, .jsonl file, folder of such files, id of a Hugging Face dataset, or 'synthetic' for "
            "generated long documents."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the run's state, logs and report.")],
    max_length: Annotated[int, typer.Option(help="Longest sequence, in tokens.")] = _TRAIN.max_length,
    min_length: Annotated[
        int, typer.Option(help="Shortest sequence; lengths are the longest and its halves.")
    ] = _TRAIN.min_length,
    chunk_lengths: Annotated[
        str, typer.Option(help="Prefill chunks that targets are made for, in tokens; 0 is the whole sequence.")
    ] = ",".join(map(str, _TRAIN.chunk_lengths)),
    chunks_per_sequence: Annotated[
        int, typer.Option(help="Chunks of each sequence that are learnt from.")
    ] = _TRAIN.chunks_per_sequence,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _TRAIN.steps,
    accumulation: Annotated[int, typer.Option(help="Sequences per step and process.")] = _TRAIN.accumulation,
    learning_rate: Annotated[float, typer.Option(help="Peak of the cosine schedule.")] = _TRAIN.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.")] = _TRAIN.weight_decay,
    hidden_size: Annotated[int, typer.Option(help="Width of the indexer.")] = _STUDENT.hidden_size,
    inputs: Annotated[
        str, typer.Option(help="What the indexer reads: k+v, or k, v, q, k+q, k+v+q to compare (not servable).")
    ] = "k+v",
    loss: Annotated[str, typer.Option(help="kl, mse or cosine.")] = _STUDENT.loss,
    target: Annotated[
        str, typer.Option(help="Worth of a column: mass (its total), peak (its largest probability) or mixed.")
    ] = _STUDENT.target,
    peak_power: Annotated[
        float, typer.Option(help="Power that peaks are raised to, with --target peak or mixed.")
    ] = _STUDENT.peak_power,
    exclude_window: Annotated[
        int, typer.Option(help="Diagonals below this do not count in the targets.")
    ] = _STUDENT.exclude_window,
    seed: Annotated[int, typer.Option(help="Of weights, order of documents, lengths and chunks.")] = _TRAIN.seed,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = _TRAIN.validate_every,
    validation_sequences: Annotated[int, typer.Option(help="Sequences of a validation.")] = _TRAIN.validation_sequences,
    validation_share: Annotated[float, typer.Option(help="Share of the text that is held out.")] = 0.02,
    density: Annotated[float, typer.Option(help="Density at which validation reports recall.")] = _TRAIN.density,
    patience: Annotated[
        int, typer.Option(help="Stop after this many validations without a better one; 0: never.")
    ] = _TRAIN.patience,
    save_every: Annotated[int, typer.Option(help="Steps between states that --resume can go on from.")] = (
        _TRAIN.save_every
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, exactly.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print parameters, memory and time, and stop.")] = False,
    text_field: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration of a dataset.")] = None,
    packing: Annotated[bool, typer.Option(help="Cut sequences from documents laid end to end.")] = True,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if not the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, bfloat16, float16 or float32.")] = "auto",
    compute_dtype: Annotated[str | None, typer.Option(help="Of the indexer's products; bfloat16 on CUDA.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default what there is.")] = None,
    calibrate: Annotated[bool, typer.Option(help="Calibrate the presets' thresholds at the end.")] = True,
) -> None:
    """Train an indexer: the model stays frozen, the indexer learns from its attention.

    On several GPUs: accelerate launch --num_processes N -m vllm_vsprefill.cli train ...
    """
    from vllm_vsprefill.distil.trainer import Interrupted

    try:
        place = _device(device)
        if dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise DistilError(f"--dtype: expected auto, bfloat16, float16 or float32, found {dtype!r}")
        if not 0 < validation_share < 1:
            raise DistilError(f"--validation-share: expected a number between 0 and 1, found {validation_share}")
        settings: dict[str, Any] = {
            "max_length": max_length,
            "min_length": min(min_length, max_length),
            "chunk_lengths": _numbers(chunk_lengths, "--chunk-lengths"),
            "chunks_per_sequence": chunks_per_sequence,
            "steps": steps,
            "accumulation": accumulation,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "seed": seed,
            "compute_dtype": compute_dtype or ("bfloat16" if place.type == "cuda" else "float32"),
            "validate_every": validate_every,
            "validation_sequences": validation_sequences,
            "density": density,
            "patience": patience,
            "save_every": save_every,
            "device": device,
            "calibrate": calibrate,
        }
        student = {
            "inputs": _inputs(inputs),
            "hidden_size": hidden_size,
            "loss": loss,
            "target": target,
            "peak_power": peak_power,
            "exclude_window": exclude_window,
        }
        options = train_options(student, **settings)
        data_settings = {
            "data": data,
            "text_field": text_field,
            "split": split,
            "subset": subset,
            "packing": packing,
            "validation_share": validation_share,
            "tokenizer": tokenizer or model,
        }
        _train(model, out, options, settings, student, data_settings, resume, dry_run, dtype)
    except DistilError as error:
        raise _fail(error) from None
    except Interrupted as stop:
        typer.echo(f"vsprefill: {stop}", err=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        typer.echo("vsprefill: stopped at once; the last saved state and checkpoint are intact", err=True)
        raise typer.Exit(130) from None


def _train(
    model: str,
    out: Path,
    options: TrainOptions,
    settings: dict[str, Any],
    student: dict[str, Any],
    data_settings: dict[str, Any],
    resume: bool,
    dry_run: bool,
    dtype: str,
) -> None:
    import torch

    from vllm_vsprefill.distil import estimate
    from vllm_vsprefill.distil.model import check, load, positions, read_config
    from vllm_vsprefill.distil.trainer import Trainer

    config = read_config(model)
    _, layers = check(config)
    longest = positions(config)
    if longest is not None and options.max_length > longest:
        raise DistilError(f"--max-length {options.max_length}: the model has {longest} positions")
    if dry_run:
        where = _device(options.device)
        own = dtype if dtype != "auto" else str(getattr(config, "dtype", None) or "bfloat16").removeprefix("torch.")
        found = estimate.estimate(config, options, 4 if own == "float32" else 2)
        rate = estimate.matmul_rate(where, torch.bfloat16 if where.type == "cuda" else torch.float32)
        typer.echo(layers.describe())
        typer.echo(estimate.describe(found, options, where, rate, 1))
        return
    _check_out(out, model, resume)
    accelerator = _accelerator(options.device)

    def log(line: str) -> None:
        if accelerator.is_main_process:
            typer.echo(line)

    log(layers.describe())
    text = config.get_text_config(decoder=True)
    train_source, held_out, most = _sources(
        options, **data_settings, vocabulary=text.vocab_size, processes=accelerator.num_processes, log=log
    )
    if most < options.max_length:
        settings = {**settings, "max_length": most, "min_length": min(options.min_length, most)}
        options = train_options(student, **settings)
    teacher = load(model, accelerator.device, dtype)
    Trainer(
        options, teacher, train_source, held_out, out, accelerator, resume=resume, log=lambda line: typer.echo(line)
    ).run()


def _check_out(out: Path, model: str, resume: bool) -> None:
    """DistilError if the folder cannot be written to or holds something else: found out before anything heavy."""
    import tempfile

    from vllm_vsprefill.distil import state

    if out.exists() and not out.is_dir():
        raise DistilError(f"--out {out}: expected a folder, found a file")
    folder = Path(model).expanduser()
    if folder.is_dir() and out.exists() and out.samefile(folder):
        raise DistilError(f"--out {out}: that is the model's own folder, whose config.json would be lost")
    if not resume:
        state.check_unused(out)
        held = [name for name in ("config.json", "indexer.safetensors") if (out / name).exists()]
        if held:
            raise DistilError(f"--out {out}: it already holds {' and '.join(held)}; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DistilError(f"--out {out}: cannot be written to ({error.strerror})") from None


@app.command()
def calibrate(
    model: Annotated[str, typer.Option(help="The model that the indexer is for: Hugging Face id or folder.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of the indexer; its thresholds are replaced.")],
    data: Annotated[str, typer.Option(help="Held-out text: file, folder, dataset id, or 'synthetic'.")],
    recall: Annotated[float | None, typer.Option(help="Share of the true attention that every layer reaches.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the causal entries that are kept.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Preset to set; all with their default recalls if neither a recall nor a density is given."),
    ] = None,
    per_head: Annotated[bool, typer.Option("--per-head", help="Thresholds for each KV head.")] = False,
    metric: Annotated[
        str, typer.Option(help="What recall counts: mass, or strong (entries weigh as much as their probability).")
    ] = "mass",
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 32768,
    sequences: Annotated[int, typer.Option(help="Sequences.")] = 8,
    chunk_lengths: Annotated[str, typer.Option(help="Prefill chunks, in tokens, in turns; 0: whole.")] = "2048,8192",
    rows: Annotated[int, typer.Option(help="Rows sampled of each chunk.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the sampled rows.")] = 0,
    text_field: Annotated[str, typer.Option(help="Column or key that holds the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a dataset.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Configuration of a dataset.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer, if not the model's.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default what there is.")] = None,
    platform: Annotated[
        str | None, typer.Option(help="Where it will be served, cuda or cpu: tile sizes differ; by default --device.")
    ] = None,
) -> None:
    """Set the presets' thresholds of an indexer for a recall or a density on held-out text."""
    try:
        _calibrate(
            model, checkpoint, data, recall, density, preset, per_head, metric, length, sequences,
            _numbers(chunk_lengths, "--chunk-lengths"), rows, seed,
            {
                "text_field": text_field, "split": split, "subset": subset, "packing": True, "validation_share": 0.0,
                "tokenizer": tokenizer or model,
            },
            dtype, device, platform,
        )  # fmt: skip
    except DistilError as error:
        raise _fail(error) from None
    except KeyboardInterrupt:
        typer.echo("vsprefill: stopped; the checkpoint is as it was", err=True)
        raise typer.Exit(130) from None


def _calibrate(
    model: str,
    checkpoint: Path,
    data: str,
    recall: float | None,
    density: float | None,
    preset: str | None,
    per_head: bool,
    metric: str,
    length: int,
    count: int,
    chunks: list[int],
    rows: int,
    seed: int,
    data_settings: dict[str, Any],
    dtype: str,
    device: str | None,
    platform: str | None,
) -> None:
    import torch

    from vllm_vsprefill.checkpoint import CheckpointError, load_checkpoint
    from vllm_vsprefill.config import PRESETS
    from vllm_vsprefill.distil import calibrate as calibration
    from vllm_vsprefill.distil.model import check, load, positions, read_config

    problems = []
    if recall is not None and density is not None:
        problems.append("give either --recall or --density, not both")
    for flag, value in (("--recall", recall), ("--density", density)):
        if value is not None and not 0 < value <= 1:
            problems.append(f"{flag}: expected a number above 0 and at most 1, found {value}")
    if preset is not None and preset not in PRESETS:
        problems.append(f"--preset: expected one of {', '.join(PRESETS)}, found {preset!r}")
    if metric not in ("mass", "strong"):
        problems.append(f"--metric: expected mass or strong, found {metric!r}")
    if platform not in (None, "cpu", "cuda"):
        problems.append(f"--platform: expected cuda or cpu, found {platform!r}")
    for flag, number in (("--length", length), ("--sequences", count), ("--rows", rows)):
        if number < 1:
            problems.append(f"{flag}: expected at least 1, found {number}")
    if min(chunks) < 0:
        problems.append(f"--chunk-lengths: expected 0 or more, found {min(chunks)}")
    if (recall is not None or density is not None) and preset is None:
        problems.append("with --recall or --density say which preset it is for: --preset accurate, balanced or fast")
    if problems:
        raise DistilError("options that cannot be used:\n" + "\n".join(f"  - {p}" for p in problems))
    which = [preset] if preset is not None else list(calibration.DEFAULT_GOALS)
    goals = {
        name: calibration.Goal(recall, density, metric)  # type: ignore[arg-type]
        if recall is not None or density is not None
        else calibration.Goal(calibration.DEFAULT_GOALS[name].recall, None, metric)  # type: ignore[arg-type]
        for name in which
    }
    config = read_config(model)
    fingerprint, _ = check(config)
    try:
        loaded = load_checkpoint(checkpoint, expected=fingerprint)
    except CheckpointError as error:
        raise DistilError(str(error)) from None
    place = _device(device)
    tuning = calibration.platform_tuning(torch.device(platform) if platform is not None else place)
    longest = positions(config)
    if longest is not None and length > longest:
        raise DistilError(f"--length {length}: the model has {longest} positions")
    # Text that is too short for a sparse prompt says nothing about one, unless it is asked for by --length.
    length = max(length, 16)
    least = min(length, calibration.MIN_SEQ_LEN)
    settings = train_options({}, max_length=length, min_length=least, steps=1, validation_sequences=count, seed=seed)
    # The held-out stream: the documents of a generated one are not those of training, text is all held out.
    _, source, most = _sources(
        settings, data=data, **data_settings, vocabulary=config.get_text_config(decoder=True).vocab_size,
        processes=count, log=typer.echo,
    )  # fmt: skip
    position, sequences = 0, []
    for _ in range(count):
        sequences.append(source.sequence(position, most))
        position = source.after(position, most)
    if most < calibration.MIN_SEQ_LEN:
        typer.echo(
            f"note: contexts below {calibration.MIN_SEQ_LEN:,} tokens run dense; thresholds found on shorter ones "
            "may not suit longer ones"
        )
    teacher = load(model, place, dtype)
    from tqdm import tqdm

    with tqdm(total=count, unit="sequence", disable=None) as bar:
        tables = calibration.measure(
            teacher,
            {i: [w.to(place) for w in loaded.layers[i]] for i in loaded.config.layers},
            sequences,
            {name: calibration.preset_budgets(name, tuning) for name in which},
            chunks=chunks,
            min_seq_len=calibration.MIN_SEQ_LEN,
            rows=rows,
            seed=seed,
            progress=bar.update,
        )
    found = calibration.calibrate(tables, goals, per_head)
    calibration.store(loaded, {name: c.thresholds for name, c in found.items()})
    for name, c in found.items():
        goal = goals[name]
        wanted = f"recall {goal.recall:g}" if goal.recall is not None else f"density {goal.density:g}"
        typer.echo(f"{name} (wanted: {wanted}): recall {c.recall.mean():.1%}, density {c.density.mean():.1%}")
        if note := calibration.shortfall(c, goal, name):
            typer.echo(f"  note: {note}")
        for i, layer in enumerate(loaded.config.layers):
            assert c.thresholds.tau_columns is not None
            assert c.thresholds.tau_diagonals is not None
            typer.echo(
                f"  layer {layer}: columns {_shown(c.thresholds.tau_columns[i])}, "
                f"diagonals {_shown(c.thresholds.tau_diagonals[i])}, "
                f"recall {c.recall[i].mean():.1%}, density {c.density[i].mean():.1%}"
            )
    typer.echo(f"stored in {checkpoint}")


def _shown(entry: float | tuple[float, ...]) -> str:
    return " ".join(f"{x:g}" for x in entry) if isinstance(entry, tuple) else f"{entry:g}"


def _mount() -> None:
    """Commands for a running server, where their module is installed."""
    try:
        control = importlib.import_module("vllm_vsprefill.control")
    except ImportError:
        return
    for name in ("status", "mode"):
        command = getattr(control, name, None)
        if callable(command):
            app.command(name)(command)


_mount()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
