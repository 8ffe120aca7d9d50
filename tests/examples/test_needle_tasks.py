# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The generated problems are what they claim to be, as ids and as text."""

from __future__ import annotations

import re

import numpy as np
import pytest

from examples.needle import tasks
from examples.needle.tasks import HAYSTACKS, TASKS, Problem, make_problem, training_sequence
from examples.needle.vocabulary import END, IDS, SPECIALS, TOKENS, UNK, decode, encode, split
from examples.needle.words import COMMON, FILLER, PLACES, SENTENCES, VARIABLES

NEEDLE = re.compile(r"(?:The|One) magic number for (\w+) is (\d{3})\.")
ASSIGNMENT = re.compile(r"VAR (\w{3}) = (?:VAR (\w{3})|(\d{3}))\.")


def problem(task: str, haystack: str, length: int = 2048, seed: int = 0, **more: object) -> Problem:
    return make_problem(np.random.default_rng(seed), task, haystack, length, **more)  # type: ignore[arg-type]


def solve(p: Problem) -> list[str]:
    """The answers, read off the text the way a person would."""
    if p.task == "variable_tracking":
        match = re.search(r"hold (\d{3})\?", p.question)
        assert match is not None
        found: list[str] = []
        for name, source, value in ASSIGNMENT.findall(p.context):
            if value == match[1] or source in found:
                found.append(name)
        return found
    asked = re.findall(r"\w+", p.question.split(" for ")[1])
    return [value for key in asked for name, value in NEEDLE.findall(p.context) if name == key]


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("task", TASKS)
def test_the_answers_follow_from_the_context(task: str, haystack: str) -> None:
    for seed in range(20):
        p = problem(task, haystack, 700, seed)
        solved = solve(p)
        if task == "multi_value":
            assert sorted(solved) == sorted(p.answers)
            assert len(solved) == 4
        else:
            assert tuple(solved) == p.answers
        assert p.is_correct(p.answer_text)


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("task", TASKS)
def test_each_needle_occurs_once(task: str, haystack: str) -> None:
    p = problem(task, haystack, 4096, 3)
    values = [value for _, value in NEEDLE.findall(p.context)]
    keys = {key for key, _ in NEEDLE.findall(p.context)}
    names = [name for name, _, _ in ASSIGNMENT.findall(p.context)]
    assert len(values) == len(set(values))
    assert len(names) == len(set(names))
    assert len(keys) == len(values) - (3 if task == "multi_value" else 0)
    # No key and no number outside a needle.
    rest = ASSIGNMENT.sub("", NEEDLE.sub("", p.context))
    assert not re.search(r"\d", rest)
    assert not set(re.findall(r"\w+", rest)) & (set(PLACES) | set(VARIABLES))


@pytest.mark.parametrize("length", [256, 1000, 2048, 32768])
def test_a_prompt_has_exactly_the_length_asked_for(length: int) -> None:
    for task in TASKS:
        for haystack in HAYSTACKS:
            assert len(problem(task, haystack, length).prompt_ids) == length


def test_a_prompt_that_cannot_hold_the_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="40 tokens cannot hold a multi_key problem with 63 distractors"):
        problem("multi_key", "words", 40, distractors=63)


def test_the_same_seed_gives_the_same_problem() -> None:
    assert problem("multi_query", "words", seed=5).content == problem("multi_query", "words", seed=5).content
    assert problem("multi_query", "words", seed=5).content != problem("multi_query", "words", seed=6).content


@pytest.mark.parametrize("task", TASKS)
def test_question_and_template_fit_in_the_dense_last_rows(task: str) -> None:
    p = problem(task, "words")
    question = encode(p.question)
    assert p.prompt_ids.tolist()[-len(question) - 2 :] == [*question, IDS[END], IDS["<|assistant|>"]]
    assert len(question) + 2 < tasks.MAX_QUESTION_TOKENS


@pytest.mark.parametrize("task", TASKS)
def test_needle_positions_point_at_the_asked_needles(task: str) -> None:
    p = problem(task, "words", 1024, 2)
    pattern = ASSIGNMENT if task == "variable_tracking" else NEEDLE
    starts = [decode(p.prompt_ids[i : i + 12].tolist()) for i in p.needle_positions]
    assert all(pattern.match(text) for text in starts)
    assert len(starts) == (1 if task in ("single", "multi_key") else len(p.answers))


def test_depth_places_the_needle() -> None:
    positions = [problem("single", "words", 2000, depth=d).needle_positions[0] for d in (0.0, 0.5, 1.0)]
    assert positions[0] == 1
    assert 900 < positions[1] < 1100
    assert positions[2] > 1950


def test_scoring_is_exact_except_for_the_order_of_several_values() -> None:
    p = problem("multi_value", "words")
    key = p.answer_text.split(":")[0]
    assert p.is_correct(f"{key}: {', '.join(reversed(p.answers))}.")
    assert p.is_correct(f" {p.answer_text}<|end|>")
    assert not p.is_correct(f"{key}: {', '.join([p.answers[0], *p.answers[:3]])}.")
    assert not p.is_correct(f"{key}: {', '.join(p.answers[:3])}.")
    single = problem("single", "words")
    assert single.is_correct(single.answer_text)
    assert not single.is_correct(single.answer_text.removesuffix(".") + ", 111.")
    chain = problem("variable_tracking", "words")
    assert not chain.is_correct(", ".join(reversed(chain.answers)) + ".")


@pytest.mark.parametrize("length", [256, 300, 1024, 8192, 65536])
def test_training_sequences_have_their_length_and_answer_what_they_ask(length: int) -> None:
    rng = np.random.default_rng(length)
    for _ in range(10):
        ids, kinds = training_sequence(rng, length)
        assert len(ids) == len(kinds) == length
        text = decode(ids.tolist())
        turns = re.findall(r"Question: ([^<]*)<\|end\|><\|assistant\|> ([^<]*)<\|end\|>", text)
        assert turns
        assert len(turns) == text.count("<|assistant|>")
        # The answers are the tokens that count as such.
        answers = decode(ids[kinds >= tasks.KIND_ANSWER].tolist())
        assert answers == "".join(f" {answer}<|end|>" for _, answer in turns).removeprefix(" ")
        questions = [question for question, _ in turns]
        assert len(set(questions)) == len(questions)
        for question, answer in turns:
            before = text[: text.index(question)]
            if (match := re.match(r"What is the magic number for (\w+)\?", question)) is not None:
                assert f"magic number for {match[1]} is {answer.split(': ')[1]}" in before


def test_words_of_the_needles_are_apart_from_the_haystacks() -> None:
    groups = {"places": PLACES, "variables": VARIABLES, "filler": FILLER}
    for name, words in groups.items():
        assert len(words) == len(set(words)), name
    assert not set(PLACES) & {*FILLER, *COMMON, *VARIABLES}
    assert not set(VARIABLES) & {*FILLER, *COMMON, "VAR"}
    assert len(TOKENS) == len(set(TOKENS))
    assert TOKENS[: len(SPECIALS)] == SPECIALS
    # Every stored sentence is in the vocabulary.
    assert IDS[UNK] not in {token for sentence in SENTENCES for token in encode(sentence)}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("magic number: 41790.", ["▁magic", "▁number", ":", "▁417", "90", "."]),
        ("a  b\n\nc", ["▁a", "▁b", "▁c"]),
        ("x=1", ["▁x", "=", "1"]),
        ("don't (stop)", ["▁don", "'", "t", "▁(", "stop", ")"]),
        ("", []),
        (" ", ["▁"]),
    ],
)
def test_splitting(text: str, pieces: list[str]) -> None:
    assert split(text) == pieces
