# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Prompts from a person's own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval.test_client import Characters
from vllm_vsprefill.eval import texts as reading
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.texts import Cutter, Text, read_texts


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder").mkdir()
    names = ("none.txt", "empty.txt", "binary.txt", "folder")
    with pytest.raises(EvalError) as error:
        read_texts([tmp_path / name for name in names])
    for name, problem in zip(names, ("no such file", "is empty", "not text in UTF-8", "no files of text"), strict=True):
        assert any(name in line and problem in line for line in str(error.value).splitlines())


def test_a_folder_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\xff")
    (text,) = read_texts([tmp_path])
    assert text.content == "one\n\ntwo"
    assert text.digest != Text("", "one").digest


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert [text.content for text in read_texts([tmp_path / "a.txt", tmp_path])] == ["one", "one"]


def test_of_a_long_file_no_more_is_read_than_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAX_CHARACTERS", 2**16)
    (tmp_path / "a.txt").write_bytes(b"x" * 2**20 + b"\xff")  # who reads it whole meets the last byte
    (text,) = read_texts([tmp_path / "a.txt"])
    assert text.content == "x" * 2**16


def test_without_files_there_is_the_standard_library() -> None:
    (text,) = read_texts([])
    assert "import" in text.content
    assert len(text.content) > 1_000_000


def test_prompts_of_the_wanted_length_spread_over_the_texts() -> None:
    texts = [Text("a", "a" * 20 + "b" * 20), Text("c", "c" * 30)]
    cutter = Cutter(texts, Characters())
    prompts = [cutter.cut(10, i) for i in range(7)]
    assert [p.text for p in prompts] == ["a", "c"] * 3 + ["a"]
    # However many there are to be, the same number is the same prompt.
    assert ["".join(map(chr, p.ids)) for p in prompts[::2]] == ["a" * 10, "aaaaabbbbb", "a" * 10, "b" * 10]
    assert all(len(p.ids) == 10 for p in prompts)


def test_texts_that_are_too_short() -> None:
    with pytest.raises(EvalError, match="prompts of 31 tokens are longer than the text: c has 30; give longer"):
        Cutter([Text("a", "a" * 40), Text("c", "c" * 30)], Characters()).cut(31, 0)
