# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What was measured to be best on a platform, for options that the user leaves open.

Keyed by what decides it (CPU or CUDA, compute capability), never by the name of a device. Importable without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlatformTuning:
    """Defaults of one platform.

    Attributes:
        block_q: query tile, in positions.
        block_k: key granule, in positions.
        min_seq_len: tokens of the sequence below which the stock kernel is faster; a preset that starts later wins.
        min_pairs: rows of a chunk times tokens of the sequence below which it is, with 32 heads of 128 channels.
        min_rows_sampled: rows of a chunk below which it is with the training-free estimate, which takes a pass over the
            sequence for its own rows however few the others are.
        tile_window: window, in positions, where every tile has a list of its own.
        tile_q: positions of such a tile; 0: what fills a program.
        tile_k: granule of its window and sinks.
        tile_parts: parts of a tile, with a mean query each.
        tile_any_parts: tiles of large heads and groups have parts, too.
        tile_variance: half the variance of a key's logits over a tile's queries is added to its scores.
        priced_rows: rows of a chunk whose true attention is computed there.
        tile_max_density: share of the causal pairs there above which the stock kernel is faster; None: the option's
            default.
        tile_min_seq_len: tokens of the sequence there below which it is, whatever a preset says; None: as elsewhere.
    """

    block_q: int
    block_k: int
    min_seq_len: int = 0
    min_pairs: int = 0
    min_rows_sampled: int = 0
    tile_window: int = 256
    tile_q: int = 0
    tile_k: int = 16
    tile_parts: int = 1
    tile_any_parts: bool = False
    tile_variance: bool = False
    priced_rows: int = 64
    tile_max_density: float | None = None
    tile_min_seq_len: int | None = None


# With lists for every tile, a layer was fastest at 0.5 B parameters (2 KV heads of 64 channels, 2 cores) with tiles of
# 64 positions and 32 priced rows. Two parts and the variance bring more of the true output for the same pairs
# (docs/selection.md). Attention over everything by the same code is faster than vLLM's kernel.
CPU = PlatformTuning(
    block_q=128,
    block_k=64,
    tile_q=64,
    tile_parts=2,
    tile_any_parts=True,
    tile_variance=True,
    priced_rows=32,
    tile_max_density=1.0,
)

# Least compute capability the row is for -> defaults. Small tiles keep the union along scattered diagonals small; the
# heads of a group fill the rows of a tensor-core tile. The least sizes of (9, 0) are from
# `python -m benchmarks.kernels --crossover` on an H100 with 32 heads of 128 channels: for its launches, the sparse
# attention of a layer took 0.6 ms at least, 1.25 where the host was busy; stock attention takes that for 2**26 pairs.
# A sixteenth less admits what was measured there, chunks of powers of two, when decodes take some of a step's tokens.
# Those of (8, 0) have not been measured; its stock attention is slower.
# Lists for every tile: with 12 / 2 heads of 128, 8,192 rows of 32,768 and half of the heads on everything (57 % of the
# pairs) choosing and attending took 2.0 ms, the stock kernel 2.2. From which length on they pay was not measured;
# what is measured above errs towards stock attention.
_PAIRS, _ROWS, _DENSITY = 60 * 2**20, 960, 0.6
CUDA: dict[tuple[int, int], PlatformTuning] = {
    (8, 0): PlatformTuning(block_q=16, block_k=4, min_pairs=_PAIRS, min_rows_sampled=_ROWS),
    (9, 0): PlatformTuning(
        block_q=16,
        block_k=4,
        min_seq_len=12288,
        min_pairs=_PAIRS,
        min_rows_sampled=_ROWS,
        tile_max_density=_DENSITY,
    ),
}
_MEASURED_CHANNELS = 32 * 128  # query heads times head size


def pairs_worth_choosing(min_pairs: int, num_heads: int, head_size: int) -> int:
    """``min_pairs`` for a rank with other heads than those it was measured with.

    Launches take as long for few heads as for many, stock attention less. For more heads nothing was measured; the
    number stays, which errs towards stock attention.
    """
    return max(min_pairs, min_pairs * _MEASURED_CHANNELS // (num_heads * head_size))


def cuda_tuning(capability: tuple[int, int] | None) -> PlatformTuning:
    """The row of the highest capability that a device has; the lowest row for an unknown or older device."""
    rows = [key for key in CUDA if capability is not None and key <= capability]
    return CUDA[max(rows, default=min(CUDA))]


def platform_tuning() -> PlatformTuning:
    """Defaults of the platform vLLM runs on."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return CPU
    capability = current_platform.get_device_capability()
    return cuda_tuning(None if capability is None else (int(capability.major), int(capability.minor)))
