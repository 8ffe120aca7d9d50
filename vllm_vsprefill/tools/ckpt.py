# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``vsprefill ckpt list|show|verify``: indexer checkpoints, installed ones and others.

A checkpoint is a stranger's: nothing of it is run, no pickle is read, and its texts are printed without what a terminal
would obey. torch is imported only by what reads tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_vsprefill.checkpoint import (
    WEIGHTS_FILE,
    CheckpointConfig,
    CheckpointError,
    Thresholds,
    candidates,
    load_checkpoint,
    read_config,
    resolve_checkpoint,
)
from vllm_vsprefill.identity import read_identity
from vllm_vsprefill.tools import models
from vllm_vsprefill.tools.errors import ToolError, plain

app = typer.Typer(no_args_is_help=True, help="Indexer checkpoints: those installed, what is in one, is it whole.")

_Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A folder, a Hugging Face id, or the name of an installed one.")
]
_Folders = Annotated[
    list[Path] | None,
    typer.Option("--folder", help="Folder that holds checkpoint folders, instead of the installed ones; repeatable."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Model = Annotated[
    str | None, typer.Option("--model", help="Model to serve: its folder or Hugging Face id. Must it fit?")
]


def _locate(name: str) -> Path:
    """Folder of a checkpoint; what exists as a path comes first, then what is installed, then Hugging Face."""
    if not Path(name).expanduser().exists():
        for folder in candidates(None):
            if folder.name == name:
                return folder
    return resolve_checkpoint(name)


def _problems(read: Callable[[], object]) -> list[str]:
    """What is wrong with a checkpoint, by reading it."""
    try:
        read()
    except CheckpointError as error:
        return list(error.problems)
    except ImportError as error:
        return [f"tensors are read with torch, which is missing ({error}); run this where vLLM is installed"]
    except Exception as error:  # files of strangers: whatever a parser makes of them is a fault of the checkpoint
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        return [f"it cannot be read ({type(error).__name__}: {reason}); get the checkpoint again"]
    return []


def _parameters(config: CheckpointConfig) -> int:
    return sum(prod(shape) for shape in config.tensor_shapes().values())


def _layers(layers: tuple[int, ...]) -> str:
    """``0-3, 7`` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _range(entries: tuple[float | tuple[float, ...], ...] | None) -> str:
    if entries is None:
        return "as the preset"
    values = [value for entry in entries for value in (entry if isinstance(entry, tuple) else (entry,))]
    heads = ", one for each KV head" if any(isinstance(entry, tuple) for entry in entries) else ""
    return f"{min(values):g}..{max(values):g}{heads}"


def _described(folder: Path, config: CheckpointConfig) -> list[str]:
    model = config.fingerprint
    rope = "none" if model.rope_theta is None else f"theta {model.rope_theta:g}"
    if model.rope_scaling:
        rope += ", " + ", ".join(f"{name} {value}" for name, value in model.rope_scaling.items())
    size = (folder / WEIGHTS_FILE).stat().st_size
    lines = [
        f"{folder}",
        f"  trained for: {config.model}",
        f"  identity: {_identity(config)}",
        f"  must match: {model.architecture}, {model.num_layers} layers, {model.num_query_heads} query heads, "
        f"{model.num_kv_heads} KV heads of {model.head_size} channels, hidden size {model.hidden_size}; RoPE: {rope}",
        f"  indexer: hidden size {config.hidden_size}, {config.dtype}, reads {'+'.join(config.inputs)}; "
        f"{_parameters(config):,} parameters, {size / 2**20:.2f} MiB",
        f"  layers: {_layers(config.layers)} ({len(config.layers)} of {model.num_layers})",
    ]
    for preset, thresholds in config.thresholds.items():
        lines.append(f"  thresholds, {preset}: {_thresholds(thresholds)}")
    if not config.thresholds:
        lines.append("  thresholds: those of the presets (not calibrated)")
    lines += [f"  training, {name}: {value}" for name, value in config.training.items()]
    return lines


def _identity(config: CheckpointConfig) -> str:
    known = {name: value for name, value in config.identity.model_dump().items() if value is not None}
    if not known.keys() & {"norms", "weights"}:
        return "no hashes of weights; servers go by what it must match"
    return ", ".join(f"{name} {value}" for name, value in known.items())


def _compared(config: CheckpointConfig, model: str) -> str:
    """Whether it was trained on the weights of a model that it fits, and what a server does then."""
    relation = config.identity.relation(read_identity(model, config.fingerprint.num_layers))
    if relation == "same":
        return "trained on the weights of this model, as far as they can be compared"
    if relation == "other":
        return (
            f"note: trained on another model of these shapes ({config.identity.name or config.model}); a server takes "
            'it only as an explicit "checkpoint", with a warning'
        )
    return "note: the weights cannot be compared (no hashes in the checkpoint, or no safetensors of the model here)"


def _thresholds(found: Thresholds) -> str:
    recall = "" if found.recall is None else f"; recall {sum(found.recall) / len(found.recall):.1%}"
    return f"columns {_range(found.tau_columns)}; diagonals {_range(found.tau_diagonals)}{recall}"


def _fail(where: object, problems: list[str]) -> None:
    typer.echo(f"vsprefill: indexer checkpoint {plain(str(where))} cannot be used:", err=True)
    for problem in problems:
        typer.echo(f"  - {plain(problem)}", err=True)
    raise typer.Exit(1)


def _located(name: str) -> Path:
    try:
        return _locate(name)
    except CheckpointError as error:
        _fail(name, list(error.problems))
    except (OSError, RuntimeError, ValueError) as error:  # no access, no such user's home, no name of a file
        _fail(name, [str(error)])
    raise AssertionError("not reached")


@app.command("list")
def list_checkpoints(folder: _Folders = None, as_json: _Json = False) -> None:
    """Indexers that a server finds by itself: name, model, layers, and what is wrong with those that cannot be used."""
    rows: list[dict[str, Any]] = []
    missing = [str(one) for one in folder or () if not one.is_dir()]
    if missing:
        typer.echo(f"vsprefill: no such folder: {', '.join(missing)}", err=True)
        raise typer.Exit(1)
    try:
        found = list(candidates(folder))
    except OSError as error:
        typer.echo(f"vsprefill: {plain(str(error))}", err=True)
        raise typer.Exit(1) from None
    for one in found:
        configs: list[CheckpointConfig] = []
        problems = _problems(lambda one=one, configs=configs: configs.append(read_config(one)))  # type: ignore[misc]
        row: dict[str, Any] = {"name": one.name, "folder": str(one), "problems": problems}
        if configs:
            config = configs[0]
            row |= {
                "model": config.model,
                "layers": list(config.layers),
                "model_layers": config.fingerprint.num_layers,
                "parameters": _parameters(config),
                "presets": list(config.thresholds),
            }
        rows.append(row)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        typer.echo("no checkpoints" + ("" if folder else " are installed"))
    for row in rows:
        if row["problems"]:
            typer.echo(plain(f"{row['name']}: cannot be used: {'; '.join(row['problems'])}").replace("\n", " "))
            continue
        presets = ", ".join(row["presets"])
        typer.echo(
            plain(
                f"{row['name']}: for {row['model']}; {len(row['layers'])} of {row['model_layers']} layers, "
                f"{row['parameters']:,} parameters, {f'calibrated for {presets}' if presets else 'not calibrated'}"
            ).replace("\n", " ")
        )


@app.command("show")
def show(checkpoint: _Checkpoint, as_json: _Json = False) -> None:
    """What a checkpoint says of itself: model, layers, thresholds, training. Reads no weights."""
    folder = _located(checkpoint)
    found: list[CheckpointConfig] = []
    problems = _problems(lambda: found.append(read_config(folder)))
    if problems:
        _fail(folder, problems)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), **found[0].model_dump(mode="json")}, indent=2))
        return
    for line in _described(folder, found[0]):
        typer.echo(plain(line).replace("\n", " "))


@app.command("verify")
def verify(checkpoint: _Checkpoint, model: _Model = None) -> None:
    """Read a checkpoint whole: format, shapes, dtypes, every number finite and, with --model, made for that model.

    Exit status 1, with every problem, if a server could not use it.
    """
    folder = _located(checkpoint)
    expected, unknown = None, False
    if model is not None:
        try:
            expected = models.fingerprint(model)
        except ToolError as error:
            typer.echo(f"vsprefill: {plain(str(error))}", err=True)
            unknown = True
    found: list[CheckpointConfig] = []
    problems = _problems(lambda: found.append(read_config(folder, expected)))
    # Without the model: its numbers are looked at, too, if it was made for another one.
    problems += _problems(lambda: found.append(load_checkpoint(folder).config))
    if problems:
        _fail(folder, list(dict.fromkeys(problems)))
    config = found[0]
    digest = hashlib.sha256()
    with (folder / WEIGHTS_FILE).open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    typer.echo(
        plain(
            f"{folder}: in order: {len(config.tensor_shapes())} tensors of {config.dtype}, {_parameters(config):,} "
            "numbers, all finite" + ("" if model is None else f"; made for {model}")
        )
    )
    if model is not None and expected is not None:
        typer.echo(plain(_compared(config, model)))
    typer.echo(f"sha256 of {WEIGHTS_FILE}: {digest.hexdigest()}")
    if unknown:
        raise typer.Exit(1)
