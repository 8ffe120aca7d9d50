# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Selection for a round: the plain reference over requests, its workspace and its checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_budgets, check_tensor
from ..gathered import BLOCK, GatheredLogits, check_gathered
from ..index import Index, check_index
from ..launch import cdiv
from ..paged import Batch, PagedKV, check_device, check_paged
from ..reference import cache_slots
from ..types import UNLIMITED, Budgets
from . import naive

BINS = 4096
COPIES = 4  # of each histogram, so that equal logits do not all wait for one address
NO_CAP = 2**31 - 1
MAX_SEQ_LEN = 2**21 - 1  # counts of a bin have 21 bits
LARGEST = 1e30  # larger logits and NaN count as this


class SelectWorkspace(NamedTuple):
    """Scratch of ``select``, allocated once.

    Attributes:
        bins: int64 ``[requests, 2, Hkv, 2, COPIES, BINS]``, a histogram per pass; zero between calls.
        cuts: int32 ``[requests, 2, Hkv, 4]``: coarse bin, ``u`` of the cut, tokens to take that are equal to it,
            unused.
        above: int64 ``[requests, 2, Hkv]`` tokens before the coarse bin.
        mass: float64 ``[requests, 2, Hkv, 2]``: whole mass, mass before the coarse bin.
        ties: int32 ``[requests, 2, Hkv, C // 1024]``.
    """

    bins: Tensor
    cuts: Tensor
    above: Tensor
    mass: Tensor
    ties: Tensor


def allocate_select(
    num_requests: int, num_kv_heads: int, max_seq_len: int, device: torch.device | str
) -> SelectWorkspace:
    """Room for selections; 512 KiB a KV head for the histograms.

    Raises:
        ValueError: sequences longer than 2**21 - 1 tokens.
    """
    if max_seq_len > MAX_SEQ_LEN:
        raise ValueError(f"max_seq_len must be at most {MAX_SEQ_LEN}, got {max_seq_len}")
    lead = (num_requests, 2, num_kv_heads)
    return SelectWorkspace(
        torch.zeros(*lead, 2, COPIES, BINS, dtype=torch.int64, device=device),
        torch.empty(*lead, 4, dtype=torch.int32, device=device),
        torch.empty(lead, dtype=torch.int64, device=device),
        torch.empty(*lead, 2, dtype=torch.float64, device=device),
        torch.empty(*lead, cdiv(max_seq_len, BLOCK), dtype=torch.int32, device=device),
    )


def check_gather(logits: Tensor, kv: PagedKV, batch: Batch, gathered: GatheredLogits) -> None:
    """Checks every argument of ``gather``.

    Raises:
        ValueError: wrong dtype, shape, stride or device; names the argument.
    """
    heads = kv.num_kv_heads
    check_tensor("logits", logits, 2, (torch.float32, torch.bfloat16))
    check_paged(kv, batch, logits.device)
    if logits.shape[1] != 2 * heads:
        raise ValueError(f"logits has {logits.shape[1]} values a slot, expected {2 * heads}")
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows, got strides {logits.stride()}")
    check_gathered(gathered, batch, heads, logits.device)
    check_device("logits", logits)


def gather(logits: Tensor, kv: PagedKV, batch: Batch, gathered: GatheredLogits) -> None:
    """Brings the logits of every request from the cache slots together, for ``select``.

    Args:
        logits: float32 or bfloat16 ``[slots, 2 * Hkv]``, contiguous rows: column and diagonal of head 0, of head 1, ...
        kv: its block table says in which slots a sequence lies.
        batch: the requests; rows are not looked at.
        gathered: written. A NaN becomes the largest logit: a broken estimate is kept first and never hidden.
    """
    for i, n in enumerate(batch.seq_len.tolist()):
        rows = logits[cache_slots(kv, i, n)].float().unflatten(1, (kv.num_kv_heads, 2)).permute(2, 1, 0)
        rows = rows.clamp(max=LARGEST).nan_to_num(nan=LARGEST, neginf=float("-inf"))
        gathered.logits[i, :, :, :n] = rows
        blocks = F.pad(rows, (0, -n % BLOCK), value=float("-inf")).unflatten(-1, (-1, BLOCK))
        gathered.block_max[i, :, :, : blocks.shape[2]] = blocks.amax(-1)


def check_select(
    gathered: GatheredLogits, batch: Batch, tau: Tensor, index: Index, workspace: SelectWorkspace, budgets: Budgets
) -> None:
    """Checks every argument of ``select``.

    Raises:
        ValueError: wrong dtype, shape or device, or a minimum above its maximum; names the argument.
    """
    logits = check_tensor("gathered.logits", gathered.logits, 4, (torch.float32,))
    heads, device = logits.shape[2], logits.device
    check_tensor("tau", tau, 2, (torch.float64,))
    if tuple(tau.shape) != (2, heads) or not tau.is_contiguous() or tau.device != device:
        raise ValueError(f"tau must be contiguous, [2, {heads}] on {device}, got {tuple(tau.shape)} on {tau.device}")
    check_index(index, batch, heads, device)
    check_gathered(gathered, batch, heads, device)
    ties = workspace.ties
    if ties.device != device or ties.shape[0] < batch.num_requests or ties.shape[2] != heads:
        raise ValueError(f"workspace is for {tuple(ties.shape)} on {ties.device}, too small for this batch")
    if ties.shape[3] != gathered.block_max.shape[3]:
        raise ValueError("workspace and gathered must be for sequences of the same length")
    check_budgets(budgets, NO_CAP)
    check_device("gathered", logits)


def select(
    gathered: GatheredLogits,
    batch: Batch,
    tau: Tensor,
    index: Index,
    workspace: SelectWorkspace,
    *,
    budgets: Budgets = UNLIMITED,
) -> None:
    """Chooses columns and diagonals of every request and writes them into the flags of an index.

    The sets are those that ``naive.select`` takes from the softmax of each request's logits.

    Args:
        gathered: from ``gather`` or ``sampled``.
        batch: the requests; rows are not looked at.
        tau: float64 ``[2, Hkv]``, thresholds of columns and of diagonals.
        index: its flags are written. ``build_index`` makes the lists.
        workspace: from ``allocate_select``.
        budgets: entries kept at least and at most.
    """
    for i, n in enumerate(batch.seq_len.tolist()):
        # [2, H, n] -> [n, H, 2]
        columns, diagonals = naive.distributions(gathered.logits[i, :, :, :n].permute(2, 1, 0))
        chosen = naive.select(columns, diagonals, tau_columns=tau[0], tau_diagonals=tau[1], budgets=budgets)
        flags = index.flags[i, :, :, :n]
        flags.zero_()
        lists = ((chosen.columns, chosen.num_columns), (chosen.diagonals, chosen.num_diagonals))
        for kind, (items, counts) in enumerate(lists):
            valid = torch.arange(items.shape[1], device=items.device) < counts.unsqueeze(1)
            head, entry = valid.nonzero(as_tuple=True)
            flags[kind, head, items[head, entry].long()] = 1
