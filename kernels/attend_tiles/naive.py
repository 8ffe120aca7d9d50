# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Attention over window, sinks and a list of keys for each tile of queries: the plain reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_like, check_query_key, check_scale, check_tensor
from ..types import SparsePattern


def check_attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, pattern: SparsePattern, scale: float, out: Tensor | None
) -> None:
    """Checks every argument of ``attend_tiles``."""
    check_query_key(q, k)
    check_tensor("v", v, 3)
    check_like("v", v, "k", k, shape=True)
    check_tensor("keys", keys, 3, (torch.bool,))
    wanted = (k.shape[1], len(pattern.tiles(q.shape[0], k.shape[0])), k.shape[0])
    if tuple(keys.shape) != wanted or keys.device != q.device:
        raise ValueError(f"keys must have shape {wanted} on {q.device}, got {tuple(keys.shape)} on {keys.device}")
    check_scale(scale)
    if out is not None:
        check_tensor("out", out, 3)
        check_like("out", out, "q", q, shape=True)


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    pattern: SparsePattern,
    *,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Causal attention of a chunk's rows to the sinks, the keys of their tile's window, and those that it lists.

    Args:
        q: ``[T, Hq, D]``, the chunk's queries; the last row is the query at position ``n - 1``.
        k, v: ``[n, Hkv, D]``, the whole sequence, ``n >= T``; same dtype and device.
        keys: bool ``[Hkv, tiles, n]``, of ``pattern.tiles(T, n)``; read only between the sinks and a tile's window.
        pattern: tiles, window and sinks; ``dense_last`` is not looked at.
        scale: factor on ``q . k`` before the softmax.
        out: written and returned, if given.

    Returns:
        ``[T, Hq, D]``, and the (row, key) pairs visited, over all KV heads.

    Raises:
        ValueError: dtype, shape or device mismatch; the message names the argument.
    """
    check_attend_tiles(q, k, v, keys, pattern, scale, out)
    n, first, num_kv_heads = k.shape[0], k.shape[0] - q.shape[0], k.shape[1]
    out = torch.empty_like(q) if out is None else out
    position = torch.arange(n, device=q.device)
    queries, result = (x.unflatten(1, (num_kv_heads, -1)) for x in (q, out))
    visited = 0
    for i, tile in enumerate(pattern.tiles(q.shape[0], n)):
        start, end = max(tile * pattern.block_q, first), min((tile + 1) * pattern.block_q, n)
        near = (position < pattern.sink_keys) | (position >= pattern.window_start(tile * pattern.block_q))
        causal = position <= position[start:end].unsqueeze(1)  # [rows, n]
        for head in range(num_kv_heads):
            seen = causal & (near | keys[head, i])
            visited += int(seen.sum())
            # [group, rows, n]
            logits = queries[start - first : end - first, head].transpose(0, 1).float() @ k[:, head].float().T * scale
            probs = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1)
            result[start - first : end - first, head] = (probs @ v[:, head].float()).transpose(0, 1).to(q.dtype)
    return out, visited
