# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The plan of a step: which requests run sparse, and how the others are grouped."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vsprefill.plan import MIN_ROWS, Gate, RequestRows, plan_step
from vllm_vsprefill.tuning import cuda_tuning, pairs_worth_choosing

GATE = Gate(min_seq_len=1000, dense_last_rows=64)


def starts(rows: list[int]) -> list[int]:
    return [0, *itertools.accumulate(rows)]


@pytest.mark.parametrize(
    ("rows", "context", "prefilling", "sparse"),
    [
        (512, 1000, True, True),
        (512, 999, True, False),  # short context
        (1, 5000, True, False),  # last token of a prompt after a prefix hit
        (1, 5000, False, False),  # decode
        (512, 5000, False, False),  # not a prompt
        (64, 5000, True, False),  # nothing but dense last rows
        (64 + MIN_ROWS - 1, 5000, True, False),  # too few others
        (64 + MIN_ROWS, 5000, True, True),
    ],
)
def test_gate(rows: int, context: int, prefilling: bool, sparse: bool) -> None:
    plan = plan_step([0, rows], [context], [prefilling], GATE)
    assert bool(plan.sparse) is sparse
    dense_rows = sum(part.rows for run in plan.dense_runs for part in run)
    assert dense_rows == (GATE.dense_last_rows if sparse else rows)


def test_gate_looks_at_the_whole_context_not_at_the_chunk() -> None:
    plan = plan_step([0, 128, 256], [128, 20000], [True, True], GATE)
    assert [rows.request for rows in plan.sparse] == [1]


def test_few_rows_stay_dense_whatever_the_options() -> None:
    gate = Gate(min_seq_len=0, dense_last_rows=0)
    assert not plan_step([0, MIN_ROWS - 1], [9000], [True], gate).sparse
    assert plan_step([0, MIN_ROWS], [9000], [True], gate).sparse


def test_small_pieces_of_work_stay_dense() -> None:
    gate = Gate(min_seq_len=1, dense_last_rows=64, min_pairs=2**24)
    for rows, context, sparse in ((1024, 16384, True), (1023, 16384, False), (128, 131072, True), (127, 140000, False)):
        assert gate.admits(rows, context, True) is sparse


def test_few_rows_may_be_more_where_choosing_keys_costs_more() -> None:
    gate = Gate(min_seq_len=1, dense_last_rows=64, min_rows=1024)
    assert not gate.admits(1023, 10**6, True)
    assert gate.admits(1024, 5000, True)


@pytest.mark.parametrize(
    ("rows", "context", "trained", "sampled"),
    [
        (4096, 16384, True, True),
        (2048, 32768, True, True),
        (1024, 65536, True, True),
        (512, 131072, True, False),
        (2048, 16384, False, False),
        (1024, 32768, False, False),
        (256, 131072, False, False),
    ],
)
def test_what_the_documentation_says_of_hopper(rows: int, context: int, trained: bool, sampled: bool) -> None:
    """With a decode or two in the same step, too."""
    tuning = cuda_tuning((9, 0))
    for least, sparse in ((0, trained), (tuning.min_rows_sampled, sampled)):
        gate = Gate(tuning.min_seq_len, dense_last_rows=64, min_pairs=tuning.min_pairs, min_rows=least)
        assert gate.admits(rows, context, True) is sparse
        assert gate.admits(rows - 3, context - 3, True) is sparse


@given(st.integers(1, 5000), st.integers(0, 3000), st.integers(0, 2**24), st.integers(0, 2000), st.integers(0, 100))
def test_min_seq_len(rows: int, min_seq_len: int, min_pairs: int, min_rows: int, dense: int) -> None:
    gate = Gate(min_seq_len, dense, min_pairs=min_pairs, min_rows=min_rows)
    least = gate.shortest_seq_len(rows)
    if least is None:
        assert not gate.admits(rows, 10**9, True)
        return
    assert gate.admits(rows, least, True)
    assert rows >= max(min_rows, dense + MIN_ROWS)
    assert least >= min_seq_len
    assert rows * least >= min_pairs
    assert least in (rows, min_seq_len) or rows * (least - 1) < min_pairs
    assert least == rows or not gate.admits(rows, least - 1, True)


def test_few_heads_want_longer_chunks() -> None:
    assert pairs_worth_choosing(1000, 32, 128) == 1000
    assert pairs_worth_choosing(1000, 8, 128) == 4000
    assert pairs_worth_choosing(1000, 64, 128) == 1000
    assert pairs_worth_choosing(0, 8, 64) == 0


def test_switched_off() -> None:
    gate = Gate(min_seq_len=1, dense_last_rows=0, enabled=False)
    plan = plan_step([0, 512], [9000], [True], gate)
    assert not plan.sparse
    assert plan.prefill_pairs == RequestRows(0, 0, 512, 9000).causal_pairs


def test_dense_runs_are_of_neighbours_and_skip_padding() -> None:
    rows = [1, 1, 512, 1, 0, 1, 700, 0]
    contexts = [50, 60, 4000, 70, 0, 80, 9000, 0]
    flags = [False, False, True, False, False, False, True, False]
    plan = plan_step(starts(rows), contexts, flags, GATE)
    assert [r.request for r in plan.sparse] == [2, 6]
    assert [[r.request for r in run] for run in plan.dense_runs] == [[0, 1], [2, 3], [5], [6]]
    tail = plan.dense_runs[1][0]
    assert (tail.row_start, tail.row_end, tail.seq_len) == (2 + 512 - 64, 2 + 512, 4000)
    assert plan.sparse[0] == RequestRows(2, 2, 2 + 512 - 64, 4000 - 64)


def test_without_dense_rows_nothing_is_left_over() -> None:
    plan = plan_step([0, 512], [9000], [True], Gate(min_seq_len=1, dense_last_rows=0))
    assert plan.sparse == (RequestRows(0, 0, 512, 9000),)
    assert plan.dense_runs == ()


@given(st.integers(1, 300), st.integers(0, 300))
def test_causal_pairs(rows: int, cached: int) -> None:
    counted = sum(position + 1 for position in range(cached, cached + rows))
    assert RequestRows(0, 0, rows, cached + rows).causal_pairs == counted


@given(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 4000), st.booleans()), max_size=12))
def test_every_row_is_computed_once(requests: list[tuple[int, int, bool]]) -> None:
    rows = [r for r, _, _ in requests]
    plan = plan_step(starts(rows), [r + cached for r, cached, _ in requests], [p for _, _, p in requests], GATE)
    pieces = [*plan.sparse, *(r for run in plan.dense_runs for r in run)]
    covered = sorted(itertools.chain.from_iterable(range(p.row_start, p.row_end) for p in pieces))
    assert covered == list(range(sum(rows)))
    for run in plan.dense_runs:
        assert all((a.row_end, a.request + 1) == (b.row_start, b.request) for a, b in itertools.pairwise(run))
    expected = sum(RequestRows(0, 0, r, r + c).causal_pairs for r, c, prefilling in requests if prefilling)
    assert plan.prefill_pairs == expected
