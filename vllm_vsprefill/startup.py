# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Checks that run once, before any engine process is started: options, checkpoint, vLLM's version.

Every problem found is reported in one message, so that a start-up is corrected in one go.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_vsprefill import _compat
from vllm_vsprefill.checkpoint import CheckpointConfig, find_checkpoints, read_config, resolve_checkpoint
from vllm_vsprefill.config import ENV_PREFIX, ConfigError, ShippedOptions, VSPrefillConfig, env_name
from vllm_vsprefill.exchange import Exchange
from vllm_vsprefill.fingerprint import ModelFingerprint, read_setting
from vllm_vsprefill.identity import ModelIdentity, Relation, read_identity
from vllm_vsprefill.registration import BACKEND_NAME
from vllm_vsprefill.tuning import platform_tuning

logger = logging.getLogger("vllm.vsprefill")

ADDITIONAL_CONFIG_KEY = "vsprefill"


class StartupError(RuntimeError):
    """The server was asked for something that VSPREFILL cannot do. The message lists every reason.

    Not a ValueError: pydantic would wrap it into a message of its own, with the whole configuration behind it.
    """


def read_options(vllm_config: Any) -> VSPrefillConfig:
    """The user's options, with the tile sizes and the crossover of the platform where none are given.

    From ``--additional-config`` and the environment; in the processes that a server has started, from what it shipped
    with the configuration: their environment may be another one (Ray). Raises ``ConfigError``.
    """
    return _given_options(vllm_config).resolved(platform_tuning())


def _given_options(vllm_config: Any) -> VSPrefillConfig:
    given = _section(vllm_config)
    return VSPrefillConfig.from_sources(given, None if isinstance(given, ShippedOptions) else os.environ)


def shipped(vllm_config: Any) -> ShippedOptions | None:
    """What :func:`ship` has put into a configuration, or None."""
    section = _section(vllm_config)
    return section if isinstance(section, ShippedOptions) else None


def ship(vllm_config: Any, exchange: Callable[[], Exchange]) -> None:
    """Put the options of all sources into a checked configuration, for every process that gets it, once.

    ``exchange`` makes the folder that the processes of the server meet in; it is called once for a server.
    """
    if shipped(vllm_config) is not None:
        return  # vLLM makes one configuration from another; it stays that of the same server
    options = _given_options(vllm_config)
    section = ShippedOptions(options.given())
    if options.checkpoint is not None and (folder := Path(options.checkpoint).expanduser()).is_dir():
        section["checkpoint"] = str(folder.resolve())  # other processes may work in another folder
    if options.enabled:
        located = locate_checkpoint(options, vllm_config)
        located.log()
        if located.folder is not None and options.checkpoint is None:
            section.indexer = located.folder.name
        section.trained, section.doubtful = located.folder is not None, located.is_doubtful
    else:
        section.trained = False
    found = exchange()
    section.exchange, section.exchange_made = None if found.folder is None else str(found.folder), found.made
    # A mapping of its own: the user's may serve for another engine, in another environment.
    vllm_config.additional_config = {**(vllm_config.additional_config or {}), ADDITIONAL_CONFIG_KEY: section}


def _section(vllm_config: Any) -> Any:
    """What stands under ``vsprefill`` in ``--additional-config``."""
    additional = getattr(vllm_config, "additional_config", None)
    return additional.get(ADDITIONAL_CONFIG_KEY) if isinstance(additional, dict) else None


def misplaced(vllm_config: Any) -> list[str]:
    """Options in ``--additional-config`` that nobody would read, each with the place where it belongs."""
    problems = []
    additional = getattr(vllm_config, "additional_config", None)
    for key, value in additional.items() if isinstance(additional, dict) else ():
        if key == ADDITIONAL_CONFIG_KEY or not isinstance(key, str):
            continue
        plain = re.sub("[^a-z]", "", key.lower())
        option = _option_name(key)
        if option is not None:
            problems.append(
                f"additional_config has {key!r} at its top level, where nobody reads it; the option belongs into "
                f'{{"{ADDITIONAL_CONFIG_KEY}": {{"{option}": ...}}}}'
            )
        elif difflib.SequenceMatcher(None, ADDITIONAL_CONFIG_KEY, plain.removeprefix("vllm")).ratio() > 0.88:
            problems.append(f"additional_config has {key!r}; did you mean {ADDITIONAL_CONFIG_KEY!r}?")
        elif isinstance(value, dict) and (path := _nested(value)):
            problems.append(
                f"additional_config has {ADDITIONAL_CONFIG_KEY!r} inside of {'.'.join((key, *path[:-1]))!r}, where "
                "nobody reads it; it belongs at the top level"
            )
    return problems


def _option_name(key: str) -> str | None:
    """The option that a key of the top level means: by its name, as a variable or with the section before a dot."""
    plain = key.lower().replace("-", "_")
    for prefix in (f"{ADDITIONAL_CONFIG_KEY}.", ENV_PREFIX.lower()):
        plain = plain.removeprefix(prefix)
    return plain if plain in VSPrefillConfig.model_fields else None


def _nested(value: dict[Any, Any]) -> tuple[str, ...]:
    """Path to a section for this plugin inside of another one; empty where there is none."""
    for key, inner in value.items():
        if isinstance(key, str) and key.lower() == ADDITIONAL_CONFIG_KEY:
            return (key,)
        if isinstance(inner, dict) and (path := _nested(inner)):
            return (str(key), *path)
    return ()


def unread(vllm_config: Any) -> str | None:
    """What was asked of this plugin in a configuration that does not select it, or None."""
    asked = []
    if os.environ.get("VLLM_ATTENTION_BACKEND", "").upper() == BACKEND_NAME:
        asked.append(f"VLLM_ATTENTION_BACKEND={os.environ['VLLM_ATTENTION_BACKEND']} is set, which this vLLM ignores")
    additional = getattr(vllm_config, "additional_config", None)
    if isinstance(additional, dict) and ADDITIONAL_CONFIG_KEY in additional:
        asked.append(f"additional_config has a section {ADDITIONAL_CONFIG_KEY!r}")
    options = [name for name in map(env_name, VSPrefillConfig.model_fields) if os.environ.get(name, "").strip()]
    if options:
        asked.append(f"{', '.join(options)} {'is' if len(options) == 1 else 'are'} set")
    if not asked:
        return None
    return f"{'; '.join(asked)}, but another attention backend runs. Select it with --attention-backend {BACKEND_NAME}."


def fingerprint(vllm_config: Any) -> ModelFingerprint:
    """Fingerprint of the served model. Raises ValueError, with the reason, for one that no indexer can be made for."""
    hf_config = _hf_config(vllm_config)
    if hf_config is None:
        raise ValueError("the model has no configuration that says what its attention looks like")
    return ModelFingerprint.from_hf_config(hf_config)


def _hf_config(vllm_config: Any) -> Any:
    model_config = getattr(vllm_config, "model_config", None)
    return getattr(model_config, "hf_text_config", None) or getattr(model_config, "hf_config", None)


def _has_dummy_weights(vllm_config: Any) -> bool:
    load_format = getattr(getattr(vllm_config, "load_config", None), "load_format", None)
    return getattr(load_format, "value", load_format) == "dummy"


def served_identity(vllm_config: Any, num_layers: int) -> ModelIdentity:
    """Which model is served, from its files; unknown for dummy weights, and before the files are there."""
    model_config, load_config = (getattr(vllm_config, name, None) for name in ("model_config", "load_config"))
    model = getattr(model_config, "model", None)
    if not isinstance(model, str) or _has_dummy_weights(vllm_config):
        return ModelIdentity()
    return read_identity(
        model,
        num_layers,
        revision=getattr(model_config, "revision", None),
        cache_dir=getattr(load_config, "download_dir", None),
    )


@dataclass(frozen=True)
class Located:
    """The indexer to use for a model.

    Attributes:
        folder: its checkpoint; None for the training-free estimator.
        model: the fingerprint that it must have.
        note: what to tell about the choice; empty where it is beyond doubt.
        is_warning: whether the note is one.
        is_doubtful: whether it may have been trained on another model than the one that is served.
    """

    folder: Path | None = None
    model: ModelFingerprint | None = None
    note: str = ""
    is_warning: bool = False
    is_doubtful: bool = False

    def log(self) -> None:
        """Log the note, if there is one."""
        if self.note:
            logger.log(logging.WARNING if self.is_warning else logging.INFO, "VSPREFILL: %s", self.note)


def locate_checkpoint(options: VSPrefillConfig, vllm_config: Any) -> Located:
    """Indexer to use: the user's, else the installed one made for this model, else none.

    Of the installed ones with the model's shapes, one that is known to be trained on another model is not taken. A
    checkpoint of the user's is, with a warning. In a process that a server has started, the choice is that of the
    server, and has no note.

    Raises:
        CheckpointError: the user's checkpoint is missing or was made for a model of other shapes.
        ConfigError: the trained estimator was asked for and there is none, or there can be none for this model.
    """
    if options.estimator in ("sampled", "priced"):
        return Located()
    try:
        model = fingerprint(vllm_config)
    except ValueError as error:
        if options.checkpoint is None and options.estimator == "auto":
            return Located()
        asked = "a checkpoint is given" if options.checkpoint is not None else "estimator is 'vsindexer'"
        raise ConfigError(
            f"{asked}, but this model cannot have an indexer: {error}. Use estimator 'priced'."
        ) from error
    section = shipped(vllm_config)
    decided = section is not None and section.trained is not None
    if options.checkpoint is not None:
        folder = resolve_checkpoint(options.checkpoint)
        config = read_config(folder, expected=model)
        if section is not None and decided:
            return Located(folder, model, is_doubtful=section.doubtful)
        return _given(folder, config, model, vllm_config)
    if section is not None and decided:
        found = (folder for folder, _ in find_checkpoints(model) if folder.name == section.indexer)
        return Located(next(found, None), model, is_doubtful=section.doubtful)
    located = _installed(model, vllm_config)
    if located.folder is None and options.estimator == "vsindexer":
        reason = located.note or 'no installed indexer was trained for this model. Give one with "checkpoint"'
        raise ConfigError(
            f"estimator is 'vsindexer', but {reason}, or use estimator 'auto' or 'priced', which needs none."
        )
    if located.folder is None and located.note:
        return replace(located, note=f"{located.note}. The training-free estimator is used")
    return located


def _given(folder: Path, config: CheckpointConfig, model: ModelFingerprint, vllm_config: Any) -> Located:
    """The user's checkpoint, which fits, with what is known of its model."""
    served = served_identity(vllm_config, model.num_layers)
    relation = config.identity.relation(served)
    if relation == "other":
        note = (
            f"the indexer {folder.name} was trained on {_trained_on(config)}; {_called(served)} has its shapes, but "
            f"{_difference(config.identity, served)}. It is used because it is given as checkpoint: its recall is "
            "looked at with the first prompts; compare answers with those of dense prefill (vsprefill eval)"
        )
        return Located(folder, model, note, is_warning=True, is_doubtful=True)
    return _taken(folder, config, served, relation, model, vllm_config)


def _taken(
    folder: Path,
    config: CheckpointConfig,
    served: ModelIdentity,
    relation: Relation,
    model: ModelFingerprint,
    vllm_config: Any,
) -> Located:
    """A checkpoint of the served model, as far as is known."""
    if relation == "same":
        return Located(folder, model)
    # Made-up weights attend to nothing in particular, and nobody wants their answers.
    doubtful = not _has_dummy_weights(vllm_config)
    return Located(folder, model, _by_shapes(folder, config, served), is_doubtful=doubtful)


def _installed(model: ModelFingerprint, vllm_config: Any) -> Located:
    """The installed checkpoint that was trained on this model, else one of which that is not known."""
    candidates = list(find_checkpoints(model))
    if not candidates:
        return Located(None, model)
    served = served_identity(vllm_config, model.num_layers)
    relations = [config.identity.relation(served) for _, config in candidates]
    wanted: Relation
    for wanted in ("same", "unknown"):
        if wanted in relations:
            folder, config = candidates[relations.index(wanted)]
            return _taken(folder, config, served, wanted, model, vllm_config)
    refused = "; ".join(
        f"{folder.name} was trained on {_trained_on(config)}, the served one has {_difference(config.identity, served)}"
        for folder, config in candidates
    )
    note = (
        f"no installed indexer was trained on {_called(served)}, though it has the shapes of another model: {refused}. "
        f'To use it nevertheless, for a fine-tuned version, say, give it by "checkpoint": "{candidates[0][0]}"'
    )
    return Located(None, model, note, is_warning=True)


def _trained_on(config: CheckpointConfig) -> str:
    """The model of a checkpoint, for messages."""
    return config.identity.name or config.model


def _called(served: ModelIdentity) -> str:
    return f"the served model {served.name}" if served.name else "the served model"


def _difference(trained: ModelIdentity, served: ModelIdentity) -> str:
    """Why two models are not the same, for messages."""
    if trained.norms is not None and served.norms is not None and trained.norms != served.norms:
        return "other weights"
    if trained.weights is not None and served.weights is not None:
        return "other weights in its key and value projections"
    return "another name; its weights are not here yet or not in safetensors files, so they cannot be compared"


def _by_shapes(folder: Path, config: CheckpointConfig, served: ModelIdentity) -> str:
    known = config.identity.norms is not None or config.identity.weights is not None
    missing = (
        f"the weights of {_called(served)} are not in safetensors files, or not here yet"
        if known
        else "the checkpoint does not say which weights it was trained on"
    )
    return f"the indexer {folder.name} (trained on {_trained_on(config)}) is taken for its shapes: {missing}"


def check_agreement(vllm_config: Any, trained: bool) -> None:
    """Raise :class:`StartupError` where a worker has found a trained indexer and the process that started the server
    has not, or the other way round: ranks with different estimators would attend to different keys."""
    section = shipped(vllm_config)
    if section is None or section.trained in (None, trained):
        return
    here, there = ("a", "none") if trained else ("no", "one")
    raise StartupError(
        f"VSPREFILL: this worker finds {here} trained indexer for the model, the process that started the server found "
        f'{there}. Install the same indexers on every machine, or name one with "checkpoint".'
    )


def check(vllm_config: Any) -> None:
    """Refuse a start-up that cannot work, naming every problem. Raises :class:`StartupError`."""
    problems = []
    if reason := _compat.unsupported_version():
        problems.append(reason)
    problems += misplaced(vllm_config)
    try:
        options = read_options(vllm_config)
    except ConfigError as error:
        problems.append(str(error))
        # The other checks go on with the part of the options that they need.
        options = _checkpoint_option(vllm_config)
    problems += _platform_problems(vllm_config, options)
    if options.enabled:
        try:
            layers = read_setting(_hf_config(vllm_config), "num_hidden_layers")
            if isinstance(layers, int):
                options.check_layers(layers)
        except ConfigError as error:
            problems.append(str(error))
        try:
            locate_checkpoint(options, vllm_config)
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
    given = _section(vllm_config)
    path = given.get("checkpoint") if isinstance(given, dict) else None
    try:
        return VSPrefillConfig.from_sources({"checkpoint": path}).resolved(platform_tuning())
    except ConfigError:
        return VSPrefillConfig.from_sources().resolved(platform_tuning())
