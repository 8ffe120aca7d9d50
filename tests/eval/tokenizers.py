# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Three kinds of tokenizers, made without a network: words, byte pairs with a chat format, single bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
NEEDLE = Path(__file__).resolve().parent.parent.parent / "examples" / "needle" / "model"


def needle(folder: Path) -> Path:
    """The needle model's: whole words, unknown ones are one token."""
    return NEEDLE


def pairs(folder: Path) -> Path:
    """Byte-level byte pairs as Qwen's, with a token that texts begin with and a chat format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|start|>", "<|end|>"]
    trainer: Any = trainers.BpeTrainer(
        vocab_size=800, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([Path(__file__).read_text(), (NEEDLE.parent / "README.md").read_text()], trainer)
    made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    return folder


def characters(folder: Path) -> Path:
    """A token for every byte, and no chat format."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(folder)
    return folder


ALL = (needle, pairs, characters)
