# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How sure a share of few samples is."""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def wilson(right: float, samples: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (JASA 22, 1927), 95 % by default.

    ``right`` may be fractional, as scores between 0 and 1 add up to: the interval is then as wide as that of right and
    wrong answers with the same mean, which vary more.

    Raises:
        ValueError: no samples, or more right than samples.
    """
    if samples < 1 or not 0 <= right <= samples + 1e-9:
        raise ValueError(f"{right} right of {samples}")
    share = min(right / samples, 1.0)
    scale = 1 + z * z / samples
    middle = (share + z * z / (2 * samples)) / scale
    half = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)
