# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Training text: files, datasets and token ids as sequences of any length, addressed by a position.

A position names a place in the stream for good, so a run that is resumed, or split over several processes, reads what
an uninterrupted run on one process would have read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.options import DataOptions
from vllm_vsprefill.distil.reading import Document, read_records

Ids = npt.NDArray[np.int64]
BATCH = 64
MAX_CHARACTERS = 2**22
"""Of a batch of documents that are tokenised together."""


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
        start: what every sequence begins with, as served prompts do; where a sequence begins at the start of a document
            it may be there already.
    """

    def __init__(self, tokens: npt.NDArray[np.uint32], description: str, start: Sequence[int] = ()) -> None:
        self.tokens, self.description, self.start = tokens, description, np.asarray(start, np.uint32)

    def _cut(self, position: int, length: int) -> npt.NDArray[np.uint32]:
        length = min(length, len(self.tokens))
        start = position % len(self.tokens)
        first = self.tokens[start : start + length]
        return np.concatenate((first, self.tokens[: length - len(first)]))

    def _missing(self, position: int) -> int:
        """Tokens that have to be put before a sequence."""
        count = len(self.start)
        return 0 if np.array_equal(self._cut(position, count), self.start) else count

    def sequence(self, position: int, length: int) -> Ids:
        missing = self._missing(position)
        body = self._cut(position, length - missing)
        return (np.concatenate((self.start, body)) if missing else body).astype(np.int64)

    def after(self, position: int, length: int) -> int:
        return position + min(length - self._missing(position), len(self.tokens))

    def identity(self) -> str:
        return _digest([self.tokens, self.start] if len(self.start) else [self.tokens])


class Documents:
    """One document after the other, cut to length; goes round at the end. Texts begin as served prompts do."""

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


def leading_tokens(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts before any text of a prompt, its beginning-of-text token, say; often none."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    places = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
    return full[: places[0]] if places and plain else []


def tokenise(
    records: Iterable[Document],
    tokenizer: Callable[[], Any],
    max_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[npt.NDArray[np.uint32]], Any]:
    """Documents as token ids, until there are ``max_tokens``; texts begin with what the tokenizer begins a prompt with.

    Args:
        records: text, text in pieces, or ids.
        tokenizer: makes the tokenizer; only called where there is text.
        max_tokens: tokens that suffice.
        progress: told the number of tokens so far.

    Returns:
        The documents, and the tokenizer or None. A document that came in pieces may lack its end.
    """
    documents: list[npt.NDArray[np.uint32]] = []
    made: Any = None
    start: list[int] = []
    total, waiting = 0, list[str]()

    def ids_of(texts: list[str]) -> list[list[int]]:
        nonlocal made, start
        if made is None:
            made = tokenizer()
            start = leading_tokens(made)
        found: list[list[int]] = made(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )["input_ids"]
        return found

    def flush() -> int:
        if not waiting:
            return 0
        ids = ids_of(waiting)
        documents.extend(np.asarray([*start, *d], np.uint32) for d in ids if len(d))
        waiting.clear()
        return sum(map(len, ids))

    for record in records:
        if isinstance(record, str):
            waiting.append(record)
            enough = min(MAX_CHARACTERS, 8 * (max_tokens - total))  # tokens rarely have more than 8 characters
            if len(waiting) == BATCH or sum(map(len, waiting)) >= enough:
                total += flush()
        elif isinstance(record, list):
            if record:
                documents.append(np.asarray(record, np.uint32))
                total += len(record)
        else:
            total += flush()
            parts: list[npt.NDArray[np.uint32]] = []
            for piece in filter(str.strip, record):
                ids = np.asarray(ids_of([piece])[0], np.uint32)
                parts.append(ids)
                total += len(ids)
                if progress is not None:
                    progress(total)
                if total >= max_tokens:
                    break
            if any(map(len, parts)):
                documents.append(np.concatenate((np.asarray(start, np.uint32), *parts)))
        if progress is not None:
            progress(total)
        if total >= max_tokens:
            break
    flush()
    return documents, made


def _name(data: str) -> str:
    """A dataset's id, or the name of a file or folder: paths of one machine do not belong in a checkpoint."""
    path = Path(data).expanduser()
    return path.resolve().name if path.exists() else data


def _start(made: Any, tokenizer: Callable[[], Any]) -> list[int]:
    """What sequences begin with; nothing where there are only token ids and no tokenizer."""
    try:
        return leading_tokens(made if made is not None else tokenizer())
    except DistilError:
        return []


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
    note: Callable[[str], None] | None = None,
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
        note: told what is left out.

    Raises:
        DistilError: no text, too little of it, or ids that the model does not know.
    """
    documents, made = tokenise(read_records(options, note), tokenizer, max_tokens, progress)
    if not documents:
        raise DistilError(f"--data {options.data}: no text in it; expected at least {min_length} tokens")
    start = _start(made, tokenizer) if packing else []
    largest = max(*start, *(int(d.max()) for d in documents), 0)
    if largest >= vocabulary:
        raise DistilError(
            f"--data {options.data}: token id {largest} is beyond the model's {vocabulary} embeddings; the tokenizer "
            "(or the stored input_ids) belongs to another model, give the right one with --tokenizer"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    documents = [documents[i] for i in order]
    total = sum(map(len, documents))
    what = f"{_name(options.data)}: {len(documents)} documents, {total:,} tokens"
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
        return PackedTokens(tokens, what, start), PackedTokens(tokens, what, start)
    held = max(round(validation_share * len(tokens)), min(max_length, len(tokens) // 5))
    if min(held, len(tokens) - held) < min_length:
        raise DistilError(
            f"--data {options.data}: too little text: {len(tokens):,} tokens, of which {held:,} are held out for "
            f"validation, but the shortest sequences have {min_length}; give more text or lower --min-length"
        )
    return PackedTokens(tokens[held:], what, start), PackedTokens(tokens[:held], f"{what}, held out", start)
