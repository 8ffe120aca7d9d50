# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The rows of a chunk whose true attention is computed, to stand for all of them."""

from __future__ import annotations


def spread_rows(num_rows_total: int, num_rows: int) -> list[int]:
    """At most ``num_rows`` rows, spread over a chunk, and over the places within a tile; ascending."""
    count = min(num_rows, num_rows_total)
    step = max(num_rows_total // count, 1)
    return [min(num_rows_total * i // count + i * 37 % step, num_rows_total - 1) for i in range(count)]


def check_num_rows(num_rows: int) -> None:
    """Checks the number of rows to look at."""
    if isinstance(num_rows, bool) or not isinstance(num_rows, int) or num_rows < 1:
        raise ValueError(f"num_rows must be a positive int, got {num_rows!r}")
