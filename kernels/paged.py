# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Keys and values in a paged cache, and batches of requests that use it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_tensor

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, *FP8_DTYPES)
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class PagedKV(NamedTuple):
    """Keys and values of one layer.

    Attributes:
        cache: ``[num_blocks, Hkv, block, 2 * D]``, keys in the first ``D`` channels, values in the others. Any
            strides, but the channels must be contiguous.
        block_table: int32 ``[requests, max_blocks]``; what lies behind the blocks of a sequence is never read.
        k_scale: float32 ``[1]``, factor on the keys of an fp8 cache; None for 1.
        v_scale: float32 ``[1]``, factor on the values of an fp8 cache; None for 1.
    """

    cache: Tensor
    block_table: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.cache.shape[1]

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.cache.shape[2]

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.cache.shape[3] // 2


class Batch(NamedTuple):
    """Which rows of the query tensor belong to which request. Nothing here is read on the host but the two bounds.

    Attributes:
        row_start: int32 ``[requests]``, first row of the request in the query tensor.
        row_end: int32 ``[requests]``, one past its last row. The last row is the query at position
            ``seq_len - 1``. A request without rows is skipped.
        seq_len: int32 ``[requests]``, tokens in the cache, those of the rows included.
        max_rows: bound on the rows of a request.
        max_seq_len: bound on the lengths of sequences.
    """

    row_start: Tensor
    row_end: Tensor
    seq_len: Tensor
    max_rows: int
    max_seq_len: int

    @classmethod
    def from_lists(cls, rows: list[int], seq_lens: list[int], device: torch.device | str = "cpu") -> Batch:
        """Requests of ``rows[i]`` rows, one behind the other, at the ends of sequences of ``seq_lens[i]`` tokens."""
        ends = torch.tensor(rows, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        starts = ends - torch.tensor(rows, dtype=torch.int32)
        lengths = torch.tensor(seq_lens, dtype=torch.int32)
        return cls(
            starts.to(device), ends.to(device), lengths.to(device), max(rows, default=0), max(seq_lens, default=0)
        )

    @property
    def num_requests(self) -> int:
        """Requests."""
        return self.row_start.shape[0]


def check_paged(kv: PagedKV, batch: Batch, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Checks shapes, dtypes, strides and devices of a cache and a batch; reads no values.

    Raises:
        ValueError: names the argument.
    """
    cache = check_tensor("cache", kv.cache, 4, CACHE_DTYPES)
    if cache.shape[3] % 2 or cache.shape[3] == 0:
        raise ValueError(
            f"cache must hold keys and values side by side in its last axis, got shape {tuple(cache.shape)}"
        )
    if cache.stride(3) != 1:
        raise ValueError(f"cache must have contiguous channels, got strides {cache.stride()}")
    if kv.block_size % 16 or kv.block_size == 0:
        raise ValueError(f"cache must have blocks of a multiple of 16 tokens, got {kv.block_size}")
    if dtype is not None and cache.dtype not in FP8_DTYPES and cache.dtype != dtype:
        raise ValueError(f"cache has dtype {cache.dtype} but q has {dtype}")
    table = check_tensor("block_table", kv.block_table, 2, (torch.int32,))
    if table.stride(1) != 1:
        raise ValueError(f"block_table must have contiguous rows, got strides {table.stride()}")
    if table.shape[0] < batch.num_requests:
        raise ValueError(f"block_table has {table.shape[0]} rows but the batch has {batch.num_requests} requests")
    if table.shape[1] * kv.block_size < batch.max_seq_len:
        raise ValueError(
            f"block_table has room for {table.shape[1] * kv.block_size} tokens but max_seq_len is {batch.max_seq_len}"
        )
    for name, scale in (("k_scale", kv.k_scale), ("v_scale", kv.v_scale)):
        if scale is None:
            continue
        check_tensor(name, scale, scale.dim(), (torch.float32,))
        if scale.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(scale.shape)}")
        if cache.dtype not in FP8_DTYPES:
            raise ValueError(f"{name} is for an fp8 cache, but cache has dtype {cache.dtype}")
    for name in ("row_start", "row_end", "seq_len"):
        value = check_tensor(name, getattr(batch, name), 1, (torch.int32,))
        if value.shape[0] != batch.num_requests:
            raise ValueError(f"{name} has {value.shape[0]} entries but row_start has {batch.num_requests}")
        if not value.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    tensors: list[tuple[str, Tensor | None]] = [("cache", cache), ("block_table", table)]
    tensors += [("k_scale", kv.k_scale), ("v_scale", kv.v_scale)]
    tensors += [(name, getattr(batch, name)) for name in ("row_start", "row_end", "seq_len")]
    for name, tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_queries(q: Tensor, kv: PagedKV, batch: Batch) -> None:
    """Checks queries ``[rows, Hq, D]`` against a cache, and the cache and batch themselves.

    Raises:
        ValueError: names the argument.
    """
    check_tensor("q", q, 3, QUERY_DTYPES)
    if q.stride(2) != 1:
        raise ValueError(f"q must have contiguous channels, got strides {q.stride()}")
    check_paged(kv, batch, q.device, q.dtype)
    if kv.head_size != q.shape[2]:
        raise ValueError(f"cache has head size {kv.head_size} but q has {q.shape[2]}")
    if q.shape[1] == 0 or q.shape[1] % kv.num_kv_heads:
        raise ValueError(f"q has {q.shape[1]} heads, not a multiple of the {kv.num_kv_heads} KV heads of cache")


def check_priors(prior: Tensor | None, kv: PagedKV, batch: Batch) -> None:
    """Checks what is added to the scores of keys, float32 ``[requests, Hkv, positions]`` or None; reads no values.

    Raises:
        ValueError: names the argument.
    """
    if prior is None:
        return
    check_tensor("prior", prior, 3, (torch.float32,))
    requests, heads, positions = prior.shape
    if requests < batch.num_requests or heads != kv.num_kv_heads:
        raise ValueError(
            f"prior is for {requests} requests and {heads} KV heads, expected {batch.num_requests} and "
            f"{kv.num_kv_heads}"
        )
    if positions < batch.max_seq_len:
        raise ValueError(f"prior has room for {positions} tokens but max_seq_len is {batch.max_seq_len}")
    if prior.stride(2) != 1:
        raise ValueError(f"prior must have contiguous positions, got strides {prior.stride()}")
    if prior.device != kv.cache.device:
        raise ValueError(f"prior is on {prior.device}, expected {kv.cache.device}")


def priors(prior: Tensor | None) -> tuple[Tensor | None, int | None, int | None]:
    """A prior and its strides as kernels take them; without one nothing, for which nothing is compiled either."""
    return (None, None, None) if prior is None else (prior, prior.stride(0), prior.stride(1))


@triton.jit
def key_offsets(p_table, b_pos, stride_block, stride_token, BLOCK_SIZE: tl.constexpr):
    """64-bit offsets into the cache of positions ``b_pos``, all of them inside the sequence."""
    b_block = tl.load(p_table + b_pos // BLOCK_SIZE).to(tl.int64)
    return b_block * stride_block + (b_pos % BLOCK_SIZE).to(tl.int64) * stride_token


@triton.jit
def paged_rows(
    p_rows, p_table, b_j, m_j, stride_block, stride_token, o_d,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, UPCAST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Keys or values ``[BN, BD]`` at positions ``b_j``, zero outside ``m_j``."""
    b_block = tl.load(p_table + b_j // BLOCK_SIZE, mask=m_j, other=0).to(tl.int64)
    b_offset = b_block * stride_block + (b_j % BLOCK_SIZE).to(tl.int64) * stride_token
    # [BN, BD]
    b_x = tl.load(p_rows + b_offset[:, None] + o_d[None, :], mask=m_j[:, None] & (o_d < D)[None, :], other=0.0)
    b_x = b_x.to(dtype)
    if UPCAST:
        b_x = b_x.to(tl.float32)
    return b_x


# Kernels are compiled or interpreted as was asked for when their modules were imported.
_INTERPRETED = bool(triton.knobs.runtime.interpret)


def is_interpreted() -> bool:
    """Whether kernels run under Triton's interpreter (``TRITON_INTERPRET=1`` before the first import)."""
    return _INTERPRETED


def check_device(name: str, tensor: Tensor) -> None:
    """Checks that kernels can run where ``tensor`` lies."""
    if tensor.device.type != "cuda" and not is_interpreted():
        raise ValueError(f"{name} is on {tensor.device}; this version runs on CUDA devices only")
