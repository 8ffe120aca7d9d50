# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Options of these commands: each is a validated field, and an option of the command line by its name."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error}), found {value!r}") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object, found {value!r}")
    return found


Object = Annotated[dict[str, Any], BeforeValidator(_object)]


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
    options: Object = Field({}, description='What the server is to be given as --additional-config\'s "vsprefill".')


class DoctorCommand(Frozen):
    """Options of ``vsprefill doctor``."""

    json_: bool = Field(False, description="Print JSON.")
    server: DoctorModel = Field(DoctorModel(), description="What is to be served")
