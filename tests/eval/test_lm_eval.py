# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""RULER's prompts and scores against lm_eval's generators, where lm_eval, nltk and its punkt_tab are installed.

pip install lm_eval==0.4.13 nltk wonderwords; NLTK_DATA=FOLDER with tokenizers/punkt_tab
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.eval import tokenizers
from vllm_vsprefill.eval.draw import Draw
from vllm_vsprefill.eval.options import EvalCommand
from vllm_vsprefill.eval.ruler import niah
from vllm_vsprefill.eval.ruler.problem import Problem
from vllm_vsprefill.eval.ruler.score import score
from vllm_vsprefill.eval.ruler.suite import Ruler
from vllm_vsprefill.eval.suites import Cell
from vllm_vsprefill.eval.tokens import LocalTokens

pytest.importorskip("wonderwords")
try:
    from lm_eval.tasks.ruler import common_utils, cwe_utils, fwe_utils, niah_utils, prepare_niah, qa_utils, vt_utils
except (ImportError, OSError) as error:
    pytest.skip(f"lm_eval's RULER is not installed: {error}", allow_module_level=True)

LENGTH = 4096
ESSAY = tuple(" ".join(f"Sentence {i} is here. Is it? Yes!" for i in range(400)).split())


@pytest.fixture(scope="module")
def tokens() -> LocalTokens:
    return LocalTokens(str(tokenizers.NEEDLE))


@pytest.fixture(scope="module")
def theirs(tokens: LocalTokens) -> Any:
    return common_utils.get_tokenizer(str(tokenizers.NEEDLE))


@pytest.fixture(scope="module")
def ruler(tokens: LocalTokens) -> Ruler:
    server = {"url": "http://127.0.0.1:1"}
    options = {"out": "out", "suite": "ruler", "server": server, "template": "plain"}
    made = Ruler(EvalCommand.model_validate(options), tokens)
    made._essays = ESSAY
    return made


def shape(text: str) -> str:
    """A prompt with everything random replaced, and repetitions of a line written once."""
    text = text.replace("assgined", "assigned").replace(".  ", ". ")
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", text)
    text = re.sub(r"\b\d{7}\b", "NUMBER", text)
    text = re.sub(r"\b\d{5}\b", "VALUE", text)
    text = re.sub(r"\b(?!VAR)(?:[A-Z]{5}|[A-Z]{3})\b", "NAME", text)
    text = re.sub(r"(?<= for )(?!UUID)[^:\n]+?, and [^:\n]+?(?= mentioned)", "KEYS", text)
    return re.sub(r"(?<= for )(?!UUID|KEYS)[^:\n]+?(?= is:| mentioned)", "KEY", text)


def lines(text: str) -> set[str]:
    return {line.strip() for line in shape(text).split("\n")}


def pieces(text: str) -> set[str]:
    """The question, and sentences of running text without the last one, which ends where the length does."""
    text, question = re.sub(r"\d+", "0", shape(text)).rsplit("\n", 1)
    return {question, *re.split(r"(?<=[.!?:])\s+", text)[:-1]}


@pytest.mark.parametrize("task", niah.TASKS)
def test_needles(task: str, ruler: Ruler, theirs: Any) -> None:
    given = niah.TASKS[task]
    kind = "repeat" if given.haystack == "noise" else given.haystack
    haystack: Any = list(ESSAY) if kind == "essay" else prepare_niah.get_haystack(kind)
    random.seed(1)
    (doc,) = prepare_niah.generate_samples(
        haystack,
        TOKENIZER=theirs,
        max_seq_length=LENGTH,
        type_haystack=kind,
        type_needle_k=given.key,
        type_needle_v=given.value,
        template=niah_utils.TEMPLATE,
        num_samples=1,
        num_needle_k=given.keys,
        num_needle_v=given.values,
        num_needle_q=given.queries,
    )
    made = ruler.sample(Cell("ruler", task, LENGTH, 1), 0)
    mine = made.problem
    assert shape(mine.prefix.strip()) == shape(doc["gen_prefix"])
    assert len(mine.answers) == len(doc["outputs"])
    if kind == "essay":  # needles lie in the running text
        assert pieces(mine.text) == pieces(doc["input"])
    else:
        assert lines(mine.text) == lines(doc["input"])
    # Ours counts the answer's beginning, too, and fills what is left.
    assert doc["length"] - 60 <= len(made.ids) + niah.TOKENS <= LENGTH


def test_variable_tracking(ruler: Ruler, theirs: Any) -> None:
    random.seed(1)
    (example,) = vt_utils.sys_vartrack_w_noise_random(theirs, num_samples=1, max_seq_length=500, incremental=5)
    (doc,) = vt_utils.sys_vartrack_w_noise_random(theirs, 1, LENGTH, icl_example=example)
    mine = ruler.sample(Cell("ruler", "vt", LENGTH, 1), 0).problem
    assert shape(mine.prefix.strip()) == shape(doc["gen_prefix"])

    def turns(text: str) -> list[set[str]]:
        # Assignments stand between the sentences of noise, anywhere.
        parts = shape(text).strip().split("\n\n\n\n")
        return [set(re.split(r"(?<=[.:,])\s+|\s+(?=VAR NAME =)|(?<=VALUE) |(?<=VAR NAME)  ", part)) for part in parts]

    own, other = turns(mine.text), turns(doc["input"])
    assert len(own) == len(other) == 2
    strip = [[{piece.strip() for piece in part} for part in text] for text in (own, other)]
    assert strip[0] == strip[1]


def test_common_and_frequent_words(ruler: Ruler, theirs: Any) -> None:
    random.seed(1)
    (doc,) = cwe_utils.sys_word_pair_random(1, LENGTH, theirs)
    mine = ruler.sample(Cell("ruler", "cwe", LENGTH, 1), 0).problem
    numbered = re.compile(r"(\d+\. \D+)+")
    own = mine.text[mine.text.rindex("Below is") :]
    assert numbered.sub("LIST", own, count=0) == numbered.sub("LIST", doc["input"], count=0)
    example = mine.text[: mine.text.rindex("\nBelow is")]
    assert numbered.sub("LIST", example) == numbered.sub("LIST", doc["input_example"].replace(":1.", ": 1."))
    assert mine.prefix.strip() == doc["gen_prefix"]
    (doc,) = fwe_utils.sys_kwext(theirs, LENGTH, num_samples=1)
    mine = ruler.sample(Cell("ruler", "fwe", LENGTH, 1), 0).problem
    coded = re.compile(r"(?<=coded words\. ).*?(?=\nQuestion)")
    assert coded.sub("CODED", mine.text) == coded.sub("CODED", doc["input"])
    assert mine.prefix.strip() == doc["gen_prefix"]
    assert len(mine.answers) == len(doc["outputs"]) == 3


def test_questions(tmp_path: Path) -> None:
    from vllm_vsprefill.eval.ruler import documents
    from vllm_vsprefill.eval.ruler.sources import Library, Question

    texts = tuple(f"Paragraph {i}." for i in range(30))
    random.seed(1)
    qas = [{"query": "Which?", "outputs": ["a", "b"], "context": [3], "more_context": [1, 2, 4]}]
    text, answers = qa_utils.generate_input_output(0, 12, qas, list(texts))
    asked = Question("Which?", ("a", "b"), (3,), (1, 2, 4))
    mine = documents.make(Draw("report", 1), asked, Library((asked,), texts), 12)

    def order(prompt: str) -> tuple[str, int, bool]:
        found = re.findall(r"Document \d+:\nParagraph (\d+)\.", prompt)
        return re.sub(r"Paragraph \d+", "P", prompt), len(found), {"1", "2", "3", "4"} <= set(found)

    assert order(mine.text) == order(text)
    assert list(mine.answers) == answers
    assert mine.prefix.strip() == qa_utils.CONFIG["answer_prefix"]


@pytest.mark.parametrize("answer", ["", "one", "One, two", " THREE\ttwo one.", "on e", "nothing of it"])
@pytest.mark.parametrize("any_of", [False, True])
def test_scores(answer: str, any_of: bool) -> None:
    expected = ("one", "Two", "three")
    process = common_utils.process_results_part if any_of else common_utils.process_results
    if any_of:  # RULER's "part" takes the best of the references; lm_eval hands them over as one list
        found = max(process({"max_length": LENGTH, "outputs": [one]}, [answer])[str(LENGTH)] for one in expected)
    else:
        found = process({"max_length": LENGTH, "outputs": list(expected)}, [answer])[str(LENGTH)]
    assert score(Problem("", "", expected, any_of), answer) == pytest.approx(found)
