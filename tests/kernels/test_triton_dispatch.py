# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which version of ``attend`` runs, and why not the faster one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import make_paged
from vllm_vsprefill.kernels.index import allocate_index
from vllm_vsprefill.kernels.merge.paged import set_flags
from vllm_vsprefill.kernels.merge.triton import build_index
from vllm_vsprefill.kernels.types import SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)


@pytest.fixture
def dispatch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``attend.triton`` as on a device of capability 9.0, with a stand-in for the kernel, and a problem for it."""
    from vllm_vsprefill.kernels.attend import hopper, triton

    problem = make_paged(seq_lens=[40], rows=[40], pattern=SparsePattern(16, 4, 20, 5, 0), dtype=torch.float16)
    index = allocate_index(1, 2, problem.batch.max_seq_len, problem.pattern, DEVICE)
    set_flags(index, problem.selections, problem.batch)
    build_index(index, problem.kv, problem.batch)
    stand_in = SimpleNamespace(unsupported=hopper.unsupported, attend=lambda q, *_, **__: q)
    monkeypatch.setattr(triton, "_hopper", stand_in)
    monkeypatch.setattr(triton, "_no_hopper", None)
    monkeypatch.setattr(triton, "capability", lambda _: 90)

    def attend(**options: Any) -> torch.Tensor:
        return triton.attend(problem.q, problem.kv, index, problem.batch, scale=0.3, **options)

    return SimpleNamespace(module=triton, stand_in=stand_in, attend=attend, problem=problem, index=index)


def test_a_wrong_argument_of_ours_is_no_slower_kernel(dispatch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dispatch.attend() is dispatch.problem.q

    def wrong(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return q.stride(0, 1)  # type: ignore[call-overload]

    monkeypatch.setattr(dispatch.stand_in, "attend", wrong)
    for _ in range(2):
        with pytest.raises(TypeError, match="stride"):
            dispatch.attend()
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
    monkeypatch.setattr(dispatch.stand_in, "attend", too_new)
    for _ in range(2):
        assert dispatch.attend()[dispatch.problem.batch.row_start[0] :][:40].isfinite().all()
    assert len(calls) == 1
    assert ["does not compile it" in line for line in told] == [True]
    reason = dispatch.module.without_hopper(dispatch.problem.q, dispatch.problem.kv, dispatch.index, 0)
    assert reason.startswith("this Triton does not compile it")


def test_reasons_for_a_slower_kernel(dispatch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_vsprefill.kernels.attend.hopper import unsupported_shape

    q, kv, index = dispatch.problem.q, dispatch.problem.kv, dispatch.index
    why = dispatch.module.without_hopper
    assert why(q, kv, index, 0) is None
    assert "dense last rows" in why(q, kv, index, 5)
    assert "a cache of the queries' type" in why(q.float(), kv, index, 0)
    assert "multiples of 16 bytes" in why(torch.zeros(42, 8, 68, dtype=q.dtype, device=DEVICE)[..., 4:], kv, index, 0)
    half, full = torch.float16, torch.float32
    for shape, said in (
        ((4, 16, 80, half), "64 and 128 channels, not 80"),
        ((4, 16, 64, full), "not torch.float32"),
        ((65, 16, 64, half), "at most 64 query heads"),
        ((1, 16, 64, half), "tiles of at least 64 rows, not 16"),
    ):
        assert said in str(unsupported_shape(*shape))
    monkeypatch.setattr(dispatch.module, "capability", lambda _: 80)
    assert why(q, kv, index, 0) == "it is for compute capability 9.0"
