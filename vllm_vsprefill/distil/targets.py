# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What an indexer learns: true distributions over columns and diagonals, for the row ranges of chunked prefill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from vllm_vsprefill.distil.capture import LayerCall


class Range(NamedTuple):
    """One prefill chunk: rows ``start .. end - 1`` at the end of a context of ``end`` tokens."""

    start: int
    end: int


class TargetKind(NamedTuple):
    """A way to weigh columns, the diagonals that do not count, and the power that peaks are raised to."""

    name: str
    exclude_window: int
    peak_power: float = 1.0


class Targets(NamedTuple):
    """True distributions of one range: float32 ``[Hkv, end]`` each, every row sums to one."""

    columns: Tensor
    diagonals: Tensor


def chunk_ranges(length: int, chunk: int) -> list[Range]:
    """The chunks in which a server computes a prompt; ``chunk`` 0 is the whole prompt at once."""
    step = chunk or length
    return [Range(start, min(start + step, length)) for start in range(0, length, step)]


def spread_ranges(length: int, chunk: int, max_ranges: int, min_seq_len: int = 0) -> list[Range]:
    """At most ``max_ranges`` of a prompt's chunks, evenly spread over those that end at ``min_seq_len`` or later."""
    ranges = chunk_ranges(length, chunk)
    ranges = [part for part in ranges if part.end >= min_seq_len] or ranges[-1:]
    places = np.linspace(0, len(ranges) - 1, min(max_ranges, len(ranges))).round().astype(int)
    return [ranges[i] for i in places.tolist()]


def draw_ranges(rng: np.random.Generator, length: int, chunks: Sequence[int], max_ranges: int) -> list[Range]:
    """Some of the chunks of one prompt, ascending, for a chunk length drawn from ``chunks``."""
    ranges = chunk_ranges(length, int(chunks[int(rng.integers(len(chunks)))]))
    if len(ranges) <= max_ranges:
        return ranges
    return [ranges[i] for i in sorted(rng.choice(len(ranges), max_ranges, replace=False).tolist())]


def _normalised(weights: Tensor) -> Tensor:
    total = weights.sum(-1, keepdim=True)
    # A head that looks nowhere beyond the excluded diagonals says nothing about columns: any is as good.
    uniform = weights.new_full((), 1.0 / weights.shape[-1])
    return (weights / total.clamp(min=1e-30)).where(total > 1e-30, uniform)


def compute(call: LayerCall, part: Range, kinds: Iterable[TargetKind]) -> dict[TargetKind, Targets]:
    """Targets of several kinds for one layer and range, sharing what they can.

    ``mass`` is the mean attention of the range's rows (VSPrefill, arXiv 2603.04460); ``peak`` weighs a column by the
    largest probability that any row and query head of the group gives it, to a power; ``mixed`` is the mean of the two.
    Diagonals are weighed by mass in all of them.
    """
    if call.q.is_cuda:
        from vllm_vsprefill.distil.mass import triton as mass

        known: dict[str, Any] = {"lse": None if call.lse is None else call.lse[: part.end]}
        kinds = tuple(kinds)
        # Without these columns the kernel has half the work.
        plain = any(kind.name != "peak" and not 0 < kind.exclude_window < part.end for kind in kinds)
        only: dict[str, Any] = {"with_columns": plain}
    else:
        from vllm_vsprefill.distil.mass import cpu as mass  # type: ignore[no-redef]

        known, only = {}, {}
    q, k = call.q[: part.end], call.k[: part.end]
    rows: dict[str, Any] = {"scale": call.scale, "row_start": part.start, **known}
    all_columns, all_diagonals = mass.mass_sums(q, k, **rows, **only)
    made: dict[tuple[str, int], Tensor] = {("sum", 0): all_columns} if all_columns.shape[1] else {}

    def columns(reduce: Any, near: int, power: float = 1.0) -> Tensor:
        if (reduce, near) not in made:
            made[reduce, near] = mass.column_weights(q, k, reduce=reduce, min_distance=near, **rows)
        weights = made[reduce, near]
        if power != 1:
            # Relative to the largest: the powers of small probabilities do not vanish all at once.
            weights = (weights / weights.amax(-1, keepdim=True).clamp(min=1e-30)) ** power
        return _normalised(weights)

    out = {}
    for kind in kinds:
        # Of a sequence that lies within the window everything is kept; it teaches the plain distributions.
        near = kind.exclude_window if kind.exclude_window < part.end else 0
        if kind.name == "mass":
            chosen = columns("sum", near)
        elif kind.name == "peak":
            chosen = columns("max", near, kind.peak_power)
        else:
            chosen = (columns("sum", near) + columns("max", near, kind.peak_power)) / 2
        diagonals = all_diagonals
        if near:
            diagonals = all_diagonals.clone()
            diagonals[:, :near] = 0
        out[kind] = Targets(chosen, _normalised(diagonals))
    return out
