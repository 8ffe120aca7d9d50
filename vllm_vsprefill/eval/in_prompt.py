# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The suite ``in-prompt``: questions and answers in the middle of a prompt, where rows run sparse.

A question at the end of a prompt is answered by rows that attend to everything, so it says little about the others.
Here the prompt is a conversation about a long text: facts are scattered over it, and in its second half they are asked
for and answered. The model is asked how likely it finds each token of the prompt; an answer counts as found if every
token of the value is ranked first. That share falls as soon as a key is left out that one of those rows needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from vllm_vsprefill.eval.draw import Draw, belongs
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.fit import Fitted, fit
from vllm_vsprefill.eval.options import EvalCommand
from vllm_vsprefill.eval.places import PLACES
from vllm_vsprefill.eval.suites import Cell
from vllm_vsprefill.eval.targets import Target
from vllm_vsprefill.eval.texts import Text
from vllm_vsprefill.eval.tokens import Tokens

QUESTIONS = 12
FACTS = 24
FIRST = 0.5  # share of the text before the first question: rows of short contexts run dense
APART = 0.125  # share of the text between a fact and its question, at the least

FACT = " The magic number for {place} is {value}. "
QUESTION = "Question: What is the magic number for {place}?"


@dataclass(frozen=True)
class Asked:
    """A fact that is asked for."""

    place: str
    value: str


@dataclass(frozen=True)
class Conversation:
    """Pieces of text, each with the question that follows it; the last piece is followed by none."""

    pieces: tuple[str, ...]
    asked: tuple[Asked, ...]


@dataclass(frozen=True)
class Answered:
    """Where an answer's value stands among the tokens of a prompt."""

    begin: int
    end: int


def converse(draw: Draw, text: str, size: int) -> Conversation:
    """A conversation about ``size`` characters of a text, which begins anywhere and goes round.

    Facts, questions and their places are the same for every size.
    """
    places = draw.shuffled([place for place in PLACES if belongs(place, draw.split)])[:FACTS]
    values: dict[str, None] = {}
    while len(values) < len(places):
        values[draw.number(3)] = None
    facts = [Asked(place, value) for place, value in zip(places, values, strict=True)]
    events: list[tuple[float, int, Asked]] = []
    for number, fact in enumerate(facts):
        ask = FIRST + (1 - FIRST) * draw.rng.random()
        if number < QUESTIONS:
            events.append((ask, 1, fact))
            events.append((draw.rng.random() * (ask - APART), 0, fact))
        else:
            events.append((draw.rng.random(), 0, fact))
    begin = draw.rng.randrange(len(text))
    body = (text[begin:] + "\n\n" + text * (size // len(text) + 1))[:size]
    pieces, asked, piece, last = [], [], "", 0
    for share, is_question, fact in sorted(events, key=lambda event: event[:2]):
        place = _boundary(body, int(share * size))
        piece += body[last:place]
        last = max(last, place)
        if is_question:
            pieces.append(piece)
            asked.append(fact)
            piece = ""
        else:
            piece += FACT.format(place=fact.place, value=fact.value)
    return Conversation((*pieces, piece + body[last:]), tuple(asked))


def _boundary(text: str, place: int) -> int:
    """The next place between words, if one comes soon."""
    for i in range(place, min(place + 200, len(text))):
        if text[i].isspace():
            return i
    return place


class InPrompt:
    """Answers inside prompts.

    Raises:
        EvalError: there is no chat format, or it changes what was said before.
    """

    def __init__(self, options: EvalCommand, texts: list[Text], tokens: Tokens) -> None:
        self._options, self._texts, self._tokens = options, texts, tokens
        if options.template == "chat" and not tokens.has_chat:
            raise EvalError("the model has no chat format; say --template plain")
        self._sample = cache(self.sample)

    def cells(self) -> list[Cell]:
        """One for each length."""
        count = self._options.count("in-prompt")
        return [Cell("in-prompt", "facts", length, count) for length in self._options.lengths]

    def notes(self) -> list[str]:
        """How answers are counted."""
        names = ", ".join(text.name for text in self._texts)
        return [
            f"Answers inside prompts: {QUESTIONS} a prompt, in the second half of its text ({names}); "
            "found if every token of the value is ranked first."
        ]

    def check(self, cell: Cell) -> None:
        """EvalError if a prompt cannot be made."""
        try:
            self._sample(cell, 0)
        except EvalError as error:
            raise EvalError(f"in-prompt at {cell.length:,} tokens: {error}") from None

    def measure(self, target: Target, cell: Cell, index: int) -> dict[str, Any]:
        """The share of the answers in a prompt that the model ranks first, and which."""
        made, answers = self._sample(cell, index)
        rank = target.rows(made.ids, 1).rank  # of the token after each row
        right = [bool((rank[a.begin - 1 : a.end - 1] == 1).all()) for a in answers]
        where = [[a.begin, int(found)] for a, found in zip(answers, right, strict=True)]
        return {"score": round(sum(right) / len(right), 6), "of": len(right), "answers": where, "tokens": len(made.ids)}

    def sample(self, cell: Cell, index: int) -> tuple[Fitted[Conversation], list[Answered]]:
        """A conversation of at most the cell's length in tokens, and its answers."""
        text = self._texts[index % len(self._texts)].content

        def build(size: int) -> Conversation:
            return converse(Draw(self._options.split, self._options.seed, "in-prompt", cell.length, index), text, size)

        made = fit(build, lambda c: self._ids(self._turns(c)), cell.length - 1, 64)
        return made, self._answers(made)

    def _turns(self, made: Conversation) -> list[dict[str, str]]:
        turns = []
        for piece, fact in zip(made.pieces, made.asked, strict=False):
            question = QUESTION.format(place=fact.place)
            turns.append({"role": "user", "content": f"{piece.strip()} {question}".strip()})
            turns.append({"role": "assistant", "content": f"{fact.place}: {fact.value}."})
        return [*turns, {"role": "user", "content": made.pieces[-1].strip() or "."}]

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        if self._options.template == "chat":
            return self._tokens.chat(turns)
        lead = {"user": "\n", "assistant": "\nAnswer: "}
        text = "".join(lead[turn["role"]] + turn["content"] for turn in turns)
        return [*self._tokens.prefix(), *self._tokens.encode(text.removeprefix("\n"))]

    def _answers(self, made: Fitted[Conversation]) -> list[Answered]:
        """Where the values stand: what a conversation is longer by that ends with one."""
        turns, found = self._turns(made.problem), []
        for number, fact in enumerate(made.problem.asked):
            before = turns[: 2 * number + 1]
            ends = []
            for answer in (f"{fact.place}:", f"{fact.place}: {fact.value}"):
                ids = self._ids([*before, {"role": "assistant", "content": answer}])
                if made.ids[: len(ids)] != ids:
                    raise EvalError("the model's chat format changes earlier turns; say --template plain")
                ends.append(len(ids))
            found.append(Answered(*ends))
        return found
