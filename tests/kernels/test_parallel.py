# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Pieces of work on several cores."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from tests.kernels.problems import TOLERANCE, make_problem, relative_error
from vllm_vsprefill.kernels import parallel
from vllm_vsprefill.kernels.attend import cpu, naive
from vllm_vsprefill.kernels.parallel import run_pieces


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[None]:
    """Two threads, whatever the machine has."""
    before = torch.get_num_threads()
    monkeypatch.setattr(parallel, "_cores", lambda: frozenset({0, 1}))
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def name_after(barrier: threading.Barrier) -> tuple[str, int]:
    barrier.wait(timeout=30)
    return threading.current_thread().name, torch.get_num_threads()


@pytest.mark.usefixtures("two_threads")
def test_pieces_run_side_by_side_on_one_core_each() -> None:
    # The barrier opens only if two pieces are under way at once.
    results = run_pieces([partial(name_after, threading.Barrier(2))] * 4)
    assert len({name for name, _ in results}) == 2
    assert {threads for _, threads in results} == {1}
    assert threading.current_thread().name not in {name for name, _ in results}
    # The caller's own operators are still split.
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_results_keep_their_order() -> None:
    assert run_pieces([partial(int, i) for i in range(100)]) == list(range(100))
    assert run_pieces([]) == []


def here() -> str:
    return threading.current_thread().name


@pytest.mark.usefixtures("two_threads")
def test_few_pieces_or_one_core_stay_in_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(run_pieces([here] * 3)) == {here()}
    assert here() not in set(run_pieces([here] * 4))
    monkeypatch.setattr(parallel, "_cores", lambda: frozenset({0}))
    assert set(run_pieces([here] * 4)) == {here()}
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert set(run_pieces([here] * 4)) == {here()}


@pytest.mark.usefixtures("two_threads")
def test_pieces_of_a_piece_run_in_it() -> None:
    def outer() -> bool:
        return set(run_pieces([here] * 8)) == {here()}

    assert run_pieces([outer] * 8) == [True] * 8


@pytest.mark.usefixtures("two_threads")
def test_first_error_is_raised_after_all_have_ended() -> None:
    done = []

    def piece(i: int) -> None:
        if i in (3, 5):
            raise ValueError(f"piece {i}")
        done.append(i)

    with pytest.raises(ValueError, match="piece 3"):
        run_pieces([partial(piece, i) for i in range(20)])
    assert len(done) == 18


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("inference", [False, True])
def test_inference_mode_reaches_the_pieces(inference: bool) -> None:
    with torch.inference_mode(inference):
        target = torch.zeros(8)

        def piece(i: int) -> bool:
            # Fails outside inference mode if the tensor was made in it.
            target[i] += i
            return torch.is_inference_mode_enabled()

        assert run_pieces([partial(piece, i) for i in range(8)]) == [inference] * 8
        assert target.tolist() == list(range(8))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attend_is_the_same_in_pieces(dtype: torch.dtype) -> None:
    problem = make_problem(n=3000, num_rows=2500, num_kv_heads=2, dtype=dtype, num_columns=400)
    problem = problem.with_pattern(block_q=64, block_k=32, dense_last=300)
    arguments = problem.q, problem.k, problem.v, problem.selection, problem.pattern
    with torch.inference_mode():
        out, visited = cpu.attend(*arguments, scale=problem.scale)
    torch.set_num_threads(1)
    alone, visited_alone = cpu.attend(*arguments, scale=problem.scale)
    assert visited == visited_alone
    assert relative_error(out, alone) < TOLERANCE[dtype]
    expected, expected_visited = naive.attend(*arguments, scale=problem.scale)
    assert visited == expected_visited
    assert relative_error(out, expected) < TOLERANCE[dtype]
