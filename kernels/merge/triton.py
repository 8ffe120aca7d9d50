# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Union of columns, diagonals, window and sinks in a form that every query tile can read, for CUDA devices.

The union of a tile is never written out (that would grow with tiles times keys). Two facts make one small index per
request and KV head enough for all tiles:

- With ``block_k`` dividing ``block_q``, which granules the diagonals of a tile touch depends on the tile only by a
  shift. Granule ``g`` of the tile that starts at ``t0`` belongs to it iff some selected distance lies in
  ``[r * block_k - block_k + 1, r * block_k + L - 1]`` with ``r = t0 // block_k - g`` and ``L`` the tile's length. So
  the *relative* granules ``r`` are listed once; close diagonals share granules in this list already, and each granule
  is in it once.
- ``near[r]``, how far the smallest selected distance lies behind the lower end of that interval, answers "is this key
  covered by a diagonal granule" with one load: iff ``near[r] <= L + block_k - 2``. The last, shorter tile of a
  context reads the same table.

Sinks are listed as columns: a tile drops a column iff its window or a granule covers it, and that is what must happen
to a sink, too. The Hopper kernel does it the other way round: it drops from the granules what is a column or a sink, by
the columns' flags, which have to stay as they are from ``build_index`` to ``attend``. Granules of the local window (a
contiguous run that is cheaper to address directly) are not listed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_selection, check_tensor
from ..launch import cdiv, launch, next_power_of_2
from ..paged import Batch, PagedKV, check_device, check_paged
from ..types import Selection, SparsePattern

BLOCK = 1024  # positions a program handles
RANK = 64  # positions between two entries of the rank tables
NONE = 255  # no distance near enough


class Index(NamedTuple):
    """What ``attend`` reads. ``C`` is the room for positions, ``G`` that for granules.

    Attributes:
        columns: int32 ``[requests, Hkv, C]``, columns and sinks, ascending.
        slots: int32 ``[requests, Hkv, C]``, their cache slots, ``block * block_size + offset``.
        rank: int32 ``[requests, Hkv, C // 64]``, how many of them lie below ``64 * i``.
        granules: int32 ``[requests, Hkv, G]``, relative granules beyond the window, ascending.
        granule_rank: int32 ``[requests, Hkv, G // 64]``, how many of them are below ``64 * i``.
        near: uint8 ``[requests, Hkv, G]``, see the module; 255 for none.
        flags: uint8 ``[requests, 2, Hkv, C]``, nonzero where a column (0) or distance (1) is selected.
        counts: int32 ``[requests, 2, Hkv, C // 1024]``, scratch.
        pattern: what it was laid out for.
    """

    columns: Tensor
    slots: Tensor
    rank: Tensor
    granules: Tensor
    granule_rank: Tensor
    near: Tensor
    flags: Tensor
    counts: Tensor
    pattern: SparsePattern


def check_pattern(pattern: SparsePattern) -> None:
    """Checks that the kernels can run a pattern: they need what makes granules shift with the tiles.

    Raises:
        ValueError: names the field.
    """
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
    q, k = pattern.block_q, pattern.block_k
    if q & (q - 1) or not 16 <= q <= 128:
        raise ValueError(f"block_q must be a power of two from 16 to 128 for this version, got {q}")
    if k & (k - 1) or k > q:
        raise ValueError(f"block_k must be a power of two of at most block_q ({q}) for this version, got {k}")


def listed_sinks(pattern: SparsePattern) -> int:
    """First positions that are listed as columns: whole granules of sinks."""
    return cdiv(pattern.sinks, pattern.block_k) * pattern.block_k


def allocate_index(
    num_requests: int, num_kv_heads: int, max_seq_len: int, pattern: SparsePattern, device: torch.device | str
) -> Index:
    """Room for an index; allocate it once. About ``9 + 5 / block_k`` bytes a position and KV head.

    Args:
        num_requests: sparse requests of a step.
        num_kv_heads: KV heads.
        max_seq_len: longest context.
        pattern: its ``block_k`` decides the number of granules.
        device: device.
    """
    check_pattern(pattern)
    # One block more than positions: the rank of a context's end lies behind its last position.
    width = (cdiv(max_seq_len, BLOCK) + 1) * BLOCK
    granules = (cdiv(cdiv(max_seq_len, pattern.block_k), BLOCK) + 1) * BLOCK
    lead = (num_requests, num_kv_heads)

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return Index(
        room(*lead, width),
        room(*lead, width),
        room(*lead, width // RANK),
        room(*lead, granules),
        room(*lead, granules // RANK),
        room(*lead, granules, dtype=torch.uint8),
        room(num_requests, 2, num_kv_heads, width, dtype=torch.uint8),
        room(num_requests, 2, num_kv_heads, width // BLOCK),
        pattern,
    )


@triton.jit(do_not_specialize=["stride_items", "width", "i_kind"])
def _flag_kernel(
    p_items, p_num, p_flags, p_seq_len, stride_items, width, i_kind, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Scatters one kind of a selection of one request into its flags."""
    i_b, i_h = tl.program_id(0), tl.program_id(1)
    n = tl.load(p_seq_len)
    num = tl.load(p_num + i_h)
    o_i = i_b * BLOCK + tl.arange(0, BLOCK)
    # [BLOCK]
    b_item = tl.load(p_items + i_h.to(tl.int64) * stride_items + o_i, mask=o_i < num, other=-1)
    m_item = (b_item >= 0) & (b_item < n)
    tl.store(p_flags + (i_kind * HEADS + i_h).to(tl.int64) * width + b_item, 1, mask=m_item)


@triton.jit
def _merged(p_flags, i_row, o_c, n, sinks, width):
    """Whether positions are columns or sinks; ``i_row`` is the request's first row of flags plus the head."""
    # [BLOCK]
    b_flag = tl.load(p_flags + i_row * width + o_c, mask=o_c < n, other=0)
    return ((b_flag != 0) | (o_c < sinks)) & (o_c < n)


@triton.jit(do_not_specialize=["sinks", "window_granules", "width", "granule_width"])
def _count_kernel(
    p_flags, p_near, p_counts, p_seq_len, sinks, window_granules, width, granule_width,
    HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Computes ``near`` and counts list entries, block by block."""
    i_b, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_seq_len + i_r)
    if i_b * BLOCK > n + BLOCK:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    i_flags = (i_r * 2 * HEADS + i_h).to(tl.int64)
    m_column = _merged(p_flags, i_flags, o_c, n, sinks, width)
    num_blocks = width // BLOCK
    tl.store(p_counts + i_flags * num_blocks + i_b, tl.sum(m_column.to(tl.int32), 0))
    if i_b * BLOCK < granule_width:
        b_near = tl.full([BLOCK], 255, tl.int32)
        p_distance = p_flags + (i_flags + HEADS) * width
        for w in range(BLOCK_Q + BLOCK_K - 1):
            o_d = o_c * BLOCK_K - BLOCK_K + 1 + w
            # [BLOCK]
            b_flag = tl.load(p_distance + o_d, mask=(o_d >= 0) & (o_d < n), other=0)
            b_near = tl.minimum(b_near, tl.where(b_flag != 0, w, 255))
        i_near = (i_r * HEADS + i_h).to(tl.int64) * granule_width
        tl.store(p_near + i_near + o_c, b_near.to(tl.uint8))
        m_granule = (b_near < 255) & (o_c > window_granules)
        tl.store(p_counts + (i_flags + HEADS) * num_blocks + i_b, tl.sum(m_granule.to(tl.int32), 0))


@triton.jit
def _before(p_counts, i_row, i_b, num_blocks, BLOCKS: tl.constexpr):
    """Sum of the counts of the blocks before ``i_b``."""
    o_b = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(p_counts + i_row * num_blocks + o_b, mask=o_b < i_b, other=0), 0)


@triton.jit(do_not_specialize=["stride_table", "sinks", "window_granules", "width", "granule_width"])
def _list_kernel(
    p_flags, p_near, p_counts, p_columns, p_slots, p_rank, p_granules, p_granule_rank, p_seq_len, p_table,
    stride_table, sinks, window_granules, width, granule_width,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """Writes the lists and their rank tables."""
    i_b, i_h, i_r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tl.load(p_seq_len + i_r)
    if i_b * BLOCK > n + BLOCK:
        return
    o_c = i_b * BLOCK + tl.arange(0, BLOCK)
    i_flags = (i_r * 2 * HEADS + i_h).to(tl.int64)
    i_head = (i_r * HEADS + i_h).to(tl.int64)
    num_blocks = width // BLOCK
    m_column = _merged(p_flags, i_flags, o_c, n, sinks, width)
    b_one = m_column.to(tl.int32)
    b_place = _before(p_counts, i_flags, i_b, num_blocks, BLOCKS) + tl.cumsum(b_one, 0) - b_one
    tl.store(p_columns + i_head * width + b_place, o_c, mask=m_column)
    b_block = tl.load(p_table + i_r.to(tl.int64) * stride_table + o_c // BLOCK_SIZE, mask=m_column, other=0)
    tl.store(p_slots + i_head * width + b_place, b_block * BLOCK_SIZE + o_c % BLOCK_SIZE, mask=m_column)
    tl.store(p_rank + i_head * (width // RANK) + o_c // RANK, b_place, mask=o_c % RANK == 0)
    if i_b * BLOCK < granule_width:
        # [BLOCK]
        b_near = tl.load(p_near + i_head * granule_width + o_c)
        m_granule = (b_near < 255) & (o_c > window_granules)
        b_one = m_granule.to(tl.int32)
        b_place = _before(p_counts, i_flags + HEADS, i_b, num_blocks, BLOCKS) + tl.cumsum(b_one, 0) - b_one
        tl.store(p_granules + i_head * granule_width + b_place, o_c, mask=m_granule)
        tl.store(p_granule_rank + i_head * (granule_width // RANK) + o_c // RANK, b_place, mask=o_c % RANK == 0)


def check_index(index: Index, batch: Batch, num_kv_heads: int, device: torch.device) -> None:
    """Checks that an index has room for a batch.

    Raises:
        ValueError: names the argument.
    """
    check_pattern(index.pattern)
    flags = check_tensor("index.flags", index.flags, 4, (torch.uint8,))
    if flags.device != device:
        raise ValueError(f"index is on {flags.device}, expected {device}")
    if flags.shape[2] != num_kv_heads:
        raise ValueError(f"index has room for {flags.shape[2]} KV heads, not {num_kv_heads}")
    if flags.shape[0] < batch.num_requests:
        raise ValueError(f"index has room for {flags.shape[0]} requests, not {batch.num_requests}")
    if flags.shape[3] < (cdiv(batch.max_seq_len, BLOCK) + 1) * BLOCK:
        raise ValueError(f"index has no room for contexts of {batch.max_seq_len} tokens")


def set_flags(index: Index, selections: list[Selection], batch: Batch) -> None:
    """Takes over selections that were made elsewhere, one per request, as ``select`` does with its own.

    Args:
        index: its flags are written.
        selections: as the other versions return them; entries beyond the context are left out.
        batch: the requests.

    Raises:
        ValueError: wrong shape, dtype or device; names the argument.
    """
    device, num_heads, width = index.flags.device, index.flags.shape[2], index.flags.shape[3]
    check_device("index", index.flags)
    check_index(index, batch, num_heads, device)
    if len(selections) != batch.num_requests:
        raise ValueError(f"selections has {len(selections)} entries for {batch.num_requests} requests")
    index.flags[: batch.num_requests].zero_()
    for i, selection in enumerate(selections):
        check_selection(selection, num_heads, device)
        lists = ((selection.columns, selection.num_columns), (selection.diagonals, selection.num_diagonals))
        for kind, (items, counts) in enumerate(lists):
            if items.shape[1] == 0:
                continue
            items, counts = items.contiguous(), counts.contiguous()
            _flag_kernel[(cdiv(items.shape[1], BLOCK), num_heads)](
                items, counts, index.flags[i], batch.seq_len[i:], items.stride(0), width, kind,
                HEADS=num_heads, BLOCK=BLOCK,
            )  # fmt: skip


def build_index(index: Index, kv: PagedKV, batch: Batch, *, checked: bool = False) -> Index:
    """Lists and tables from the flags.

    Args:
        index: flags are read, everything else is written.
        kv: its block table gives the slots.
        batch: the requests; rows are not looked at.
        checked: an earlier call with tensors of these shapes, strides, types and devices has passed the checks.

    Returns:
        ``index``.

    Raises:
        ValueError: wrong shape, dtype or device; names the argument.
    """
    if not checked:
        check_device("index", index.flags)
        check_paged(kv, batch, index.flags.device)
        check_index(index, batch, kv.num_kv_heads, index.flags.device)
    if batch.num_requests == 0:
        return index
    pattern, num_heads = index.pattern, kv.num_kv_heads
    width, granule_width = index.columns.shape[2], index.granules.shape[2]
    block_k = pattern.block_k
    sinks = listed_sinks(pattern)
    # The last relative granule that the window reaches: the interval of r + 1 begins behind it.
    window_granules = (max(pattern.window, 1) - 1 + block_k - 1) // block_k
    grid = (cdiv(batch.max_seq_len, BLOCK) + 1, num_heads, batch.num_requests)
    launch(
        _count_kernel, grid,
        (
            index.flags, index.near, index.counts, batch.seq_len, sinks, window_granules, width, granule_width,
        ),
        HEADS=num_heads, BLOCK_Q=pattern.block_q, BLOCK_K=block_k, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        _list_kernel, grid,
        (
            index.flags, index.near, index.counts, index.columns, index.slots, index.rank, index.granules,
            index.granule_rank, batch.seq_len, kv.block_table, kv.block_table.stride(0), sinks, window_granules,
            width, granule_width,
        ),
        HEADS=num_heads, BLOCK_SIZE=kv.block_size, BLOCK=BLOCK, BLOCKS=next_power_of_2(width // BLOCK),
        RANK=RANK,
    )  # fmt: skip
    return index
