# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Logits of the VSIndexer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_vsprefill.kernels.score import cpu, naive
from vllm_vsprefill.kernels.types import IndexerLayerWeights

Score = Callable[[Tensor, Tensor, IndexerLayerWeights], Tensor]
BOTH = pytest.mark.parametrize("score", [naive.score, cpu.score], ids=["naive", "cpu"])


def make(
    num_tokens: int, heads: int = 2, size: int = 16, hidden: int = 24, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, IndexerLayerWeights]:
    rng = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=rng) * scale).to(dtype)

    weights = IndexerLayerWeights(
        normal(heads, 2 * size, hidden, scale=(2 * size) ** -0.5),
        normal(heads, hidden),
        normal(heads, hidden, 2, scale=hidden**-0.5),
        normal(heads, 2),
    )
    return normal(num_tokens, heads, size), normal(num_tokens, heads, size), weights


def by_hand(k: Tensor, v: Tensor, weights: IndexerLayerWeights) -> Tensor:
    """One token and head at a time, in float64."""
    w1, b1, w2, b2 = (x.double().numpy() for x in weights)
    out = np.empty((*k.shape[:2], 2))
    for t in range(k.shape[0]):
        for h in range(k.shape[1]):
            x = np.concatenate((k[t, h].double().numpy(), v[t, h].double().numpy()))
            out[t, h] = np.maximum(x @ w1[h] + b1[h], 0) @ w2[h] + b2[h]
    return torch.from_numpy(out).float()


@BOTH
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 100])
@pytest.mark.parametrize(("heads", "size", "hidden"), [(1, 4, 1), (2, 16, 24), (3, 10, 7)])
def test_definition(score: Score, num_tokens: int, heads: int, size: int, hidden: int) -> None:
    k, v, weights = make(num_tokens, heads, size, hidden)
    logits = score(k, v, weights)
    assert logits.dtype == torch.float32
    assert logits.shape == (num_tokens, heads, 2)
    torch.testing.assert_close(logits, by_hand(k, v, weights), rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_half_precision(score: Score, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    k, v, weights = make(300, size=64, hidden=256)
    k, v = k.to(dtype), v.to(dtype)
    weights = IndexerLayerWeights(*(x.to(weight_dtype) for x in weights))
    logits = score(k, v, weights)
    expected = naive.score(k.double(), v.double(), weights)
    assert logits.dtype == torch.float32
    # Rounded hidden activations of order one, 256 of them with weights of 1/16
    assert float((logits - expected).abs().max()) < (0.03 if score is cpu.score else 1e-4)
    # Logits are not rounded to half precision themselves.
    assert not torch.equal(logits, logits.to(dtype).float())


@BOTH
def test_a_tokens_logits_depend_on_that_token_only(score: Score) -> None:
    k, v, weights = make(1200)
    whole = score(k, v, weights)
    parts = [score(k[a:b], v[a:b], weights) for a, b in ((0, 1), (1, 513), (513, 700), (700, 1200))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


@BOTH
def test_any_strides(score: Score) -> None:
    k, v, weights = make(50)
    expected = score(k, v, weights)
    packed = torch.cat((k, v), dim=-1)
    torch.testing.assert_close(score(packed[..., :16], packed[..., 16:], weights), expected)
    head_major = k.transpose(0, 1).contiguous().transpose(0, 1)
    transposed = weights._replace(w1=weights.w1.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(score(head_major, v, transposed), expected)


@BOTH
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"k": torch.zeros(5, 2, 16, dtype=torch.int8)}, "k must have dtype"),
        ({"k": torch.zeros(5, 32)}, "k must have 3 axes"),
        ({"v": torch.zeros(5, 2, 8)}, "v has shape"),
        ({"v": torch.zeros(4, 2, 16)}, "v has shape"),
        ({"v": torch.zeros(5, 2, 16, dtype=torch.float16)}, "v has dtype"),
        ({"v": torch.zeros(5, 2, 16, device="meta")}, "v is on meta"),
        ({"w1": torch.zeros(2, 31, 24)}, r"weights.w1 has shape \(2, 31, 24\), expected \(2, 32, 24\)"),
        ({"w1": torch.zeros(3, 32, 24)}, r"weights.w1 has shape"),
        ({"b1": torch.zeros(2, 23)}, r"weights.b1 has shape"),
        ({"w2": torch.zeros(2, 24, 3)}, r"weights.w2 has shape"),
        ({"b2": torch.zeros(2)}, r"weights.b2 must have 2 axes"),
        ({"b2": torch.zeros(2, 2, dtype=torch.int32)}, r"weights.b2 must have dtype"),
        ({"w2": torch.zeros(2, 24, 2, device="meta")}, r"weights.w2 is on meta"),
    ],
)
def test_bad_argument_is_named(score: Score, bad: dict[str, Any], message: str) -> None:
    k, v, weights = make(5)
    arguments = {"k": k, "v": v, **weights._asdict(), **bad}
    k, v = arguments.pop("k"), arguments.pop("v")
    with pytest.raises(ValueError, match=message):
        score(k, v, IndexerLayerWeights(**arguments))
