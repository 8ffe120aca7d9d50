# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""One small random problem of every operation of the fuzzer, and that the fuzzer notices what is wrong."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE

if USABLE:
    from tests.kernels import fuzz
    from vllm_vsprefill.kernels.attend import naive as naive_attend
    from vllm_vsprefill.kernels.attend.triton import attend

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)


@pytest.mark.parametrize(
    "name", sorted(name for name in fuzz.OPERATIONS if not name.endswith("hopper")) if USABLE else []
)
def test_a_problem(name: str) -> None:
    result = fuzz.solve(name, 125, tiny=True)
    assert not result.faults, result.params
    assert result.errors or name in ("forget", "guard", "merge")


def test_a_wrong_row_is_found_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    good = attend

    def wrong(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        out = good(q, *args, **options)
        row = int(args[2].row_start[0])
        out[row, 0] *= 1.03
        return out

    monkeypatch.setattr(fuzz, "attend", wrong)
    first, second = fuzz.solve("attend", 100, tiny=True), fuzz.solve("attend", 100, tiny=True)
    assert any("worst row" in fault for fault in first.faults)
    assert first.params == second.params
    assert first.errors == second.errors


def test_an_exception_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(fuzz, "forget", broken)
    result = fuzz.solve("forget", 3, tiny=True)
    assert result.raised
    assert "no such kernel" in result.faults[0]
    report = fuzz.summarize([result, fuzz.solve("peak", 0, tiny=True)])
    assert report["forget"]["failures"][0]["repeat"] == "forget:3"
    assert report["peak"]["failures"] == []


def test_masks_equal_the_definition() -> None:
    """``visible`` against ``attend.naive`` on more shapes than problems would compare."""
    rng, gen = random.Random(0), torch.Generator(DEVICE).manual_seed(0)
    for _ in range(20):
        n = rng.randint(1, 120)
        rows = rng.randint(1, n)
        config = {"reach": n, **fuzz.draw_pattern_shape(rng, False)}
        pattern = fuzz.draw_pattern(rng, config, (0, 0, 3, 500))
        one = fuzz.choose(rng, gen, 2, n)
        found = fuzz.visible(one.columns, one.diagonals, pattern, rows)
        selection = one.selection.below(n)
        for head in range(2):
            wanted = naive_attend.visible(
                selection, pattern, head=head, num_rows=rows, seq_len=n, device=torch.device(DEVICE)
            )
            assert torch.equal(found[head], wanted), (pattern, n, rows)
