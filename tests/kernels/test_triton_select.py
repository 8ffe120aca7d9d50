# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The histogram selection against the plain reference."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import make_batch, paged_cache
from vllm_vsprefill.kernels.gathered import allocate_gathered
from vllm_vsprefill.kernels.index import allocate_index
from vllm_vsprefill.kernels.paged import Batch, PagedKV
from vllm_vsprefill.kernels.select import paged, triton
from vllm_vsprefill.kernels.select.paged import allocate_select, check_gather, check_select
from vllm_vsprefill.kernels.types import UNLIMITED, Budgets, SparsePattern

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)

PATTERN = SparsePattern(block_q=16, block_k=1, window=1, sinks=0, dense_last=0)


def make(seq_lens: list[int], heads: int, kind: str, seed: int) -> tuple[Tensor, PagedKV, Batch]:
    """Logits in cache slots; those of nobody are NaN."""
    rng = torch.Generator().manual_seed(seed)
    batch, _ = make_batch([1] * len(seq_lens), seq_lens)
    kv = paged_cache(seq_lens, heads, 16, 16, rng)
    logits = torch.full((kv.cache.shape[0] * 16, 2 * heads), float("nan"))
    for i, n in enumerate(seq_lens):
        position = torch.arange(n)
        values = torch.randn(n, 2 * heads, generator=rng)
        values = {
            "normal": values,
            "wide": values * 8,
            "equal": values * 0 + 3,
            "few values": torch.round(values * 2) / 2,
            "a peak": values + 40 * (position == n // 2).unsqueeze(1),
        }[kind]
        logits[kv.block_table[i].cpu().long()[position // 16] * 16 + position % 16] = values
    return logits.to(DEVICE), kv, batch


def chosen(
    logits: Tensor, kv: PagedKV, batch: Batch, tau: Tensor, budgets: Budgets = UNLIMITED, version: Any = triton
) -> list[list[set[int]]]:
    """Sets of each request: columns of every head, then diagonals of every head."""
    heads, requests, longest = kv.num_kv_heads, batch.num_requests, batch.max_seq_len
    index = allocate_index(requests, heads, longest, PATTERN, DEVICE)
    gathered = allocate_gathered(requests, heads, longest, DEVICE)
    workspace = allocate_select(requests, heads, longest, DEVICE)
    index.flags.fill_(77)
    for name, tensor in (gathered._asdict() | workspace._asdict()).items():
        if name != "bins":
            tensor.fill_(-7)
    check_gather(logits, kv, batch, gathered)
    version.gather(logits, kv, batch, gathered)
    check_select(gathered, batch, tau, index, workspace, budgets)
    version.select(gathered, batch, tau, index, workspace, budgets=budgets)
    assert not workspace.bins.any(), "bins must be left empty for the next call"
    return [
        [set(row[:n].nonzero().flatten().tolist()) for row in index.flags[i].flatten(0, 1)]
        for i, n in enumerate(batch.seq_len.tolist())
    ]


def expected(
    logits: Tensor, kv: PagedKV, batch: Batch, tau: Tensor, budgets: Budgets = UNLIMITED
) -> list[list[set[int]]]:
    return chosen(logits, kv, batch, tau, budgets, paged)


@pytest.mark.parametrize("seed", range(3))
def test_gathered_logits_are_those_of_the_reference(seed: int) -> None:
    logits, kv, batch = make([1500, 1024, 3][: seed + 1], seed + 1, "normal", seed)
    logits[int(kv.block_table[0, 0]) * 16 + 1] = torch.tensor([float("nan"), float("inf")] * (seed + 1), device=DEVICE)
    found = []
    for version in (triton, paged):
        gathered = allocate_gathered(batch.num_requests, seed + 1, batch.max_seq_len, DEVICE)
        for tensor in gathered:
            tensor.fill_(-7)
        version.gather(logits, kv, batch, gathered)
        found.append(gathered)
    for i, n in enumerate(batch.seq_len.tolist()):
        assert torch.equal(found[0].logits[i, :, :, :n], found[1].logits[i, :, :, :n])
        assert torch.equal(found[0].block_max[i, :, :, : -(-n // 1024)], found[1].block_max[i, :, :, : -(-n // 1024)])


@pytest.mark.parametrize("kind", ["normal", "wide", "equal", "few values", "a peak"])
@pytest.mark.parametrize("seed", range(5))
def test_equals_the_reference(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind}{seed}")
    seq_lens = [rng.choice([rng.randint(1, 200), rng.randint(1000, 2500)]) for _ in range(rng.randint(1, 2))]
    heads = rng.randint(1, 3)
    # 0.873: no number of equal tokens adds up to it, so that rounding decides nothing.
    tau = torch.tensor(
        [[rng.choice([-1.0, 0.0, 0.3141, 0.8731, 0.9917, 1.0]) for _ in range(heads)] for _ in range(2)],
        dtype=torch.float64,
        device=DEVICE,
    )
    bounds: list[int | None] = []
    for _ in ("columns", "diagonals"):
        maximum = rng.choice([None, None, 0, 1, 64, 5000])
        minimum = rng.choice([0, 0, 1, 50, 3000])
        bounds += [minimum if maximum is None else min(minimum, maximum), maximum]
    budgets = Budgets(*bounds)  # type: ignore[arg-type]
    logits, kv, batch = make(seq_lens, heads, kind, seed)
    assert chosen(logits, kv, batch, tau, budgets) == expected(logits, kv, batch, tau, budgets)


def test_ties_go_to_lower_positions_and_smaller_diagonals() -> None:
    logits, kv, batch = make([1500], 1, "equal", 0)
    tau = torch.zeros(2, 1, dtype=torch.float64, device=DEVICE)
    assert chosen(logits, kv, batch, tau, Budgets(min_columns=1100, min_diagonals=1030)) == [
        [set(range(1100)), set(range(1030))]
    ]


def test_a_logit_that_is_not_a_number_is_kept_first() -> None:
    logits, kv, batch = make([300], 1, "normal", 1)
    slot = int(kv.block_table[0, 5]) * 16 + 3
    logits[slot] = float("nan")
    tau = torch.full((2, 1), 0.5, dtype=torch.float64, device=DEVICE)
    assert chosen(logits, kv, batch, tau) == [[{83}, {300 - 1 - 83}]]


def test_a_long_context() -> None:
    logits, kv, batch = make([20000], 1, "normal", 2)
    tau = torch.tensor([[0.6171], [0.2313]], dtype=torch.float64, device=DEVICE)
    got, want = chosen(logits, kv, batch, tau)[0], expected(logits, kv, batch, tau)[0]
    for one, other in zip(got, want, strict=True):
        # Tokens as close as 4e-6 may change places.
        assert len(one ^ other) <= 2
        assert len(one) == pytest.approx(len(other), abs=1)


def test_bad_arguments_are_named() -> None:
    logits, kv, batch = make([30], 2, "normal", 0)
    tau = torch.zeros(2, 2, dtype=torch.float64, device=DEVICE)
    for name, change, bounds in (
        ("logits has 3 values", {"logits": logits[:, :3]}, {}),
        ("logits must have dtype", {"logits": logits.double()}, {}),
        ("tau must have dtype", {"tau": tau.float()}, {}),
        ("tau must be contiguous", {"tau": tau[:1]}, {}),
        ("max_columns must be", {}, {"max_columns": -1}),
        ("min_diagonals is 4", {}, {"min_diagonals": 4, "max_diagonals": 3}),
    ):
        arguments = {"logits": logits, "kv": kv, "batch": batch, "tau": tau, **change}
        with pytest.raises(ValueError, match="^" + re.escape(name)):
            chosen(**arguments, budgets=Budgets(**bounds))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^max_seq_len"):
        allocate_select(1, 1, 2**21, DEVICE)
