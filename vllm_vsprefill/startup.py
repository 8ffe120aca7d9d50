# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Checks that run once, before any engine process is started: options, checkpoint, vLLM's version.

Every problem found is reported in one message, so that a start-up is corrected in one go.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_vsprefill import _compat
from vllm_vsprefill.checkpoint import find_checkpoint, read_config, resolve_checkpoint
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.fingerprint import ModelFingerprint

ADDITIONAL_CONFIG_KEY = "vsprefill"


class StartupError(ValueError):
    """The server was asked for something that VSPREFILL cannot do. The message lists every reason."""


def read_options(vllm_config: Any) -> VSPrefillConfig:
    """The user's options from ``--additional-config`` and the environment; raises ``ConfigError``."""
    additional = getattr(vllm_config, "additional_config", None)
    options = additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None
    return VSPrefillConfig.from_sources(options, os.environ)


def fingerprint(vllm_config: Any) -> ModelFingerprint | None:
    """Fingerprint of the served model, or None for a model without the usual attention shapes."""
    model_config = getattr(vllm_config, "model_config", None)
    hf_config = getattr(model_config, "hf_text_config", None) or getattr(model_config, "hf_config", None)
    if hf_config is None:
        return None
    try:
        return ModelFingerprint.from_hf_config(hf_config)
    except ValueError:
        return None


def locate_checkpoint(options: VSPrefillConfig, model: ModelFingerprint | None) -> Path | None:
    """Folder of the indexer to use: the user's, else the installed one made for this model, else None.

    Raises:
        CheckpointError: the user's checkpoint is missing or was made for another model.
        StartupError: the trained estimator was asked for and there is none.
    """
    if options.estimator == "sampled":
        return None
    if options.checkpoint is not None:
        folder = resolve_checkpoint(options.checkpoint)
        read_config(folder, expected=model)
        return folder
    folder_or_none = find_checkpoint(model) if model is not None else None
    if folder_or_none is None and options.estimator == "vsindexer":
        raise StartupError(
            "estimator is 'vsindexer', but no installed indexer was trained for this model. Give one with "
            "\"checkpoint\", or use estimator 'auto' or 'sampled', which needs none."
        )
    return folder_or_none


def check(vllm_config: Any) -> None:
    """Refuse a start-up that cannot work, naming every problem. Raises :class:`StartupError`."""
    problems = []
    if reason := _compat.unsupported_version():
        problems.append(reason)
    try:
        options = read_options(vllm_config)
    except ValueError as error:
        problems.append(str(error))
    else:
        if options.enabled:
            model = fingerprint(vllm_config)
            try:
                if model is not None:
                    options.check_layers(model.num_layers)
            except ValueError as error:
                problems.append(str(error))
            try:
                locate_checkpoint(options, model)
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise StartupError("VSPREFILL cannot start:\n" + "\n".join(problems))
