# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which requests of one scheduler step run sparse. Plain Python over CPU-side facts: no tensor, no vLLM."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_vsprefill.kernels.types import SparsePattern
from vllm_vsprefill.metrics import DENSE, LAST_ROWS, NO_REASON, SPARSE

MIN_ROWS = 64
"""Fewest rows, the dense last ones aside, worth a selection: choosing keys costs a pass over the sequence, however few
rows use the result."""


@dataclass(frozen=True, slots=True)
class Gate:
    """When a request's chunk runs sparse.

    Attributes:
        min_seq_len: tokens of the sequence, those of this chunk included, below which stock attention runs.
        dense_last_rows: rows at the end of every chunk that attend to everything; a chunk of only those is dense.
        min_pairs: rows of the chunk times tokens of the sequence below which stock attention runs.
        min_rows: rows of the chunk below which it runs; ``MIN_ROWS`` beside the dense last ones in any case.
        enabled: False sends everything to the stock kernel.
        worth: False sends everything to it that would run sparse, because that was not worth it lately.
    """

    min_seq_len: int
    dense_last_rows: int
    min_pairs: int = 0
    min_rows: int = 0
    enabled: bool = True
    worth: bool = True

    def admits(self, rows: int, seq_len: int, is_prefilling: bool) -> bool:
        """Whether ``rows`` new tokens at the end of ``seq_len`` run sparse."""
        return self.reason(rows, seq_len, is_prefilling) is None

    def reason(self, rows: int, seq_len: int, is_prefilling: bool) -> str | None:
        """Why they do not, one of ``metrics.GATE_REASONS``, or None if they do."""
        if not is_prefilling:
            return "decode"
        if not self.enabled:
            return "switched_off"
        if seq_len < self.min_seq_len:
            return "short_sequence"
        shortest = self.shortest_seq_len(rows)
        if shortest is None:
            return "few_rows"
        if seq_len < shortest:
            return "few_pairs"
        return None if self.worth else "not_worth"

    def shortest_seq_len(self, rows: int) -> int | None:
        """Tokens of the sequence from which a chunk of ``rows`` runs sparse; None if it never does."""
        if not self.enabled or rows < max(self.min_rows, self.dense_last_rows + MIN_ROWS):
            return None
        return max(self.min_seq_len, -(-self.min_pairs // rows), rows)

    def shortest_prompt(self, chunk: int, longest: int) -> int | None:
        """Tokens of the shortest prompt of which a chunk runs sparse, where nothing of it is cached and nothing else is
        computed beside it.

        Args:
            chunk: tokens of every chunk but the last.
            longest: tokens of the longest prompt there can be.

        Returns:
            Tokens, or None if no prompt of at most ``longest`` runs sparse.
        """
        for done in range(0, longest, chunk):  # a prompt that needs fewer whole chunks before is a shorter one
            rows = range(1, min(chunk, longest - done) + 1)
            first = bisect.bisect_left(rows, True, key=lambda r: self.admits(r, done + r, True))
            if first < len(rows):
                return done + rows[first]
        return None


@dataclass(frozen=True, slots=True)
class RequestRows:
    """Rows of one request in the step's flat token list; ``seq_len`` tokens up to and including the last row."""

    request: int
    row_start: int
    row_end: int
    seq_len: int

    @property
    def rows(self) -> int:
        """Number of query rows."""
        return self.row_end - self.row_start

    @property
    def causal_pairs(self) -> int:
        """(query, key) pairs that dense causal attention computes for these rows, per head."""
        return SparsePattern.causal_pairs(self.rows, self.seq_len)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step does.

    Attributes:
        sparse: rows that run sparse, one entry a request, in batch order.
        dense_runs: the other rows, among them the last ones of every sparse chunk, as maximal runs of rows and requests
            that lie next to each other; the stock kernel wants slices of the token list and of the block table.
        dense_prefill_pairs: causal pairs, per head, of prefill rows among ``dense_runs`` (for the density figures).
        starts_alone: the only request that prefills begins at position 0 (it is a new prompt).
        shares: chunks and rows by path and reason, the labels of ``vsprefill_tokens``.
    """

    sparse: tuple[RequestRows, ...]
    dense_runs: tuple[tuple[RequestRows, ...], ...]
    dense_prefill_pairs: int
    starts_alone: bool = False
    shares: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    @property
    def prefill_pairs(self) -> int:
        """Causal pairs, per head, of all prefill rows of the step."""
        return self.dense_prefill_pairs + sum(rows.causal_pairs for rows in self.sparse)

    @property
    def dense_chunks(self) -> int:
        """Prefill chunks that the gate leaves to the stock kernel."""
        return sum(
            chunks for (path, reason), (chunks, _) in self.shares.items() if path == DENSE and reason != "decode"
        )


def plan_step(
    query_start_loc: Sequence[int], seq_lens: Sequence[int], is_prefilling: Sequence[bool], gate: Gate
) -> StepPlan:
    """Sort the requests of a step into sparse ones and runs of dense ones.

    Args:
        query_start_loc: first row of each request, and the number of rows at the end; ``num_requests + 1`` values.
        seq_lens: tokens of each request, those of this step included.
        is_prefilling: whether the request still computes its prompt.
        gate: the rule.

    Requests without rows (padding) appear nowhere.
    """
    sparse: list[RequestRows] = []
    runs: list[list[RequestRows]] = []
    dense_pairs = 0
    open_run = False
    prefilling = fresh = 0
    shares: dict[tuple[str, str], tuple[int, int]] = {}

    def share(path: str, reason: str, rows: int, chunks: int = 1) -> None:
        before = shares.get((path, reason), (0, 0))
        shares[path, reason] = before[0] + chunks, before[1] + rows

    for request, seq_len in enumerate(seq_lens):
        rows = RequestRows(request, query_start_loc[request], query_start_loc[request + 1], seq_len)
        if rows.rows <= 0:
            open_run = False  # a run is of neighbouring requests, too
            continue
        prefilling += is_prefilling[request]
        fresh += is_prefilling[request] and rows.rows == seq_len
        reason = gate.reason(rows.rows, seq_len, is_prefilling[request])
        if reason is None:
            tail = gate.dense_last_rows
            share(SPARSE, NO_REASON, rows.rows - tail)
            sparse.append(RequestRows(request, rows.row_start, rows.row_end - tail, seq_len - tail))
            open_run = False
            if not tail:
                continue
            share(DENSE, LAST_ROWS, tail, chunks=0)
            rows = RequestRows(request, rows.row_end - tail, rows.row_end, seq_len)
        else:
            share(DENSE, reason, rows.rows)
        if is_prefilling[request]:
            dense_pairs += rows.causal_pairs
        if not open_run:
            runs.append([])
            open_run = True
        runs[-1].append(rows)
    starts_alone = prefilling == fresh == 1
    return StepPlan(tuple(sparse), tuple(tuple(run) for run in runs), dense_pairs, starts_alone, shares)
