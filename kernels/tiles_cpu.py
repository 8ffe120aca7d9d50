# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the CPU versions of ``price``, ``rank`` and ``attend_tiles`` share; above all the scores of ``tile_scores.py``.

The product with the keys is in the dtype of the inputs. What a score is compared with is subtracted before the product
is rounded, so that a score near a bar is exact enough to be on the right side of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from .types import SparsePattern

# Keys of a block of scores: with 32 tiles of 8 query heads 1 MiB in bfloat16, which fits a core's cache.
KEYS = 2048
TILES = 32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which matrix products of such inputs are fast on this machine, and at least as exact."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.float32
    if dtype == torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return torch.float32
    return dtype


class Buffers(threading.local):
    """Memory that a thread uses again: fresh memory costs more than a product that writes to it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._found: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """``[rows, columns]`` that the thread's next call with this name overwrites."""
        found = self._found.get(name)
        if found is None or found.numel() < rows * columns:
            # Some room to grow: later tiles tend to need a little more.
            found = self._found[name] = torch.empty(rows * columns * 5 // 4, dtype=self._dtype)
        return found[: rows * columns].view(rows, columns)


class TileScores:
    """Scores of one chunk, without a prior.

    Args:
        q: ``[T, Hq, D]``, the chunk's queries; the last row is the query at position ``n - 1``.
        k: ``[n, Hkv, D]``, the whole sequence.
        scale: factor on ``q . k`` before the softmax.
        pattern: tiles, window and sinks.

    Attributes:
        k: ``[Hkv, n, D]``, contiguous, in the dtype of products.
        buffers: in the same dtype.
    """

    def __init__(self, q: Tensor, k: Tensor, *, scale: float, pattern: SparsePattern) -> None:
        self.scale, self.pattern = scale, pattern
        self.seq_len, self.first = k.shape[0], k.shape[0] - q.shape[0]
        # [T, Hkv, group, D]
        self._queries = q.unflatten(1, (k.shape[1], -1))
        self.k = k.transpose(0, 1).to(product_dtype(k.dtype)).contiguous()
        self.buffers = Buffers(self.k.dtype)
        # The tiles' windows and the sinks, in float32 once for all tiles. [Hkv, keys, D]
        self._near_start = pattern.window_start(self.first // pattern.block_q * pattern.block_q)
        self._window = self.k[:, self._near_start :].float()
        self._sinks = self.k[:, : pattern.sink_keys].float()

    def width(self, tiles: range | list[int]) -> int:
        """Keys before the last tile's window: all that some tile may list, and the sinks."""
        return self.pattern.window_start(tiles[-1] * self.pattern.block_q)

    def scores(self, head: int, tiles: range | list[int], bar: float = 0.0) -> Iterator[tuple[int, Tensor]]:
        """Scores less ``bar`` for one KV head, of each part of a tile and query head, some keys at a time.

        Args:
            head: KV head.
            tiles: ascending indices on the absolute grid; each holds a row of the chunk.
            bar: finite.

        Yields:
            The first key and ``[tiles, parts * group, keys]``, up to ``width(tiles)``; keys that a tile may not list
            mean nothing. The next block overwrites the memory.
        """
        found = [self._means(head, tile) for tile in tiles]
        queries = torch.cat([mean for mean, _ in found])
        shift = torch.cat([near for _, near in found]).add_(bar).neg_().unsqueeze(1)  # [tiles * parts * group, 1]
        coarse = shift.to(queries.dtype)
        # What the shift lost by its own rounding
        rest = (shift - coarse).to(queries.dtype)
        width = self.width(tiles)
        for first in range(0, width, KEYS):
            keys = self.k[head, first : min(first + KEYS, width)]
            scores = self.buffers.take("scores", len(queries), len(keys))
            torch.addmm(coarse, queries, keys.T, alpha=self.scale, out=scores)
            scores += rest
            yield first, scores.view(len(tiles), -1, len(keys))

    def _means(self, head: int, tile: int) -> tuple[Tensor, Tensor]:
        """Mean queries ``[parts * group, D]`` of a tile in the dtype of products, and ``near`` of each, in float32."""
        block_q = self.pattern.block_q
        end = min((tile + 1) * block_q, self.seq_len)
        bounds = [self.pattern.part(tile, part, self.first, self.seq_len) for part in range(self.pattern.parts)]
        some = next(bound for bound in bounds if bound[0] < bound[1])
        # A part without rows says what another one says already.
        bounds = [bound if bound[0] < bound[1] else some for bound in bounds]
        rows = [self._queries[low - self.first : high - self.first, head] for low, high in bounds]
        mean = torch.cat([part.float().mean(0) for part in rows]).to(self._queries.dtype)
        window_start = self.pattern.window_start(tile * block_q)
        window = self._window[head, window_start - self._near_start : end - self._near_start]
        sinks = self._sinks[head, : min(self.pattern.sink_keys, window_start)]
        queries = mean.float()
        parts = [queries @ keys.T for keys in (sinks, window)]
        near = torch.cat(parts, 1).mul_(self.scale).logsumexp(1)
        return mean.to(self.k.dtype), near
