# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Reading text, packing it, generating it; what is wrong with it is said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vsprefill.distil import reading
from vllm_vsprefill.distil.data import Documents, PackedTokens, leading_tokens, open_sources
from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.distil.options import DataOptions
from vllm_vsprefill.distil.synthetic import Synthetic, document


class Letters:
    """A tokenizer for tests: one token a letter."""

    eos_token_id = 0

    def __call__(self, text: Any, **options: Any) -> dict[str, Any]:
        del options
        if isinstance(text, str):
            return {"input_ids": [ord(c) % 128 for c in text]}
        return {"input_ids": [[ord(c) % 128 for c in one] for one in text]}


class Beginning(Letters):
    """One that puts a beginning-of-text token before a prompt, as many do."""

    def __call__(self, text: Any, *, add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        ids = super().__call__(text, **options)["input_ids"]
        if add_special_tokens:
            ids = [1, *ids] if isinstance(text, str) else [[1, *one] for one in ids]
        return {"input_ids": ids}


def sources(data: Path | str, **changes: Any) -> tuple[Any, Any]:
    sizes = {"min_length": 8, "max_length": 32, "vocabulary": 128, "max_tokens": 10**6}
    read = {key: changes.pop(key) for key in list(changes) if key in DataOptions.model_fields}
    tokenizer = changes.pop("tokenizer", Letters)
    return open_sources(DataOptions(data=str(data), **read), tokenizer, **{**sizes, **changes})


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_is_packed_and_split(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("abcdefghij" * 100)
    train, held_out = sources(file, validation_share=0.1)
    assert len(held_out.tokens) == 100
    assert len(train.tokens) == 901  # and the end-of-text token
    assert train.sequence(0, 20).tolist() == [ord(c) for c in "abcdefghij" * 2]
    assert train.after(0, 20) == 20
    # Goes round at the end.
    assert train.sequence(895, 12).tolist() == [*(ord(c) for c in "fghij"), 0, *(ord(c) for c in "abcdef")]


def test_json_lines_and_folders(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"text": "x" * 200}, {"text": "y" * 200, "more": 1}])
    jsonl(tmp_path / "b.jsonl", [{"input_ids": [5] * 200}])
    (tmp_path / "notes.md").write_text("z" * 200)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    train, held_out = sources(tmp_path)
    tokens = np.concatenate((train.tokens, held_out.tokens))
    assert {value: int((tokens == value).sum()) for value in (5, ord("x"), ord("y"), ord("z"))} == dict.fromkeys(
        (5, ord("x"), ord("y"), ord("z")), 200
    )


def test_documents_are_kept_apart_without_packing(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": chr(97 + i) * (5 + 10 * i)} for i in range(6)])
    train, held_out = sources(file, packing=False)
    assert isinstance(train, Documents)
    documents = [*train.documents, *held_out.documents]
    assert sorted(map(len, documents)) == [15, 25, 35, 45, 55]
    assert len(set(train.sequence(0, 20).tolist())) == 1
    assert len(train.sequence(0, 20)) <= 20
    assert train.after(3, 20) == 4


def test_the_order_is_the_seeds_and_the_identity_tells_contents_apart(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": chr(97 + i) * 100} for i in range(8)])
    first, again, other = (sources(file, seed=seed)[0] for seed in (1, 1, 2))
    assert first.identity() == again.identity() != other.identity()
    assert not np.array_equal(first.tokens, other.tokens)


def test_reading_stops_when_there_is_enough(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"input_ids": [1] * 100}] * 50)
    train, held_out = sources(file, max_tokens=500)
    assert 500 <= len(train.tokens) + len(held_out.tokens) <= 510


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "no text in it"),
        ("blank.txt", " \n\n ", "no text in it"),
        ("empty.jsonl", "", "no text in it"),
        ("short.txt", "a few", "too little text: 6 tokens"),
        ("broken.jsonl", '{"text": "x"}\n{"text": \n', "line 2: not valid JSON"),
        ("list.jsonl", "[1, 2]\n", "line 1: expected a JSON object, found list"),
        ("column.jsonl", '{"body": "x", "title": "y"}\n', "column 'text' is missing; found columns 'body', 'title'"),
        (
            "half.jsonl",
            '{"text": "fine"}\n{"text": "a\\ud83d"}\n',
            "line 2: character 1 of 'text' is half of a surrogate",
        ),
        ("null.jsonl", '{"text": "fine"}\n{"text": null}\n', "line 2: 'text' is null; leave such records out"),
        ("deep.jsonl", "[" * 100_000 + "\n", "line 1: not valid JSON"),
        ("wide.txt", "\0".join("words of another encoding"), "not UTF-8 text (zero bytes, as of UTF-16)"),
        ("type.jsonl", '{"text": 5}\n', "column 'text' holds int, not text"),
        ("ids.jsonl", '{"input_ids": [' + "200, " * 60 + "1]}\n", "token id 200 is beyond the model's 128 embeddings"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DistilError) as error:
        sources(tmp_path / name)
    assert message in str(error.value)
    assert name in str(error.value)


def test_other_bad_data(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    with pytest.raises(DistilError, match=r"not UTF-8 text \(byte 3\)"):
        sources(tmp_path / "latin.txt")
    with pytest.raises(DistilError, match="no such file or folder"):
        sources(tmp_path / "missing.txt")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DistilError, match="the folder holds no text"):
        sources(tmp_path / "nothing")
    file = jsonl(tmp_path / "a.jsonl", [{"text": "abc"}] * 3)
    with pytest.raises(DistilError, match=r"at least 2 documents of 8 tokens are needed, found 0 \(longest: 3\)"):
        sources(file, packing=False)


def test_json_lines_that_are_not_utf8_or_not_ids(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(DistilError, match=r"latin.jsonl: not UTF-8 text .*convert it first"):
        sources(tmp_path / "latin.jsonl")
    file = jsonl(tmp_path / "large.jsonl", [{"input_ids": [2**40] * 30}])
    with pytest.raises(DistilError, match=r"large.jsonl, line 1: column 'text' is missing; found columns 'input_ids'"):
        sources(file)


def test_nothing_is_held_out_where_nothing_is_trained(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": "x" * 20}, {"text": "y" * 20}])
    one, other = sources(file, validation_share=0.0, min_length=32)
    assert len(one.tokens) == 42  # an end-of-text token behind each
    assert np.array_equal(one.tokens, other.tokens)
    with pytest.raises(DistilError, match=r"too little text: 42 tokens, but the shortest sequences have 64"):
        sources(file, validation_share=0.0, min_length=64, max_length=64)


def test_a_dataset_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"story": ["abc" * 50, "def" * 50]}).to_iterable_dataset()
    asked: list[Any] = []

    def load(name: str, subset: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, subset, split, streaming))
        return made

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, held_out = sources("owner/stories", text_field="story", split="test", subset="small")
    assert asked == [("owner/stories", "small", "test", True)]
    assert len(train.tokens) + len(held_out.tokens) == 302
    with pytest.raises(DistilError, match=r"column 'text'.*found columns 'story'.*--text-field"):
        sources("owner/stories")

    def fail(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DistilError, match=r"cannot be read as a dataset .no route to host"):
        sources("owner/stories")


def test_generated_documents_hold_facts_that_are_asked_for_later() -> None:
    text = document(np.random.default_rng(3), 3000)
    questions = [line for line in text.splitlines() if line.startswith("Question:")]
    assert len(questions) >= 4
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.startswith("Question:"):
            code = lines[i + 1].removeprefix("Answer: ").split(".")[0]
            before = "\n".join(lines[:i])
            assert f"is {code}." in before
    assert 3000 <= text.count(" ") + text.count("\n") <= 3600


def test_generated_sequences_have_their_length_and_are_repeatable() -> None:
    one, again, other = Synthetic(Letters(), 128, 1), Synthetic(Letters(), 128, 1), Synthetic(Letters(), 128, 2)
    for position, length in ((0, 100), (3, 5000)):
        ids = one.sequence(position, length)
        assert len(ids) == length
        assert np.array_equal(ids, again.sequence(position, length))
        assert not np.array_equal(ids, other.sequence(position, length))
    held_out = Synthetic(Letters(), 128, 1, held_out=True)
    assert not np.array_equal(one.sequence(0, 100), held_out.sequence(0, 100))
    assert one.after(5, 100) == 6


def test_a_tokenizer_of_another_model_is_found_out() -> None:
    with pytest.raises(DistilError, match=r"does not belong to the model.*64 embeddings"):
        Synthetic(Letters(), 64, 0)


def test_packed_tokens_shorter_than_asked_for() -> None:
    tokens = PackedTokens(np.arange(10, dtype=np.uint32), "ten")
    assert len(tokens.sequence(4, 99)) == 10
    assert tokens.after(4, 99) == 14


# ----------------------------------------------------------------------------------------------------------------------
# what prompts begin with


def fast_tokenizer(begin: bool) -> Any:
    """A real tokenizer of words, with or without a beginning-of-text token."""
    import tokenizers
    import transformers

    words = {"<s>": 0, "</s>": 1, "?": 2, **{chr(97 + i): 3 + i for i in range(26)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if begin:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("begin", [True, False])
def test_what_a_tokenizer_begins_a_prompt_with(begin: bool) -> None:
    assert leading_tokens(fast_tokenizer(begin)) == ([0] if begin else [])


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_sequences_begin_as_served_prompts_do(tmp_path: Path, begin: bool, packing: bool) -> None:
    tokenizer = fast_tokenizer(begin)
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{chr(97 + i)} " * 40} for i in range(6)])
    train, _ = sources(file, tokenizer=lambda: tokenizer, packing=packing)
    served = tokenizer("q")["input_ids"][:-1]
    position = 0
    for _ in range(20):
        ids = train.sequence(position, 24)
        assert len(ids) == 24
        assert ids[: len(served)].tolist() == served
        # Once: the text goes on behind it.
        assert ids[len(served)] not in served
        position = train.after(position, 24)


def test_the_beginning_takes_no_text_away(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": "abcdefghij" * 8}])
    train, _ = sources(file, tokenizer=Beginning, validation_share=0.0)
    assert train.tokens.tolist() == [1, *(ord(c) for c in "abcdefghij" * 8), 0]
    read, position = [], 0
    while position < len(train.tokens):
        read += train.sequence(position, 10).tolist()[1:]
        position = train.after(position, 10)
    assert read[:81] == train.tokens.tolist()[1:]
    plain = sources(file, validation_share=0.0)[0]
    assert plain.identity() == PackedTokens(plain.tokens, "the same").identity() != train.identity()


def test_ids_begin_as_prompts_do_where_there_is_a_tokenizer(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"input_ids": [5] * 100}])
    assert sources(file, tokenizer=Beginning)[0].sequence(0, 8).tolist() == [1] + [5] * 7

    def none() -> Any:
        raise DistilError("no tokenizer can be loaded")

    assert sources(file, tokenizer=none)[0].sequence(0, 8).tolist() == [5] * 8


def test_generated_sequences_begin_as_prompts_do() -> None:
    plain, begun = Synthetic(Letters(), 128, 1), Synthetic(Beginning(), 128, 1)
    ids = begun.sequence(3, 100)
    assert ids[0] == 1
    assert ids[1:].tolist() == plain.sequence(3, 100)[1:].tolist()
    assert plain.identity() == "synthetic-1-1-False" != begun.identity()


# ----------------------------------------------------------------------------------------------------------------------
# long texts, and other things that lie in folders


class Counting(Letters):
    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: Any, **options: Any) -> dict[str, Any]:
        self.characters += sum(map(len, [text] if isinstance(text, str) else text))
        return super().__call__(text, **options)


@pytest.mark.parametrize("name", ["book.txt", "book.jsonl"])
def test_no_more_of_a_long_text_is_tokenised_than_is_wanted(tmp_path: Path, name: str) -> None:
    text = "the quick brown fox jumps over the lazy dog\n" * 90_000  # 3.8 MiB
    file = tmp_path / name
    file.write_text(text if name.endswith("txt") else json.dumps({"text": text}) + "\n")
    tokenizer = Counting()
    train, held_out = sources(file, tokenizer=lambda: tokenizer, max_tokens=1000)
    assert 1000 <= len(train.tokens) + len(held_out.tokens) < tokenizer.characters + 2 < 300_000
    everything = sources(file, validation_share=0.0, max_tokens=10**9)[0].tokens
    assert everything[:-1].tolist() == [ord(c) for c in text]


def test_no_more_documents_are_tokenised_than_are_wanted(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"text": "x" * 5_000}] * 60)
    tokenizer = Counting()
    sources(file, tokenizer=lambda: tokenizer, max_tokens=12_000)
    assert 12_000 <= tokenizer.characters < 110_000


@given(st.text(alphabet="ab \n\u00e9", max_size=400), st.integers(4, 40))
def test_pieces_are_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", size)
        found = list(reading.pieces(io.StringIO(text)))
    assert "".join(found) == text
    assert all(0 < len(piece) <= size for piece in found)


def test_pieces_end_between_lines_or_words() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE", 12)
        assert list(reading.pieces(io.StringIO("aa bb cc\ndd ee ff gg"))) == ["aa bb cc\n", "dd ee ff gg"]
        assert list(reading.pieces(io.StringIO("aa bb cc dd ee"))) == ["aa bb cc dd", " ee"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"abc" * 20)
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "' + b"xyz" * 20 + b'"}\n')
    for name, letters in (("a.txt", "abc"), ("b.jsonl", "xyz")):
        train, _ = sources(tmp_path / name, validation_share=0.0)
        assert train.tokens[:-1].tolist() == [ord(c) for c in letters * 20]


@pytest.mark.parametrize("letters", [200_000, 700_000])  # in the first piece, and in one of those behind it
def test_a_bad_byte_far_behind_is_found(tmp_path: Path, letters: int) -> None:
    (tmp_path / "a.txt").write_bytes("é".encode() * letters + b"x\xff" + b"y" * 100)
    with pytest.raises(DistilError, match=rf"a.txt: not UTF-8 text \(byte {2 * letters + 1}\)"):
        sources(tmp_path / "a.txt")


def test_a_damaged_table_is_told(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    text = pyarrow.array([b"fine", b"caf\xe9 " * 20], pyarrow.binary())  # not UTF-8, but called text
    parquet.write_table(pyarrow.table({"text": text.view(pyarrow.string())}), file)
    with pytest.raises(DistilError, match=r"a.parquet: damaged behind record"):
        sources(file)


def test_a_cloned_dataset(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "stories"
    (folder / "data").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "note.txt").write_text("g" * 100)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nr" * 10)
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "more.arrow").write_bytes(b"x")
    parquet.write_table(pyarrow.table({"text": ["p" * 100, "q" * 50], "id": [1, 2]}), folder / "data" / "a.parquet")
    notes: list[str] = []
    (train, _) = sources(folder, validation_share=0.0, note=notes.append)
    assert sorted(set(train.tokens.tolist())) == [0, ord("p"), ord("q")]
    assert notes == ["stories: 1 files are read, others are left out: 1 .arrow, 1 .png, 1 dataset card"]
    file = folder / "data" / "a.parquet"
    with pytest.raises(DistilError, match=r"a.parquet: column 'body' is missing; found columns 'text', 'id'"):
        sources(file, text_field="body")
    with pytest.raises(DistilError, match=r"a.parquet, record 1: column 'id' holds int, not text"):
        sources(file, text_field="id")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DistilError, match=r"a.parquet: not a parquet file \(it is a pointer of git-lfs"):
        sources(folder)
    file.unlink()
    with pytest.raises(DistilError, match=r"the folder holds no text; .*, found 1 .arrow, 1 .png, 1 dataset card"):
        sources(folder)


def test_choices_within_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc" * 100)
    with pytest.raises(DistilError, match=r"--subset long is for a dataset by its id; here all files are read"):
        sources(tmp_path, subset="long")
    with pytest.raises(DistilError, match=r"a.txt: --subset long and --split test are for a dataset by its id"):
        sources(file, subset="long", split="test")
    assert sources(file, split="train")[0].tokens.any()


def test_choices_of_a_dataset_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    import datasets

    (tmp_path / "clone").mkdir()
    for name in ("long", "short"):
        jsonl(tmp_path / "clone" / f"{name}.jsonl", [{"text": "x" * 100}])
    (tmp_path / "clone" / "README.md").write_text(
        "---\nconfigs:\n- config_name: long\n  data_files: long.jsonl\n"
        "- config_name: short\n  data_files: short.jsonl\n---\n"
    )
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, **k: real(str(tmp_path / "clone"), *a, **k))
    with pytest.raises(DistilError, match=r"it has several configurations; choose one with --subset: long, short"):
        sources("owner/stories")
    with pytest.raises(DistilError, match=r"it has no configuration 'big'; choose one with --subset: long, short"):
        sources("owner/stories", subset="big")
    with pytest.raises(DistilError, match=r"it has no split 'test'; choose one with --split: train"):
        sources("owner/stories", subset="long", split="test")
    assert len(sources("owner/stories", subset="long", validation_share=0.0)[0].tokens) == 101
