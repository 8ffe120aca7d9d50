# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which version of ``attend_tiles`` runs, and why not the faster one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import make_paged
from tests.kernels.tile_problems import random_keys, tile_index
from vllm_vsprefill.kernels.types import SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)


@pytest.fixture
def dispatch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``attend_tiles.triton`` as on a device of capability 9.0, a stand-in for the kernel, and a problem for it."""
    from vllm_vsprefill.kernels.attend_tiles import hopper, triton

    problem = make_paged(seq_lens=[40], rows=[40], pattern=SparsePattern(64, 4, 20, 5), dtype=torch.float16)
    index = tile_index(problem, random_keys(problem, 0.3))
    stand_in = SimpleNamespace(unsupported=hopper.unsupported, attend_tiles=lambda q, *_, **__: q)
    monkeypatch.setattr(triton, "_hopper", stand_in)
    monkeypatch.setattr(triton, "_no_hopper", None)
    monkeypatch.setattr(triton, "capability", lambda _: 90)

    def attend_tiles() -> torch.Tensor:
        return triton.attend_tiles(problem.q, problem.kv, index, problem.batch, scale=0.3)

    return SimpleNamespace(module=triton, stand_in=stand_in, call=attend_tiles, problem=problem, index=index)


def test_a_wrong_argument_of_ours_is_no_slower_kernel(dispatch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.call() is dispatch.problem.q

    def wrong(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return q.stride(0, 1)  # type: ignore[call-overload]

    monkeypatch.setattr(dispatch.stand_in, "attend_tiles", wrong)
    for _ in range(2):
        with pytest.raises(TypeError, match="stride"):
            dispatch.call()
    assert dispatch.module._no_hopper is None


def test_a_triton_that_does_not_compile_it_runs_a_slower_kernel(dispatch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    calls: list[None] = []

    def too_new(*_: Any, **__: Any) -> torch.Tensor:
        calls.append(None)
        compiler: Any = triton.compiler.compile
        return compiler(object())

    told: list[str] = []
    monkeypatch.setattr(dispatch.module.logger, "warning", lambda text, *args: told.append(text % args))
    monkeypatch.setattr(dispatch.stand_in, "attend_tiles", too_new)
    for _ in range(2):
        assert dispatch.call()[dispatch.problem.batch.row_start[0] :][:40].isfinite().all()
    assert len(calls) == 1
    assert ["does not compile it" in line for line in told] == [True]
    reason = dispatch.module.without_hopper(dispatch.problem.q, dispatch.problem.kv, dispatch.index)
    assert reason.startswith("this Triton does not compile it")


def test_reasons_for_a_slower_kernel(dispatch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_vsprefill.kernels.attend_tiles.hopper import unsupported_shape

    q, kv, index = dispatch.problem.q, dispatch.problem.kv, dispatch.index
    why = dispatch.module.without_hopper
    assert why(q, kv, index) is None
    assert "a cache of the queries' type" in why(q.float(), kv, index)
    assert "multiples of 16 bytes" in why(torch.zeros(42, 8, 68, dtype=q.dtype, device=DEVICE)[..., 4:], kv, index)
    half, full = torch.float16, torch.float32
    for shape, said in (
        ((4, 32, 80, half), "64 and 128 channels, not 80"),
        ((4, 32, 64, full), "not torch.float32"),
        ((65, 32, 64, half), "at most 64 query heads"),
        ((4, 48, 64, half), "tiles of multiples of 32 rows, not 48"),
        ((6, 64, 64, half), "tiles of multiples of 20 rows, not 64"),
        ((1, 64, 64, half), "tiles of multiples of 128 rows, not 64"),
    ):
        assert said in str(unsupported_shape(*shape))
    for group, block_q in ((6, 20), (6, 120), (7, 18), (4, 64), (8, 16), (1, 128), (64, 2)):
        assert unsupported_shape(group, block_q, 128, half) is None
    monkeypatch.setattr(dispatch.module, "capability", lambda _: 80)
    assert why(q, kv, index) == "it is for compute capability 9.0"
