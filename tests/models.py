# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Small models for tests, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vllm_vsprefill.checkpoint import CheckpointConfig, save_checkpoint
from vllm_vsprefill.distil.student import initial_weights
from vllm_vsprefill.fingerprint import ModelFingerprint
from vllm_vsprefill.identity import read_identity

ROOT = Path(__file__).resolve().parent.parent


def save_random_model(folder: Path, *, layers: int = 2, kv_heads: int = 2, seed: int = 0, **overrides: object) -> Path:
    """A Qwen3 model with random weights in float32, without a tokenizer.

    The weights are large enough for attention to be uneven and for greedy decoding not to hang on rounding.
    """
    import transformers

    config = transformers.Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2 * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        **overrides,
    )
    return _save(transformers.Qwen3ForCausalLM, config, folder, seed)


def save_random_mixed_model(folder: Path, *, seed: int = 0) -> Path:
    """A Gemma 3 model of four layers, every other one with a sliding window of 256, random weights in float32."""
    import transformers

    config = transformers.Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65536,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=256,
        query_pre_attn_scalar=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return _save(transformers.Gemma3ForCausalLM, config, folder, seed)


def _save(model_class: Any, config: Any, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = model_class(config).to(torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.5 if "embed" in name else 2.0 / weight.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def save_random_indexer(folder: Path, model: Path, *, hidden: int = 32, seed: int = 0) -> Path:
    """An untrained indexer for a model saved on disk: its choices are arbitrary but reproducible."""
    import transformers

    fingerprint = ModelFingerprint.from_hf_config(transformers.AutoConfig.from_pretrained(model))
    layers = tuple(range(fingerprint.num_layers))
    weights = initial_weights(layers, fingerprint.num_kv_heads, 2 * fingerprint.head_size, hidden, seed)
    # Three times as large, to spread the logits, so that few tokens hold most of the mass.
    weights = {name: 3 * weight for name, weight in weights.items()}
    config = CheckpointConfig(
        model="random",
        fingerprint=fingerprint,
        identity=read_identity(model, fingerprint.num_layers),
        hidden_size=hidden,
        dtype="float32",
        layers=layers,
    )
    return save_checkpoint(folder, weights, config)
