# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Causal attention of whole sequences, with the log-sum-exp of every row where a kernel gives it away."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_vsprefill.distil.errors import first_line

logger = logging.getLogger(__name__)

Result = tuple[Tensor, Tensor]  # out [1, Hq, n, D], log-sum-exp of any shape that holds [Hq, n]

# Rows of one step of a sliding window.
WINDOW_ROWS = 2048


def _expanded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Result:
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return out[0], out[1]


def _cudnn_expanded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Result:
    return _cudnn(q, *_expanded(q, k, v), scale)


def _flash_expanded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Result:
    k, v = _expanded(q, k, v)
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return out[0], out[1]


# Fastest first, on devices that have them. All but the first copy keys and values to every query head.
KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Result]] = {
    "cudnn": _cudnn,
    "cudnn, expanded": _cudnn_expanded,
    "flash, expanded": _flash_expanded,
}


def row_lse(raw: Tensor, heads: int, n: int) -> Tensor:
    """A kernel's log-sum-exps as float32 ``[n, Hq]``; some pad the rows, some add an axis."""
    return raw.float().reshape(heads, -1)[:, :n].transpose(0, 1)


@cache
def lse_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> str | None:
    """The first kernel that gives the right output and the right log-sum-exp for these shapes, found by trying."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    n, scale = 320, 0.5 * size**-0.5
    rng = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, n, h, size, generator=rng, device=device, dtype=dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    )
    keys, values = (x.float() for x in _expanded(q, k, v))
    logits = (q.float() @ keys.transpose(-1, -2)) * scale
    logits.masked_fill_(torch.ones(n, n, dtype=torch.bool, device=device).triu(1), float("-inf"))
    expected, expected_lse = logits.softmax(-1) @ values, logits.logsumexp(-1)[0].T
    for name, kernel in KERNELS.items():
        try:
            out, raw = kernel(q, k, v, scale)
            lse = row_lse(raw, heads, n)
            torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)
            torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)
        except (RuntimeError, AssertionError, AttributeError, NotImplementedError):
            # A build without this kernel, a shape it does not take, or a convention of its own.
            continue
        return name
    return None


@cache
def _warn_once(name: str, reason: str) -> None:
    logger.warning("attention kernel %r failed (%s); PyTorch chooses another, targets take longer", name, reason)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor | None]:
    """Causal attention of a whole sequence.

    Args:
        q: ``[1, Hq, n, D]``.
        k: ``[1, Hkv, n, D]``.
        v: ``[1, Hkv, n, D]``.
        scale: factor on ``q . k``.

    Returns:
        ``[1, Hq, n, D]``, and the log-sum-exp of each row (natural logarithm), float32 ``[n, Hq]``, or None where
        no kernel gives it.
    """
    name = lse_kernel(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3])
    if name is not None:
        try:
            out, raw = KERNELS[name](q, k, v, scale)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Some builds refuse some lengths or strides; the targets then compute the log-sum-exp themselves.
            _warn_once(name, first_line(error))
        else:
            return out, row_lse(raw, q.shape[1], q.shape[2])
    k, v = _expanded(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), None


def sliding(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Attention to the nearest ``window`` keys, the row's own included; shapes as for ``causal``, but that queries may
    be those of the last rows only.

    Takes a block of rows at a time, so that memory grows with the window and not with the square of the sequence.
    """
    k, v = _expanded(q, k, v)
    n, before = q.shape[2], k.shape[2] - q.shape[2]
    out = torch.empty_like(q)
    for first in range(0, n, WINDOW_ROWS):
        last = min(first + WINDOW_ROWS, n)
        low, end = max(0, before + first - window + 1), before + last
        row = torch.arange(before + first, end, device=q.device)[:, None]
        key = torch.arange(low, end, device=q.device)
        seen = (key <= row) & (key > row - window)
        keys, values = k[:, :, low:end], v[:, :, low:end]
        out[:, :, first:last] = F.scaled_dot_product_attention(
            q[:, :, first:last], keys, values, attn_mask=seen, scale=scale
        )
    return out
