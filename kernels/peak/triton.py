# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Largest and total attention probability of each column, streaming, for CUDA devices.

The column half of ``mass.triton``: with the log-sum-exps known, a program owns a block of keys and walks down the rows
that are far enough behind it. A maximum is taken over logarithms and needs one exponential per column.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import cdiv, next_power_of_2
from ..mass.triton import _keys, _lse_kernel, _rows, check_tensors
from ..paged import is_interpreted
from ..settings import Settings, padded, settings
from .naive import Reduce, check_weights


@triton.jit(do_not_specialize=["n", "row_start", "row_end", "min_distance"])
def _weight_kernel(
    p_q, p_k, p_lse, p_out, scale, norm, n, row_start, row_end, min_distance,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_lse_row, stride_lse_head,
    GROUP: tl.constexpr, PACK: tl.constexpr, POSITIONS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, UPCAST: tl.constexpr, MAXIMUM: tl.constexpr,
):  # fmt: skip
    """Maxima or sums of ``BN`` columns over the rows at least ``min_distance`` behind."""
    i_j, i_h = tl.program_id(0) * BN, tl.program_id(1)
    o_m, o_d, o_n = tl.arange(0, POSITIONS * PACK), tl.arange(0, BD), tl.arange(0, BN)
    b_j = i_j + o_n
    b_k = _keys(p_k + i_h.to(tl.int64) * stride_k_head, b_j, b_j < n, stride_k_row, o_d, D, UPCAST)
    b_acc = tl.full([POSITIONS * PACK, BN], float("-inf") if MAXIMUM else 0.0, tl.float32)
    first = tl.maximum(row_start, i_j + min_distance) // POSITIONS * POSITIONS
    # From here on every row of a tile is far enough behind every key of the block.
    inner = tl.minimum(tl.maximum(first, tl.cdiv(i_j + BN + min_distance, POSITIONS) * POSITIONS), row_end)
    for i_0 in range(first, inner, POSITIONS):
        b_q, b_lse = _rows(
            p_q, p_lse, i_0, i_h, row_start, row_end, stride_q_row, stride_q_head, stride_lse_row, stride_lse_head,
            o_m, o_d, GROUP, PACK, D, UPCAST,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale - b_lse[:, None]
        m_s = b_j[None, :] + min_distance <= (i_0 + o_m // PACK)[:, None]
        if MAXIMUM:
            b_acc = tl.maximum(b_acc, tl.where(m_s, b_s, float("-inf")))
        else:
            b_acc += tl.where(m_s, tl.math.exp2(b_s), 0.0)
    for i_0 in range(tl.cdiv(inner, POSITIONS) * POSITIONS, row_end, POSITIONS):
        b_q, b_lse = _rows(
            p_q, p_lse, i_0, i_h, row_start, row_end, stride_q_row, stride_q_head, stride_lse_row, stride_lse_head,
            o_m, o_d, GROUP, PACK, D, UPCAST,
        )  # fmt: skip
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale - b_lse[:, None]
        if MAXIMUM:
            b_acc = tl.maximum(b_acc, b_s)
        else:
            b_acc += tl.math.exp2(b_s)
    b_out = tl.math.exp2(tl.max(b_acc, 0)) if MAXIMUM else tl.sum(b_acc, 0) * norm
    tl.store(p_out + i_h.to(tl.int64) * n + b_j, b_out, mask=b_j < n)


def column_weights(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    reduce: Reduce = "max",
    min_distance: int = 0,
    row_start: int = 0,
    row_end: int | None = None,
    lse: Tensor | None = None,
    config: Settings | None = None,
) -> Tensor:
    """Same contract as ``naive.column_weights``.

    Args:
        q: ``[n, Hq, D]``, contiguous channels; bfloat16, float16 or float32.
        k: ``[n, Hkv, D]``, same dtype and device.
        scale: factor on ``q . k`` before the softmax.
        reduce: ``max`` or ``sum``.
        min_distance: nearest distance that counts, in positions.
        row_start: first row of the range.
        row_end: one past the last row; None for the end of the sequence.
        lse: float32 ``[n, Hq]``, log-sum-exp of the scaled causal logits (natural logarithm); computed if None. Only
            rows of the range are read.
        config: tile sizes; None for those that the table has for ``mass``.

    Returns:
        float32 ``[Hkv, n]``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch, or what ``naive.column_weights`` refuses.
    """
    end = check_weights(q, k, scale, reduce, min_distance, row_start, row_end)
    check_tensors(q, k, lse)
    n, heads, size = k.shape
    group = q.shape[1] // heads
    config = config or settings("mass", size, q.device, q.element_size())
    pack = next_power_of_2(group)
    positions = max(config.block_m // pack, 1)
    while positions * pack < 16:
        positions *= 2
    compute_lse = lse is None
    if lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    out = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), lse.stride(0), lse.stride(1))
    shape = {
        "GROUP": group, "PACK": pack, "POSITIONS": positions, "BN": config.block_n, "D": size, "BD": padded(size),
        "UPCAST": is_interpreted() and q.dtype == torch.bfloat16, "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }  # fmt: skip
    log2_scale, norm = scale / math.log(2), 1.0 / ((end - row_start) * group)
    if compute_lse:
        tiles = (end - 1) // positions - row_start // positions + 1
        _lse_kernel[(tiles, heads)](q, k, lse, log2_scale, n, row_start, end, *strides, **shape)
    _weight_kernel[(cdiv(n, config.block_n), heads)](
        q, k, lse, out, log2_scale, norm, n, row_start, end, min_distance, *strides, **shape,
        MAXIMUM=reduce == "max",
    )  # fmt: skip
    return out
