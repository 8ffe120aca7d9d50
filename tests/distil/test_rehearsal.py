# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What training says of models that it cannot train for, of every kind that transformers knows."""

from __future__ import annotations

import re
from typing import Any

import pytest
import transformers

from tests.distil import tiny
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.model import check, positions
from vllm_vsprefill.distil.rehearsal import rehearse

SMALL = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 512,
    "pad_token_id": 0,
}  # fmt: skip


def build(kind: str, **settings: Any) -> Any:
    """A small configuration of a kind; of its own size where it does not take other ones."""
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {kind}")
    made = transformers.CONFIG_MAPPING[kind]
    try:
        return made(**{**SMALL, **settings})
    except Exception:
        return made(**settings)


def verdict(config: Any) -> str:
    """What training would say before it reads data."""
    try:
        fingerprint, layers = check(config)
        rehearse(config, fingerprint, layers)
        positions(config)
    except DistilError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_what_is_promised_to_work_is_accepted(name: str) -> None:
    assert verdict(tiny.config(name)) == "accepted"


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "glm4_moe", "seed_oss", "ernie4_5", "gpt_neox"])
def test_other_decoders_are_accepted(kind: str) -> None:
    assert verdict(build(kind)) == "accepted"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gpt_oss", "no indexer can be trained for a gpt_oss model: layer 0 has attention sinks"),
        ("deepseek_v3", "a deepseek_v3 model has multi-head latent attention (MLA)"),
        ("minicpm3", "a minicpm3 model has multi-head latent attention (MLA)"),
        ("mimo_v2_flash", "keys of size 192 but values of size 128"),
        ("bert", "for a bert model: layer 0 looks ahead"),
        ("bloom", "for a bloom model: attention layers [0, 1] of the model did not pass through"),
        ("gptj", "for a gptj model: its attention does not go through transformers' attention interface"),
        ("llama4", "the decoder of a llama4_text model cannot be told from its head"),
        ("modernbert-decoder", "the decoder of a modernbert-decoder model cannot be told from its head"),
        ("vit", "not a decoder: transformers has no causal language model of the kind vit"),
        ("mamba2", "the model's configuration has no num_attention_heads"),
    ],
)
def test_what_cannot_be_trained_for_is_named(kind: str, message: str) -> None:
    assert message in verdict(build(kind))


def test_heads_that_are_not_as_the_configuration_says() -> None:
    config = tiny.config("qwen3")
    fingerprint, layers = check(config)
    wrong = fingerprint.model_copy(update={"head_size": 8})
    with pytest.raises(
        DistilError, match=r"layer 0 has 4 query heads and 2 KV heads of size 16, but .* has 4, 2 and 8"
    ):
        rehearse(config, wrong, layers)


@pytest.mark.slow
def test_every_kind_of_model_is_accepted_or_refused_by_name() -> None:
    found: dict[str, str] = {}
    for kind in transformers.CONFIG_MAPPING:
        try:
            config = build(kind)
        except Exception:  # needs parts or files
            continue
        found[kind] = verdict(config)  # anything but a refusal of ours fails here
    assert len(found) > 200
    accepted = {kind for kind, said in found.items() if said == "accepted"}
    assert {"llama", "qwen2", "qwen3", "mixtral", "gemma3", "phi3"} <= accepted
    assert not accepted & {"gpt_oss", "deepseek_v2", "deepseek_v3", "bert", "t5", "clip", "whisper"}
    for kind, said in found.items():
        assert said == "accepted" or re.search(r"\w{3,} \w{2,}", said), (kind, said)
        assert "Traceback" not in said
