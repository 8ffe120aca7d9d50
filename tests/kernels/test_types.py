# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The pattern's own validation."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from vllm_vsprefill.kernels.types import SparsePattern


def test_defaults_are_valid_and_fixed() -> None:
    pattern = SparsePattern()
    with pytest.raises(FrozenInstanceError):
        pattern.window = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", [field.name for field in fields(SparsePattern)])
@pytest.mark.parametrize("value", [-1, 1.0, "64", None, True])
def test_bad_field_is_named(name: str, value: Any) -> None:
    if name == "variance" and value is True:
        value = 1
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        SparsePattern(**{name: value})


@pytest.mark.parametrize("name", ["block_q", "block_k"])
def test_blocks_hold_at_least_one_position(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        SparsePattern(**{name: 0})  # type: ignore[arg-type]


def test_window_sinks_and_dense_rows_may_be_zero() -> None:
    SparsePattern(window=0, sinks=0, dense_last=0)
