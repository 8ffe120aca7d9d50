# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A list of measurements, one after the other, on a machine that is there for a short time.

    python -m benchmarks.campaign benchmarks/campaigns/one_gpu.txt --out results --set model=MODEL_FOLDER \\
        --set texts=code.txt,book.txt --seconds 580

A line of the file is a step: a name, the seconds it may take (``-``: all that are left) and a command. ``{name}`` in
it stands for a ``--set`` value (``{texts*}``: as many words as it has parts between commas), ``{out}`` for the folder.
A step that fails, or is ended because its time is over, does not keep the next from running. Steps that are done are
left out the next time, and none is started that would not end before ``--seconds`` are over, unless it has no time of
its own. What each printed is in ``OUT/NAME.log``, how each ended in ``OUT/campaign.json``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks import environment

GRACE = 10.0
"""Seconds that a step has to end by itself once it was asked to."""


class Step(NamedTuple):
    """One measurement.

    Attributes:
        name: of the log.
        command: words; ``python`` is the interpreter of this process.
        seconds: after which it is ended; None: what is left of the campaign.
    """

    name: str
    command: list[str]
    seconds: float | None


def read_steps(path: Path, values: dict[str, str]) -> list[Step]:
    """Steps of a file, with what ``--set`` gives put in.

    Raises:
        ValueError: the file is not as it should be, or a step needs a value that was not given.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None
    steps = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        try:
            name, seconds, command = line.split(maxsplit=2)
            limit = None if seconds == "-" else float(seconds)
        except ValueError:
            raise ValueError(f"{path}:{number}: expected name, seconds (or -) and command, found {line!r}") from None
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"{path}:{number}: {name!r} cannot be the name of a log; use letters, digits, _ . and -")
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        steps.append(Step(name, _words(words, values, name), limit))
    names = [step.name for step in steps]
    if not steps or len(set(names)) < len(names):
        raise ValueError(f"{path}: {'two steps have one name' if steps else 'no step'}")
    return steps


def _words(command: list[str], values: dict[str, str], name: str) -> list[str]:
    """Words of a command with the values put in."""
    words: list[str] = []
    for word in command:
        several = word[1:-2] if word.startswith("{") and word.endswith("*}") else None
        try:
            words += values[several].split(",") if several else [word.format(**values)]
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"step {name} needs --set {str(error).strip(chr(39))}=...") from None
    return [sys.executable, *words[1:]] if words[:1] == ["python"] else words


def run(step: Step, log: Path, seconds: float) -> dict[str, Any]:
    """Runs a step, its descendants included, for so long at most.

    Returns:
        ``rc``, its exit status, None where it had to be ended; ``seconds`` it took; ``error`` where it did not start.
    """
    begin = time.monotonic()
    with log.open("ab") as file:
        try:
            process = subprocess.Popen(
                step.command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return {"rc": None, "seconds": 0.0, "error": str(error)}
        rc: int | None = None
        try:
            rc = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(process)
    return {"rc": rc, "seconds": round(time.monotonic() - begin, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a step: itself, and servers that it started."""
    for sent, wait in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
    process.wait()


def main(
    plan: Annotated[Path, typer.Argument(help="file of steps")],
    out: Annotated[Path, typer.Option(help="folder for results, logs and campaign.json")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE for {NAME} in commands")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="for all steps of this call together")] = 36000.0,
    only: Annotated[str, typer.Option(help="names of steps, with commas; else all")] = "",
) -> None:
    """Run the steps that are not done yet. Exit status 1 if one failed or was left out."""
    begin = time.monotonic()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"campaign: --out {out}: {error.strerror}")
    try:
        if odd := [pair for pair in set_ or [] if "=" not in pair]:
            raise ValueError(f"--set {odd[0]}: expected NAME=VALUE")
        given = dict(pair.split("=", 1) for pair in set_ or [])
        steps = read_steps(plan, {**given, "out": str(out)})
        wanted = set(only.split(",")) if only else {step.name for step in steps}
        if unknown := wanted - {step.name for step in steps}:
            raise ValueError(f"no step {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in steps)}")
    except ValueError as error:
        sys.exit(f"campaign: {error}")
    report = out / "campaign.json"
    try:
        state: dict[str, Any] = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {"steps": {}}
        state["steps"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        sys.exit(f"campaign: {report} is damaged ({error}); without it all steps are run again")
    failed = False
    for step in steps:
        earlier, command = state["steps"].get(step.name, {}), shlex.join(step.command)
        # The same step for another model, say, is another one.
        if step.name not in wanted or (earlier.get("rc") == 0 and earlier.get("command") == command):
            continue
        left = begin + seconds - time.monotonic()
        if left < (step.seconds or 1.0):
            print(f"{step.name}: left out, {left:.0f} s are left", flush=True)
            failed = True
            continue
        print(f"{step.name}: {command}", flush=True)
        ended = run(step, out / f"{step.name}.log", min(step.seconds or left, left))
        state["steps"][step.name] = {**ended, "command": command}
        environment.write(report, state)
        failed |= ended["rc"] != 0
        print(f"{step.name}: exit status {ended['rc']}, {ended['seconds']} s {ended.get('error', '')}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    typer.run(main)
