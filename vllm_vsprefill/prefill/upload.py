# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Small lists of integers on their way to a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


class Upload:
    """Lists of int32 that go to the device in one copy. Each begins at a multiple of 16 bytes: Triton compiles a kernel
    anew for a pointer that is aligned differently."""

    def __init__(self) -> None:
        self._values: list[int] = []

    def add(self, values: list[int]) -> slice:
        """Queue a list; where it will lie."""
        self._values += [0] * (-len(self._values) % 4)
        place = slice(len(self._values), len(self._values) + len(values))
        self._values += values
        return place

    def send(self, device: torch.device) -> Sent:
        """Copy without waiting. The pinned source is PyTorch's: it is not handed out again before the copy is done."""
        source = torch.tensor(self._values, dtype=torch.int32, pin_memory=device.type == "cuda")
        return Sent(source.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class Sent:
    """What lies on the device."""

    values: Tensor

    def take(self, place: slice) -> Tensor:
        """The list that ``Upload.add`` gave this place, int32."""
        return self.values[place]
