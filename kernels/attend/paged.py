# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Sparse attention of a round: the plain reference over requests, and the checks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..checks import check_like, check_scale, check_tensor
from ..index import Index, check_index
from ..paged import QUERY_DTYPES, Batch, PagedKV, check_device, check_queries
from ..reference import keys_values, selection_of, with_rows
from . import naive


def check_attend(
    q: Tensor, kv: PagedKV, index: Index, batch: Batch, scale: float, out: Tensor | None, lse: Tensor | None,
    visited: Tensor | None, dense_last: int | None = None,
) -> None:  # fmt: skip
    """Checks every argument of ``attend``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch; the message names the argument.
    """
    check_queries(q, kv, batch)
    check_index(index, batch, kv.num_kv_heads, q.device)
    check_scale(scale)
    if out is not None:
        check_tensor("out", out, 3, QUERY_DTYPES)
        check_like("out", out, "q", q, shape=True)
        if out.stride(2) != 1:
            raise ValueError(f"out must have contiguous channels, got strides {out.stride()}")
    for name, value, ndim, dtype in (("lse", lse, 2, torch.float32), ("visited", visited, 1, torch.int64)):
        if value is None:
            continue
        check_tensor(name, value, ndim, (dtype,))
        if value.device != q.device:
            raise ValueError(f"{name} is on {value.device} but q is on {q.device}")
    if lse is not None and lse.shape != q.shape[:2]:
        raise ValueError(f"lse has shape {tuple(lse.shape)}, expected {tuple(q.shape[:2])}")
    if visited is not None and (visited.shape[0] < batch.num_requests or not visited.is_contiguous()):
        raise ValueError(f"visited must be contiguous with an entry per request, got shape {tuple(visited.shape)}")
    if dense_last is not None and (isinstance(dense_last, bool) or not isinstance(dense_last, int) or dense_last < 0):
        raise ValueError(f"dense_last must be a non-negative int, got {dense_last!r}")
    check_device("q", q)


def attend(
    q: Tensor,
    kv: PagedKV,
    index: Index,
    batch: Batch,
    *,
    scale: float,
    dense_last: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    visited: Tensor | None = None,
) -> Tensor:
    """Sparse causal attention of the rows of several requests.

    The semantics are those of ``naive.attend``, request by request, over the columns and diagonals in the index's
    flags.

    Args:
        q: ``[rows, Hq, D]``, contiguous channels; bfloat16, float16 or float32.
        kv: the cache, of the same dtype or fp8.
        index: from ``build_index``, for the same batch.
        batch: which rows belong to which request. Rows of no request are left as they are.
        scale: factor on ``q . k`` before the softmax.
        dense_last: dense rows at the end of each request; None for those of the pattern.
        out: ``[rows, Hq, D]``, written if given.
        lse: float32 ``[rows, Hq]``, written if given: log-sum-exp of the scaled logits, natural logarithm.
        visited: int64 ``[requests]``; the (row, key) pairs of all KV heads are added to it if given.

    Returns:
        The output, ``[rows, Hq, D]``.
    """
    if out is None:
        out = torch.empty_like(q)
    pattern = index.pattern if dense_last is None else replace(index.pattern, dense_last=dense_last)
    group = q.shape[1] // kv.num_kv_heads
    for i, start, end, n in with_rows(batch):
        k, v = keys_values(kv, i, n)
        selection = selection_of(index, i, n)
        for head in range(kv.num_kv_heads):
            heads = slice(head * group, (head + 1) * group)
            mask = naive.visible(selection, pattern, head=head, num_rows=end - start, seq_len=n, device=q.device)
            found, total = naive.masked(q[start:end, heads], k[:, head], v[:, head], mask, scale)
            out[start:end, heads] = found.to(out.dtype)
            if lse is not None:
                lse[start:end, heads] = total.float()
            if visited is not None:
                visited[i] += int(mask.sum())
    return out
