# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What is finished is kept, whatever happens, and never mixed with another run's."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.journal import FILE, Journal

SETTINGS = {"model": "m", "seed": 1, "lengths": [1, 2]}


def test_goes_on_where_it_was(tmp_path: Path) -> None:
    Journal(tmp_path / "out", SETTINGS).add("a/0", score=1.0)
    again = Journal(tmp_path / "out", SETTINGS)
    assert "a/0" in again
    assert "a/1" not in again
    again.add("a/1", score=0.5, text="é\n")
    found = Journal(tmp_path / "out", SETTINGS).records
    assert [found[key]["score"] for key in ("a/0", "a/1")] == [1.0, 0.5]
    assert found["a/1"]["text"] == "é\n"


def test_a_line_that_was_cut_short_is_measured_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SETTINGS)
    journal.add("a/0", score=1.0)
    journal.add("a/1", score=1.0)
    data = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(data[:-7])
    again = Journal(tmp_path, SETTINGS)
    assert "a/0" in again
    assert "a/1" not in again
    again.add("a/1", score=0.0)
    assert Journal(tmp_path, SETTINGS).records["a/1"]["score"] == 0.0


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Journal(tmp_path, SETTINGS)
    with pytest.raises(
        EvalError, match=r"other settings(.|\n)*model: 'm' in the run so far, 'n' now(.|\n)*seed: 1"
    ) as error:
        Journal(tmp_path, {**SETTINGS, "model": "n", "seed": 2})
    assert "lengths" not in str(error.value)


def test_a_damaged_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("not JSON\n")
    with pytest.raises(EvalError, match="is damaged"):
        Journal(tmp_path, SETTINGS)
    assert (tmp_path / FILE).read_text() == "not JSON\n"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match=r"--out .*file/out: cannot be used"):
        Journal(tmp_path / "file" / "out", SETTINGS)
