# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Prompts cut from a person's own text."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.tokens import Tokens

SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".c", ".h", ".cc", ".cpp", ".go", ".rs", ".js", ".ts", ".java"})
MAX_CHARACTERS = 4_000_000  # of one file: enough for a million tokens, and read at once
_ENCODING = "utf-8-sig"  # a byte-order mark is no part of the text


@dataclass(frozen=True)
class Text:
    """One document, and what reports call it."""

    name: str
    content: str

    @property
    def digest(self) -> str:
        """Tells its content from others."""
        return hashlib.sha256(self.content.encode()).hexdigest()[:12]


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """The files, and those with a known suffix below the folders; without any, Python's standard library.

    Files of one folder are one document: a folder of sources is one long text.

    Raises:
        EvalError: every path that is not there, holds no text or is not UTF-8.
    """
    if not paths:
        return [_joined("the source of Python's standard library", _sources(Path(sysconfig.get_path("stdlib"))))]
    found, problems = [], []
    for path in paths:
        try:
            if path.is_dir():
                files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
                if not files:
                    problems.append(f"{path}: no files of text ({', '.join(sorted(SUFFIXES))})")
                    continue
                found.append(_joined(path.name, files))
            else:
                with path.open(encoding=_ENCODING) as file:
                    found.append(Text(path.name, file.read(MAX_CHARACTERS)))
            if not found[-1].content.strip():
                problems.append(f"{path}: it is empty")
        except UnicodeDecodeError:
            problems.append(f"{path}: it is not text in UTF-8")
        except OSError as error:
            problems.append(f"{path}: {(error.strerror or str(error)).lower()}")
    if problems:
        raise EvalError("--data:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return found


def _sources(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.py"))


def _joined(name: str, files: list[Path]) -> Text:
    parts, size = [], 0
    for file in files:
        parts.append(file.read_text(encoding=_ENCODING, errors="replace"))
        size += len(parts[-1])
        if size > MAX_CHARACTERS:
            break
    return Text(name, "\n\n".join(parts)[:MAX_CHARACTERS])


@dataclass(frozen=True)
class Prompt:
    """Some tokens of a text."""

    text: str
    ids: list[int]


def _spread(number: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8, ...: any first few lie evenly in [0, 1) (van der Corput)."""
    share, step = 0.0, 0.5
    while number:
        number, bit = divmod(number, 2)
        share += bit * step
        step /= 2
    return share


class Cutter:
    """Cuts prompts from texts, each tokenized once."""

    def __init__(self, texts: Sequence[Text], tokens: Tokens) -> None:
        self._texts, self._tokens = texts, tokens
        self._ids: list[list[int]] = []

    def cut(self, length: int, index: int) -> Prompt:
        """The prompt of ``length`` tokens with a number: from the texts in turn, spread evenly over each.

        Raises:
            EvalError: every text that is shorter.
        """
        prefix = self._tokens.prefix()
        body = length - len(prefix)
        if not self._ids:
            self._ids = [self._tokens.encode(text.content) for text in self._texts]
        short = [f"{t.name} has {len(ids):,}" for t, ids in zip(self._texts, self._ids, strict=True) if len(ids) < body]
        if short:
            raise EvalError(
                f"prompts of {length:,} tokens are longer than the text: {', '.join(short)}; give longer texts"
            )
        number, which = divmod(index, len(self._ids))
        ids = self._ids[which]
        begin = int((len(ids) - body) * _spread(number))
        return Prompt(self._texts[which].name, [*prefix, *ids[begin : begin + body]])
