# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Tiny models with random weights, of every architecture that is promised to work."""

from __future__ import annotations

from typing import Any

import torch

_COMMON = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(name: str, **overrides: Any) -> Any:
    """transformers' configuration of a tiny model by the name of its architecture."""
    import transformers as t

    makers: dict[str, tuple[Any, dict[str, Any]]] = {
        "qwen2": (t.Qwen2Config, {}),
        "qwen3": (t.Qwen3Config, {"head_dim": 16}),
        "llama3.1": (t.LlamaConfig, {"rope_parameters": LLAMA3_ROPE}),
        "mistral": (t.MistralConfig, {"sliding_window": None}),
        "gemma2": (
            t.Gemma2Config,
            {"head_dim": 16, "attn_logit_softcapping": None, "sliding_window": 8, "query_pre_attn_scalar": 24},
        ),
        "gemma3": (
            t.Gemma3TextConfig,
            {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        "phi": (t.PhiConfig, {"num_key_value_heads": 4}),
        "phi3": (t.Phi3Config, {"sliding_window": None}),
    }
    maker, own = makers[name]
    return maker(**{**_COMMON, **own, **overrides})


ARCHITECTURES = ("qwen2", "qwen3", "llama3.1", "mistral", "gemma2", "gemma3", "phi", "phi3")


def model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A tiny causal language model in float32 whose attention is uneven."""
    import transformers

    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config(name, **overrides)).float().eval()
    with torch.no_grad():
        for key, weight in made.named_parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=1.0 if "embed" in key else 1.5 / weight.shape[1] ** 0.5)
    return made
