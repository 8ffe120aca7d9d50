# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How much of the true attention the selections of a round cover: the plain reference, its workspace, its checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_scale, check_tensor
from ..index import Index, check_index
from ..launch import cdiv, next_power_of_2
from ..paged import Batch, PagedKV, check_device, check_queries
from ..reference import keys_values, selection_of, with_rows
from ..rows import check_num_rows
from . import naive

SPLITS = 32  # of the sequence
MAX_ROWS = 128  # of a tile: rows times heads of the group


class RecallWorkspace(NamedTuple):
    """Scratch of ``recall``, allocated once.

    Attributes:
        partial: float32 ``[3, requests, Hkv, SPLITS, rows]``: of each split the maximum, base 2, the sum, and the sum
            over the keys that are kept.
        num_rows: rows to look at.
    """

    partial: Tensor
    num_rows: int


def allocate_recall(
    num_requests: int, num_query_heads: int, num_kv_heads: int, num_rows: int, device: torch.device | str
) -> RecallWorkspace:
    """Room for ``num_rows`` rows a request.

    Raises:
        ValueError: ``num_rows`` is not a positive int.
    """
    check_num_rows(num_rows)
    pack = next_power_of_2(num_query_heads // num_kv_heads)
    rows = cdiv(num_rows * pack, max(MAX_ROWS, pack)) * max(MAX_ROWS, pack)
    room = torch.empty(3, num_requests, num_kv_heads, SPLITS, rows, dtype=torch.float32, device=device)
    return RecallWorkspace(room, num_rows)


def check_recall(
    q: Tensor, kv: PagedKV, batch: Batch, index: Index, workspace: RecallWorkspace, totals: Tensor, scale: float
) -> None:
    """Checks every argument of ``recall``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch; names the argument.
    """
    check_device("q", q)
    check_queries(q, kv, batch)
    check_scale(scale)
    heads = kv.num_kv_heads
    check_index(index, batch, heads, q.device)
    if workspace.partial.shape[1] < batch.num_requests or workspace.partial.shape[2] != heads:
        raise ValueError(f"workspace is for {tuple(workspace.partial.shape[1:3])} requests and heads, too small")
    if check_tensor("totals", totals, 1, (torch.float32,)).shape != (2,) or not totals.is_contiguous():
        raise ValueError(f"totals must have two entries side by side, got shape {tuple(totals.shape)}")
    if totals.device != q.device:
        raise ValueError(f"totals is on {totals.device}, expected {q.device}")


def recall(
    q: Tensor, kv: PagedKV, batch: Batch, index: Index, workspace: RecallWorkspace, totals: Tensor, *, scale: float
) -> None:
    """Adds up the recall of every request and KV head: ``naive.recall`` of what ``build_index`` was given.

    Args:
        q: ``[rows, Hq, D]``, contiguous channels.
        kv: the cache, of the same dtype or fp8.
        batch: which rows belong to which request. Requests without rows are left out.
        index: what was chosen.
        workspace: from ``allocate_recall``; it says how many rows to look at.
        totals: float32 ``[2]``, to which the sum and the number of what was summed are added.
        scale: factor on ``q . k`` before the softmax.
    """
    for i, start, end, n in with_rows(batch):
        k, _ = keys_values(kv, i, n)
        selection = selection_of(index, i, n)
        queries = q[start:end].to(k.dtype)
        found = naive.recall(queries, k, selection, index.pattern, scale=scale, num_rows=workspace.num_rows)
        totals[0] += found.sum()
        totals[1] += len(found)
