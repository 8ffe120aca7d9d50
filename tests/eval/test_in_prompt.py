# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Answers inside prompts: the facts are there before they are asked for, and values are found among the tokens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.needle.words import PLACES as NEEDLE_PLACES
from tests.eval import tokenizers
from vllm_vsprefill.eval.draw import Draw
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.in_prompt import APART, FIRST, QUESTIONS, InPrompt, converse
from vllm_vsprefill.eval.options import EvalCommand
from vllm_vsprefill.eval.places import PLACES
from vllm_vsprefill.eval.rows import Rows
from vllm_vsprefill.eval.suites import Cell
from vllm_vsprefill.eval.texts import Text
from vllm_vsprefill.eval.tokens import LocalTokens

TEXT = Text("t", "".join(f"Line {i} of a text without numbers or places of note.\n" for i in range(2000)))
CELL = Cell("in-prompt", "facts", 4096, 2)


def test_the_needle_model_knows_the_places() -> None:
    assert set(PLACES) <= set(NEEDLE_PLACES)
    assert len(set(PLACES)) == len(PLACES)


def test_facts_come_well_before_their_questions() -> None:
    made = converse(Draw("report", 1), TEXT.content, 20000)
    assert len(made.asked) == QUESTIONS
    so_far, total = "", sum(map(len, made.pieces))
    for piece, fact in zip(made.pieces, made.asked, strict=False):
        so_far += piece
        stated = f"The magic number for {fact.place} is {fact.value}."
        assert so_far.count(stated) == 1
        assert len(so_far) > 0.95 * FIRST * total
        assert len(so_far) - so_far.index(stated) > 0.8 * APART * total
        assert f"{fact.value}." not in so_far.replace(stated, "")  # no other fact has this value
    bigger = converse(Draw("report", 1), TEXT.content, 30000)
    assert bigger.asked == made.asked
    assert converse(Draw("report", 2), TEXT.content, 20000).asked != made.asked


@pytest.mark.parametrize("make", tokenizers.ALL)
def test_values_are_found_among_the_tokens(make: Any, tmp_path: Path) -> None:
    tokens = LocalTokens(str(make(tmp_path / "tokenizer")))
    template = "chat" if tokens.has_chat else "plain"
    length = 16384 if make is tokenizers.characters else 4096
    suite = InPrompt(options(template, length), [TEXT], tokens)
    made, answers = suite.sample(Cell("in-prompt", "facts", length, 2), 0)
    assert 0.95 * length < len(made.ids) < length
    assert len(answers) == QUESTIONS
    for fact, answer in zip(made.problem.asked, answers, strict=True):
        said = tokens._made.decode(made.ids[answer.begin : answer.end])
        assert said.strip() == fact.value
        before = tokens._made.decode(made.ids[: answer.begin])
        assert re.search(rf"{fact.place}\??\D*{fact.place}:$", before.strip()), before[-200:]


def options(template: str, length: int) -> EvalCommand:
    given = {"out": "out", "suite": "in-prompt", "server": {"url": "http://127.0.0.1:1"}, "template": template}
    return EvalCommand.model_validate({**given, "lengths": (length,)})


class Model:
    """In place of a target: ranks every token first, but those at some positions."""

    def __init__(self, wrong: set[int]) -> None:
        self.wrong = wrong

    def rows(self, prompt: list[int], top: int) -> Rows:
        rank = np.array([2 if i in self.wrong else 1 for i in range(1, len(prompt))], np.int32)
        n = len(rank)
        return Rows(np.zeros((n, 1), np.int32), np.zeros((n, 1), np.float32), np.zeros(n, np.float32), rank)


def test_an_answer_is_wrong_if_any_of_its_tokens_is(tmp_path: Path) -> None:
    suite = InPrompt(options("chat", 4096), [TEXT], LocalTokens(str(tokenizers.pairs(tmp_path))))
    _, answers = suite.sample(CELL, 0)
    assert all(a.end - a.begin > 1 for a in answers)
    target: Any = Model(set())
    assert suite.measure(target, CELL, 0)["score"] == 1.0
    target = Model({answers[0].begin, answers[3].end - 1, answers[5].end})  # the last is what follows an answer
    found = suite.measure(target, CELL, 0)
    assert found["score"] == pytest.approx((QUESTIONS - 2) / QUESTIONS, abs=1e-6)
    assert [right for _, right in found["answers"]].count(0) == 2
    assert found["of"] == QUESTIONS


def test_a_format_that_changes_earlier_turns(tmp_path: Path) -> None:
    tokens = LocalTokens(str(tokenizers.pairs(tmp_path)))
    tokens._made.chat_template = "{{ messages | length }}" + tokenizers.CHAT
    with pytest.raises(EvalError, match="changes earlier turns; say --template plain"):
        InPrompt(options("chat", 4096), [TEXT], tokens).check(CELL)


def test_a_length_that_holds_no_conversation(tmp_path: Path) -> None:
    suite = InPrompt(options("chat", 128), [TEXT], LocalTokens(str(tokenizers.NEEDLE)))
    with pytest.raises(EvalError, match="in-prompt at 128 tokens: the smallest prompt has"):
        suite.check(Cell("in-prompt", "facts", 128, 1))
