# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Prompts of a measurement, cut from text: the same ones again from the same seed, no two that begin alike.

In the open loop some requests go on from a document that others have asked about, too: three quarters of such a prompt
are the document's, so a server finds them in its prefix cache once the first of these requests is computed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.texts import Text
from vllm_vsprefill.eval.tokens import LocalTokens

SHARED = 0.75
"""Part of a prompt that is its document's."""

NEW_DOCUMENT = 0.25
"""Share of the requests about documents that bring one nobody has asked about yet."""

OPEN_DOCUMENTS = 8
"""The latest documents, about which requests ask."""

FITS = 6  # tries to cut a text whose tokens come out differently once it is cut


class Request(NamedTuple):
    """A prompt.

    Attributes:
        length: tokens of prompt and answer together, at most.
        text: of the prompt.
        document: number of the document that it goes on from; -1 where there is none.
    """

    length: int
    text: str
    document: int = -1


class Prompts:
    """Makes prompts.

    Args:
        texts: what they are cut from.
        tokens: of the model.
        seed: of everything drawn.
        answer: tokens left for the answer.
    """

    def __init__(self, texts: Sequence[Text], tokens: LocalTokens, seed: int, answer: int) -> None:
        self._tokens, self._seed = tokens, seed
        self._room = answer + len(tokens.prefix())
        self._texts = texts

    @cached_property
    def _ids(self) -> list[int]:
        return [token for text in self._texts for token in self._tokens.encode(text.content)]

    def check(self, lengths: Sequence[int]) -> None:
        """EvalError if the text is too short for a length."""
        if max(lengths) > len(self._ids):
            raise EvalError(
                f"prompts of {max(lengths):,} tokens are longer than the text, which has {len(self._ids):,}; give "
                "longer texts with --data"
            )

    def closed(self, length: int, first: int, last: int) -> list[Request]:
        """Prompts of one length by their numbers; the last one is not among them."""
        return [
            Request(length, self._text(length, f"Text {length}-{number}", f"closed/{length}/{number}"))
            for number in range(first, last)
        ]

    def opened(self, lengths: Sequence[int], share: float, count: int) -> list[Request]:
        """The first requests of an endless row of mixed lengths.

        Args:
            lengths: all equally often.
            share: of the requests that go on from a document.
            count: how many.
        """
        rng = self._random("open", share, *lengths)
        documents: list[tuple[int, str]] = []
        found: list[Request] = []
        for number in range(count):
            length, shares, new, which = rng.choice(lengths), rng.random() < share, rng.random(), rng.random()
            if not shares:
                found.append(Request(length, self._text(length, f"Text {number}", f"open/{number}")))
                continue
            if not documents or new < NEW_DOCUMENT:
                key = f"document/{len(documents)}"
                whole = self._text(length, f"Document {len(documents)}", key, SHARED)
                documents.append((length, whole))
            latest = range(max(len(documents) - OPEN_DOCUMENTS, 0), len(documents))
            chosen = latest[int(which * len(latest))] if documents and new >= NEW_DOCUMENT else len(documents) - 1
            length, begin = documents[chosen]
            found.append(
                Request(length, self._text(length, f"\n\nPart {number}", f"open/{number}", 1.0, begin), chosen)
            )
        return found

    def _random(self, *parts: object) -> random.Random:
        return random.Random("/".join(map(str, (self._seed, *parts))))  # of text: the same on every platform

    def _text(self, length: int, name: str, key: str, part: float = 1.0, begin: str = "") -> str:
        """A text that fills a part of a length, some of which may be there already."""
        limit = int((length - self._room) * part)
        at = self._random(key).randrange(max(len(self._ids) - limit, 0) + 1)
        text = f"{begin}{name}:\n"
        text += self._tokens.decode(self._ids[at : at + max(limit - len(self._tokens.encode(text)), 0)])
        for _ in range(FITS):
            ids = self._tokens.encode(text)
            if len(ids) <= limit:
                return text
            text = self._tokens.decode(ids[: limit - max(len(ids) - limit, 0) // 8])
        raise EvalError(
            f"no prompt of {length:,} tokens could be cut: the tokenizer makes more tokens of a text than made it"
        )
