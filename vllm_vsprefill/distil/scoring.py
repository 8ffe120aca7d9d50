# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The indexer's forward and backward pass in memory that does not grow with hidden width times context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Hidden activations that exist at a time, over all heads: 2**26 take 128 MiB in bfloat16, a few of them live together.
BLOCK_ELEMENTS = 2**26


class _Score(torch.autograd.Function):
    """``relu(x @ w1 + b1) @ w2 + b2`` over blocks of tokens; the backward pass computes the hidden layer again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        ctx.save_for_backward(x, w1, b1, w2)
        low = tuple(w.to(x.dtype) for w in (w1, w2))
        # [H, n, 2]
        out = torch.empty(*x.shape[:2], w2.shape[2], dtype=torch.float32, device=x.device)
        for block in _blocks(x.shape[1], w1):
            hidden = torch.baddbmm(b1.to(x.dtype).unsqueeze(1), x[:, block], low[0]).relu_()
            out[:, block] = torch.bmm(hidden, low[1])
        return out + b2.unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, b1, w2 = ctx.saved_tensors
        (grad,) = grads
        low1, low2 = w1.to(x.dtype), w2.to(x.dtype)
        d1, db1, d2 = torch.zeros_like(w1), torch.zeros_like(b1), torch.zeros_like(w2)
        for block in _blocks(x.shape[1], w1):
            part, g = x[:, block], grad[:, block].to(x.dtype)
            hidden = torch.baddbmm(b1.to(x.dtype).unsqueeze(1), part, low1).relu_()
            d2 += torch.bmm(hidden.transpose(1, 2), g)
            down = torch.bmm(g, low2.transpose(1, 2)).mul_(hidden > 0)
            d1 += torch.bmm(part.transpose(1, 2), down)
            db1 += down.sum(1, dtype=torch.float32)
        return None, d1, db1, d2, grad.sum(1)


def _blocks(tokens: int, w1: Tensor) -> list[slice]:
    step = max(1024, BLOCK_ELEMENTS // (w1.shape[0] * w1.shape[2]))
    return [slice(start, start + step) for start in range(0, tokens, step)]


def score(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Logits of each token.

    Args:
        x: ``[H, n, I]``, inputs, in the dtype of the products; gets no gradient.
        w1: float32 ``[H, I, hidden]``.
        b1: float32 ``[H, hidden]``.
        w2: float32 ``[H, hidden, 2]``.
        b2: float32 ``[H, 2]``.

    Returns:
        float32 ``[H, n, 2]``: column, diagonal.
    """
    out: Tensor = _Score.apply(x, w1, b1, w2, b2)  # type: ignore[no-untyped-call]
    return out
