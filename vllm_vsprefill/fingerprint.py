# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What an indexer must match in a model: the shapes and the RoPE settings of its attention layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

RopeValue = str | bool | float | tuple[float, ...]


class ModelFingerprint(BaseModel):
    """The settings of a model that its keys and values depend on, besides the weights.

    An indexer reads one token's key (with RoPE applied) and value, per layer and KV head, so a model that differs in
    any of these cannot use it. Fine-tuned versions of one model share a fingerprint; ``identity.py`` tells them apart.

    ``architecture`` is the ``model_type`` of the text part, such as ``qwen3`` or ``llama``: unlike the class name it is
    the same whether or not the text model is wrapped (in a multimodal model, or with another head).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(min_length=1)
    num_layers: int = Field(ge=1)
    num_query_heads: int = Field(ge=1)
    num_kv_heads: int = Field(ge=1)
    head_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    rope_theta: float | None = None
    rope_scaling: dict[str, RopeValue] | None = None

    @field_validator("rope_scaling", mode="before")
    @classmethod
    def _normalise(cls, value: Any) -> Any:
        return normalise_rope(value) if isinstance(value, Mapping) else value

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelFingerprint:
        """Fingerprint of a Hugging Face configuration (an object, or the mapping of a ``config.json``).

        Takes the text part of a multimodal configuration, the spellings of transformers 4 (``rope_theta``,
        ``rope_scaling``) and 5 (``rope_parameters``), and where layer kinds have RoPE settings of their own, those of
        full attention: sliding-window layers never use an indexer.

        Raises:
            ValueError: the configuration has no attention shapes (not a transformer, say), or layers of different
                shapes; names what is missing or differs.
        """
        text = _text_config(config)
        shape = {name: read_setting(text, name) for name in _SHAPE}
        differing = [name for name, value in shape.items() if _differs_by_layer(value)]
        if differing:
            raise ValueError(
                f"{' and '.join(differing)} {'differs' if len(differing) == 1 else 'differ'} from layer to layer of "
                "the model; an indexer has one shape for all layers"
            )
        heads, hidden, layers = shape["num_attention_heads"], shape["hidden_size"], shape["num_hidden_layers"]
        missing = [name for name in _SHAPE[:3] if not _is_count(shape[name])]
        if missing:
            raise ValueError(
                f"the model's configuration has no {', '.join(missing)}; it has no attention layers to index"
            )
        theta, rope = _rope(text)
        architectures = read_setting(text, "architectures") or ["unknown"]
        return cls(
            architecture=str(read_setting(text, "model_type") or architectures[0]),
            num_layers=layers,
            num_query_heads=heads,
            num_kv_heads=shape["num_key_value_heads"] or heads,
            head_size=shape["head_dim"] or hidden // heads,
            hidden_size=hidden,
            rope_theta=theta,
            rope_scaling=rope,
        )

    def differences(self, other: ModelFingerprint) -> dict[str, tuple[Any, Any]]:
        """``{field: (here, there)}`` for every field in which two fingerprints differ."""
        return {
            name: (getattr(self, name), getattr(other, name))
            for name in type(self).model_fields
            if getattr(self, name) != getattr(other, name)
        }


def normalise_rope(settings: Mapping[str, Any]) -> dict[str, RopeValue] | None:
    """One spelling for equal RoPE settings; None for plain RoPE.

    Drops unset entries, the base (a field of its own) and what does nothing; numbers become floats, lists tuples.
    """
    kind = settings.get("rope_type", settings.get("type"))
    rope: dict[str, RopeValue] = {}
    for name, value in sorted(settings.items()):
        if name in ("rope_theta", "rope_type", "type") or value is None:
            continue
        if name == "partial_rotary_factor" and float(value) == 1.0:
            continue
        rope[str(name)] = _plain(value)
    if kind in (None, "default"):
        # Without scaling the length it was trained for has no effect, but some versions write it down.
        rope.pop("original_max_position_embeddings", None)
        return rope or None
    return {"rope_type": str(kind), **rope}


def _plain(value: Any) -> RopeValue:
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (list, tuple)):
        return tuple(float(item) for item in value)
    return json.dumps(value, sort_keys=True, default=str)


# The first three must be there, the others may follow from them.
_SHAPE = ("num_attention_heads", "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim")


class _ByLayer:
    """Stands for a setting of which the configuration says that it has no single value."""


_BY_LAYER = _ByLayer()


def read_setting(config: Any, name: str) -> Any:
    """A setting of a Hugging Face configuration, object or mapping: None where it has none, and an object of no use
    where it has no single value."""
    if isinstance(config, Mapping):
        by_layer = config.get("per_layer_config")
        overrides = by_layer.values() if isinstance(by_layer, Mapping) else by_layer or ()
        if any(
            isinstance(layer, Mapping) and layer.get(name, config.get(name)) != config.get(name) for layer in overrides
        ):
            return _BY_LAYER
        return config.get(name)
    try:
        return getattr(config, name, None)
    except Exception:
        # transformers refuses to name one value for layers that have several; custom classes may raise anything.
        return _BY_LAYER


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _differs_by_layer(value: Any) -> bool:
    return isinstance(value, _ByLayer) or (isinstance(value, (list, tuple)) and len(set(map(str, value))) > 1)


def _text_config(config: Any) -> Any:
    for name in ("text_config", "language_config", "llm_config"):
        nested = read_setting(config, name)
        if nested is not None and read_setting(nested, "num_attention_heads") is not None:
            return nested
    return config


def _rope(text: Any) -> tuple[float | None, dict[str, RopeValue] | None]:
    """Base and normalised remaining settings."""
    settings = read_setting(text, "rope_parameters") or read_setting(text, "rope_scaling") or {}
    if not isinstance(settings, Mapping):
        settings = {}
    if settings and all(isinstance(value, Mapping) for value in settings.values()):
        settings = settings.get("full_attention") or next(iter(settings.values()))
    theta = settings.get("rope_theta")
    if theta is None:
        theta = read_setting(text, "rope_theta")
    merged = dict(settings)
    factor = read_setting(text, "partial_rotary_factor")
    if factor is not None:
        merged.setdefault("partial_rotary_factor", factor)
    try:
        return None if theta is None else float(theta), normalise_rope(merged)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the model's RoPE settings cannot be read: {error}") from error
