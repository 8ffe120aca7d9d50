# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Differences between rows, against numbers worked out by hand and against full distributions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.fidelity import Differences, compare, pack, row_kl, unpack
from vllm_vsprefill.eval.rows import Rows


def rows_of(logits: np.ndarray[Any, Any], tokens: list[int], top: int) -> Rows:
    """What a server says of a prompt: row i is about tokens[i + 1]."""
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    listed: list[Any] = [None]
    for i, row in enumerate(logprobs):
        order = np.argsort(-row, kind="stable")
        rank = {int(token): n + 1 for n, token in enumerate(order)}
        wanted = {int(t) for t in order[:top]} | {tokens[i + 1]}
        listed.append({str(t): {"logprob": float(row[t]), "rank": rank[t]} for t in wanted})
    return Rows.parse(tokens, listed, top)


def test_two_rows_by_hand() -> None:
    dense = rows_of(np.log([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]), [0, 1, 1], top=3)
    sparse = rows_of(np.log([[0.25, 0.5, 0.25], [0.2, 0.5, 0.3]]), [0, 1, 1], top=3)
    (first, second) = compare(dense, sparse, bins=2)
    assert (first.rows, second.rows) == (1, 1)
    assert (first.agree, second.agree) == (0, 1)
    assert first.nll == pytest.approx(np.log(0.3 / 0.5), abs=1e-6)  # the token became likelier
    assert first.absolute == pytest.approx(np.log(0.5 / 0.3), abs=1e-6)
    assert second.nll == pytest.approx(np.log(0.6 / 0.5), abs=1e-6)
    both = 0.5 * np.log(2) + 0.3 * np.log(0.3 / 0.5) + 0.2 * np.log(0.2 / 0.25)
    assert first.kl == pytest.approx(both, abs=1e-5)
    means = (first + second).means()
    assert means["top1"] == 0.5
    assert means["nll"] == pytest.approx((np.log(0.6) + np.log(1.2)) / 2, abs=1e-6)


def test_nothing_differs_from_itself() -> None:
    rows = rows_of(np.random.default_rng(0).normal(size=(50, 30)) * 3, [int(i) % 30 for i in range(51)], top=5)
    total = sum(compare(rows, rows), Differences())
    assert (total.rows, total.agree, total.nll, total.absolute, total.kl) == (50, 50, 0, 0, 0)


@pytest.mark.parametrize("top", [1, 3, 10, 40])
def test_kl_is_a_lower_bound_that_closes(top: int) -> None:
    rng = np.random.default_rng(top)
    a = rng.normal(size=(200, 40)) * 2
    b = a + rng.normal(size=a.shape)
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (a, b))
    true = (np.exp(p) * (p - q)).sum(1)
    tokens = [0] * 201
    found = row_kl(rows_of(a, tokens, top), rows_of(b, tokens, top))
    assert (found <= true + 1e-5).all()
    assert (found >= 0).all()
    if top == 40:
        np.testing.assert_allclose(found, true, atol=1e-4)


def test_rows_of_other_prompts_are_refused() -> None:
    one, two = (rows_of(np.zeros((n, 3)), [0] * (n + 1), 1) for n in (3, 4))
    with pytest.raises(ValueError, match="3 and 4"):
        compare(one, two)


def test_parts_cover_every_row_once() -> None:
    rows = rows_of(np.zeros((37, 3)), [0] * 38, 1)
    assert sum(part.rows for part in compare(rows, rows)) == 37
    assert unpack(pack(compare(rows, rows))) == compare(rows, rows)


def test_rows_survive_a_file_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    rows = rows_of(np.random.default_rng(1).normal(size=(5, 9)), [1] * 6, 4)
    rows.save(tmp_path / "a" / "rows.npz")
    again = Rows.load(tmp_path / "a" / "rows.npz")
    for name in ("ids", "logprobs", "actual", "rank"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(again, name))
    with pytest.raises(EvalError, match=r"rows.npz/more.npz cannot be written"):
        rows.save(tmp_path / "a" / "rows.npz" / "more.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK")
    with pytest.raises(EvalError, match=r"bad.npz cannot be read"):
        Rows.load(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    "listed", [[None, {"2": {"logprob": -1, "rank": 1}}], [None, None], [None, {"1": {"logprob": -1}}]]
)
def test_answers_of_another_form(listed: Any) -> None:
    with pytest.raises(EvalError, match="do not fit the prompt"):
        Rows.parse([0, 1], listed, 1)
