# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Rows that stand for a chunk."""

from __future__ import annotations

import random

from vllm_vsprefill.kernels.rows import spread_rows


def test_rows_are_of_the_chunk_and_at_different_places_of_their_tiles() -> None:
    rng = random.Random(0)
    for total in [1, 2, 63, 64, 65, *(rng.randrange(1, 20000) for _ in range(50))]:
        rows = spread_rows(total, 64)
        assert len(rows) == min(64, total)
        assert rows[0] >= 0
        assert rows[-1] < total
        assert rows == sorted(set(rows))
    assert len({row % 16 for row in spread_rows(8192, 64)}) == 16
