# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Sparse causal attention over an explicit mask: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_like, check_query_key, check_scale, check_selection, check_tensor, check_tile
from ..types import Selection, SparsePattern


def check_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    pattern: SparsePattern,
    scale: float,
    out: Tensor | None,
) -> None:
    """Checks every argument of ``attend``."""
    check_query_key(q, k)
    check_tensor("v", v, 3)
    check_like("v", v, "k", k, shape=True)
    check_selection(selection, k.shape[1], q.device)
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
    check_scale(scale)
    if out is not None:
        check_tensor("out", out, 3)
        check_like("out", out, "q", q, shape=True)


def visible(
    selection: Selection, pattern: SparsePattern, *, head: int, num_rows: int, seq_len: int, device: torch.device
) -> Tensor:
    """The mask of one KV head for the last ``num_rows`` rows of a sequence.

    Returns:
        bool ``[num_rows, seq_len]``; row ``r`` stands for the query at position
        ``seq_len - num_rows + r``.
    """
    n = seq_len
    columns = selection.columns[head, : int(selection.num_columns[head])]
    diagonals = selection.diagonals[head, : int(selection.num_diagonals[head])]
    mask = torch.zeros(num_rows, n, dtype=torch.bool, device=device)
    first_row = n - num_rows
    for tile in range(first_row // pattern.block_q, (n - 1) // pattern.block_q + 1):
        start, end = tile * pattern.block_q, min((tile + 1) * pattern.block_q, n)
        check_tile(columns, diagonals, start, end, n, pattern)
        keys = pattern.tile_keys(columns, diagonals, start, end)
        mask[max(start - first_row, 0) : end - first_row, keys] = True
    if pattern.dense_last:
        mask[-pattern.dense_last :] = True
    rows = torch.arange(first_row, n, device=device)
    return mask & (torch.arange(n, device=device) <= rows.unsqueeze(1))


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one KV head under a mask, in the dtype that ``attend`` computes in.

    Args:
        q: ``[T, group, D]``.
        k: ``[n, D]``.
        v: ``[n, D]``.
        mask: bool ``[T, n]``.
        scale: factor on ``q . k``.

    Returns:
        ``(out [T, group, D], lse [T, group])``, the log-sum-exp with the natural logarithm.
    """
    dtype = torch.float64 if q.dtype in (torch.float32, torch.float64) else torch.float32
    # [group, T, n]
    logits = torch.einsum("tgd,nd->gtn", q.to(dtype), k.to(dtype)) * scale
    logits.masked_fill_(~mask, float("-inf"))
    return torch.einsum("gtn,nd->tgd", torch.softmax(logits, dim=-1), v.to(dtype)), logits.logsumexp(-1).T


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    pattern: SparsePattern,
    *,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Sparse causal attention of the last rows of one sequence.

    Row ``r`` is the query at position ``i = n - T + r``. With ``t = i // block_q`` it attends to key ``j <= i`` if
    ``j`` is a selected column of its KV head, or if ``j`` lies in a granule that tile ``t`` touches along a selected
    distance, the local window or the sinks (see ``merge``), or if ``i >= n - dense_last``. Each key counts once.
    Query head ``g`` uses KV head ``g // (Hq // Hkv)``.

    Computed in float64 for float32 and float64 inputs, else in float32.

    Args:
        q: ``[T, Hq, D]``, any strides.
        k: ``[n, Hkv, D]`` with ``n >= T``, any strides.
        v: ``[n, Hkv, D]``, any strides.
        selection: columns and diagonals per KV head.
        pattern: tile, granule, window, sinks, dense rows.
        scale: factor on ``q . k`` before the softmax.
        out: ``[T, Hq, D]``, written if given.

    Returns:
        ``(out, visited)``: the output in the dtype of ``q``, and the number of (row, key) pairs that entered a
        softmax, summed over rows and KV heads (not query heads).

    Raises:
        ValueError: dtype, shape or device mismatch, or indices out of range; the message names the argument.
    """
    check_attend(q, k, v, selection, pattern, scale, out)
    num_rows, num_heads, _ = q.shape
    seq_len, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    if out is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
    visited = 0
    for head in range(num_kv_heads):
        mask = visible(selection, pattern, head=head, num_rows=num_rows, seq_len=seq_len, device=q.device)
        visited += int(mask.sum())
        heads = slice(head * group, (head + 1) * group)
        out[:, heads] = masked(q[:, heads], k[:, head], v[:, head], mask, scale)[0].to(out.dtype)
    return out, visited
