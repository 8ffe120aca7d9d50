# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Argument checks shared by the operations. Every failure is a ``ValueError`` that names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import Budgets, Selection, SparsePattern

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, value: object, ndim: int, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES) -> Tensor:
    """Returns ``value`` if it is a tensor of ``ndim`` axes and one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(value.shape)}")
    return value


def check_like(name: str, value: Tensor, like_name: str, like: Tensor, *, shape: bool = False) -> None:
    """Checks that ``value`` has the dtype and device of ``like``, and its shape if ``shape`` is set."""
    if value.dtype != like.dtype:
        raise ValueError(f"{name} has dtype {value.dtype} but {like_name} has {like.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device} but {like_name} is on {like.device}")
    if shape and value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)} but {like_name} has {tuple(like.shape)}")


def check_scale(scale: float) -> None:
    """Checks that the softmax scale is a positive finite number."""
    if not math.isfinite(scale) or scale <= 0:
        raise ValueError(f"scale must be a positive finite number, got {scale!r}")


def check_prior(prior: Tensor | None, k: Tensor) -> None:
    """Checks what is added to the scores of keys, float32 ``[Hkv, n]`` or None, against k ``[n, Hkv, D]``."""
    if prior is None:
        return
    check_tensor("prior", prior, 2, (torch.float32,))
    if prior.shape != (k.shape[1], k.shape[0]):
        raise ValueError(f"prior has shape {tuple(prior.shape)}, expected {(k.shape[1], k.shape[0])}")
    if prior.device != k.device:
        raise ValueError(f"prior is on {prior.device} but k is on {k.device}")


def check_query_key(q: Tensor, k: Tensor) -> None:
    """Checks q ``[T, Hq, D]`` against k ``[n, Hkv, D]``, T <= n, Hq a multiple of Hkv."""
    check_tensor("q", q, 3)
    check_tensor("k", k, 3)
    check_like("k", k, "q", q)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"k has head size {k.shape[2]} but q has {q.shape[2]}")
    if min(q.shape[1:]) == 0 or k.shape[1] == 0:
        raise ValueError(f"q and k need at least one head and one channel, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, which is not a multiple of the {k.shape[1]} KV heads of k")
    if q.shape[0] == 0:
        raise ValueError("q must have at least one row")
    if q.shape[0] > k.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows but k has only {k.shape[0]} positions")


def check_selection(selection: Selection, num_kv_heads: int, device: torch.device) -> None:
    """Checks dtypes, shapes and device of a selection; reads no values."""
    for items_name, count_name in (("columns", "num_columns"), ("diagonals", "num_diagonals")):
        items = check_tensor(f"selection.{items_name}", getattr(selection, items_name), 2, (torch.int32,))
        counts = check_tensor(f"selection.{count_name}", getattr(selection, count_name), 1, (torch.int32,))
        for name, value in ((items_name, items), (count_name, counts)):
            if value.shape[0] != num_kv_heads:
                raise ValueError(f"selection.{name} has {value.shape[0]} rows but k has {num_kv_heads} KV heads")
            if value.device != device:
                raise ValueError(f"selection.{name} is on {value.device} but q is on {device}")


def check_budgets(budgets: Budgets, highest: int | None = None) -> None:
    """Checks that budgets are non-negative ints, up to ``highest`` if given, and no minimum is above its maximum."""
    wanted = "a non-negative int" if highest is None else f"an int from 0 to {highest}"
    for kind in ("columns", "diagonals"):
        minimum, maximum = getattr(budgets, f"min_{kind}"), getattr(budgets, f"max_{kind}")
        for name, value in ((f"min_{kind}", minimum), (f"max_{kind}", maximum)):
            if value is None and name.startswith("max"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0 or value > (highest or value):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
        if maximum is not None and minimum > maximum:
            raise ValueError(f"min_{kind} is {minimum}, above max_{kind}, which is {maximum}")


def check_tile(
    columns: Tensor, diagonals: Tensor, tile_start: int, tile_end: int, seq_len: int, pattern: SparsePattern
) -> None:
    """Checks what a tile of a pattern is made of, the range of the values included."""
    if not isinstance(pattern, SparsePattern):
        raise ValueError(f"pattern must be a SparsePattern, got {type(pattern).__name__}")
    if not 0 <= tile_start < tile_end <= seq_len:
        raise ValueError(
            f"tile_start and tile_end must satisfy 0 <= tile_start < tile_end <= seq_len, "
            f"got {tile_start}, {tile_end} and {seq_len}"
        )
    for name, value in (("columns", columns), ("diagonals", diagonals)):
        check_tensor(name, value, 1, (torch.int32, torch.int64))
        if value.numel() and not (0 <= int(value.min()) and int(value.max()) < seq_len):
            raise ValueError(f"{name} must lie in [0, {seq_len})")
