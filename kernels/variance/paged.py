# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What single queries of a tile may find in a key that their mean does not, for the requests of a round: the plain
reference over requests, its workspace and its checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_scale, check_tensor
from ..paged import Batch, PagedKV, check_device, check_priors, check_queries
from ..reference import keys_values, with_rows
from ..types import SparsePattern
from . import naive

MAX_SPLITS = 32  # of a request's queries, for each KV head
LEVELS = 8  # programs for the keys whose mean result is taken off
PROGRAMS = 256  # that add up products at a time, about: two for each multiprocessor of a large device


class VarianceWorkspace(NamedTuple):
    """Scratch of ``variance``, allocated once.

    Attributes:
        sums: float32 ``[places, D, D]``, sums of outer products of a split of a request's queries.
        centre: float32 ``[requests, Hkv, D]``, means of the keys as they lie in the cache.
        level: float32 ``[requests, Hkv, LEVELS]``, sums of results of the keys whose mean is taken off.
        covariance: ``[requests, Hkv, D, D]``, bfloat16 for queries of two bytes, which takes every size of queries,
            and else float32.
    """

    sums: Tensor
    centre: Tensor
    level: Tensor
    covariance: Tensor


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What keys are multiplied in with the covariance of queries of a type."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def allocate_variance(
    num_requests: int, num_kv_heads: int, head_size: int, dtype: torch.dtype, device: torch.device | str
) -> VarianceWorkspace:
    """Room for the covariances of a round.

    Args:
        num_requests: requests of a round.
        num_kv_heads: KV heads.
        head_size: channels of a head.
        dtype: of the queries.
        device: device.
    """
    square, each = (head_size, head_size), num_requests * num_kv_heads
    places = max(each, min(PROGRAMS, MAX_SPLITS * each))
    return VarianceWorkspace(
        torch.empty(places, *square, dtype=torch.float32, device=device),
        torch.empty(num_requests, num_kv_heads, head_size, dtype=torch.float32, device=device),
        torch.empty(num_requests, num_kv_heads, LEVELS, dtype=torch.float32, device=device),
        torch.empty(num_requests, num_kv_heads, *square, dtype=product_dtype(dtype), device=device),
    )


def check_variance(
    q: Tensor, kv: PagedKV, batch: Batch, pattern: SparsePattern, workspace: VarianceWorkspace, prior: Tensor,
    scale: float,
) -> None:  # fmt: skip
    """Checks every argument of ``variance``.

    Raises:
        ValueError: dtype, shape, stride or device mismatch; names the argument.
    """
    check_queries(q, kv, batch)
    check_scale(scale)
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
    check_tensor("prior", prior, 3, (torch.float32,))
    check_priors(prior, kv, batch)
    found, wanted = workspace.covariance, product_dtype(q.dtype)
    if found.dtype != wanted or found.device != q.device:
        raise ValueError(f"workspace is of {found.dtype} on {found.device}, expected {wanted} on {q.device}")
    if found.shape[0] < batch.num_requests or found.shape[1:3] != (kv.num_kv_heads, kv.head_size):
        requests, heads, size, _ = found.shape
        raise ValueError(f"workspace is for {requests} requests and {heads} heads of size {size}")
    if workspace.sums.shape[0] < batch.num_requests * kv.num_kv_heads:
        raise ValueError(f"workspace has room for {workspace.sums.shape[0]} sums")
    check_device("q", q)


def variance(
    q: Tensor, kv: PagedKV, batch: Batch, pattern: SparsePattern, workspace: VarianceWorkspace, prior: Tensor, *,
    scale: float,
) -> None:  # fmt: skip
    """Half the variance of every key's logits over the queries of a tile, for ``price`` and ``rank``.

    As ``naive.variance``.

    Args:
        q: ``[rows, Hq, D]``, contiguous channels.
        kv: the cache, of the same dtype or fp8.
        batch: which rows belong to which request. Requests without rows are left out.
        pattern: tiles and their parts. Queries are seen around the mean of their part.
        workspace: from ``allocate_variance``.
        prior: float32 ``[requests, Hkv, positions]``, contiguous positions; the first ``seq_len`` of a request are
            written.
        scale: factor on ``q . k`` before the softmax.
    """
    for i, start, end, n in with_rows(batch):
        k, _ = keys_values(kv, i, n)
        prior[i, :, :n] = naive.variance(q[start:end].to(k.dtype), k, scale=scale, pattern=pattern)
