# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Commands made of pydantic models."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from vllm_vsprefill.command_line import takes


class Inner(BaseModel):
    colour: Literal["red", "blue"] = Field("red", description="Of the thing.")
    size_of: int | None = Field(None, ge=1, description="Its size.")
    parts: tuple[int, ...] = (1, 2)


class Outer(BaseModel):
    name: str = Field(description="What it is called.")
    quick: bool = Field(False, description="Do it quickly.")
    polish: bool = Field(True, description="Polish it.")
    inner: Inner = Field(description="The thing")


def run(*arguments: str, seen: list[Outer] | None = None) -> tuple[int, str]:
    app = typer.Typer()

    @app.command()
    @takes(Outer, KeyError)
    def make(options: Outer) -> None:
        """Make it."""
        if options.name == "none":
            raise KeyError("nothing of that name")
        (seen if seen is not None else []).append(options)

    done = CliRunner().invoke(app, arguments)
    return done.exit_code, re.sub(r"\s+", " ", done.output)


def test_values_reach_the_model() -> None:
    seen: list[Outer] = []
    assert run("--name", "a", seen=seen)[0] == 0
    assert run("--name", "b", "--quick", "--no-polish", "--colour", "blue", "--size-of", "3", seen=seen)[0] == 0
    assert seen == [
        Outer(name="a", inner=Inner()),
        Outer(name="b", quick=True, polish=False, inner=Inner(colour="blue", size_of=3)),
    ]


def test_defaults_of_a_model_within_are_those_of_the_model_around_it() -> None:
    class Around(BaseModel):
        inner: Inner = Inner(colour="blue", parts=(7,))

    seen: list[Around] = []
    app = typer.Typer()
    app.command()(takes(Around)(seen.append))
    runner = CliRunner()
    assert "[default: blue]" in runner.invoke(app, ["--help"]).output
    assert runner.invoke(app, []).exit_code == 0
    assert runner.invoke(app, ["--size-of", "2"]).exit_code == 0
    assert runner.invoke(app, ["--colour", "red"]).exit_code == 0
    assert seen == [
        Around(),
        Around(inner=Inner(colour="blue", parts=(7,), size_of=2)),
        Around(inner=Inner(colour="red", parts=(7,))),
    ]


def test_help_says_what_the_fields_say() -> None:
    code, output = run("--help")
    assert code == 0
    for part in ("Make it.", "What it is called. (needed)", "--no-polish", "[red|blue]", "[default: red]", "The thing"):
        assert part in output, output


def test_everything_wrong_is_said_at_once() -> None:
    code, output = run("--colour", "green", "--size-of", "0")
    assert code == 1
    for part in (
        "--name: is needed",
        "--colour: expected 'red' or 'blue', found 'green'",
        "--size-of: expected a number greater than or equal to 1, found '0'",
    ):
        assert part in output, output


def test_errors_that_are_messages() -> None:
    code, output = run("--name", "none")
    assert code == 1
    assert "nothing of that name" in output
    assert "Traceback" not in output


def test_one_name_is_one_option() -> None:
    class Twice(BaseModel):
        colour: str = ""
        inner: Inner = Inner()

    def nothing(options: Any) -> None:
        del options

    with pytest.raises(TypeError, match="Twice has several fields called colour"):
        takes(Twice)(nothing)
