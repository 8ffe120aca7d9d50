# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The frozen model: which of its layers can have an indexer, loading it, running its decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_vsprefill.distil import capture
from vllm_vsprefill.distil.errors import DistilError, first_line
from vllm_vsprefill.distil.options import ModelOptions
from vllm_vsprefill.fingerprint import ModelFingerprint
from vllm_vsprefill.identity import ModelIdentity, model_name, module_identity, read_identity


@dataclass(frozen=True)
class Layers:
    """Attention layers by what can be done with them: covered ones, and the reason for each that is left out."""

    covered: tuple[int, ...]
    skipped: dict[int, str]

    def describe(self, what: str = "get an indexer") -> str:
        """One line per reason; ``what`` is what the layers do that are not left out."""
        lines = [f"{len(self.covered)} layers {what}"]
        for reason in dict.fromkeys(self.skipped.values()):
            which = [str(i) for i, why in self.skipped.items() if why == reason]
            lines.append(f"left out, {reason}: layers {', '.join(which)}")
        return "\n".join(lines)


def kind_of(config: Any) -> str:
    """What a configuration calls its model, for messages."""
    return str(_setting(config, "model_type") or type(config).__name__)


def _setting(config: Any, name: str) -> Any:
    """A setting; None if the configuration has none or, with settings per layer, refuses to give one for all."""
    try:
        return getattr(config, name, None)
    except Exception:
        return None


def attention_layers(config: Any) -> Layers:
    """Which layers of a transformers configuration can have an indexer: full causal attention without soft-capping.

    Raises:
        DistilError: it says nothing of layers.
    """
    text = text_config(config)
    count, kinds = _setting(text, "num_hidden_layers"), _setting(text, "layer_types")
    if not isinstance(count, int) or (kinds is not None and len(kinds) != count):
        raise DistilError(f"the configuration of a {kind_of(config)} model does not say what its layers are")
    window = _setting(text, "sliding_window")
    if _setting(text, "use_sliding_window") is False:
        window = None
    cap = _setting(text, "attn_logit_softcapping")
    skipped: dict[int, str] = {}
    for i in range(count):
        kind = kinds[i] if kinds else ("full_attention" if window is None else "sliding_attention")
        if kind == "sliding_attention":
            skipped[i] = f"sliding window of {window} tokens" if window is not None else "sliding window"
        elif kind != "full_attention":
            skipped[i] = f"{str(kind).replace('_', ' ')}"
        elif cap is not None:
            skipped[i] = f"attention logits are soft-capped (at {cap:g})"
    return Layers(tuple(i for i in range(count) if i not in skipped), skipped)


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the decoder.

    Raises:
        DistilError: it cannot be told which.
    """
    try:
        return config.get_text_config(decoder=True)
    except Exception as error:
        raise DistilError(
            f"the decoder of a {kind_of(config)} model cannot be told from its configuration ({first_line(error)})"
        ) from None


@dataclass(frozen=True)
class Teacher:
    """A frozen model, ready to be listened to.

    Attributes:
        name: for people to read.
        decoder: the decoder stack, without the head over the vocabulary.
        fingerprint: what an indexer for it must match.
        identity: which of the models with this fingerprint it is.
        layers: which of its layers get an indexer.
        vocabulary: rows of the embedding.
        device: where it runs.
    """

    name: str
    decoder: torch.nn.Module
    fingerprint: ModelFingerprint
    identity: ModelIdentity
    layers: Layers
    vocabulary: int
    device: torch.device

    def digest(self) -> str:
        """Changes when the weights or their type do; from a few numbers of every parameter."""
        digest = hashlib.sha256()
        for name, parameter in self.decoder.named_parameters():
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // 64)][:64].float().cpu().numpy()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(sample.tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def run(self, ids: Tensor, call: Callable[[capture.LayerCall], None] | None = None) -> Tensor:
        """One prefill of a whole sequence; ``ids`` int64 ``[n]``. Returns the last hidden states ``[n, C]``.

        Nothing outlives its layer: there is no KV cache, and no logits over the vocabulary.

        Raises:
            DistilError: the device's memory does not suffice, or layers cannot be listened to.
        """
        covered = frozenset(self.layers.covered if call is not None else ())
        try:
            with capture.listening(covered, call or _ignore):
                out = self.decoder(input_ids=ids[None].to(self.device), use_cache=False)
        except torch.OutOfMemoryError:
            raise DistilError(
                f"out of memory on {self.device} with a sequence of {len(ids)} tokens; take shorter ones (--max-length "
                "of vsprefill train, --length of calibrate), or a larger device (train --dry-run estimates what is "
                "needed)"
            ) from None
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


def _ignore(call: capture.LayerCall) -> None:
    del call


def _source(model: str) -> Path | str:
    """A model as transformers' loaders take it: its folder, or else its id."""
    path = Path(model).expanduser()
    return path if path.is_dir() else model


def _from_hub(options: ModelOptions) -> dict[str, Any]:
    # False, not None, which would ask on the terminal.
    return {"revision": options.revision, "trust_remote_code": options.trust_remote_code}


def _unreadable(model: str, error: Exception) -> str:
    """Why transformers does not take a model, or what would help."""
    if "trust_remote_code" in str(error):
        return "it comes with code of its own; allow it to run with --trust-remote-code"
    if Path(model).expanduser().is_dir():
        return f"transformers cannot read it ({first_line(error)})"
    return f"no such folder, and transformers cannot load it as an id ({first_line(error)})"


def read_config(options: ModelOptions) -> Any:
    """transformers' configuration of a model, with the settings that replace its own.

    Raises:
        DistilError: no such folder or id, no configuration that transformers knows, or a setting that it has not.
    """
    from transformers import AutoConfig

    path = Path(options.model).expanduser()
    if path.is_file():
        raise DistilError(
            f"--model {options.model}: expected the folder of a Hugging Face model or an id, found a file"
        )
    if path.is_dir() and not (path / "config.json").is_file():
        raise DistilError(
            f"--model {options.model}: the folder holds no config.json; expected that of a Hugging Face model"
        )
    try:
        config = AutoConfig.from_pretrained(_source(options.model), **_from_hub(options))
    except Exception as error:
        # Code that comes with a model may raise anything.
        raise DistilError(f"--model {options.model}: {_unreadable(options.model, error)}") from None
    _override(config, options.hf_overrides)
    return config


def _override(config: Any, settings: Mapping[str, Any], where: str = "") -> None:
    """Replace settings, as vLLM does: those of a part of the configuration one by one, others whole."""
    unknown = [f"{where}{name}" for name in settings if name not in config.to_dict() and _setting(config, name) is None]
    if unknown:
        raise DistilError(f"--hf-overrides: a {kind_of(config)} configuration has no {', '.join(unknown)}")
    for name, value in settings.items():
        part = _setting(config, name)
        if isinstance(value, Mapping) and hasattr(part, "to_dict"):
            _override(part, value, f"{where}{name}.")
        else:
            setattr(config, name, value)


def positions(config: Any) -> int | None:
    """Longest sequence that a transformers configuration allows, scaled RoPE included; None if it names none."""
    text = text_config(config)
    longest = _setting(text, "max_position_embeddings")
    if not isinstance(longest, int):
        return None
    rope = _setting(text, "rope_parameters") or _setting(text, "rope_scaling") or {}
    rope = rope.get("full_attention") or rope
    if rope.get("rope_type", rope.get("type")) == "yarn" and rope.get("factor"):
        # Checkpoints differ in whether max_position_embeddings is the length before or after scaling.
        original = rope.get("original_max_position_embeddings") or longest
        longest = max(longest, int(original * float(rope["factor"])))
    return longest


def check(config: Any) -> tuple[ModelFingerprint, Layers]:
    """Fingerprint and layers of a model that an indexer can be trained for.

    Raises:
        DistilError: it is no transformer, or none of its layers can run sparse; says why for each.
    """
    try:
        fingerprint = ModelFingerprint.from_hf_config(config)
    except ValueError as error:
        raise DistilError(str(error)) from None
    except Exception as error:
        raise DistilError(
            f"the attention of a {kind_of(config)} model cannot be told from its configuration ({first_line(error)})"
        ) from None
    if _setting(text_config(config), "kv_lora_rank"):
        raise DistilError(
            f"a {kind_of(config)} model has multi-head latent attention (MLA): its cache holds no keys and values, "
            "which an indexer reads"
        )
    layers = attention_layers(config)
    if not layers.covered:
        raise DistilError(
            f"no attention layer of this model can run sparse, nothing to train or calibrate:\n{layers.describe()}"
        )
    return fingerprint, layers


def decoder_of(model: Any) -> Any:
    """The decoder stack of a transformers model, without the head over the vocabulary.

    Raises:
        DistilError: transformers does not say which part of it that is.
    """
    decoder = model.get_decoder()
    # Some models call their head the decoder.
    if not hasattr(decoder, "get_output_embeddings") or decoder.get_output_embeddings() is not None:
        raise DistilError(
            f"the decoder of a {model.config.model_type} model cannot be told from its head, it cannot be listened to"
        )
    return decoder


def wrap(model: Any, name: str, identity: ModelIdentity | None = None) -> Teacher:
    """A teacher around a transformers model that is in memory; it is frozen and put in evaluation mode.

    Args:
        model: the model.
        name: for people to read.
        identity: which model it is; by default by its weights.

    Raises:
        DistilError: none of its layers can have an indexer.
    """
    config: Any = model.config
    fingerprint, layers = check(config)
    capture.register()
    model.set_attn_implementation(capture.IMPLEMENTATION)
    decoder = decoder_of(model)
    model.eval().requires_grad_(False)
    embedding = decoder.get_input_embeddings()
    identity = identity or module_identity(name, decoder, fingerprint.num_layers)
    return Teacher(name, decoder, fingerprint, identity, layers, embedding.num_embeddings, embedding.weight.device)


def load_model(options: ModelOptions, config: Any, device: torch.device, *, head: bool = False) -> Any:
    """transformers' model, from a folder or by its id, with the weights of its decoder at least.

    Args:
        options: which, and how.
        config: its configuration, from ``read_config``.
        device: where to run it.
        head: whether its head over the vocabulary is needed, too.

    Raises:
        DistilError: it cannot be loaded, lacks weights, or does not fit on the device.
    """
    from transformers import AutoModelForCausalLM

    try:
        loaded, found = AutoModelForCausalLM.from_pretrained(
            _source(options.model), config=config, dtype=options.dtype, output_loading_info=True, **_from_hub(options)
        )
    except Exception as error:
        # transformers, safetensors and libraries for quantised weights raise many kinds; to the user they are all one.
        raise DistilError(f"--model {options.model}: its weights cannot be loaded ({error})") from None
    needed = {id(parameter) for parameter in (loaded if head else decoder_of(loaded)).parameters()}
    missing = sorted(name for name, p in loaded.named_parameters() if name in found["missing_keys"] and id(p) in needed)
    if missing:
        raise DistilError(
            f"--model {options.model}: {len(missing)} of its weights are not there and would be random: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
    try:
        return loaded.to(device)
    except torch.OutOfMemoryError:
        raise DistilError(f"--model {options.model}: its weights do not fit on {device}; use a larger device") from None


def load(options: ModelOptions, device: torch.device) -> Teacher:
    """Load a model from a folder or by its id.

    Args:
        options: which, and how.
        device: where to run it.

    Raises:
        DistilError: it cannot be found or loaded, or has no layer for an indexer.
    """
    config = read_config(options)
    fingerprint, _ = check(config)
    loaded = load_model(options, config, device)
    # Of the files, as a server reads them; of what was made of them where they are in another format.
    identity = read_identity(options.model, fingerprint.num_layers, revision=options.revision)
    if identity.weights is None and identity.norms is None:
        seen = module_identity(model_name(options.model), decoder_of(loaded), fingerprint.num_layers)
        identity = identity.model_copy(update={"norms": seen.norms, "weights": seen.weights})
    return wrap(loaded, model_name(options.model), identity)


def load_tokenizer(options: ModelOptions) -> Any:
    """The model's tokenizer, or another one that is named.

    Raises:
        DistilError: there is none.
    """
    from transformers import AutoTokenizer

    named = options.tokenizer or options.model
    # A revision is one of the model's repository.
    settings = {**_from_hub(options), "revision": options.revision if named == options.model else None}
    try:
        return AutoTokenizer.from_pretrained(_source(named), **settings)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise DistilError(f"the tokenizer {named}: {_unreadable(named, error)}") from None
        raise DistilError(
            f"no tokenizer can be loaded from {named} ({first_line(error)}); name one with --tokenizer"
        ) from None
