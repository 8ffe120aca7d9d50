# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The fused scoring kernel against the plain reference."""

from __future__ import annotations

import random
import re

import pytest
import torch

from tests.kernels.interpreted import DEVICE, REASON, USABLE
from tests.kernels.paged_problems import make_batch, paged_cache
from vllm_vsprefill.kernels.score import paged
from vllm_vsprefill.kernels.score.paged import (
    allocate_missing,
    check_score_missing,
    check_score_slots,
    prepare_weights,
)
from vllm_vsprefill.kernels.score.triton import score_missing, score_slots
from vllm_vsprefill.kernels.settings import Settings
from vllm_vsprefill.kernels.types import IndexerLayerWeights

pytestmark = pytest.mark.skipif(not USABLE, reason=REASON)


def random_weights(heads: int, size: int, hidden: int, rng: torch.Generator) -> IndexerLayerWeights:
    shapes = ((heads, 2 * size, hidden), (heads, hidden), (heads, hidden, 2), (heads, 2))
    found = [torch.randn(shape, generator=rng).to(DEVICE) for shape in shapes]
    return IndexerLayerWeights(found[0] / size**0.5, found[1], found[2] / hidden**0.5, found[3])


@pytest.mark.parametrize("seed", range(12))
def test_slots_and_missing(seed: int) -> None:
    choose, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    seq_lens = [choose.randint(1, 150) for _ in range(choose.randint(1, 2))]
    heads, size, block = choose.randint(1, 3), choose.choice([16, 24, 64]), choose.choice([16, 48])
    dtype = choose.choice([torch.float32, torch.float16, torch.bfloat16])
    layout = choose.choice(["NHD", "HND"])
    kv = paged_cache(seq_lens, heads, size, block, rng, layout=layout, dtype=dtype)
    batch, _ = make_batch([1] * len(seq_lens), seq_lens)
    weights = prepare_weights(random_weights(heads, size, choose.choice([16, 48, 128]), rng), dtype)
    slots = []
    for i, n in enumerate(seq_lens):
        position = torch.arange(n, device=DEVICE)
        slots.append(kv.block_table[i].long()[position // block] * block + position % block)
    every = torch.cat(slots)
    logits = torch.full((kv.cache.shape[0] * block, 2 * heads), float("nan"), device=DEVICE)
    expected = logits.clone()
    config = Settings(choose.choice([16, 64]), choose.choice([16, 32]), 4, 1)
    rtol, atol = (1e-3, 2e-3) if dtype == torch.float16 else (1e-4, 1e-4)

    # Some slots, and padding.
    some = torch.cat((every[::2], torch.tensor([-1, -1], device=DEVICE)))
    score_slots(kv, some, weights, logits, config=config)
    paged.score_slots(kv, some, weights, expected)
    torch.testing.assert_close(logits, expected, equal_nan=True, rtol=rtol, atol=atol)
    # What is missing, and nothing else.
    logits[every[0]] = 5.0
    expected[every[0]] = 5.0
    missing = allocate_missing(len(seq_lens), batch.max_seq_len, DEVICE)
    check_score_missing(kv, batch, weights, logits, missing)
    score_missing(kv, batch, weights, logits, missing, config=config)
    paged.score_missing(kv, batch, weights, expected, missing)
    assert float(expected[every[0], 0]) == 5.0
    torch.testing.assert_close(logits, expected, equal_nan=True, rtol=rtol, atol=atol)


def test_a_broken_token_is_not_missing_afterwards() -> None:
    rng = torch.Generator().manual_seed(0)
    kv = paged_cache([20], 1, 16, 16, rng)
    weights = prepare_weights(random_weights(1, 16, 32, rng), torch.float32)
    logits = torch.full((kv.cache.shape[0] * 16, 2), float("nan"), device=DEVICE)
    slot = int(kv.block_table[0, 0]) * 16 + 2
    kv.cache[slot // 16, :, slot % 16] = float("nan")
    batch, _ = make_batch([1], [20])
    score_missing(kv, batch, weights, logits, allocate_missing(1, batch.max_seq_len, DEVICE))
    # The interpreter's maximum, unlike the device's, lets NaN pass.
    assert not logits[slot].isnan().any()


def test_bad_arguments_are_named() -> None:
    rng = torch.Generator().manual_seed(0)
    kv = paged_cache([20], 2, 16, 16, rng)
    weights = prepare_weights(random_weights(2, 16, 32, rng), torch.float32)
    logits = torch.zeros(kv.cache.shape[0] * 16, 4, device=DEVICE)
    slots = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    half = weights._replace(w1=weights.w1.half())
    for name, arguments in (
        ("weights.w1 has shape", (kv, slots, weights._replace(w1=weights.w1[:1]), logits)),
        ("weights.w1 has dtype", (kv, slots, half, logits)),
        (
            "weights.w1 must have a multiple",
            (kv, slots, prepare_weights(random_weights(2, 16, 20, rng), torch.float32), logits),
        ),
        ("logits must have contiguous rows", (kv, slots, weights, logits[:, :3])),
        ("slot_mapping must have dtype", (kv, slots.int(), weights, logits)),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(name)):
            check_score_slots(*arguments)
