# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Sparse attention: the reference against plain loops, the fast path against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.problems import (
    TOLERANCE,
    Problem,
    granules_of,
    make_problem,
    make_selection,
    masked_softmax_attention,
    problems,
    relative_error,
    tile_of,
)
from vllm_vsprefill.kernels.attend import cpu, naive
from vllm_vsprefill.kernels.types import Selection, SparsePattern

Attend = Callable[..., tuple[Tensor, int]]
BOTH = pytest.mark.parametrize("attend", [naive.attend, cpu.attend], ids=["naive", "cpu"])


def run(attend: Attend, problem: Problem, **changes: Any) -> tuple[Tensor, int]:
    kwargs: dict[str, Any] = {"q": problem.q, "k": problem.k, "v": problem.v, "selection": problem.selection}
    return attend(**{**kwargs, "pattern": problem.pattern, "scale": problem.scale, **changes})


def dense(problem: Problem) -> Tensor:
    """Causal attention in float64."""
    num_rows, n = problem.q.shape[0], problem.seq_len
    causal = np.tril(np.ones((num_rows, n), dtype=bool), n - num_rows)
    return masked_softmax_attention(problem.q, problem.k, problem.v, [causal] * problem.k.shape[1], problem.scale)


def causal_pairs(problem: Problem) -> int:
    n = problem.seq_len
    return problem.k.shape[1] * sum(i + 1 for i in range(n - problem.q.shape[0], n))


def check(problem: Problem) -> None:
    """cpu against naive: same count, same output within the dtype's rounding."""
    expected, expected_visited = run(naive.attend, problem)
    actual, visited = run(cpu.attend, problem)
    assert actual.dtype == problem.q.dtype
    assert actual.shape == problem.q.shape
    assert visited == expected_visited
    assert relative_error(actual, expected) < TOLERANCE[problem.q.dtype]


@BOTH
@settings(max_examples=200)
@given(problem=problems(max_seq_len=70))
def test_definition(attend: Attend, problem: Problem) -> None:
    masks = problem.masks()
    out, visited = run(attend, problem)
    expected = masked_softmax_attention(problem.q, problem.k, problem.v, masks, problem.scale)
    assert isinstance(visited, int)
    assert visited == sum(int(mask.sum()) for mask in masks)
    assert relative_error(out, expected) < TOLERANCE[torch.float64]


@settings(max_examples=500)
@given(
    problem=problems(
        max_seq_len=400,
        dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
        sizes=(64, 80, 96, 128, 256),
    )
)
def test_cpu_equals_naive(problem: Problem) -> None:
    check(problem)


@BOTH
@given(problem=problems(max_seq_len=90), data=st.data())
def test_diagonals_and_all_remaining_columns_are_dense(attend: Attend, problem: Problem, data: st.DataObject) -> None:
    n, pattern = problem.seq_len, problem.pattern
    first_row = n - problem.q.shape[0]
    columns = []
    for diagonals in problem.diagonals:
        remaining = set()
        for tile in {tile_of(i, n, pattern) for i in range(first_row, n)}:
            granules = granules_of(tile, n, diagonals, pattern)
            remaining |= {j for j in range(tile.stop) if j // pattern.block_k not in granules}
        columns.append(sorted(remaining))
    out, visited = run(attend, replace(problem, columns=columns))
    assert visited == causal_pairs(problem)
    assert relative_error(out, dense(problem)) < TOLERANCE[torch.float64]


@BOTH
@pytest.mark.parametrize("everything", ["columns", "diagonals", "window", "sinks", "dense_last"])
def test_everything_selected_is_dense(attend: Attend, everything: str) -> None:
    problem = make_problem(n=150, num_rows=100, dtype=torch.float64, num_columns=0, num_diagonals=0)
    if everything in ("columns", "diagonals"):
        change: dict[str, Any] = {everything: [list(range(150))] * 2}
        problem = replace(problem, **change)
    else:
        problem = problem.with_pattern(**{everything: 1000})
    out, visited = run(attend, problem)
    assert visited == causal_pairs(problem)
    assert relative_error(out, dense(problem)) < TOLERANCE[torch.float64]


@BOTH
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_query_always_sees_itself(attend: Attend, dtype: torch.dtype) -> None:
    nothing = SparsePattern(block_q=1, block_k=1, window=0, sinks=0, dense_last=0)
    problem = make_problem(n=9, num_columns=0, num_diagonals=0, dtype=dtype, pattern=nothing)
    out, visited = run(attend, problem)
    torch.testing.assert_close(out, problem.v.repeat_interleave(4, dim=1), rtol=0, atol=0)
    assert visited == 9 * 2


@BOTH
def test_budget_of_one(attend: Attend) -> None:
    nothing = SparsePattern(block_q=1, block_k=1, window=0, sinks=0, dense_last=0)
    problem = make_problem(n=40, dtype=torch.float64, pattern=nothing)
    problem = replace(problem, columns=[[3], []], diagonals=[[], [5]])
    out, visited = run(attend, problem)
    # Head 0: itself and column 3 once it is in the past; head 1: itself and the key 5 places back.
    assert visited == (40 + 36) + (40 + 35)
    for i, g, other in ((20, 0, 3), (2, 1, None), (20, 7, 15), (3, 4, None)):
        h = g // 4
        keys = [i] if other is None else [other, i]
        weights = torch.softmax(problem.k[keys, h] @ problem.q[i, g] * problem.scale, dim=0)
        torch.testing.assert_close(out[i, g], weights @ problem.v[keys, h])


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 255, 257, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_odd_lengths(n: int, dtype: torch.dtype) -> None:
    pattern = SparsePattern(block_q=128, block_k=64, window=100, sinks=5, dense_last=3)
    check(make_problem(n=n, dtype=dtype, num_columns=60, num_diagonals=4, pattern=pattern))


@pytest.mark.parametrize("num_rows", [1, 2, 63, 64, 65, 200, 299, 300])
@pytest.mark.parametrize("dense_last", [0, 1, 64])
def test_chunks_that_start_anywhere_in_a_tile(num_rows: int, dense_last: int) -> None:
    pattern = SparsePattern(block_q=64, block_k=16, window=40, sinks=20, dense_last=dense_last)
    check(make_problem(n=300, num_rows=num_rows, num_columns=30, pattern=pattern))


@BOTH
def test_a_chunk_equals_the_same_rows_of_a_longer_chunk(attend: Attend) -> None:
    problem = make_problem(n=200, dtype=torch.float64, num_columns=30).with_pattern(dense_last=7)
    whole, _ = run(attend, problem)
    for num_rows in (1, 5, 33, 120):
        part, _ = run(attend, replace(problem, q=problem.q[-num_rows:]))
        torch.testing.assert_close(part, whole[-num_rows:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("size", [64, 80, 96, 112, 128, 192, 256])
def test_groups_and_head_sizes(group: int, size: int) -> None:
    check(make_problem(n=130, num_rows=77, group=group, size=size, dtype=torch.bfloat16, num_columns=25))


@pytest.mark.parametrize(
    ("columns", "diagonals"),
    [([[], []], [[], []]), ([[0, 50], []], [[], [30]]), ([[], list(range(120))], [[1, 119], []])],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_empty_and_uneven_heads(columns: list[list[int]], diagonals: list[list[int]], dtype: torch.dtype) -> None:
    problem = make_problem(n=120, num_rows=100, dtype=dtype)
    check(replace(problem, columns=columns, diagonals=diagonals))
    check(replace(problem, columns=columns, diagonals=diagonals).with_pattern(window=0, sinks=0))


def test_tiles_longer_than_a_block() -> None:
    pattern = SparsePattern(block_q=1000, block_k=10, window=30, sinks=2, dense_last=300)
    check(make_problem(n=1500, num_rows=1337, num_columns=100, pattern=pattern))


@pytest.mark.parametrize("limits", [(1, 16), (40, 16), (512, 3), (100_000, 100_000)])
@pytest.mark.parametrize("min_common", [1, 100_000])
def test_batches_and_shared_keys_change_no_result(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], min_common: int
) -> None:
    monkeypatch.setattr(cpu, "BATCH_ROWS", limits[0])
    monkeypatch.setattr(cpu, "BATCH_BLOCKS", limits[1])
    monkeypatch.setattr(cpu, "MIN_COMMON", min_common)
    check(make_problem(n=700, num_rows=650, num_columns=100, num_diagonals=5))
    # Some blocks of a batch have no past, or nothing but shared keys.
    columns = make_problem(n=300, num_columns=64, num_diagonals=0).with_pattern(window=0, sinks=0)
    check(columns)
    check(replace(columns, columns=[list(range(100, 164)), []]))


@BOTH
@pytest.mark.parametrize("stale", [-1, 2**31 - 1, 0])
def test_entries_beyond_the_counts_are_not_read(attend: Attend, stale: int) -> None:
    problem = make_problem(n=100, dtype=torch.float64)
    expected, visited = run(attend, problem)
    out, count = run(attend, problem, selection=make_selection(problem.columns, problem.diagonals, stale=stale))
    assert count == visited
    assert torch.equal(out, expected)


def test_keys_that_nobody_sees_are_not_read() -> None:
    # Not even position 0 is seen.
    problem = make_problem(n=300, num_rows=40).with_pattern(sinks=0)
    problem = replace(problem, columns=[[33, 101, 102], [7]], diagonals=[[90], [150]])
    unseen = torch.from_numpy(~np.stack([mask.any(axis=0) for mask in problem.masks()], axis=1))
    assert unseen[0].all()
    expected, _ = run(cpu.attend, problem)
    out, _ = run(
        cpu.attend,
        problem,
        k=problem.k.masked_fill(unseen.unsqueeze(-1), float("nan")),
        v=problem.v.masked_fill(unseen.unsqueeze(-1), float("nan")),
    )
    assert torch.equal(out, expected)


@BOTH
def test_any_strides_and_the_callers_output(attend: Attend) -> None:
    problem = make_problem(n=150, num_rows=90, num_kv_heads=2, group=3, size=64).with_pattern(dense_last=20)
    expected, visited = run(attend, problem)
    (n, heads, size), q = problem.k.shape, problem.q
    # One tensor [n, Hq + 2 * Hkv, D], as a fused projection leaves it
    fused = torch.cat((torch.zeros(n - 90, 6, size), q)), problem.k, problem.v
    packed = torch.cat(fused, dim=1)
    head_major = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (problem.k, problem.v)]
    # Channels outermost: not even the last axis is contiguous.
    odd = [x.permute(2, 1, 0).contiguous().permute(2, 1, 0) for x in (q, problem.k, problem.v)]
    views = [
        (packed[n - 90 :, :6], packed[:, 6 : 6 + heads], packed[:, 6 + heads :]),
        (q, *head_major),
        tuple(odd),
    ]
    for view in views:
        wide = torch.full((90, 6, 2 * size), float("nan"))
        result, count = run(attend, problem, q=view[0], k=view[1], v=view[2], out=wide[..., :size])
        assert result.data_ptr() == wide.data_ptr()
        assert count == visited
        torch.testing.assert_close(wide[..., :size], expected, rtol=1e-5, atol=1e-6)
        assert wide[..., size:].isnan().all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_large_logits_stay_finite(dtype: torch.dtype) -> None:
    problem = make_problem(n=260, num_rows=200, dtype=dtype, num_columns=40)
    problem = replace(problem, q=problem.q * 30, scale=1.0)
    expected, _ = run(naive.attend, problem)
    out, _ = run(cpu.attend, problem)
    assert relative_error(out, expected) < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_close_to_float64(dtype: torch.dtype) -> None:
    problem = make_problem(n=900, num_rows=600, size=128, dtype=dtype, num_columns=200, num_diagonals=5)
    exact = replace(problem, q=problem.q.double(), k=problem.k.double(), v=problem.v.double())
    out, _ = run(cpu.attend, problem)
    assert relative_error(out, run(naive.attend, exact)[0]) < TOLERANCE[dtype]


def changed(selection: Selection, **changes: Any) -> Selection:
    return selection._replace(**changes)


GOOD = make_problem(n=20, num_rows=10, num_kv_heads=2, group=2, size=8)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": GOOD.q.int()}, "q must have dtype"),
    ({"q": GOOD.q[0]}, "q must have 3 axes"),
    ({"q": GOOD.q[:0]}, "q must have at least one row"),
    ({"q": GOOD.q[:, :3]}, "q has 3 heads, which is not a multiple of the 2 KV heads"),
    ({"q": GOOD.q[:, :0]}, "q and k need at least one head"),
    ({"q": GOOD.q.numpy()}, "q must be a tensor"),
    ({"k": GOOD.k.half()}, "k has dtype"),
    ({"k": GOOD.k.to("meta")}, "k is on meta"),
    ({"k": GOOD.k[..., :4]}, "k has head size 4"),
    ({"k": GOOD.k[:9], "v": GOOD.v[:9]}, "q has 10 rows but k has only 9 positions"),
    ({"v": GOOD.v[:19]}, "v has shape"),
    ({"v": GOOD.v[..., :4]}, "v has shape"),
    ({"v": GOOD.v.double()}, "v has dtype"),
    ({"v": GOOD.v.to("meta")}, "v is on meta"),
    (
        {"selection": changed(GOOD.selection, columns=GOOD.selection.columns.long())},
        "selection.columns must have dtype",
    ),
    ({"selection": changed(GOOD.selection, columns=GOOD.selection.columns[:1])}, "selection.columns has 1 rows"),
    ({"selection": changed(GOOD.selection, diagonals=GOOD.selection.diagonals[0])}, "selection.diagonals must have 2"),
    (
        {"selection": changed(GOOD.selection, num_columns=torch.zeros(3, dtype=torch.int32))},
        "selection.num_columns has 3",
    ),
    (
        {"selection": changed(GOOD.selection, num_diagonals=GOOD.selection.num_diagonals.to("meta"))},
        "selection.num_diagonals is on meta",
    ),
    ({"pattern": {"block_q": 3}}, "pattern must be a SparsePattern"),
    ({"scale": float("nan")}, "scale must be"),
    ({"scale": 0.0}, "scale must be"),
    ({"out": torch.empty(10, 4, 7)}, "out has shape"),
    ({"out": torch.empty(10, 4, 8, dtype=torch.float16)}, "out has dtype"),
    ({"out": torch.empty(10, 4, 8, device="meta")}, "out is on meta"),
]


@BOTH
@pytest.mark.parametrize(("bad", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_argument_is_named(attend: Attend, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(attend, GOOD, **bad)


def test_cpu_refuses_other_devices() -> None:
    meta = {name: getattr(GOOD, name).to("meta") for name in ("q", "k", "v")}
    selection = Selection(*(x.to("meta") for x in GOOD.selection))
    with pytest.raises(ValueError, match="q is on meta; this version runs on the CPU only"):
        run(cpu.attend, GOOD, **meta, selection=selection)


@BOTH
def test_positions_outside_the_context_are_refused_or_ignored(attend: Attend) -> None:
    # The reference refuses them; the fast path must not read outside the keys.
    selection = make_selection([[1, 25], [2]], [[30], []])
    if attend is naive.attend:
        with pytest.raises(ValueError, match=r"columns must lie in \[0, 20\)"):
            run(attend, GOOD, selection=selection)
    else:
        expected, _ = run(attend, GOOD, selection=make_selection([[1], [2]], [[], []]))
        assert torch.equal(run(attend, GOOD, selection=selection)[0], expected)
