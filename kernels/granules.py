# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Granules of many tiles at once, in NumPy: for CPUs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .types import SparsePattern

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def tile_granules(diagonals: IntArray, starts: IntArray, ends: IntArray, pattern: SparsePattern) -> BoolArray:
    """Granules that each tile touches along the diagonals, the local window and the sinks.

    Args:
        diagonals: ``[S]``, selected diagonals of one KV head.
        starts: ``[tiles]``, first position of each tile.
        ends: ``[tiles]``, one past its last position.
        pattern: granule, window and sinks.

    Returns:
        bool ``[tiles, G]`` with ``G`` the number of granules up to the last tile's end.
    """
    block_k = pattern.block_k
    num_granules = -(-int(ends[-1]) // block_k)
    far = diagonals[diagonals >= pattern.reach]
    # [tiles, S + 1]: first and last position touched along each distance; the whole window is one interval.
    low = np.concatenate((starts[:, None] - far, starts[:, None] - (pattern.reach - 1)), axis=1)
    high = np.concatenate((ends[:, None] - 1 - far, ends[:, None] - 1), axis=1)
    first = np.maximum(low, 0) // block_k
    # An interval that ends before position 0 becomes empty.
    stop = np.where(high >= 0, high // block_k + 1, first)
    # From intervals to coverage: +1 where one begins, -1 behind its end, covered where the running sum is positive.
    width = num_granules + 1
    base = np.arange(len(starts))[:, None] * width
    size = len(starts) * width
    edges = np.bincount((base + first).ravel(), minlength=size) - np.bincount((base + stop).ravel(), minlength=size)
    covered: BoolArray = np.cumsum(edges.reshape(len(starts), width), axis=1)[:, :num_granules] > 0
    covered[:, : pattern.sink_granules] = True
    return covered
