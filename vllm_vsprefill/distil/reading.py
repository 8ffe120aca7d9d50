# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Documents out of files, folders and datasets; a long one comes in pieces, so that no more is read than is wanted.

The ``datasets`` library reads datasets. Its builders for text and JSON lines are not used for files: they hold a text
whole, and their errors name neither the line nor the field.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from vllm_vsprefill.distil.errors import INSTALL, DistilError, first_line
from vllm_vsprefill.distil.options import DataOptions

# A document: text, text in pieces, or token ids.
Document = str | Iterator[str] | list[int]

TEXT_SUFFIXES = {".txt", ".md", ".text", ".rst"}
JSON_SUFFIXES = {".jsonl", ".ndjson"}
TABLE_SUFFIXES = {".parquet"}
KNOWN_SUFFIXES = TEXT_SUFFIXES | JSON_SUFFIXES | TABLE_SUFFIXES
PIECE = 2**18  # characters
_ENCODING = "utf-8-sig"  # a byte-order mark is no part of the text


def read_records(options: DataOptions, note: Callable[[str], None] | None = None) -> Iterator[Document]:
    """Documents as text, or as token ids where a record has ``input_ids`` instead of the field.

    Args:
        options: what to read.
        note: told what is left out.

    Raises:
        DistilError: nothing there, not readable, not valid, or without the field; names the place.
    """
    path = Path(options.data).expanduser()
    unread = [f"--subset {options.subset}"] if options.subset is not None else []
    unread += [f"--split {options.split}"] if options.split != DataOptions.model_fields["split"].default else []
    if unread and path.exists():
        raise DistilError(
            f"--data {path}: {' and '.join(unread)} {'is' if len(unread) == 1 else 'are'} for a dataset by its id; "
            "here all files are read: name the file or folder with those that are meant"
        )
    if path.is_dir():
        yield from _read_folder(path, options.text_field, note or (lambda line: None))
    elif path.exists():
        yield from _read_file(path, options.text_field)
    else:
        yield from _read_dataset(options)


def pieces(file: TextIO, start: str = "") -> Iterator[str]:
    """The text of a file in pieces of about ``PIECE`` characters, ``start`` before it.

    They are cut where tokenizers that work word by word cut in any case: behind the end of a line that no further space
    follows, or before a space.
    """
    text = start
    while more := file.read(PIECE):
        text += more
        while len(text) > PIECE:
            cut = _cut(text)
            yield text[:cut]
            text = text[cut:]
    if text:
        yield text


def _cut(text: str) -> int:
    """Where to end a piece: the last good place in the second half of the first ``PIECE`` characters, else there."""
    for boundary in ("\n", " "):
        at = text.rfind(boundary, 0, PIECE)
        while at > PIECE // 2:
            if boundary == "\n" and not text[at + 1].isspace():
                return at + 1
            if boundary == " " and not text[at + 1].isspace() and not text[at - 1].isspace():
                return at
            at = text.rfind(boundary, 0, at)
    return PIECE


def _read_folder(path: Path, field: str, note: Callable[[str], None]) -> Iterator[Document]:
    files = sorted(
        f for f in path.rglob("*") if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts)
    )
    read = [f for f in files if f.suffix.lower() in KNOWN_SUFFIXES and not _is_card(f)]
    left_out = Counter("dataset card" if _is_card(f) else f.suffix or f.name for f in files if f not in set(read))
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    if not read:
        raise DistilError(
            f"--data {path}: the folder holds no text; expected files ending in {', '.join(sorted(KNOWN_SUFFIXES))}"
            + (f", found {listed}" if listed else "")
        )
    if left_out:
        note(f"{path.resolve().name}: {len(read)} files are read, others are left out: {listed}")
    for file in read:
        yield from _read_file(file, field)


def _is_card(path: Path) -> bool:
    """Whether a file describes a dataset of the Hugging Face hub."""
    if path.name != "README.md":
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"---\n", b"---\r")
    except OSError:
        return False


def _read_file(path: Path, field: str) -> Iterator[Document]:
    with _told(path):
        if path.suffix.lower() in TABLE_SUFFIXES:
            yield from _read_table(path, field)
        elif path.suffix.lower() in JSON_SUFFIXES | {".json"}:
            yield from _read_json_lines(path, field)
        else:
            with path.open(encoding=_ENCODING) as file:
                start = file.read(PIECE + 1)
                if start.count("\0") > len(start) // 8:
                    raise DistilError(f"--data {path}: not UTF-8 text (zero bytes, as of UTF-16); convert it first")
                if len(start) > PIECE:
                    yield _rest(path, file, start)
                elif start.strip():
                    yield start


def _rest(path: Path, file: TextIO, start: str) -> Iterator[str]:
    with _told(path):  # whoever takes the pieces reads the file
        yield from pieces(file, start)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turns what reading a file may raise into a message."""
    try:
        yield
    except UnicodeDecodeError:
        raise DistilError(f"--data {path}: not UTF-8 text (byte {_first_bad_byte(path)}); convert it first") from None
    except OSError as error:
        raise DistilError(f"--data {path}: cannot be read ({error.strerror or first_line(error)})") from None


def _first_bad_byte(path: Path) -> int:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as file:
        while block := file.read(2**16):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                return done - held + error.start
            done += len(block)
    return done


def _read_json_lines(path: Path, field: str) -> Iterator[Document]:
    with path.open(encoding=_ENCODING) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DistilError(
                    f"--data {path}, line {number}: not valid JSON ({error}); expected one JSON object a line"
                ) from None
            yield _document(record, field, f"--data {path}, line {number}")


def _read_table(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DistilError(f"--data {path}: parquet files need the library pyarrow: {INSTALL}") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        with path.open("rb") as file:
            pointer = file.read(20).startswith(b"version https://git")
        hint = "it is a pointer of git-lfs; fetch the files with git lfs pull" if pointer else first_line(error)
        raise DistilError(f"--data {path}: not a parquet file ({hint})") from None
    names = table.schema_arrow.names
    wanted = [name for name in (field, "input_ids") if name in names]
    if not wanted:
        raise DistilError(_no_column(f"--data {path}", field, "is missing", names))
    number = 0
    try:
        for batch in table.iter_batches(batch_size=64, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield _document(record, field, f"--data {path}, record {number}")
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise DistilError(f"--data {path}: damaged behind record {number} ({first_line(error)})") from None


def _no_column(where: str, field: str, kind: str, names: Any) -> str:
    return (
        f"{where}: column {field!r} {kind}; found columns {', '.join(map(repr, names))}; name the one with the text "
        "with --text-field (or give token ids in 'input_ids')"
    )


def _document(record: Any, field: str, where: str) -> Document:
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
        return pieces(io.StringIO(value)) if len(value) > PIECE else value
    ids = record.get("input_ids")
    if value is None and isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < 2**32 for i in ids):
        return ids
    if field in record and value is None and ids is None:
        raise DistilError(f"{where}: {field!r} is null; leave such records out")
    kind = "is missing" if value is None else f"holds {type(value).__name__}, not text"
    raise DistilError(_no_column(where, field, kind, record))


def _read_dataset(options: DataOptions) -> Iterator[Document]:
    name = options.data
    missing = f"--data {name}: no such file or folder"
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).suffix in KNOWN_SUFFIXES:
        raise DistilError(missing)
    try:
        import datasets
    except ImportError:
        raise DistilError(f"{missing}; for a dataset of that id install the library: {INSTALL}") from None
    try:
        stream = datasets.load_dataset(name, options.subset, split=options.split, streaming=True)
        columns = stream.column_names
        if columns is not None and options.text_field not in columns and "input_ids" not in columns:
            raise DistilError(_no_column(f"--data {name}", options.text_field, "is missing", columns))
        for number, record in enumerate(stream):
            yield _document(dict(record), options.text_field, f"--data {name}, record {number}")
    except DistilError:
        raise
    except Exception as error:
        # The library and the clients below it raise many kinds; to the user they are all one.
        raise DistilError(_dataset_problem(options, error) or f"{missing}, {_unreadable(error)}") from None


def _unreadable(error: Exception) -> str:
    return f"and it cannot be read as a dataset ({first_line(error)})"


def _dataset_problem(options: DataOptions, error: Exception) -> str | None:
    """What to choose where a dataset has several configurations or splits; None if that is not the matter."""
    text = str(error)
    choices = ", ".join(re.findall(r"'([^']+)'", "".join(re.findall(r"(?:vailable[^\[]*)\[([^\]]*)\]", text))))
    for start, option, what in (
        ("Config name is missing", "--subset", "it has several configurations"),
        ("BuilderConfig", "--subset", f"it has no configuration {options.subset!r}"),
        ("Bad split", "--split", f"it has no split {options.split!r}"),
        ("Unknown split", "--split", f"it has no split {options.split!r}"),
    ):
        if text.startswith(start):
            return f"--data {options.data}: {what}; choose one with {option}" + (f": {choices}" if choices else "")
    return None
