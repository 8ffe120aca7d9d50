# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Options of these commands: each is a validated field, and an option of the command line by its name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vllm_vsprefill.command_line import JsonObject
from vllm_vsprefill.distil.options import ModelOptions


def _indices(value: Any) -> Any:
    """Layer indices from "0,3-5"."""
    if not isinstance(value, str):
        return value
    found: list[int] = []
    for part in filter(None, (part.strip() for part in value.split(","))):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise ValueError(f"expected layers such as 0,3-5, found {value!r}")
        found += range(int(first), min(int(last or first), int(first) + 9999) + 1)
    return tuple(found)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DoctorModel(Frozen):
    """A server that is to be started."""

    model: str | None = Field(None, description="Folder or Hugging Face id of the model to serve.")
    max_model_len: int | None = Field(None, ge=1, description="As for vllm serve.")
    max_num_batched_tokens: int | None = Field(None, ge=1, description="As for vllm serve.")
    tensor_parallel_size: int = Field(1, ge=1, description="As for vllm serve.")
    dtype: str = Field("auto", description="As for vllm serve.")
    kv_cache_dtype: str = Field("auto", description="As for vllm serve.")
    trust_remote_code: bool = Field(False, description="Run code that lies with the model.")
    options: JsonObject = Field({}, description='What the server is to be given as --additional-config\'s "vsprefill".')


class DoctorCommand(Frozen):
    """Options of ``vsprefill doctor``."""

    json_: bool = Field(False, description="Print JSON.")
    server: DoctorModel = Field(DoctorModel(), description="What is to be served")


class InspectCommand(Frozen):
    """Options of ``vsprefill inspect``."""

    text: Path = Field(description="Text file; its first tokens are looked at.")
    out: Path = Field(description="Folder for the page, its pictures and figures.")
    max_tokens: int = Field(4096, ge=256, le=65536, description="Tokens of the text at most.")
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_indices)] = Field(
        (), description="Layers such as 0,3-5; by default all that can run sparse."
    )
    options: JsonObject = Field({}, description="Options of VSPREFILL, such as preset, estimator or checkpoint.")
    model: ModelOptions = Field(description="Model")
