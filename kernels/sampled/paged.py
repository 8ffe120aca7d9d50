# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Training-free estimates of a round: the plain reference over requests, its workspace and its checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_scale
from ..gathered import BLOCK, GatheredLogits, check_gathered
from ..launch import cdiv, next_power_of_2
from ..paged import Batch, PagedKV, check_device, check_queries
from ..reference import keys_values, with_rows
from . import naive

SPLITS = 32  # of the sequence in the first pass
MAX_ROWS = 128  # of a tile: positions times heads of the group
BAND_BYTES = 72 * 2**20  # room for probabilities of a tile of rows; more heads than fit take turns


class SampledWorkspace(NamedTuple):
    """Scratch of ``sampled``, allocated once.

    Attributes:
        partial: float32 ``[2, requests, Hkv, SPLITS, rows]``, maximum and sum of each split, base 2.
        diagonals: float32 ``[requests, Hkv, C]``, sums along diagonals.
        bands: float16 ``[heads, positions, C]``, probabilities of a tile of rows of some heads.
        num_rows: rows to look at.
    """

    partial: Tensor
    diagonals: Tensor
    bands: Tensor
    num_rows: int


def allocate_sampled(
    num_requests: int, num_query_heads: int, num_kv_heads: int, max_seq_len: int, num_rows: int,
    device: torch.device | str,
) -> SampledWorkspace:  # fmt: skip
    """Room for estimates of ``num_rows`` rows a request.

    Raises:
        ValueError: ``num_rows`` is not a positive int.
    """
    naive.sampled_rows(1, num_rows)
    pack = next_power_of_2(num_query_heads // num_kv_heads)
    rows = cdiv(num_rows, 128) * 128 * pack
    width = cdiv(max_seq_len, BLOCK) * BLOCK
    positions = cdiv(MAX_ROWS, pack)
    heads = min(num_kv_heads, max(1, BAND_BYTES // (2 * positions * width)))
    return SampledWorkspace(
        torch.empty(2, num_requests, num_kv_heads, SPLITS, rows, dtype=torch.float32, device=device),
        torch.empty(num_requests, num_kv_heads, width, dtype=torch.float32, device=device),
        torch.empty(heads, positions, width, dtype=torch.float16, device=device),
        num_rows,
    )


def check_sampled(
    q: Tensor, kv: PagedKV, batch: Batch, workspace: SampledWorkspace, gathered: GatheredLogits, scale: float
) -> None:
    """Checks every argument of ``sampled``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch; names the argument.
    """
    check_queries(q, kv, batch)
    check_scale(scale)
    heads = kv.num_kv_heads
    check_gathered(gathered, batch, heads, q.device)
    if workspace.diagonals.shape[2] != gathered.logits.shape[3]:
        raise ValueError("workspace and gathered must be for sequences of the same length")
    if workspace.diagonals.shape[0] < batch.num_requests or workspace.diagonals.shape[1] != heads:
        raise ValueError(f"workspace is for {tuple(workspace.diagonals.shape[:2])} requests and heads, too small")
    check_device("q", q)


def sampled(
    q: Tensor,
    kv: PagedKV,
    batch: Batch,
    workspace: SampledWorkspace,
    gathered: GatheredLogits,
    *,
    scale: float,
) -> None:
    """Estimates columns and diagonals of every request from a few of its own rows, for ``select``.

    A softmax over ``gathered.logits[r, 0, h, :n]`` is ``p_columns`` of ``naive.sampled``, one over
    ``gathered.logits[r, 1, h, :n]``, reversed, ``p_diagonals``.

    Args:
        q: ``[rows, Hq, D]``, contiguous channels.
        kv: the cache, of the same dtype or fp8.
        batch: which rows belong to which request. Requests without rows are left out.
        workspace: from ``allocate_sampled``; it says how many rows to look at.
        gathered: written.
        scale: factor on ``q . k`` before the softmax.
    """
    for i, start, end, n in with_rows(batch):
        k, _ = keys_values(kv, i, n)
        columns, diagonals = naive.sampled(q[start:end].to(k.dtype), k, scale=scale, num_rows=workspace.num_rows)
        rows = torch.stack((columns, diagonals.flip(-1))).log()
        gathered.logits[i, :, :, :n] = rows
        blocks = F.pad(rows, (0, -n % BLOCK), value=float("-inf")).unflatten(-1, (-1, BLOCK))
        gathered.block_max[i, :, :, : blocks.shape[2]] = blocks.amax(-1)
