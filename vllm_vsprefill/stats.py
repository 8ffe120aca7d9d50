# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The read-out: what the workers count, and how it gets to ``/metrics`` (see ``metrics``) and ``vsprefill status``.

The numbers arise in worker processes; ``/metrics`` is served by the API process. With several API servers vLLM runs
prometheus_client in its multi-process mode, and ordinary metrics of a worker show up by themselves. With one, they
would stay in the worker, so each worker writes its counts to a small file in the server's exchange folder, which a
collector in the API process reads.

Ranks of tensor parallelism share a layer's KV heads, so their pairs are summed; whatever is a number of chunks or
tokens, or an observation, is that of the first one.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vsprefill import exchange
from vllm_vsprefill.metrics import MAX_DENSITY, Key, Look, Tally, multiprocess_metrics, quarter
from vllm_vsprefill.recall_check import Recall
from vllm_vsprefill.worth import Worth

_PROMETHEUS_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
RETRY = 10.0
"""Seconds after which a worker that could not write its counts tries again."""

TELL = 3
"""How often the log says that everything was handed back."""

logger = logging.getLogger("vllm.vsprefill")


@dataclass(slots=True)
class LayerCounts:
    """Running totals of one layer.

    Attributes:
        computed, causal: pairs that were computed, and that dense attention computes.
        sparse_chunks, dense_chunks: prefill chunks.
        handed_back: dense chunks whose selection exceeded ``max_density``.
        given: causal pairs of rows that were never meant to run sparse here.
    """

    computed: int = 0
    causal: int = 0
    sparse_chunks: int = 0
    dense_chunks: int = 0
    handed_back: int = 0
    given: int = 0

    @property
    def density(self) -> float:
        """Share of the causal pairs that was computed; 1 where nothing ran yet."""
        return self.computed / self.causal if self.causal else 1.0

    def __add__(self, other: LayerCounts) -> LayerCounts:
        return LayerCounts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __sub__(self, other: LayerCounts) -> LayerCounts:
        return LayerCounts(*(a - b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        """The numbers, in the order of the fields."""
        return self.computed, self.causal, self.sparse_chunks, self.dense_chunks, self.handed_back, self.given

    def of_other_rank(self) -> LayerCounts:
        """What is added to the counts of the first rank: its own pairs."""
        return LayerCounts(self.computed, self.causal, given=self.given)

    def __iadd__(self, other: LayerCounts) -> LayerCounts:
        self.computed += other.computed
        self.causal += other.causal
        self.sparse_chunks += other.sparse_chunks
        self.dense_chunks += other.dense_chunks
        self.handed_back += other.handed_back
        self.given += other.given
        return self


class Recorder:
    """Counts of one worker. ``record`` adds to memory; ``publish`` makes the totals visible to ``/metrics``.

    Where a device counts, too, its numbers arrive later: a step's totals are then put together elsewhere and handed in
    with ``advance``, step by step, and ``write`` makes the last ones visible.

    Args:
        rank: of the worker, for the name of its file.
        folder: the server's exchange folder, or None where it has none.
        exists: whether it exists; if not, it is made as soon as it can be.
    """

    def __init__(self, rank: int = 0, folder: Path | None = None, *, exists: bool = True) -> None:
        self.layers: dict[int, LayerCounts] = {}
        self.mode = "sparse"
        self.prompt = 0
        self.num_layers = 0
        self.tally = Tally(known=rank == 0)
        self.worth = Worth()
        self.recall: Recall | None = None  # of an indexer that may be another model's
        self._totals: dict[int, LayerCounts] = {}
        self._before_prompt: dict[int, LayerCounts] = {}
        self._prompt_of_totals = 0
        self._published: dict[Key, int] = {}
        self._observed: queue.SimpleQueue[tuple[Key, float]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._rank = rank
        self._told = 0
        self._file: Path | None = None
        self._metrics: dict[str, Any] | None = None
        if _PROMETHEUS_MULTIPROCESS in os.environ:
            self._metrics = _own_metrics()
            self.tally.listener = lambda key, value: self._observed.put((key, value))
        self._next_try = 0.0
        self._failing = False
        self._visible = True
        if folder is not None:
            self._file = folder / f"{os.getpid()}-{rank}-{secrets.token_hex(4)}.json"
            if exists and not folder.is_dir():
                # The process that started the server made it; a folder made here would be seen by nobody.
                self._visible, self._failing = False, True
                logger.warning(
                    "VSPREFILL: this worker does not see the server's folder %s. Its densities are missing from "
                    "/metrics and `vsprefill status`, and `vsprefill mode` does not reach it. Set %s to a folder that "
                    "all machines of the server share.", folder, exchange.STATS_DIR_VARIABLE,
                )  # fmt: skip

    def record(self, layer: int, counts: LayerCounts) -> None:
        """Add counts to a layer's totals."""
        self.layers.setdefault(layer, LayerCounts()).__iadd__(counts)

    def look(self, layer: int, look: Look) -> None:
        """Take down what was seen of a layer in a step."""
        if self._rank == 0:
            self.tally.look(quarter(layer, self.num_layers), look)

    def count(self, amount: int, *key: str) -> None:
        """Add to a counter of ``metrics`` that is not per layer."""
        if self._rank == 0:
            self.tally.inc(amount, *key)

    def fall_back(self, layer: int, reason: str, chunks: int) -> None:
        """A layer leaves chunks to the stock kernel that the gate let through."""
        if chunks:
            self.count(chunks, "vsprefill_fallbacks", reason, quarter(layer, self.num_layers))

    def begin_prompt(self) -> None:
        """What is recorded from now on belongs to another prompt (or other prompts computed side by side)."""
        self.prompt += 1

    def snapshot(self) -> dict[int, LayerCounts]:
        """A copy of the totals recorded in memory."""
        return {layer: LayerCounts(*counts.values()) for layer, counts in self.layers.items()}

    def publish(self) -> None:
        """Hand the totals on."""
        self.advance(self.snapshot(), self.prompt)
        self.write()

    def advance(self, totals: dict[int, LayerCounts], prompt: int) -> None:
        """Take over the totals after some step, which belonged to the ``prompt``-th prompt."""
        with self._lock:
            self._advance(totals, prompt)

    def _advance(self, totals: dict[int, LayerCounts], prompt: int) -> None:
        if prompt != self._prompt_of_totals:
            self._before_prompt, self._prompt_of_totals = self._totals, prompt
        steps = {layer: now - self._totals.get(layer, LayerCounts()) for layer, now in totals.items()}
        whole = sum(steps.values(), LayerCounts())
        if causal := whole.causal - whole.given:
            self.worth.observe((whole.computed - whole.given) / causal)
        if self._rank == 0:
            for layer, step in steps.items():
                self.fall_back(layer, MAX_DENSITY, step.handed_back)
                if causal := step.causal - step.given:
                    where = quarter(layer, self.num_layers)
                    self.tally.observe((step.computed - step.given) / causal, "vsprefill_density_ratio", where)
            self._tell(whole)
        self._totals = totals

    def _tell(self, step: LayerCounts) -> None:
        """Say so where no layer found anything to leave out in a step, the first times."""
        if self._told == TELL or not step.handed_back or step.sparse_chunks:
            return
        self._told += 1
        logger.warning(
            "VSPREFILL: all layers gave a prompt's rows back to the stock kernel, because their selections would have "
            "computed more than max_density of them. That costs the selection and gains nothing; prompts of random "
            "tokens do this, and models whose attention is not concentrated. %s",
            "`vsprefill status` counts it from now on." if self._told == TELL else "`vsprefill status` counts it.",
        )

    def write(self) -> None:
        """Make the totals visible that were taken over last. Also called by a thread that waits for a device."""
        with self._lock:
            if self._metrics is not None:
                self._publish_metrics(self._metrics)
            if self._file is not None:
                self._publish_file(self._file)

    def _shown(self) -> dict[int, LayerCounts]:
        """Totals with what this rank adds to them."""
        if self._rank == 0:
            return self._totals
        return {layer: counts.of_other_rank() for layer, counts in self._totals.items()}

    def _publish_metrics(self, metrics: dict[str, Any]) -> None:
        for key, value in {**self.tally.counters(), **_per_layer(self._shown())}.items():
            new = value - self._published.get(key, 0)
            if new or key not in self._published:
                metrics[key[0]].labels(*key[1:]).inc(new)
                self._published[key] = value
        while not self._observed.empty():
            key, seen = self._observed.get()
            metrics[key[0]].labels(*key[1:]).observe(seen)

    def _publish_file(self, file: Path) -> None:
        shown = self._shown()
        payload: dict[str, Any] = {str(layer): list(counts.values()) for layer, counts in shown.items()}
        payload["mode"] = self.mode
        payload["last_prompt"] = {
            layer: list((counts - self._before_prompt.get(layer, LayerCounts())).values())
            for layer, counts in shown.items()
        }
        payload["metrics"] = self.tally.dump()
        if self.recall is not None:
            payload["recall"] = [self.recall.found, self.recall.expected]
        if self._failing and time.monotonic() < self._next_try:
            return
        try:
            if self._visible:
                file.parent.mkdir(
                    mode=0o700, parents=True, exist_ok=True
                )  # whoever tidies the temporary folder may have removed it
            partial = file.with_suffix(".tmp")
            partial.write_text(json.dumps(payload))
            partial.replace(file)  # a reader sees the old totals or the new ones, never half a file
        except OSError as error:
            # A full or vanished temporary folder costs the read-out, never a request.
            self._next_try = time.monotonic() + RETRY
            if not self._failing:
                self._failing = True
                logger.warning(
                    "VSPREFILL: densities cannot be written to %s (%s); /metrics and `vsprefill status` stay as they "
                    "are until they can.", file.parent, error.strerror or error,
                )  # fmt: skip
            return
        if self._failing:
            self._failing = False
            logger.info("VSPREFILL: densities are written to %s again.", file.parent)


def _payloads(folder: Path) -> Iterator[dict[str, Any]]:
    """What the workers have written to an exchange folder, or to those in a folder, as far as it can be read."""
    for file in sorted([*folder.glob("*.json"), *folder.glob("vsprefill-*/*.json")]):
        try:
            payload = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(payload, dict):
            yield payload


def _sum(parts: Iterable[dict[str, Any]]) -> dict[int, LayerCounts]:
    totals: dict[int, LayerCounts] = {}
    for part in parts:
        for layer, values in part.items():
            if layer.isdecimal():
                totals.setdefault(int(layer), LayerCounts()).__iadd__(LayerCounts(*values))
    return totals


def read_counts(folder: Path) -> dict[int, LayerCounts]:
    """Sum of the totals that all workers have written to ``folder``."""
    return _sum(_payloads(folder))


def read_last_prompt(folder: Path) -> dict[int, LayerCounts]:
    """Sum over all workers of the counts of the last prompt, or of the last ones that were computed side by side."""
    return _sum(payload.get("last_prompt", {}) for payload in _payloads(folder))


def read_tally(*folders: Path) -> Tally:
    """All metrics, of all workers that have written to these folders."""
    tally, payloads = Tally(), [payload for folder in folders for payload in _payloads(folder)]
    for payload in payloads:
        tally.add(payload.get("metrics", ()))
    for key, value in _per_layer(_sum(payloads)).items():
        tally.inc(value, *key)
    return tally


def read_modes(folder: Path) -> list[str]:
    """Mode of each worker: ``sparse``, ``dense`` (by the switch) or ``off`` (by the options)."""
    return [str(payload["mode"]) for payload in _payloads(folder) if "mode" in payload]


def read_recall(folder: Path) -> list[tuple[float, float | None]]:
    """Recall that was found of an indexer, and expected, of each worker that has looked."""
    return [(payload["recall"][0], payload["recall"][1]) for payload in _payloads(folder) if "recall" in payload]


class FolderCollector:
    """prometheus_client collector over the workers' files, of all servers that a process belongs to. Yields nothing
    until a worker has written one."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @property
    def folders(self) -> list[Path]:
        """The folder given, else those of the servers that this process belongs to."""
        return exchange.opened() if self._folder is None else [self._folder]

    def describe(self) -> Iterable[Any]:
        """No series are known before the first request; an empty answer keeps registration from collecting."""
        return []

    def collect(self) -> Iterator[Any]:
        """Metric families, read at scrape time."""
        yield from read_tally(*self.folders).collect()


def _per_layer(totals: dict[int, LayerCounts]) -> dict[Key, int]:
    """Totals of layers as counters."""
    found: dict[Key, int] = {}
    for layer, counts in totals.items():
        label = str(layer)
        found["vsprefill_pairs_computed", label] = counts.computed
        found["vsprefill_pairs_causal", label] = counts.causal
        found["vsprefill_chunks", label, "sparse"] = counts.sparse_chunks
        found["vsprefill_chunks", label, "dense"] = counts.dense_chunks
    return found


_collector: FolderCollector | None = None


def install_collector() -> None:
    """Register the collector, once per process. It finds nothing until a server with VSPREFILL has been started."""
    global _collector
    if _collector is not None or _PROMETHEUS_MULTIPROCESS in os.environ:
        return
    from prometheus_client import REGISTRY

    _collector = FolderCollector()
    REGISTRY.register(_collector)


_metrics: dict[str, Any] | None = None


def _own_metrics() -> dict[str, Any]:
    """The metrics of this process in prometheus_client's multi-process mode, created once."""
    global _metrics
    if _metrics is None:
        _metrics = multiprocess_metrics()
    return _metrics
