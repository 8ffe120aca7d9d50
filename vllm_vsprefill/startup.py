# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Checks that run once, before any engine process is started: options, checkpoint, vLLM's version.

Every problem found is reported in one message, so that a start-up is corrected in one go.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from vllm_vsprefill import _compat
from vllm_vsprefill.checkpoint import find_checkpoint, read_config, resolve_checkpoint
from vllm_vsprefill.config import ConfigError, VSPrefillConfig
from vllm_vsprefill.fingerprint import ModelFingerprint
from vllm_vsprefill.tuning import platform_tuning

ADDITIONAL_CONFIG_KEY = "vsprefill"


class StartupError(RuntimeError):
    """The server was asked for something that VSPREFILL cannot do. The message lists every reason.

    Not a ValueError: pydantic would wrap it into a message of its own, with the whole configuration behind it.
    """


def read_options(vllm_config: Any) -> VSPrefillConfig:
    """The user's options from ``--additional-config`` and the environment, with the tile sizes and the crossover of
    the platform where none are given; raises ``ConfigError``."""
    return VSPrefillConfig.from_sources(_given(vllm_config), os.environ).resolved(platform_tuning())


def _given(vllm_config: Any) -> Any:
    """What the user gave under ``vsprefill`` in ``--additional-config``; raises ``ConfigError`` for a near miss."""
    additional = getattr(vllm_config, "additional_config", None)
    if not isinstance(additional, dict):
        return None
    if ADDITIONAL_CONFIG_KEY not in additional:
        names = [name for name in additional if isinstance(name, str)]
        for name in difflib.get_close_matches(ADDITIONAL_CONFIG_KEY, names, n=1, cutoff=0.7):
            raise ConfigError(f"additional_config has {name!r}; did you mean {ADDITIONAL_CONFIG_KEY!r}?")
    return additional.get(ADDITIONAL_CONFIG_KEY)


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
        ConfigError: the trained estimator was asked for and there is none.
    """
    if options.estimator == "sampled":
        return None
    if options.checkpoint is not None:
        folder = resolve_checkpoint(options.checkpoint)
        read_config(folder, expected=model)
        return folder
    folder_or_none = find_checkpoint(model) if model is not None else None
    if folder_or_none is None and options.estimator == "vsindexer":
        raise ConfigError(
            "estimator is 'vsindexer', but no installed indexer was trained for this model. Give one with "
            "\"checkpoint\", or use estimator 'auto' or 'sampled', which needs none."
        )
    return folder_or_none


def check(vllm_config: Any) -> None:
    """Refuse a start-up that cannot work, naming every problem. Raises :class:`StartupError`."""
    problems = []
    if reason := _compat.unsupported_version():
        problems.append(reason)
    model = fingerprint(vllm_config)
    try:
        options = read_options(vllm_config)
    except ConfigError as error:
        problems.append(str(error))
        # The other checks go on with the part of the options that they need.
        options = _checkpoint_option(vllm_config)
    problems += _platform_problems(vllm_config, options)
    if options.enabled:
        try:
            if model is not None:
                options.check_layers(model.num_layers)
        except ConfigError as error:
            problems.append(str(error))
        try:
            locate_checkpoint(options, model)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise StartupError("VSPREFILL cannot start:\n" + "\n".join(problems))


def _platform_problems(vllm_config: Any, options: VSPrefillConfig) -> list[str]:
    """What the platform's backend cannot do, each with its remedy."""
    if not _compat.is_cuda():
        return []
    from vllm_vsprefill.backends import cuda_limits

    return cuda_limits.problems(vllm_config, options)


def _checkpoint_option(vllm_config: Any) -> VSPrefillConfig:
    """The options with nothing but the checkpoint taken over, for use when the rest is wrong."""
    try:
        given = _given(vllm_config)
        path = given.get("checkpoint") if isinstance(given, dict) else None
        return VSPrefillConfig.from_sources({"checkpoint": path}).resolved(platform_tuning())
    except ConfigError:
        return VSPrefillConfig.from_sources().resolved(platform_tuning())
