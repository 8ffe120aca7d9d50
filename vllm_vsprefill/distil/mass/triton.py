# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""True attention along columns and diagonals, streaming, for CUDA devices.

With the log-sum-exp of the rows known, a probability needs nothing but its own logit, so sums can be taken in any
order. Two kernels compute the logits once each: one owns a block of keys and walks down the rows; the other owns a
band of diagonals and walks down the rows with its keys moving along, so that an element of its tile always stands for
the same distance. Both add tiles element by element in registers and reduce once at the end: no atomic additions, the
same result every time, memory O(n). A third one takes columns over the rows that are far enough behind a key; a maximum
is taken over logarithms and needs one exponential per column.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_vsprefill.distil.mass.naive import Reduce, check_mass, check_weights
from vllm_vsprefill.kernels.checks import check_tensor
from vllm_vsprefill.kernels.launch import cdiv, next_power_of_2
from vllm_vsprefill.kernels.paged import QUERY_DTYPES, check_device, is_interpreted
from vllm_vsprefill.kernels.settings import Settings, padded, settings


@triton.jit
def _rows(
    p_q, p_lse, i_0, i_h, row_start, row_end, stride_q_row, stride_q_head, stride_lse_row, stride_lse_head, o_m, o_d,
    GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Queries ``[BM, BD]`` and log-sum-exps ``[BM]`` from position ``i_0`` on; infinite outside the range of rows."""
    b_i = i_0 + o_m // PACK
    b_head = (i_h * GROUP + o_m % PACK).to(tl.int64)
    m_i = (b_i >= row_start) & (b_i < row_end) & (o_m % PACK < GROUP)
    b_i = b_i.to(tl.int64)
    p_q += (b_i * stride_q_row + b_head * stride_q_head)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_i[:, None] & (o_d < D)[None, :], other=0.0)
    b_lse = tl.load(p_lse + b_i * stride_lse_row + b_head * stride_lse_head, mask=m_i, other=float("inf"))
    if UPCAST:
        b_q = b_q.to(tl.float32)
    return b_q, b_lse * 1.4426950408889634


@triton.jit
def _keys(p_k, b_j, m_j, stride_k_row, o_d, D: tl.constexpr, UPCAST: tl.constexpr):
    """Keys ``[BN, BD]`` at positions ``b_j`` of one head."""
    p_k += (b_j.to(tl.int64) * stride_k_row)[:, None] + o_d[None, :]
    b_k = tl.load(p_k, mask=m_j[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    return b_k


@triton.jit(do_not_specialize=["n", "row_start", "row_end"])
def _lse_kernel(
    p_q, p_k, p_lse, scale, n, row_start, row_end,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_lse_row, stride_lse_head,
    GROUP: tl.constexpr, PACK: tl.constexpr, POSITIONS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (natural) of ``POSITIONS`` rows."""
    i_0 = (row_start // POSITIONS + tl.num_programs(0) - 1 - tl.program_id(0)) * POSITIONS
    i_h = tl.program_id(1)
    o_m, o_d, o_n = tl.arange(0, POSITIONS * PACK), tl.arange(0, BD), tl.arange(0, BN)
    b_i = i_0 + o_m // PACK
    b_head = (i_h * GROUP + o_m % PACK).to(tl.int64)
    m_i = (b_i >= row_start) & (b_i < row_end) & (o_m % PACK < GROUP)
    p_q += (b_i.to(tl.int64) * stride_q_row + b_head * stride_q_head)[:, None] + o_d[None, :]
    b_q = tl.load(p_q, mask=m_i[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    p_k += i_h.to(tl.int64) * stride_k_head
    b_max = tl.full([POSITIONS * PACK], float("-inf"), tl.float32)
    b_sum = tl.zeros([POSITIONS * PACK], tl.float32)
    for i_n in range(0, tl.minimum(i_0 + POSITIONS, n), BN):
        b_j = i_n + o_n
        b_k = _keys(p_k, b_j, b_j < n, stride_k_row, o_d, D, UPCAST)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
        b_s = tl.where(b_j[None, :] <= b_i[:, None], b_s, float("-inf"))
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.math.exp2(b_max - b_next) + tl.sum(tl.math.exp2(b_s - b_next[:, None]), 1)
        b_max = b_next
    b_lse = (b_max + tl.math.log2(b_sum)) * 0.6931471805599453
    tl.store(p_lse + b_i.to(tl.int64) * stride_lse_row + b_head * stride_lse_head, b_lse, mask=m_i)


@triton.jit(do_not_specialize=["n", "row_start", "row_end"])
def _column_kernel(
    p_q, p_k, p_lse, p_columns, scale, norm, n, row_start, row_end,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_lse_row, stride_lse_head,
    GROUP: tl.constexpr, PACK: tl.constexpr, POSITIONS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of ``BN`` columns over all rows of the range."""
    i_j, i_h = tl.program_id(0) * BN, tl.program_id(1)
    o_m, o_d, o_n = tl.arange(0, POSITIONS * PACK), tl.arange(0, BD), tl.arange(0, BN)
    b_j = i_j + o_n
    b_k = _keys(p_k + i_h.to(tl.int64) * stride_k_head, b_j, b_j < n, stride_k_row, o_d, D, UPCAST)
    b_acc = tl.zeros([POSITIONS * PACK, BN], tl.float32)
    first = tl.maximum(row_start, i_j) // POSITIONS * POSITIONS
    # From here on every row of a tile sees every key of the block.
    inner = tl.minimum(tl.maximum(first, tl.cdiv(i_j + BN, POSITIONS) * POSITIONS), row_end)
    for i_0 in range(first, inner, POSITIONS):
        b_q, b_lse = _rows(
            p_q, p_lse, i_0, i_h, row_start, row_end, stride_q_row, stride_q_head, stride_lse_row, stride_lse_head,
            o_m, o_d, GROUP, PACK, D, UPCAST,
        )  # fmt: skip
        b_p = tl.math.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale - b_lse[:, None])
        b_acc += tl.where(b_j[None, :] <= (i_0 + o_m // PACK)[:, None], b_p, 0.0)
    for i_0 in range(tl.cdiv(inner, POSITIONS) * POSITIONS, row_end, POSITIONS):
        b_q, b_lse = _rows(
            p_q, p_lse, i_0, i_h, row_start, row_end, stride_q_row, stride_q_head, stride_lse_row, stride_lse_head,
            o_m, o_d, GROUP, PACK, D, UPCAST,
        )  # fmt: skip
        b_acc += tl.math.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale - b_lse[:, None])
    tl.store(p_columns + i_h.to(tl.int64) * n + b_j, tl.sum(b_acc, 0) * norm, mask=b_j < n)


@triton.jit(do_not_specialize=["n", "row_start", "row_end"])
def _band_kernel(
    p_q, p_k, p_lse, p_bands, scale, n, row_start, row_end,
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_lse_row, stride_lse_head,
    GROUP: tl.constexpr, PACK: tl.constexpr, POSITIONS: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Band ``b``: row ``i_0 + r`` of a tile with keys ``i_0 - b * BN + c``, whose distance is ``r + b * BN - c``."""
    i_b, i_h = tl.program_id(0), tl.program_id(1)
    o_m, o_d, o_n = tl.arange(0, POSITIONS * PACK), tl.arange(0, BD), tl.arange(0, BN)
    p_k += i_h.to(tl.int64) * stride_k_head
    b_acc = tl.zeros([POSITIONS * PACK, BN], tl.float32)
    first = tl.maximum(row_start, (i_b - 1) * BN) // POSITIONS * POSITIONS
    # From here on no key lies before position 0; band 0 holds the causal edge all the way.
    inner = tl.where(
        i_b == 0, row_end, tl.minimum(tl.maximum(first, tl.cdiv(i_b * BN, POSITIONS) * POSITIONS), row_end)
    )
    for i_0 in range(first, inner, POSITIONS):
        b_q, b_lse = _rows(
            p_q, p_lse, i_0, i_h, row_start, row_end, stride_q_row, stride_q_head, stride_lse_row, stride_lse_head,
            o_m, o_d, GROUP, PACK, D, UPCAST,
        )  # fmt: skip
        b_j = i_0 - i_b * BN + o_n
        b_k = _keys(p_k, b_j, (b_j >= 0) & (b_j < n), stride_k_row, o_d, D, UPCAST)
        b_p = tl.math.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale - b_lse[:, None])
        m_p = (b_j[None, :] <= (i_0 + o_m // PACK)[:, None]) & (b_j[None, :] >= 0)
        b_acc += tl.where(m_p, b_p, 0.0)
    for i_0 in range(tl.cdiv(inner, POSITIONS) * POSITIONS, row_end, POSITIONS):
        b_q, b_lse = _rows(
            p_q, p_lse, i_0, i_h, row_start, row_end, stride_q_row, stride_q_head, stride_lse_row, stride_lse_head,
            o_m, o_d, GROUP, PACK, D, UPCAST,
        )  # fmt: skip
        b_j = i_0 - i_b * BN + o_n
        b_k = _keys(p_k, b_j, b_j < n, stride_k_row, o_d, D, UPCAST)
        b_acc += tl.math.exp2(tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale - b_lse[:, None])
    # [POSITIONS, BN]
    b_band = tl.sum(tl.reshape(b_acc, [POSITIONS, PACK, BN]), 1)
    # Distance minus row, from 1 - BN up.
    width = tl.num_programs(0) * BN
    o_r = tl.arange(0, POSITIONS)
    b_place = (i_h * POSITIONS + o_r).to(tl.int64)[:, None] * width + (i_b * BN + BN - 1 - o_n)[None, :]
    tl.store(p_bands + b_place, b_band)


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


@triton.jit(do_not_specialize=["n", "width"])
def _diagonal_kernel(
    p_bands, p_diagonals, norm, n, width, POSITIONS: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr
):
    """Adds up the rows of the bands along diagonals."""
    i_b, i_h = tl.program_id(0), tl.program_id(1)
    o_d = i_b * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i_r in range(POSITIONS):
        o_e = o_d - i_r + BN - 1
        p_row = p_bands + (i_h * POSITIONS + i_r).to(tl.int64) * width
        # [BLOCK]
        b_sum += tl.load(p_row + o_e, mask=(o_e >= 0) & (o_e < width), other=0.0)
    tl.store(p_diagonals + i_h.to(tl.int64) * n + o_d, b_sum * norm, mask=o_d < n)


def check_tensors(q: Tensor, k: Tensor, lse: Tensor | None) -> None:
    """Checks what the kernels ask of their tensors beyond the contract of the plain reference.

    Raises:
        ValueError: dtype, shape, stride or device; names the argument.
    """
    check_tensor("q", q, 3, QUERY_DTYPES)
    for name, value in (("q", q), ("k", k)):
        if value.stride(2) != 1:
            raise ValueError(f"{name} must have contiguous channels, got strides {value.stride()}")
    if lse is not None:
        check_tensor("lse", lse, 2, (torch.float32,))
        if lse.shape != q.shape[:2] or lse.device != q.device:
            raise ValueError(f"lse has shape {tuple(lse.shape)} on {lse.device}, expected {tuple(q.shape[:2])}")
    check_device("q", q)


class _Launch(NamedTuple):
    """What the kernels of one call share."""

    lse: Tensor
    positions: int
    block_n: int
    scale: float  # of logits to the base 2
    norm: float
    strides: tuple[int, ...]
    shape: dict[str, Any]


def _launch(
    q: Tensor,
    k: Tensor,
    scale: float,
    row_start: int,
    end: int,
    lse: Tensor | None,
    config: Settings | None,
    *,
    bands: bool = False,
) -> _Launch:
    """Tiles of a call; computes the log-sum-exps of its rows where they are not given."""
    n, heads, size = k.shape
    group = q.shape[1] // heads
    config = config or settings("mass", size, q.device, q.element_size())
    pack = next_power_of_2(group)
    positions = max(config.block_m // pack, 1)
    if bands:
        positions = min(positions, config.block_n)
    while positions * pack < 16:
        positions *= 2
    given = lse is not None
    if lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    own = _Launch(
        lse, positions, config.block_n, scale / math.log(2), 1.0 / ((end - row_start) * group),
        (q.stride(0), q.stride(1), k.stride(0), k.stride(1), lse.stride(0), lse.stride(1)),
        {
            "GROUP": group, "PACK": pack, "POSITIONS": positions, "BN": config.block_n, "D": size, "BD": padded(size),
            "UPCAST": is_interpreted() and q.dtype == torch.bfloat16, "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        },
    )  # fmt: skip
    if not given:
        tiles = (end - 1) // positions - row_start // positions + 1
        _lse_kernel[(tiles, heads)](q, k, lse, own.scale, n, row_start, end, *own.strides, **own.shape)
    return own


def mass_sums(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    row_start: int = 0,
    row_end: int | None = None,
    lse: Tensor | None = None,
    with_columns: bool = True,
    config: Settings | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as ``naive.mass_sums``.

    Args:
        q: ``[n, Hq, D]``, contiguous channels; bfloat16, float16 or float32.
        k: ``[n, Hkv, D]``, same dtype and device.
        scale: factor on ``q . k`` before the softmax.
        row_start: first row of the range.
        row_end: one past the last row; None for the end of the sequence.
        lse: float32 ``[n, Hq]``, log-sum-exp of the scaled causal logits (natural logarithm) as an attention forward
            returns it; computed if None. Only rows of the range are read.
        with_columns: False computes diagonals only.
        config: tile sizes; None for those of the table.

    Returns:
        ``(columns, diagonals)``, float32 ``[Hkv, n]`` each, every row sums to one; columns ``[Hkv, 0]`` if they are
        not wanted.

    Raises:
        ValueError: dtype, shape, stride or device mismatch, or an empty or impossible range; names the argument.
    """
    end = check_mass(q, k, scale, row_start, row_end)
    check_tensors(q, k, lse)
    n, heads, _ = k.shape
    # Band 0 holds all keys behind a tile's start.
    own = _launch(q, k, scale, row_start, end, lse, config, bands=True)
    diagonals = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    columns = torch.empty_like(diagonals) if with_columns else diagonals.new_empty(heads, 0)
    num_bands = cdiv(n, own.block_n) + 1
    bands = torch.empty(heads, own.positions, num_bands * own.block_n, dtype=torch.float32, device=q.device)
    if with_columns:
        _column_kernel[(cdiv(n, own.block_n), heads)](
            q, k, own.lse, columns, own.scale, own.norm, n, row_start, end, *own.strides, **own.shape
        )
    _band_kernel[(num_bands, heads)](q, k, own.lse, bands, own.scale, n, row_start, end, *own.strides, **own.shape)
    _diagonal_kernel[(cdiv(n, 1024), heads)](
        bands, diagonals, own.norm, n, bands.shape[2], POSITIONS=own.positions, BN=own.block_n, BLOCK=1024
    )
    return columns, diagonals


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
        config: tile sizes; None for those of the table.

    Returns:
        float32 ``[Hkv, n]``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch, or what ``naive.column_weights`` refuses.
    """
    end = check_weights(q, k, scale, reduce, min_distance, row_start, row_end)
    check_tensors(q, k, lse)
    n, heads, _ = k.shape
    own = _launch(q, k, scale, row_start, end, lse, config)
    out = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    _weight_kernel[(cdiv(n, own.block_n), heads)](
        q, k, own.lse, out, own.scale, own.norm, n, row_start, end, min_distance, *own.strides, **own.shape,
        MAXIMUM=reduce == "max",
    )  # fmt: skip
    return out
