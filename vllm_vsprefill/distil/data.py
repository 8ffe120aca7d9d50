# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Training text: files, datasets and token ids as sequences of any length, addressed by a position.

A position names a place in the stream for good, so a run that is resumed, or split over several processes, reads what
an uninterrupted run on one process would have read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vllm_vsprefill.distil.errors import INSTALL, DistilError, first_line
from vllm_vsprefill.distil.options import DataOptions

Ids = npt.NDArray[np.int64]
TEXT_SUFFIXES = {".txt", ".md", ".text", ".rst"}
JSON_SUFFIXES = {".jsonl", ".ndjson"}
BATCH = 64


class Source(Protocol):
    """A stream of token sequences."""

    description: str

    def sequence(self, position: int, length: int) -> Ids:
        """At most ``length`` token ids at a position."""

    def after(self, position: int, length: int) -> int:
        """The position behind that sequence."""

    def identity(self) -> str:
        """Changes when the stream's content does."""


class PackedTokens:
    """Documents laid end to end, an end-of-text token between them; goes round at the end.

    Args:
        tokens: ids, ``[N]``.
        description: for people to read.
    """

    def __init__(self, tokens: npt.NDArray[np.uint32], description: str) -> None:
        self.tokens, self.description = tokens, description

    def sequence(self, position: int, length: int) -> Ids:
        length = min(length, len(self.tokens))
        start = position % len(self.tokens)
        first = self.tokens[start : start + length]
        return np.concatenate((first, self.tokens[: length - len(first)])).astype(np.int64)

    def after(self, position: int, length: int) -> int:
        return position + min(length, len(self.tokens))

    def identity(self) -> str:
        return _digest([self.tokens])


class Documents:
    """One document after the other, cut to length; goes round at the end."""

    def __init__(self, documents: list[npt.NDArray[np.uint32]], description: str) -> None:
        self.documents, self.description = documents, description

    def sequence(self, position: int, length: int) -> Ids:
        return self.documents[position % len(self.documents)][:length].astype(np.int64)

    def after(self, position: int, length: int) -> int:
        del length
        return position + 1

    def identity(self) -> str:
        return _digest(self.documents)


def _digest(arrays: Iterable[npt.NDArray[np.uint32]]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


# ----------------------------------------------------------------------------------------------------------------------
# reading


def read_records(options: DataOptions) -> Iterator[str | list[int]]:
    """Documents as text, or as token ids where a JSON record has ``input_ids`` instead of the field.

    Raises:
        DistilError: nothing there, not readable, not valid, or without the field; names the place.
    """
    path = Path(options.data).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in TEXT_SUFFIXES | JSON_SUFFIXES)
        if not files:
            raise DistilError(
                f"--data {path}: the folder holds no text; expected files ending in "
                f"{', '.join(sorted(TEXT_SUFFIXES | JSON_SUFFIXES))}"
            )
        for file in files:
            yield from _read_file(file, options.text_field)
    elif path.exists():
        yield from _read_file(path, options.text_field)
    else:
        yield from _read_dataset(options)


def _read_file(path: Path, field: str) -> Iterator[str | list[int]]:
    if path.suffix.lower() in JSON_SUFFIXES | {".json"}:
        yield from _read_json_lines(path, field)
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DistilError(f"--data {path}: not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise DistilError(f"--data {path}: cannot be read ({error.strerror})") from None
    if text.strip():
        yield text


def _read_json_lines(path: Path, field: str) -> Iterator[str | list[int]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise DistilError(
                        f"--data {path}, line {number}: not valid JSON ({error}); expected one JSON object a line"
                    ) from None
                yield _document(record, field, f"--data {path}, line {number}")
    except UnicodeDecodeError as error:
        raise DistilError(f"--data {path}: not UTF-8 text ({error.reason}); convert it first") from None
    except OSError as error:
        raise DistilError(f"--data {path}: cannot be read ({error.strerror})") from None


def _document(record: Any, field: str, where: str) -> str | list[int]:
    if not isinstance(record, dict):
        raise DistilError(f"{where}: expected a JSON object, found {type(record).__name__}")
    value = record.get(field)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DistilError(
                f"{where}: character {error.start} of {field!r} is half of a surrogate pair, which no tokenizer takes"
            ) from None
        return value
    ids = record.get("input_ids")
    if value is None and isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < 2**32 for i in ids):
        return ids
    kind = "is missing" if value is None else f"holds {type(value).__name__}, not text"
    raise DistilError(
        f"{where}: column {field!r} {kind}; found columns {', '.join(map(repr, record))}; name the one with the text "
        "with --text-field (or give token ids in 'input_ids')"
    )


def _read_dataset(options: DataOptions) -> Iterator[str | list[int]]:
    name = options.data
    missing = f"--data {name}: no such file or folder"
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in TEXT_SUFFIXES | JSON_SUFFIXES:
        raise DistilError(missing)
    try:
        import datasets
    except ImportError:
        raise DistilError(f"{missing}; for a dataset of that id install the library: {INSTALL}") from None
    try:
        stream = datasets.load_dataset(name, options.subset, split=options.split, streaming=True)
        columns = stream.column_names
        if columns is not None and options.text_field not in columns and "input_ids" not in columns:
            raise DistilError(
                f"--data {name}: it has no column {options.text_field!r}; found columns "
                f"{', '.join(map(repr, columns))}; name the one with the text with --text-field"
            )
        for number, record in enumerate(stream):
            yield _document(dict(record), options.text_field, f"--data {name}, record {number}")
    except DistilError:
        raise
    except Exception as error:
        # The library and the clients below it raise many kinds; to the user they are all one.
        raise DistilError(f"{missing}, and it cannot be read as a dataset ({first_line(error)})") from None


def tokenise(
    records: Iterable[str | list[int]],
    tokenizer: Callable[[], Any],
    max_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[npt.NDArray[np.uint32]], Any]:
    """Documents as token ids, until there are ``max_tokens``.

    Args:
        records: text or ids.
        tokenizer: makes the tokenizer; only called where there is text.
        max_tokens: tokens that suffice.
        progress: told the number of tokens so far.

    Returns:
        The documents, and the tokenizer or None.
    """
    documents: list[npt.NDArray[np.uint32]] = []
    made: Any = None
    total, waiting = 0, list[str]()

    def flush() -> int:
        nonlocal made
        if not waiting:
            return 0
        made = made or tokenizer()
        ids = made(waiting, add_special_tokens=False, verbose=False)["input_ids"]
        documents.extend(np.asarray(d, np.uint32) for d in ids if len(d))
        waiting.clear()
        return sum(map(len, ids))

    for record in records:
        if isinstance(record, str):
            waiting.append(record)
            if len(waiting) == BATCH or sum(map(len, waiting)) > 2**22:
                total += flush()
        elif record:
            documents.append(np.asarray(record, np.uint32))
            total += len(record)
        if progress is not None:
            progress(total)
        if total >= max_tokens:
            break
    flush()
    return documents, made


def open_sources(
    options: DataOptions,
    tokenizer: Callable[[], Any],
    *,
    min_length: int,
    max_length: int,
    vocabulary: int,
    max_tokens: int,
    packing: bool = True,
    validation_share: float = 0.02,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Source, Source]:
    """Training and held-out streams.

    Args:
        options: what to read.
        tokenizer: makes the model's tokenizer.
        min_length: shortest sequence that will be asked for.
        max_length: longest sequence that will be asked for.
        vocabulary: rows of the model's embedding.
        max_tokens: tokens that suffice for the run.
        packing: cut sequences from documents laid end to end; otherwise one document is one sequence.
        validation_share: share of the tokens held out; 0, with packing: none, both streams are all of the text.
        seed: of the order of documents.
        progress: told the number of tokens read.

    Raises:
        DistilError: no text, too little of it, or ids that the model does not know.
    """
    documents, made = tokenise(read_records(options), tokenizer, max_tokens, progress)
    if not documents:
        raise DistilError(f"--data {options.data}: no text in it; expected at least {min_length} tokens")
    largest = max(int(d.max()) for d in documents)
    if largest >= vocabulary:
        raise DistilError(
            f"--data {options.data}: token id {largest} is beyond the model's {vocabulary} embeddings; the tokenizer "
            "(or the stored input_ids) belongs to another model, give the right one with --tokenizer"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    documents = [documents[i] for i in order]
    total = sum(map(len, documents))
    what = f"{options.data}: {len(documents)} documents, {total:,} tokens"
    if not packing:
        long = [d for d in documents if len(d) >= min_length]
        if len(long) < 2:
            raise DistilError(
                f"--data {options.data}: with --no-packing at least 2 documents of {min_length} tokens are needed, "
                f"found {len(long)} (longest: {max(map(len, documents))}); lower --min-length or leave packing on"
            )
        held = max(1, round(validation_share * len(long)))
        return Documents(long[held:], what), Documents(long[:held], f"{what}, held out")
    end = getattr(made, "eos_token_id", None)
    gap = [np.asarray([end], np.uint32)] if isinstance(end, int) and end < vocabulary else []
    tokens = np.concatenate([piece for d in documents for piece in (d, *gap)])
    if validation_share == 0:
        if len(tokens) < min_length:
            raise DistilError(
                f"--data {options.data}: too little text: {len(tokens):,} tokens, but the shortest sequences have "
                f"{min_length:,}; give more text"
            )
        return PackedTokens(tokens, what), PackedTokens(tokens, what)
    held = max(round(validation_share * len(tokens)), min(max_length, len(tokens) // 5))
    if min(held, len(tokens) - held) < min_length:
        raise DistilError(
            f"--data {options.data}: too little text: {len(tokens):,} tokens, of which {held:,} are held out for "
            f"validation, but the shortest sequences have {min_length}; give more text or lower --min-length"
        )
    return PackedTokens(tokens[held:], what), PackedTokens(tokens[:held], f"{what}, held out")
