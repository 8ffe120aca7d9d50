# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The needle model's vocabulary and its word-level tokenizer.

A token is one word, one punctuation mark or up to three digits. A token that follows a space carries the space as a
leading ``▁`` (as SentencePiece writes it), so that decoding restores the text: ``magic number: 41790.`` is
``▁magic ▁number : ▁417 90 .``. Words outside the vocabulary become ``<unk>``.

Everything here but :func:`build_tokenizer` is pure Python: the task generators work on token ids without the
``tokenizers`` library, and a test holds the two encodings together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from examples.needle.words import COMMON, FILLER, PLACES, SENTENCES, VARIABLES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "▁"
PAD, UNK, USER, ASSISTANT, SYSTEM, END = "<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
SPECIALS: tuple[str, ...] = (PAD, UNK, USER, ASSISTANT, SYSTEM, END)
# Words of the needles, the questions and the answers.
TEMPLATE_WORDS = (
    "The One magic number numbers for is What are the Which variables hold VAR Question two three four five six"
).split()

# One token: an optional space with up to three digits, a run of letters, or any other single character.
TOKEN_PATTERN = rf"{SPACE}?[0-9]{{1,3}}|{SPACE}?[A-Za-z]+|{SPACE}?[^A-Za-z0-9{SPACE}]|{SPACE}"
_TOKEN = re.compile(TOKEN_PATTERN)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def split(text: str) -> list[str]:
    """Token strings of ``text``, which must not hold special tokens; words are not looked up."""
    text = re.sub(r"\s+", " ", text)
    if not text:
        return []
    text = text.replace(" ", SPACE)
    return _TOKEN.findall(text if text.startswith(SPACE) else SPACE + text)


def _build() -> list[str]:
    words: list[str] = [*SPECIALS]
    digits = [str(i) for i in range(10)] + [f"{i:02d}" for i in range(100)] + [f"{i:03d}" for i in range(1000)]
    words += [SPACE + d for d in digits] + digits
    marks = ".,:;?!'\"()[]{}<>-=+*/&%$#@_|~^`\\"
    words += [SPACE] + [SPACE + m for m in marks] + list(marks)
    plain: Iterable[str] = (
        *TEMPLATE_WORDS,
        *(w for s in SENTENCES for w in re.findall(r"[A-Za-z]+", s)),
        *PLACES,
        *VARIABLES,
        *FILLER,
        *COMMON,
        *(w.capitalize() for w in COMMON),
    )
    words += [SPACE + w for w in plain]
    # "don't" splits into don ' t: the letters that follow an apostrophe, without a space.
    words += ["s", "t", "re", "ve", "ll", "d", "m"]
    return list(dict.fromkeys(words))


TOKENS: tuple[str, ...] = tuple(_build())
IDS: dict[str, int] = {token: i for i, token in enumerate(TOKENS)}
# Rows of the embedding: the vocabulary rounded up, for the kernels' sake.
EMBEDDING_ROWS = -(-len(TOKENS) // 64) * 64


def encode(text: str) -> list[int]:
    """Token ids of ``text`` (no special tokens in it); unknown words become ``<unk>``."""
    unk = IDS[UNK]
    return [IDS.get(token, unk) for token in split(text)]


def decode(ids: Iterable[int]) -> str:
    """Readable text of ``ids``: the tokenizer's own decoding with special tokens kept."""
    return "".join(TOKENS[i] for i in ids).replace(SPACE, " ").removeprefix(" ")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The same vocabulary as a Hugging Face fast tokenizer with its chat template."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(IDS, unk_token=UNK))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False),
            pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into a model folder, under the class name that every transformers version knows."""
    build_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")
