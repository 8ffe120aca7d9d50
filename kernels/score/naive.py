# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Per-token logits of the VSIndexer: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_like, check_tensor
from ..types import IndexerLayerWeights


def check_score(k: Tensor, v: Tensor, weights: IndexerLayerWeights) -> None:
    """Checks every argument of ``score``."""
    check_tensor("k", k, 3)
    check_tensor("v", v, 3)
    check_like("v", v, "k", k, shape=True)
    heads, inputs = k.shape[1], 2 * k.shape[2]
    w1 = check_tensor("weights.w1", weights.w1, 3)
    hidden = w1.shape[2]
    shapes = {"w1": (heads, inputs, hidden), "b1": (heads, hidden), "w2": (heads, hidden, 2), "b2": (heads, 2)}
    for name, shape in shapes.items():
        value = check_tensor(f"weights.{name}", getattr(weights, name), len(shape))
        if tuple(value.shape) != shape:
            raise ValueError(f"weights.{name} has shape {tuple(value.shape)}, expected {shape}")
        if value.device != k.device:
            raise ValueError(f"weights.{name} is on {value.device} but k is on {k.device}")


def score(k: Tensor, v: Tensor, weights: IndexerLayerWeights) -> Tensor:
    """Importance logits of each token, from that token's key and value only.

    ``relu([k ; v] @ w1 + b1) @ w2 + b2`` per KV head (VSPrefill, arXiv 2603.04460), everything in float32.

    Args:
        k: ``[T, H, D]``, keys with RoPE applied.
        v: ``[T, H, D]``, values, same dtype and device as ``k``.
        weights: two linear layers per KV head, any floating dtype.

    Returns:
        float32 ``[T, H, 2]``; ``[..., 0]`` column, ``[..., 1]`` diagonal.

    Raises:
        ValueError: dtype, shape or device mismatch; the message names the argument.
    """
    check_score(k, v, weights)
    # [H, T, 2D]
    x = torch.cat((k, v), dim=-1).transpose(0, 1).float()
    hidden = torch.relu(torch.baddbmm(weights.b1.float().unsqueeze(1), x, weights.w1.float()))
    logits = torch.baddbmm(weights.b2.float().unsqueeze(1), hidden, weights.w2.float())
    return logits.transpose(0, 1).contiguous()
