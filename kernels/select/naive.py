# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Selection by cumulative threshold: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_budgets, check_like, check_tensor
from ..types import UNLIMITED, Budgets, Selection


def check_distributions(logits: Tensor) -> None:
    """Checks the argument of ``distributions``."""
    check_tensor("logits", logits, 3)
    if logits.shape[0] == 0 or logits.shape[2] != 2:
        raise ValueError(f"logits must have shape [n >= 1, H, 2], got {tuple(logits.shape)}")


def distributions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the logits of a whole sequence into distributions over columns and diagonals.

    The token at position ``t`` of a sequence of ``n`` tokens speaks for column ``t`` with its column logit and for
    distance ``n - 1 - t`` with its diagonal logit.

    Args:
        logits: float ``[n, H, 2]`` as returned by ``score``.

    Returns:
        ``(p_columns, p_diagonals)``, float32 ``[H, n]`` each, every row sums to one.

    Raises:
        ValueError: wrong dtype or shape, or no token.
    """
    check_distributions(logits)
    # [2, H, n]: the positions innermost, so that softmax and the later sort run over contiguous memory
    probs = torch.softmax(logits.float().permute(2, 1, 0).contiguous(), dim=-1)
    return probs[0], probs[1].flip(-1)


def _check_tau(name: str, tau: Tensor | float, heads: int, device: torch.device) -> Tensor:
    value = torch.as_tensor(tau, dtype=torch.float64, device=device)
    if value.dim() > 1 or (value.dim() == 1 and value.shape[0] != heads):
        raise ValueError(f"{name} must be a number or have shape [{heads}], got shape {tuple(value.shape)}")
    if bool(torch.isnan(value).any()):
        raise ValueError(f"{name} must not be NaN")
    return value.expand(heads)


def check_select(
    p_columns: Tensor,
    p_diagonals: Tensor,
    tau_columns: Tensor | float,
    tau_diagonals: Tensor | float,
    budgets: Budgets,
) -> tuple[Tensor, Tensor]:
    """Checks every argument of ``select``; returns both thresholds as float64 ``[H]``."""
    check_tensor("p_columns", p_columns, 2)
    check_tensor("p_diagonals", p_diagonals, 2)
    check_like("p_diagonals", p_diagonals, "p_columns", p_columns, shape=True)
    if p_columns.shape[1] == 0:
        raise ValueError("p_columns must have at least one position")
    check_budgets(budgets)
    heads, device = p_columns.shape[0], p_columns.device
    return (
        _check_tau("tau_columns", tau_columns, heads, device),
        _check_tau("tau_diagonals", tau_diagonals, heads, device),
    )


def threshold(probs: Tensor, tau: Tensor, minimum: int, maximum: int | None) -> tuple[Tensor, Tensor]:
    """Smallest sets of one kind that reach ``tau``, of all heads.

    Args:
        probs: float ``[H, n]``.
        tau: float64 ``[H]``.
        minimum: entries kept at least.
        maximum: entries kept at most; None: no cap.

    Returns:
        int32 ``[H, largest count]``, ascending and filled up with ``n``, and the counts, int32 ``[H]``.
    """
    n = probs.shape[1]
    # NaN counts as the largest value, so a broken estimate is kept first and never hidden.
    ranked, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    cumulative = torch.cumsum(ranked, dim=-1, dtype=torch.float64)
    # The first k entries reach tau for the first time where their sum is not below it. With NaN no comparison
    # holds, so the count is n: without a usable estimate everything is kept.
    reached = cumulative >= tau.unsqueeze(1)
    counts = torch.where(reached.any(dim=-1), reached.int().argmax(dim=-1) + 1, n)
    counts = torch.where(tau <= 0, 0, counts)
    counts = torch.where(tau >= 1, n, counts)
    counts = counts.clamp(min=minimum)
    counts = counts.clamp(max=n if maximum is None else min(maximum, n))
    width = int(counts.max()) if counts.numel() else 0
    rank = torch.arange(width, device=probs.device)
    # Ranks beyond the count become n, which sorts behind every position.
    kept = torch.where(rank < counts.unsqueeze(1), order[:, :width], n)
    return torch.sort(kept, dim=-1).values.int(), counts.int()


def select(
    p_columns: Tensor,
    p_diagonals: Tensor,
    *,
    tau_columns: Tensor | float,
    tau_diagonals: Tensor | float,
    budgets: Budgets = UNLIMITED,
) -> Selection:
    """Per KV head, the smallest sets of columns and diagonals whose probability reaches the thresholds.

    Entries are taken from the largest probability down; equal ones from the lower position or smaller distance up.
    A threshold >= 1 takes everything, whatever the rounding; <= 0 takes the minimum only. Then the budgets apply:
    at least ``min_*``, at most ``max_*`` (None: no cap) and never more than ``n``.
    A head whose probabilities hold a NaN keeps everything, up to its maximum.

    Args:
        p_columns: float ``[H, n]``.
        p_diagonals: float ``[H, n]``, same dtype and device.
        tau_columns: number, or ``[H]``.
        tau_diagonals: number, or ``[H]``.
        budgets: entries kept at least and at most.

    Returns:
        The selection; its arrays are as wide as the largest count.

    Raises:
        ValueError: wrong dtype, shape or device, a NaN threshold, or a minimum above its maximum.
    """
    tau_c, tau_d = check_select(p_columns, p_diagonals, tau_columns, tau_diagonals, budgets)
    columns, num_columns = threshold(p_columns, tau_c, budgets.min_columns, budgets.max_columns)
    diagonals, num_diagonals = threshold(p_diagonals, tau_d, budgets.min_diagonals, budgets.max_diagonals)
    return Selection(columns, num_columns, diagonals, num_diagonals)
