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
        min_context: tokens of context below which the stock kernel is faster; a preset that starts later wins.
        min_pairs: rows of a chunk times context below which it is.
    """

    block_q: int
    block_k: int
    min_context: int = 0
    min_pairs: int = 0


CPU = PlatformTuning(block_q=128, block_k=64)

# Least compute capability the row is for -> defaults. Small tiles keep the union along scattered diagonals small; the
# heads of a group fill the rows of a tensor-core tile. The two least sizes are estimates from the times of the kernels:
# with 32 heads of 128 channels dense attention of 2**24 pairs takes about as long as choosing keys.
CUDA: dict[tuple[int, int], PlatformTuning] = {
    (8, 0): PlatformTuning(block_q=16, block_k=4, min_pairs=2**24),
    (9, 0): PlatformTuning(block_q=16, block_k=4, min_context=12288, min_pairs=2**24),
}


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
