# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Commands whose options are the fields of a pydantic model: name, type, default and help are written once, there.

Fields of a model within the model are options like any other, under a heading of their own in ``--help``. The model
checks the values, so that everything wrong with a command is said at once. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo

Options = TypeVar("Options", bound=BaseModel)


def _json_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error}), found {value!r}") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {value!r}")
    return found


JsonObject = Annotated[dict[str, Any], BeforeValidator(_json_object)]
"""A field that is written as a JSON object on the command line."""


class _Field(NamedTuple):
    path: tuple[str, ...]
    info: FieldInfo
    heading: str
    preset: dict[str, Any]  # its value, where a default of a model around it says another one than it does itself


def _fields(
    model: type[BaseModel],
    path: tuple[str, ...] = (),
    heading: str = "Options",
    default: BaseModel | None = None,
) -> Iterator[_Field]:
    for name, info in model.model_fields.items():
        said = default is not None and name in default.model_fields_set
        value = getattr(default, name) if said else info.default
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            inner = value if isinstance(value, BaseModel) else None
            yield from _fields(info.annotation, (*path, name), info.description or name.capitalize(), inner)
        else:
            yield _Field((*path, name), info, heading, {name: value} if said else {})


def flag(name: str) -> str:
    """The option of a field; an underscore at the end keeps a name apart from one of pydantic's (``json_``)."""
    return "--" + name.rstrip("_").replace("_", "-")


def option_problems(model: type[BaseModel], error: ValidationError) -> list[str]:
    """What is wrong with some options, each by its name on the command line."""
    found = []
    for detail in error.errors(include_url=False):
        if detail["type"] == "default_factory_not_called":  # follows from another one
            continue
        at: Any = model
        name = ""
        for part in detail["loc"]:
            if not (isinstance(at, type) and issubclass(at, BaseModel)):
                break
            name, at = str(part), at.model_fields[part].annotation if part in at.model_fields else None
        whole = isinstance(at, type) and issubclass(at, BaseModel)
        message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        message = re.sub(r"expected (?=greater|less)", "expected a number ", message)
        if detail["type"] == "missing":
            found.append(f"{flag(name)}: is needed")
        elif detail["type"] == "extra_forbidden":
            found.append(f"{flag(name)}: there is no such option")
        else:
            given = f", found {detail['input']!r}" if name and not whole and "found" not in message else ""
            found.append(f"{flag(name) + ': ' if name and not whole else ''}{message}{given}")
    return found


def _plain(annotation: Any) -> Any:
    """The type of an option, without what else may stand for "not given"."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return _plain(next(part for part in get_args(annotation) if part is not type(None)))
    return annotation


def _metavar(annotation: Any) -> str:
    kind = _plain(annotation)
    if get_origin(kind) is Literal:
        return "[" + "|".join(map(str, get_args(kind))) + "]"
    known: dict[Any, str] = {int: "INTEGER", float: "NUMBER", Path: "PATH", dict: "JSON", tuple: "LIST"}
    return known.get(get_origin(kind) or kind, "TEXT")


def _shown(default: Any) -> str | None:
    if default is None:
        return None
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _parameter(field: _Field) -> inspect.Parameter:
    name, info = field.path[-1], field.info
    needed = info.is_required() and not field.preset
    text = (info.description or "") + (" (needed)" if needed else "")
    default = field.preset.get(name, None if needed or info.default_factory is not None else info.default)
    if _plain(info.annotation) is bool:
        declared = flag(name) if default is False else f"{flag(name)}/--no-{flag(name)[2:]}"
        kind, option = bool, typer.Option(declared, help=text, rich_help_panel=field.heading)
    else:
        kind, default = str | None, _shown(default)  # type: ignore[assignment]
        option = typer.Option(flag(name), help=text, metavar=_metavar(info.annotation), rich_help_panel=field.heading)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def takes(
    model: type[Options], *errors: type[Exception], program: str = "vsprefill"
) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a function of a pydantic model a command for typer.

    Args:
        model: whose fields are the options.
        errors: exceptions whose message is all that their reader needs: it is printed, and the exit status is 1.
        program: what messages begin with.

    Raises:
        TypeError: two fields would be the same option.
    """
    fields = list(_fields(model))
    names = [field.path[-1] for field in fields]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TypeError(f"{model.__name__} has several fields called {', '.join(sorted(twice))}")

    parameters = [_parameter(field) for field in fields]
    defaults = {parameter.name: parameter.default for parameter in parameters}

    def made(run: Callable[[Options], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            values: dict[str, Any] = {}
            for field in fields:
                at = values  # Models within are made even where empty: what they lack is to be found.
                for part in field.path[:-1]:
                    at = at.setdefault(part, {})
                at.update(field.preset)
                if (value := given[field.path[-1]]) != defaults[field.path[-1]]:
                    at[field.path[-1]] = value
            try:
                options = model.model_validate(values)
            except ValidationError as error:
                lines = [f"  - {problem}" for problem in option_problems(model, error)]
                typer.echo(f"{program}: options that cannot be used:\n" + "\n".join(lines), err=True)
                raise typer.Exit(1) from None
            try:
                run(options)
            except errors as error:
                typer.echo(f"{program}: {error}", err=True)
                raise typer.Exit(1) from None

        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return made
