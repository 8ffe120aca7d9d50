# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Text to tokens: by a tokenizer on this machine, or by the server's own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

from vllm_vsprefill.eval.client import Client
from vllm_vsprefill.eval.errors import INSTALL, EvalError

# Words, numbers, code and other scripts: tokenizers that differ rarely agree on all of it.
PROBE = "The quick brown fox, 1234567 jumps;\n\n  for i in range(10): x += 0x3F  # Größe 数 \u2014 naïve-uuid 7c9e6679"


class Tokens(Protocol):
    """What an evaluation asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones around it."""

    def prefix(self) -> list[int]:
        """Special tokens that a plain text begins with."""

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation in the model's chat format; the last message, if the assistant's, is left open."""

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat format."""


class LocalTokens:
    """A Hugging Face tokenizer from a folder or of an id.

    Raises:
        EvalError: there is none, or it gives no tokens.
    """

    def __init__(self, name: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise EvalError(f"a tokenizer on this machine needs transformers: {INSTALL}") from None
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            self._made = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # transformers raises many kinds
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise EvalError(f"no tokenizer at {name!r}: {reason}") from None
        self._made.model_max_length = 10**9  # longer texts are meant, and cut here
        if not self.encode(PROBE):
            raise EvalError(f"the tokenizer of {name!r} makes no tokens of text")

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones around it."""
        return list(self._made(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """Text of tokens, whose own tokens may be a few more or fewer."""
        return str(self._made.decode(ids, clean_up_tokenization_spaces=False))

    def prefix(self) -> list[int]:
        """Special tokens that a plain text begins with."""
        ids, bare = list(self._made("a")["input_ids"]), self.encode("a")
        return ids[: len(ids) - len(bare)] if bare and ids[-len(bare) :] == bare else []

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat format."""
        return self._made.chat_template is not None

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation in the model's chat format; the last message, if the assistant's, is left open."""
        left_open = messages[-1]["role"] == "assistant"
        text = self._made.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not left_open, continue_final_message=left_open
        )
        return self.encode(text)


class ServerTokens:
    """The tokenizer of a vLLM server, over HTTP: slower, and always the right one."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._chat: bool | None = None

    def _ask(self, **body: Any) -> list[int]:
        found = self._client.post("/tokenize", {"model": self._client.model, **body}).get("tokens")
        if not isinstance(found, list):
            raise EvalError(f"{self._client.url}/tokenize does not answer as vLLM's; name a tokenizer with --tokenizer")
        return [int(token) for token in found]

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without special ones around it."""
        return self._ask(prompt=text, add_special_tokens=False) if text else []

    def prefix(self) -> list[int]:
        """Special tokens that a plain text begins with."""
        ids, bare = self._ask(prompt="a", add_special_tokens=True), self.encode("a")
        return ids[: len(ids) - len(bare)] if bare and ids[-len(bare) :] == bare else []

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat format."""
        if self._chat is None:
            try:
                self.chat([{"role": "user", "content": "a"}])
                self._chat = True
            except EvalError:
                self._chat = False
        return self._chat

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """A conversation in the model's chat format; the last message, if the assistant's, is left open."""
        left_open = messages[-1]["role"] == "assistant"
        return self._ask(messages=messages, add_generation_prompt=not left_open, continue_final_message=left_open)


def open_tokens(client: Client, name: str | None) -> Tokens:
    """The tokenizer named, else the one in the folder that the server's model is in, else the server's.

    Raises:
        EvalError: there is none.
    """
    if name is None and not Path(client.root).is_dir():
        return ServerTokens(client)
    return LocalTokens(name or client.root)


def check_tokens(found: Tokens, client: Client, name: str) -> None:
    """EvalError if the server makes other tokens of text."""
    try:
        theirs = ServerTokens(client).encode(PROBE)
    except EvalError:  # not vLLM's: nothing to compare with
        return
    mine = found.encode(PROBE)
    if mine != theirs:
        raise EvalError(
            f"the tokenizer of {name!r} is not the server's: of a test sentence it makes {len(mine)} tokens, "
            f"{mine[:6]}..., the server {len(theirs)}, {theirs[:6]}...; give the model's own with --tokenizer"
        )


def fingerprint(tokens: Tokens) -> str:
    """Tells tokenizers apart."""
    return hashlib.sha256(repr((tokens.encode(PROBE), tokens.prefix())).encode()).hexdigest()[:12]
