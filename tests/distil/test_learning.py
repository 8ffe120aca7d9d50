# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Targets, losses, the indexer's forward and backward pass, and that it learns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.distil import tiny
from vllm_vsprefill.distil import losses, scoring
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.distiller import Distiller
from vllm_vsprefill.distil.mass import naive as mass
from vllm_vsprefill.distil.model import wrap
from vllm_vsprefill.distil.options import StudentOptions
from vllm_vsprefill.distil.student import Student, features
from vllm_vsprefill.distil.targets import Range, TargetKind, chunk_ranges, compute, draw_ranges, spread_ranges
from vllm_vsprefill.kernels.score.naive import score
from vllm_vsprefill.kernels.types import IndexerLayerWeights


def random_call(n: int = 60, heads: int = 2, group: int = 2, size: int = 8, seed: int = 0) -> LayerCall:
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(n, heads * group, size, generator=rng) * 2
    k, v = (torch.randn(n, heads, size, generator=rng) for _ in range(2))
    return LayerCall(0, q, k, v, 0.4, None)


# -- targets -----------------------------------------------------------------------------------------------------------


def test_targets_of_a_range_are_those_of_its_rows_and_context() -> None:
    call, part = random_call(), Range(20, 45)
    kinds = [TargetKind("mass", 0), TargetKind("mass", 6), TargetKind("peak", 6), TargetKind("mixed", 6)]
    kinds.append(TargetKind("peak", 6, 2.0))
    found = compute(call, part, kinds)
    options: dict[str, Any] = {"scale": 0.4, "row_start": 20}
    q, k = call.q[:45], call.k[:45]
    columns, diagonals = mass.mass_sums(q, k, **options)
    torch.testing.assert_close(found[kinds[0]].columns, columns, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[kinds[0]].diagonals, diagonals, rtol=1e-4, atol=1e-7)
    far = mass.column_weights(q, k, reduce="sum", min_distance=6, **options)
    largest = mass.column_weights(q, k, reduce="max", min_distance=6, **options)
    far, largest = (x / x.sum(-1, keepdim=True) for x in (far, largest))
    torch.testing.assert_close(found[kinds[1]].columns, far, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[kinds[2]].columns, largest, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found[kinds[3]].columns, (far + largest) / 2, rtol=1e-4, atol=1e-7)
    squared = largest.square() / largest.square().sum(-1, keepdim=True)
    torch.testing.assert_close(found[kinds[4]].columns, squared, rtol=1e-4, atol=1e-7)
    for kind in kinds[1:]:
        assert not found[kind].diagonals[:, :6].any()
        torch.testing.assert_close(found[kind].diagonals.sum(-1), torch.ones(2))


def test_a_high_power_of_small_peaks_still_orders_them() -> None:
    call = random_call(2000)
    call = call._replace(q=call.q * 0.05)
    plain, sharp = TargetKind("peak", 6), TargetKind("peak", 6, 16.0)
    found = compute(call, Range(1500, 2000), [plain, sharp])
    wanted = found[plain].columns.double() ** 16
    wanted = wanted / wanted.sum(-1, keepdim=True)
    torch.testing.assert_close(found[sharp].columns.double(), wanted, rtol=1e-3, atol=1e-7)


def test_a_context_within_the_window_teaches_the_plain_distributions() -> None:
    call, kind = random_call(30), TargetKind("mass", 64)
    found = compute(call, Range(0, 30), [kind, TargetKind("mass", 0)])
    assert torch.equal(found[kind].columns, found[TargetKind("mass", 0)].columns)


@given(
    length=st.integers(1, 5000),
    chunks=st.lists(st.integers(0, 900), min_size=1, max_size=3),
    max_ranges=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_ranges_are_chunks_of_the_prompt(length: int, chunks: list[int], max_ranges: int, seed: int) -> None:
    drawn = draw_ranges(np.random.default_rng(seed), length, chunks, max_ranges)
    assert 1 <= len(drawn) <= max_ranges
    assert any(set(drawn) <= set(chunk_ranges(length, chunk)) for chunk in chunks)
    assert drawn == sorted(drawn)


def test_chunks_are_spread_over_the_contexts_that_matter() -> None:
    assert spread_ranges(100, 10, 3) == [Range(0, 10), Range(40, 50), Range(90, 100)]
    assert spread_ranges(100, 10, 3, min_seq_len=60) == [Range(50, 60), Range(70, 80), Range(90, 100)]
    assert spread_ranges(100, 0, 3, min_seq_len=60) == [Range(0, 100)]
    assert spread_ranges(50, 10, 3, min_seq_len=60) == [Range(40, 50)]


@given(length=st.integers(1, 3000), chunk=st.integers(0, 900))
def test_chunks_cover_the_prompt(length: int, chunk: int) -> None:
    assert [row for part in chunk_ranges(length, chunk) for row in range(*part)] == list(range(length))


# -- forward and backward ----------------------------------------------------------------------------------------------


def test_score_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2500, 12, generator=rng)
    shapes = ((2, 12, 16), (2, 16), (2, 16, 2), (2, 2))
    weights = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    monkeypatch.setattr(scoring, "BLOCK_ELEMENTS", 1)  # blocks of the least size
    upstream = torch.randn(2, 2500, 2, generator=rng)

    def plain(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return torch.relu(x @ w1 + b1[:, None]) @ w2 + b2[:, None]

    found = scoring.score(x, *weights)
    expected = plain(*weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    mine = torch.autograd.grad(found, weights, upstream)
    theirs = torch.autograd.grad(expected, weights, upstream)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)


def test_score_is_what_the_server_computes() -> None:
    call = random_call()
    student = Student("s", StudentOptions(hidden_size=16), [0], 2, 8, seed=3)
    with torch.no_grad():
        found = student.logits(call, features("kv", call, torch.float32))
        torch.testing.assert_close(found.transpose(0, 1), score(call.k, call.v, IndexerLayerWeights(*student.layer(0))))


def test_features_hold_what_their_name_says() -> None:
    call = random_call()
    mean = torch.stack((call.q[:, :2].mean(1), call.q[:, 2:].mean(1)))
    k, v = call.k.transpose(0, 1), call.v.transpose(0, 1)
    parts = {"k": k, "v": v, "q": mean}
    for name in ("kv", "k", "v", "q", "kq", "kvq"):
        expected = torch.cat([parts[letter] for letter in name], -1)
        torch.testing.assert_close(features(name, call, torch.float32), expected)


def test_losses_by_hand() -> None:
    true, predicted = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    log = predicted.log()
    assert losses.kl(true, log).item() == pytest.approx(np.log(2), abs=1e-6)
    assert losses.mse(true, log).item() == pytest.approx(0.0625 * 2 + 0.25)
    cosine = 0.25 / (np.sqrt(0.5) * np.sqrt(0.375))
    assert losses.cosine(true, log).item() == pytest.approx(1 - cosine, abs=1e-6)
    for measure in losses.LOSSES.values():
        assert measure(true, true.clamp(min=1e-20).log()).item() == pytest.approx(0, abs=1e-5)


def test_gradients_are_those_of_the_plain_loss() -> None:
    call, ranges = random_call(50), [Range(0, 20), Range(30, 50)]
    student = Student("s", StudentOptions(hidden_size=8), [0], 2, 8, seed=1)
    kind = student.kind
    true = [compute(call, part, [kind])[kind] for part in ranges]
    logits = student.logits(call, features("kv", call, torch.float32))
    loss, divergence = student.losses(logits, ranges, true)
    assert torch.equal(loss.detach(), divergence)
    own = torch.autograd.grad(loss.sum(), list(student.layer(0)))

    weights = IndexerLayerWeights(*(w.detach().requires_grad_() for w in student.layer(0)))
    terms = []
    for part, target in zip(ranges, true, strict=True):
        # As the server normalises: over the context at the end of the chunk, diagonals from its end.
        predicted = torch.log_softmax(score(call.k[: part.end], call.v[: part.end], weights), dim=0)
        both = (predicted[..., 0].T, predicted[..., 1].T.flip(-1))
        terms += [(t * ((t + 1e-30).log() - p)).sum(-1).mean() for t, p in zip(target, both, strict=True)]
    plain = torch.stack(terms).sum() / 2
    torch.testing.assert_close(loss.sum(), plain, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(plain, list(weights))
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# -- learning ----------------------------------------------------------------------------------------------------------


def test_several_students_learn_from_one_stream_what_each_would_learn_alone() -> None:
    teacher = wrap(tiny.model("qwen3"), "tiny")
    ids = torch.randint(4096, (120,), generator=torch.Generator().manual_seed(0))
    ranges = [Range(0, 60), Range(60, 120)]
    options = [
        StudentOptions(hidden_size=8),
        StudentOptions(hidden_size=16, inputs="kvq", loss="mse"),
        StudentOptions(hidden_size=8, target="peak", exclude_window=8, loss="cosine"),
    ]

    def fresh(which: list[StudentOptions]) -> Distiller:
        students = [Student(str(i), o, (0, 1), 2, 16, 5) for i, o in enumerate(which)]
        return Distiller(teacher, students, torch.float32)

    together = fresh(options)
    figures = together.learn(ids, ranges, 0.5)
    for i, option in enumerate(options):
        alone = fresh([option])
        own = alone.learn(ids, ranges, 0.5)
        torch.testing.assert_close(own[0], figures[i])
        for mine, theirs in zip(alone.students[0].parameters(), together.students[i].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(together.evaluate(ids, ranges), figures)


@pytest.mark.parametrize("loss", ["kl", "mse", "cosine"])
def test_the_loss_falls(loss: str) -> None:
    teacher = wrap(tiny.model("llama3.1"), "tiny")
    student = Student("s", StudentOptions(hidden_size=32, loss=loss), (0, 1), 2, 8, 0)  # type: ignore[arg-type]
    distiller = Distiller(teacher, [student], torch.float32)
    optimiser = torch.optim.AdamW(student.parameters(), lr=5e-3)
    ids = torch.randint(4096, (150,), generator=torch.Generator().manual_seed(0))
    history = []
    for _ in range(30):
        optimiser.zero_grad()
        history.append(float(distiller.learn(ids, [Range(50, 150)], 1.0)[..., 2:].mean()))
        optimiser.step()
    assert history[-1] < 0.6 * history[0]


def test_bfloat16_products_give_nearly_the_same_loss() -> None:
    teacher = wrap(tiny.model("qwen3"), "tiny")
    student = Student("s", StudentOptions(hidden_size=32), (0, 1), 2, 16, 0)
    ids = torch.randint(4096, (150,), generator=torch.Generator().manual_seed(0))
    full, half = (
        Distiller(teacher, [student], dtype).evaluate(ids, [Range(0, 150)]) for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(full, half, rtol=1e-2, atol=1e-3)
