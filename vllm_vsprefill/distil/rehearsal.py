# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Finds out whether an indexer can be trained for a model before any text is read or any weight is loaded.

The model is built without storage (PyTorch's ``meta`` device) and its decoder is run over a few tokens, with the
listener of training: shapes pass through the model's own code, and what that code asks of attention is seen. Takes
milliseconds to seconds, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_vsprefill.distil import capture
from vllm_vsprefill.distil.errors import DistilError, first_line
from vllm_vsprefill.distil.model import Layers, decoder_of, kind_of
from vllm_vsprefill.fingerprint import ModelFingerprint

TOKENS = 8


def blueprint(config: Any, trust_remote_code: bool = False) -> Any:
    """The transformers model of a configuration, without storage.

    Raises:
        DistilError: it is no language model, or transformers cannot build it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Models raise all kinds over settings that do not go together; to the user they are all one.
        if "Unrecognized configuration class" in str(error):
            raise DistilError(
                f"not a decoder: transformers has no causal language model of the kind {kind_of(config)}"
            ) from None
        raise DistilError(
            f"not a decoder that transformers runs: {kind_of(config)} cannot be built "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None


def _go_on(layer: torch.nn.Module) -> None:
    """Make a failure behind a layer's attention no failure of the run; experts, say, look at values to route by."""
    real: Callable[..., Any] = layer.forward

    def forward(*args: Any, **named: Any) -> Any:
        try:
            return real(*args, **named)
        except DistilError:
            raise
        except Exception:
            return args[0] if args else named["hidden_states"]

    layer.forward = forward


@torch.no_grad()
def rehearse(
    config: Any,
    fingerprint: ModelFingerprint,
    layers: Layers,
    trust_remote_code: bool = False,
    refusal: str = "no indexer can be trained",
) -> None:
    """Run a model without weights to see what its attention is given.

    Args:
        config: its transformers configuration.
        fingerprint: what an indexer for it must match.
        layers: which of its layers get an indexer.
        trust_remote_code: run code that lies with the model.
        refusal: how a message begins that refuses the model.

    Raises:
        DistilError: the model is refused; says what the model does that cannot be distilled.
    """
    model = blueprint(config, trust_remote_code)
    decoder = decoder_of(model)
    capture.register()
    model.set_attn_implementation(capture.IMPLEMENTATION)
    decoder.eval()
    count = len(layers.covered) + len(layers.skipped)
    stack = next((m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count), ())
    for layer in stack:
        _go_on(layer)
    wanted = (fingerprint.num_query_heads, fingerprint.num_kv_heads, fingerprint.head_size)
    heard: set[int] = set()

    def listen(call: capture.LayerCall) -> None:
        heard.add(call.layer)
        found = (call.q.shape[1], call.k.shape[1], call.k.shape[2])
        if found != wanted:
            raise DistilError(
                "layer {} has {} query heads and {} KV heads of size {}, but by its configuration the model has {}, {} "
                "and {}".format(call.layer, *found, *wanted)
            )

    try:
        with torch.device("meta"), capture.listening(frozenset(layers.covered), listen):
            decoder(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64), use_cache=False)
    except DistilError as error:
        raise DistilError(f"{refusal} for a {kind_of(config)} model: {error}") from None
    except Exception as error:
        # Code that looks at values cannot be rehearsed. Where it says of itself that it has the interface that the
        # listener needs, the run will tell.
        if not heard and not getattr(model, "_supports_attention_backend", False):
            raise DistilError(
                f"{refusal} for a {kind_of(config)} model: its attention does not go through "
                f"transformers' attention interface (and it cannot be tried without weights: {first_line(error)})"
            ) from None
