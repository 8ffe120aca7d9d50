# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""State of a training run on disk: safetensors and JSON, each state complete or not there at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.student import Student

FOLDER = "state"
TENSORS, DESCRIPTION = "tensors.safetensors", "state.json"
KEPT = 2
_NAME = re.compile(r"step-(\d+)")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@contextmanager
def writing(what: str, kept: str) -> Iterator[None]:
    """Turns failures to write into a message that says what is still there."""
    try:
        yield
    except Exception as error:
        reason = _write_problem(error)
        if reason is None:
            raise
        raise DistilError(f"{what} could not be written: {reason}. {kept}") from error


def _write_problem(error: Exception) -> str | None:
    from safetensors import SafetensorError

    text = str(error)
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the device; free some and go on with --resume"
        return f"{error.strerror or error} ({error.filename})" if error.filename else str(error.strerror or error)
    if isinstance(error, SafetensorError):
        if "No space left" in text or "os error 28" in text:
            return "no space left on the device; free some and go on with --resume"
        return text
    return None


def optimiser_tensors(student: Student, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments of a student by name, on the CPU."""
    out: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        out[f"{name}|weight"] = parameter.detach().float().cpu()
        state = optimiser.state.get(parameter, {})
        for moment in _MOMENTS:
            if moment in state:
                out[f"{name}|{moment}"] = state[moment].detach().float().cpu().contiguous()
    return out


def restore(student: Student, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of ``optimiser_tensors``."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.copy_(tensors[f"{name}|weight"])
            found = {m: tensors[f"{name}|{m}"] for m in _MOMENTS if f"{name}|{m}" in tensors}
            if found:
                # The step counter stays where the optimiser keeps it: on the device for fused ones only.
                fused = bool(optimiser.param_groups[0].get("fused"))
                optimiser.state[parameter] = {
                    m: v.clone() if m == "step" and not fused else v.to(parameter.device, copy=True)
                    for m, v in found.items()
                }


def save(out: Path, step: int, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write the state after a step; older ones but the last are removed afterwards.

    Raises:
        DistilError: the disk is full or cannot be written to; earlier states are untouched.
    """
    from safetensors.torch import save_file

    folder = out / FOLDER
    target = folder / f"step-{step:08d}"
    last = latest(out)
    kept = f"The state after step {_step(last)} is intact." if last else "There is no earlier state."
    with writing(f"the state after step {step}", kept):
        folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".writing.", dir=folder))
        try:
            save_file(tensors, partial / TENSORS)
            (partial / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
            for file in partial.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            if target.exists():
                shutil.rmtree(target)
            partial.chmod(0o755)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    for old in _states(out)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _states(out: Path) -> list[Path]:
    folder = out / FOLDER
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name) and entry.is_dir())


def latest(out: Path) -> Path | None:
    """The newest state of a run, or None."""
    states = _states(out)
    return states[-1] if states else None


def check_unused(out: Path) -> None:
    """DistilError if a folder holds the state of a run."""
    if latest(out) is not None:
        raise DistilError(
            f"--out {out}: it holds the state of another run; go on with it by --resume, or choose another folder"
        )


def load(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of the newest state that can be read.

    Raises:
        DistilError: there is none.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    problems = []
    for folder in reversed(_states(out)):
        try:
            return load_file(folder / TENSORS), json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            problems.append(f"{folder.name}: {error}")
    detail = "; ".join(problems) if problems else f"no {FOLDER}/step-* in it"
    raise DistilError(f"--resume: {out} holds no state of a run to go on from ({detail}); leave --resume out to start")
