# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What an indexer must match in a model given as a folder or as a Hugging Face id. Reads its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_vsprefill.fingerprint import ModelFingerprint
from vllm_vsprefill.tools.errors import ToolError


def read_config(model: str) -> Any:
    """A model's configuration: transformers' object, or the mapping of ``config.json`` where transformers is missing
    or does not know the model. Code that comes with a model is never run.

    Raises:
        ToolError: there is none, or it cannot be read.
    """
    folder = Path(model).expanduser()
    file = folder / "config.json"
    if folder.is_file():
        raise ToolError(f"--model {model}: expected the folder of a Hugging Face model or an id, found a file")
    if folder.is_dir() and not file.is_file():
        raise ToolError(f"--model {model}: the folder holds no config.json; expected that of a Hugging Face model")
    try:
        from transformers import AutoConfig
    except ImportError:
        if not folder.is_dir():
            raise ToolError(
                f"--model {model}: no such folder; a Hugging Face id needs transformers (pip install transformers)"
            ) from None
    else:
        try:
            return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else model, trust_remote_code=False)
        except Exception as error:  # a hub's client, a parser or a configuration class: anything may be raised
            if not folder.is_dir():
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise ToolError(
                    f"--model {model}: no such folder, and as a Hugging Face id it cannot be read ({reason})"
                ) from None
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ToolError(f"--model {model}: config.json cannot be read ({error}); get the model again") from None
    if not isinstance(content, dict):
        raise ToolError(f"--model {model}: config.json must hold an object, found {type(content).__name__}")
    return content


def fingerprint(model: str) -> ModelFingerprint:
    """What an indexer for the model must match.

    Raises:
        ToolError: the model cannot be read, or can have no indexer.
    """
    try:
        return ModelFingerprint.from_hf_config(read_config(model))
    except ValueError as error:
        raise ToolError(f"--model {model}: it can have no indexer: {error}") from None
