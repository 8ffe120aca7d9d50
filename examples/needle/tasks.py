# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""RULER-style retrieval problems for the needle model, as text and as token ids.

Five tasks, after RULER (arXiv 2404.06654): ``single`` (one needle), ``multi_key`` (one asked among many),
``multi_value`` (one key, several values), ``multi_query`` (several keys in one question) and ``variable_tracking``
(a chain of assignments). Two haystacks: ``repeat`` (one passage over and over) and ``words`` (random words).

:func:`make_problem` builds what is evaluated: one user message of an exact number of tokens, haystack first, one
question at its end. :func:`training_sequence` builds conversations with many questions about one haystack, from the
same pieces, so that both share one surface form.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from examples.needle.vocabulary import ASSISTANT, END, IDS, UNK, USER, decode, encode
from examples.needle.words import FILLER, PLACES, SENTENCES, VARIABLES

Task = Literal["single", "multi_key", "multi_value", "multi_query", "variable_tracking"]
Haystack = Literal["repeat", "words"]
TASKS: tuple[Task, ...] = ("single", "multi_key", "multi_value", "multi_query", "variable_tracking")
HAYSTACKS: tuple[Haystack, ...] = ("repeat", "words")
# Room kept for the answer when a problem "of L tokens" is asked for: prompt and answer together fit in L.
ANSWER_ROOM = 64
# The question and the template's tokens around it take fewer tokens than this.
MAX_QUESTION_TOKENS = 56

# What a token is to the training loss. "Counted" are the answer tokens that must be retrieved, by which accuracy is
# measured during training: not the punctuation, nor the keys repeated from the question.
KIND_NONE, KIND_TEXT, KIND_ANSWER, KIND_COUNTED = 0, 1, 2, 3  # KIND_COUNTED + index of the task

Ids = np.ndarray[Any, np.dtype[np.uint16]]
_COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def _ids(text: str) -> Ids:
    return np.asarray(encode(text), dtype=np.uint16)


_USER, _END = np.asarray([IDS[USER]], np.uint16), np.asarray([IDS[END]], np.uint16)
_TO_ASSISTANT = np.asarray([IDS[END], IDS[ASSISTANT]], np.uint16)
_FILLER = np.asarray([IDS["▁" + w] for w in FILLER], np.uint16)
_PLACE = np.asarray([IDS["▁" + w] for w in PLACES], np.uint16)
_VARIABLE = np.asarray([IDS["▁" + w] for w in VARIABLES], np.uint16)
_NUMBER = np.asarray([IDS[f"▁{i:03d}"] for i in range(1000)], np.uint16)
_THE, _ONE, _IS = _ids("The magic number for"), _ids("One magic number for"), _ids("is")
_VAR, _EQUALS, _EQUALS_VAR = _ids("VAR"), _ids("="), _ids("= VAR")
_DOT, _COMMA, _SEMICOLON, _COLON, _MARK = (np.asarray([IDS[c]], np.uint16) for c in ".,;:?")
_ASK_ONE = _ids("Question: What is the magic number for")
_ASK_KEYS = _ids("Question: What are the magic numbers for")
_ASK_VALUES = {n: _ids(f"Question: What are the {w} magic numbers for") for n, w in _COUNT_WORDS.items()}
_ASK_CHAIN = {n: _ids(f"Question: Which {w} variables hold") for n, w in _COUNT_WORDS.items()}
_SENTENCE = [_ids(s) for s in SENTENCES]


@dataclass(slots=True)
class Group:
    """Needles that belong to one question, with the question and its answer as token ids."""

    task: int  # index into TASKS
    needles: list[Ids]  # in the order in which they must appear
    question: Ids
    answer: Ids  # without the end token
    kinds: np.ndarray[Any, np.dtype[np.uint8]]  # of the answer's tokens
    answers: list[str]


class _Names:
    """Hands out keys, variable names and values, each once per context."""

    def __init__(self, rng: np.random.Generator, expected: int) -> None:
        # A full permutation costs more than a short context's whole generation; draw what is likely to be used.
        want = min(len(PLACES), 4 * expected + 8)
        self.places = rng.choice(len(PLACES), want, replace=False).tolist()
        self.variables = rng.choice(len(VARIABLES), min(len(VARIABLES), 5 * expected + 8), replace=False).tolist()
        # Three digits, one token; no value occurs twice.
        self.values = (rng.choice(900, min(900, 5 * expected + 8), replace=False) + 100).tolist()


def _needle(lead: Ids, key: int, value: int) -> Ids:
    return np.concatenate((lead, _PLACE[key : key + 1], _IS, _NUMBER[value : value + 1], _DOT))


def _group(rng: np.random.Generator, names: _Names, task: Task, count: int) -> Group:
    """One group; ``count`` is the number of values, of keys or of variables, and ignored for one key, one value."""
    index = TASKS.index(task)
    counted = KIND_COUNTED + index
    if task == "variable_tracking":
        chain = [names.variables.pop() for _ in range(count)]
        value = names.values.pop()
        number = _NUMBER[value : value + 1]
        needles = [np.concatenate((_VAR, _VARIABLE[chain[0] : chain[0] + 1], _EQUALS, number, _DOT))]
        for before, name in itertools.pairwise(chain):
            needles.append(
                np.concatenate((_VAR, _VARIABLE[name : name + 1], _EQUALS_VAR, _VARIABLE[before : before + 1], _DOT))
            )
        question = np.concatenate((_ASK_CHAIN[count], number, _MARK))
        answer: list[int] = []
        for name in chain:
            answer += [int(_VARIABLE[name]), int(_COMMA[0])]
        answer[-1] = int(_DOT[0])
        kinds = [counted, KIND_ANSWER] * count
        return Group(index, needles, question, _array(answer), _kinds(kinds), [VARIABLES[name] for name in chain])

    keys = [names.places.pop() for _ in range(count if task == "multi_query" else 1)]
    values = [names.values.pop() for _ in range(count if task in ("multi_value", "multi_query") else 1)]
    if task == "multi_value":
        needles = [_needle(_ONE, keys[0], value) for value in values]
        question = np.concatenate((_ASK_VALUES[count], _PLACE[keys], _MARK))
        # Any order is right. A random one leaves no order to learn: the model reads the values off as a set.
        values = [values[i] for i in rng.permutation(count)]
        answer = [int(_PLACE[keys[0]]), int(_COLON[0])]
        kinds = [KIND_ANSWER] * 2
        for i, value in enumerate(values):
            answer += [int(_NUMBER[value]), int((_DOT if i == count - 1 else _COMMA)[0])]
            # Which value comes next is a free choice, except for the last.
            kinds += [counted if i == count - 1 else KIND_ANSWER, KIND_ANSWER]
        return Group(index, needles, question, _array(answer), _kinds(kinds), [str(v) for v in values])

    needles = [_needle(_THE, key, value) for key, value in zip(keys, values, strict=True)]
    if task == "multi_query":
        listed: list[Ids] = []
        for key in keys:
            listed += [_PLACE[key : key + 1], _COMMA]
        question = np.concatenate((_ASK_KEYS, *listed[:-1], _MARK))
    else:
        question = np.concatenate((_ASK_ONE, _PLACE[keys], _MARK))
    answer = []
    for key, value in zip(keys, values, strict=True):
        answer += [int(_PLACE[key]), int(_COLON[0]), int(_NUMBER[value]), int(_SEMICOLON[0])]
    answer[-1] = int(_DOT[0])
    rng.shuffle(needles)
    kinds = [KIND_ANSWER, KIND_ANSWER, counted, KIND_ANSWER] * len(keys)
    return Group(index, needles, question, _array(answer), _kinds(kinds), [str(v) for v in values])


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, np.uint16)


def _kinds(kinds: Sequence[int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(kinds, np.uint8)


def _repeat(passage: Ids, length: int) -> Ids:
    return np.tile(passage, length // len(passage) + 1)[:length]


def _assemble(first: Ids, filler: Ids, events: list[tuple[int, int, list[Ids]]]) -> list[Ids]:
    """Insert each event's pieces into the filler at its position; ties keep the order of the second field."""
    events.sort(key=lambda event: event[:2])
    pieces, last = [first], 0
    for position, _, inserted in events:
        if position > last:
            pieces.append(filler[last:position])
            last = position
        pieces += inserted
    pieces.append(filler[last:])
    return pieces


# -- evaluation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """One evaluated problem. ``prompt_ids`` is the chat-formatted prompt, up to and including the assistant's mark."""

    task: Task
    haystack: Haystack
    context: str
    question: str
    answers: tuple[str, ...]
    answer_text: str
    prompt_ids: Ids
    answer_ids: Ids  # with the end token
    needle_positions: tuple[int, ...]  # of each asked needle's first token, in prompt_ids

    @property
    def content(self) -> str:
        """The user message."""
        return f"{self.context} {self.question}"

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.content}]

    def is_correct(self, answer: str) -> bool:
        """Whether ``answer`` is exactly right: the very text, the values of ``multi_value`` in any order."""
        answer = answer.replace(END, "").strip()
        if self.task != "multi_value":
            return answer == self.answer_text
        numbers = re.findall(r"\d+", answer)
        shape = re.sub(r"\d+", "0", answer) == re.sub(r"\d+", "0", self.answer_text)
        return shape and sorted(numbers) == sorted(self.answers)


def make_problem(
    rng: np.random.Generator,
    task: Task,
    haystack: Haystack,
    prompt_tokens: int,
    *,
    distractors: int | None = None,
    depth: float | None = None,
) -> Problem:
    """A problem whose chat-formatted prompt takes exactly ``prompt_tokens`` tokens.

    ``distractors`` is the number of further needle groups nobody asks about (default: none for ``single``, 3 to 63
    for ``multi_key``, up to 15 for the others, fewer in short prompts). ``depth`` in [0, 1] places every asked needle
    at that share of the haystack; by default each lies anywhere. Raises ValueError if the prompt is too short.
    """
    room = max(0, (prompt_tokens - 120) // 24)
    if distractors is None:
        low, high = {"single": (0, 0), "multi_key": (3, 63)}.get(task, (0, 15))
        distractors = int(np.exp(rng.uniform(np.log(low + 1), np.log(high + 2)))) - 1
        distractors = min(max(distractors, low), max(room, 1) if task != "single" else 0)
    names = _Names(rng, distractors + 2)
    asked = _group(rng, names, task, {"multi_value": 4, "multi_query": 4, "variable_tracking": 5}.get(task, 1))
    pieces: list[tuple[Ids, ...]] = [tuple(asked.needles)]
    for _ in range(distractors):
        # A chain is hidden among other chains, a key among other keys.
        if task == "variable_tracking":
            other = _group(rng, names, task, 3)
        else:
            other = _group(rng, names, "single", 1)
        pieces.append(tuple(other.needles))
    tail = np.concatenate((asked.question, _TO_ASSISTANT))
    length = prompt_tokens - 1 - len(tail) - sum(len(n) for group in pieces for n in group)
    if length < 0:
        raise ValueError(f"{prompt_tokens} tokens cannot hold a {task} problem with {distractors} distractors")
    if haystack == "repeat":
        passage = _SENTENCE[int(rng.integers(len(_SENTENCE)))]
        filler = _repeat(passage, length)
        places = np.arange(0, length + 1, len(passage))
    else:
        filler = _FILLER[rng.integers(len(_FILLER), size=length)]
        places = np.arange(0, length + 1)
    events: list[tuple[int, int, list[Ids]]] = []
    order = 0
    for number, group in enumerate(pieces):
        where = np.sort(places[rng.integers(len(places), size=len(group))])
        if depth is not None and number == 0:
            where = np.full(len(group), places[round(depth * (len(places) - 1))])
        for position, needle in zip(where.tolist(), group, strict=True):
            events.append((position, order, [needle]))
            order += 1
    body = _assemble(_USER, filler, events)
    positions, offset = [], 0
    asked_ids = {id(needle) for needle in asked.needles}
    for piece in body:
        if id(piece) in asked_ids:
            positions.append(offset)
        offset += len(piece)
    prompt = np.concatenate((*body, tail))
    return Problem(
        task=task,
        haystack=haystack,
        context=decode(np.concatenate(body[1:]).tolist()),
        question=decode(asked.question.tolist()),
        answers=tuple(asked.answers),
        answer_text=decode(asked.answer.tolist()),
        prompt_ids=prompt,
        answer_ids=np.concatenate((asked.answer, _END)),
        needle_positions=tuple(positions),
    )


# -- training ------------------------------------------------------------------------------------------------------


def _training_filler(rng: np.random.Generator, length: int) -> tuple[Ids, int]:
    """Filler tokens and the grain at which needles may be inserted."""
    kind = rng.random()
    if kind < 0.5:  # a repeated passage: a stored one, or random words
        if rng.random() < 0.3:
            passage = _SENTENCE[int(rng.integers(len(_SENTENCE)))]
        else:
            words = _FILLER[rng.integers(len(_FILLER), size=int(rng.integers(5, 30)))]
            passage = np.concatenate((words, _DOT))
        return _repeat(passage, length), len(passage) if rng.random() < 0.7 else 1
    filler = _FILLER[rng.integers(len(_FILLER), size=length)]
    if kind > 0.9:  # a person's own text: mostly words that the vocabulary lacks
        filler = np.where(rng.random(length) < rng.uniform(0.2, 0.9), np.uint16(IDS[UNK]), filler)
    if rng.random() < 0.4:
        filler = np.where(rng.random(length) < rng.uniform(0.02, 0.12), _DOT[0], filler)
    return filler, 1


_TRAINING_MIX: tuple[tuple[Task, float], ...] = (
    ("single", 0.32),
    ("multi_value", 0.22),
    ("multi_query", 0.18),
    ("variable_tracking", 0.28),
)
_MIX_TASKS = [task for task, _ in _TRAINING_MIX]
_MIX_EDGES = np.cumsum([share for _, share in _TRAINING_MIX])


def training_sequence(rng: np.random.Generator, length: int) -> tuple[Ids, np.ndarray[Any, np.dtype[np.uint8]]]:
    """A conversation of exactly ``length`` tokens and what each token is to the loss (``KIND_*``).

    Each needle is asked about at most once, at a random later distance or, in most sequences, after the whole
    haystack; how many needles there are varies from one to as many as fit.
    """
    most = max(1, min(200, length // 36))
    if rng.random() < 0.5:  # as few as in an evaluated problem
        target = int(rng.integers(1, min(20, most) + 1))
    else:
        target = int(np.exp(rng.uniform(0, np.log(most + 1))))
    names = _Names(rng, target)
    asked_share = 1.0 if rng.random() < 0.6 else float(rng.uniform(0.2, 1.0))
    counts = rng.integers(2, 6, size=target).tolist()
    kinds_of_task = np.searchsorted(_MIX_EDGES, rng.random(target) * _MIX_EDGES[-1]).tolist()
    ask = (rng.random(target) < asked_share).tolist()
    ask[0] = True
    # What a group costs in tokens beside the filler; groups are added while some filler is left.
    budget = length - 1 - max(16, int(length * rng.uniform(0.02, 0.5)))
    groups: list[tuple[Group, bool]] = []
    for count, which, asked in zip(counts, kinds_of_task, ask, strict=True):
        task = _MIX_TASKS[which]
        size = count if task == "variable_tracking" else min(count, 4)
        if len(names.places) < 4 or len(names.variables) < 5 or len(names.values) < 5:
            break
        group = _group(rng, names, task, size)
        cost = sum(map(len, group.needles))
        if asked:
            cost += len(group.question) + len(group.answer) + 4
        if cost > budget:
            if groups:
                break
            continue
        budget -= cost
        groups.append((group, asked))
    used = sum(sum(map(len, g.needles)) + (len(g.question) + len(g.answer) + 4 if asked else 0) for g, asked in groups)
    filler, grain = _training_filler(rng, length - 1 - used)
    slots = len(filler) // grain + 1
    at_end = rng.random() < 0.75
    events: list[tuple[int, int, list[Ids]]] = []
    turns: list[tuple[int, Group]] = []
    order = 0
    spots = rng.random((len(groups), 8))
    for i, (group, asked) in enumerate(groups):
        where = np.sort((spots[i, : len(group.needles)] * slots).astype(np.int64) * grain).tolist()
        for position, needle in zip(where, group.needles, strict=True):
            events.append((position, order, [needle]))
            order += 1
        if asked:
            last = where[-1]
            turns.append((len(filler) if at_end else last + int(spots[i, 7] * (len(filler) + 1 - last)), group))
    for i in rng.permutation(len(turns)).tolist():
        position, group = turns[i]
        answer_mark = (group.question, _TO_ASSISTANT, group.answer, _END, _USER)
        events.append((position, order, list(answer_mark)))
        order += 1
    pieces = _assemble(_USER, filler, events)
    ids = np.concatenate(pieces)
    kinds = np.full(length, KIND_TEXT, np.uint8)
    # Each answer's kinds go where its tokens went; the answers are recognised by identity.
    answers = {id(group.answer): group.kinds for _, group in turns}
    offset = 0
    for piece in pieces:
        found = answers.get(id(piece))
        if found is not None:
            kinds[offset : offset + len(piece)] = found
            kinds[offset + len(piece)] = KIND_ANSWER  # the end token
        offset += len(piece)
    return ids, kinds


def training_batch(
    rng: np.random.Generator, length: int, tokens: int
) -> tuple[np.ndarray[Any, np.dtype[np.uint16]], np.ndarray[Any, np.dtype[np.uint8]]]:
    """``tokens // length`` sequences: ids and kinds, each [batch, length]."""
    rows = [training_sequence(rng, length) for _ in range(tokens // length)]
    return np.stack([ids for ids, _ in rows]), np.stack([kinds for _, kinds in rows])
