# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Passes over some texts at one price after the other, each against dense attention on the same text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.eval.fidelity import Differences
from vllm_vsprefill.pricing.passes import Attend, Passes, attend_dense
from vllm_vsprefill.pricing.readings import Readings, compare, read
from vllm_vsprefill.pricing.search import Measured
from vllm_vsprefill.pricing.tiles import Priced, Tiles


class Comparison:
    """Rows behind a dense beginning, against dense attention.

    Args:
        passes: the model.
        sequences: int64 ``[n]`` each, on the model's device.
        chunks: rows of a chunk, by sequence; 0: all rows behind the beginning.
        dense_first: first rows, which are dense in every pass and not compared.
        progress: told the rows of every chunk that is done.
    """

    def __init__(
        self,
        passes: Passes,
        sequences: Sequence[Tensor],
        chunks: Sequence[int],
        dense_first: int,
        progress: Callable[[int], object] = lambda rows: None,
    ) -> None:
        self.passes, self.sequences, self.chunks, self.dense_first = passes, sequences, chunks, dense_first
        self.progress = progress
        self._dense: list[Readings] = []
        self._begun: int | None = None  # the sequence whose beginning the passes hold

    @property
    def rows(self) -> int:
        """Rows of a pass."""
        return sum(len(tokens) - self.dense_first for tokens in self.sequences)

    def dense(self) -> None:
        """The dense pass.

        Raises:
            DistilError: logits that are no numbers, or too little memory.
        """
        self._dense = [found for _, found in self._pass(attend_dense, None)]

    def measure(self, tiles: Tiles, price: float, max_density: float) -> Measured:
        """A pass at a price; ``dense`` comes first.

        Raises:
            DistilError: as ``dense`` does.
        """
        attend, total = Priced(tiles, price, max_density), Differences()
        for number, found in self._pass(attend, self._dense):
            total += compare(self._dense[number], found)
        means = total.means()
        return Measured(price, attend.density, means["top1"], means["nll"], means["kl"])

    def _pass(self, attend: Attend, like: Sequence[Readings] | None) -> Iterator[tuple[int, Readings]]:
        """Readings of every sequence."""
        for number, tokens in enumerate(self.sequences):
            with enough_memory(tokens.device, len(tokens)):
                found = self._sequence(number, tokens, attend, None if like is None else like[number])
            yield number, found

    def _sequence(self, number: int, tokens: Tensor, attend: Attend, like: Readings | None) -> Readings:
        first = self.dense_first
        if self._begun != number:
            self._begun = None
            self.passes.run(tokens, 0, first)
            self._begun = number
        chunk, parts = self.chunks[number] or len(tokens), []
        for start in range(first, len(tokens), chunk):
            end = min(start + chunk, len(tokens))
            hidden = self.passes.run(tokens, start, end, attend)
            known = None if like is None else like[start - first : end - first]
            parts.append(read(self.passes.logits, hidden, tokens[start + 1 : end + 1], known))
            self.progress(end - start)
        return Readings.joined(parts)


@contextmanager
def enough_memory(place: torch.device, length: int) -> Iterator[None]:
    """Turns too little memory for sequences of so many tokens into a message."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise DistilError(
            f"out of memory on {place} with a sequence of {length} tokens; take shorter ones (--length), "
            "shorter chunks (--chunk-lengths), or a larger device"
        ) from None
