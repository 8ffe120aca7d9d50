# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Share of the true attention that a selection covers, against masks and a softmax written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.problems import Problem, make_problem, problems
from vllm_vsprefill.kernels.recall import cpu, naive
from vllm_vsprefill.kernels.rows import spread_rows


def brute_force(problem: Problem, num_rows: int) -> torch.Tensor:
    """float64 ``[Hkv]``, from the masks."""
    found = []
    group, n = problem.q.shape[1] // problem.k.shape[1], problem.seq_len
    for head, mask in enumerate(problem.with_pattern(dense_last=0).masks()):
        shares = []
        for row in spread_rows(problem.q.shape[0], num_rows):
            seen = n - problem.q.shape[0] + row + 1
            queries = problem.q[row, head * group : (head + 1) * group].double()
            probs = (queries @ problem.k[:seen, head].double().T * problem.scale).softmax(-1)
            shares.append((probs * torch.from_numpy(mask[row, :seen])).sum(-1).mean())
        found.append(torch.stack(shares).mean())
    return torch.stack(found)


@pytest.mark.parametrize("version", [naive, cpu], ids=["naive", "cpu"])
@given(problem=problems(120, dtypes=(torch.float32,)), num_rows=st.integers(1, 20))
def test_equals_masks_and_a_softmax(version: Any, problem: Problem, num_rows: int) -> None:
    pattern = problem.with_pattern(dense_last=0).pattern
    found = version.recall(
        problem.q, problem.k, problem.selection, pattern, scale=problem.scale, num_rows=num_rows
    )  # fmt: skip
    torch.testing.assert_close(found.double(), brute_force(problem, num_rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    problem = make_problem(n=700, num_rows=300, dtype=dtype, num_columns=200)
    call = (problem.q, problem.k, problem.selection, problem.pattern)
    found, expected = (one.recall(*call, scale=problem.scale, num_rows=16) for one in (cpu, naive))
    assert 0.2 < float(expected.mean()) < 0.8
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=0)


def test_everything_is_all_of_it() -> None:
    problem = make_problem(n=200, num_rows=150, num_columns=200)
    for version in (naive, cpu):
        found = version.recall(
            problem.q, problem.k, problem.selection, problem.pattern, scale=problem.scale, num_rows=16
        )  # fmt: skip
        torch.testing.assert_close(found, torch.ones(2))


@pytest.mark.parametrize(
    ("change", "named"), [({"scale": 0.0}, "scale"), ({"num_rows": 0}, "num_rows"), ({"pattern": None}, "pattern")]
)
def test_wrong_arguments_are_named(change: dict[str, Any], named: str) -> None:
    problem = make_problem(n=40)
    arguments: dict[str, Any] = {"pattern": problem.pattern, "scale": 0.25, "num_rows": 9, **change}
    for version in (naive, cpu):
        with pytest.raises(ValueError, match=f"^{named}"):
            version.recall(problem.q, problem.k, problem.selection, **arguments)
