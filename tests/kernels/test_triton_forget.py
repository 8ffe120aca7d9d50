# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Marking slots as missing, against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE

if USABLE:
    from vllm_vsprefill.kernels.forget import paged
    from vllm_vsprefill.kernels.forget.triton import forget

pytestmark = [pytest.mark.skipif(not USABLE, reason=REASON)] + ([pytest.mark.gpu] if DEVICE == "cuda" else [])


@pytest.mark.parametrize("width", [2, 6, 16])
@pytest.mark.parametrize("tokens", [0, 1, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_against_the_reference(width: int, tokens: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(tokens)
    logits = torch.randn(500, width, generator=rng).to(dtype)
    slots = torch.randperm(500, generator=rng)[:tokens]
    slots[::5] = -1
    expected = logits.clone()
    paged.forget(expected, slots)
    found = logits.to(DEVICE)
    forget(found, slots.to(DEVICE))
    assert torch.equal(found.cpu().isnan(), expected.isnan())
    assert torch.equal(found.cpu().nan_to_num(), expected.nan_to_num())
    assert int(expected.isnan().all(1).sum()) == int((slots >= 0).sum())


def test_rows_of_a_wider_tensor() -> None:
    wide = torch.zeros(10, 8, device=DEVICE)
    forget(wide[:, 2:6], torch.tensor([3, -1, 9], device=DEVICE))
    missing = wide.cpu().isnan()
    assert missing.nonzero().tolist() == [[row, column] for row in (3, 9) for column in range(2, 6)]


if DEVICE == "cuda":

    def test_in_a_captured_graph() -> None:
        logits = torch.zeros(100, 16, device="cuda")
        slots = torch.full((8,), -1, device="cuda")
        forget(logits, slots)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forget(logits, slots)
        slots[:2] = torch.tensor([4, 50], device="cuda")
        graph.replay()
        assert logits.isnan().all(1).nonzero().squeeze(1).tolist() == [4, 50]


@pytest.mark.parametrize(
    ("logits", "slots", "named"),
    [
        (torch.zeros(4), torch.zeros(1, dtype=torch.int64), "logits"),
        (torch.zeros(4, 2).T, torch.zeros(1, dtype=torch.int64), "logits"),
        (torch.zeros(4, 2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64), "logits"),
        (torch.zeros(4, 2), torch.zeros(1, dtype=torch.int32), "slot_mapping"),
        (torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)[::2], "slot_mapping"),
    ],
)
def test_wrong_arguments_are_named(logits: torch.Tensor, slots: torch.Tensor, named: str) -> None:
    # A copy on another device would have contiguous entries.
    slots = torch.zeros(slots.shape[0] * slots.stride(0), dtype=slots.dtype, device=DEVICE)[:: slots.stride(0)]
    with pytest.raises(ValueError, match=named):
        paged.check_forget(logits.to(DEVICE), slots)
