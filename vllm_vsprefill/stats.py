# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Density read-out: how much of the causal attention was computed, per layer, on ``/metrics``.

The numbers arise in worker processes; ``/metrics`` is served by the API process. With several API servers vLLM runs
prometheus_client in its multi-process mode, and ordinary counters of a worker show up by themselves. With one, they
would stay in the worker, so each worker writes its counts to a small file in the server's exchange folder, which a
collector in the API process reads.

Metrics (all counters, label ``layer`` is the model's layer index; prefill rows only):

``vsprefill_pairs_causal_total``
    (query, key) pairs, per KV head, that dense causal attention computes.
``vsprefill_pairs_computed_total``
    pairs that were computed. The ratio of the two is the density.
``vsprefill_chunks_total``
    prefill chunks by ``path``: ``sparse`` or ``dense``.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_vsprefill import exchange

_PROMETHEUS_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
RETRY = 10.0
"""Seconds after which a worker that could not write its counts tries again."""

TELL = 3
"""How often the log says that everything was handed back."""

logger = logging.getLogger("vllm.vsprefill")

_HELP = {
    "vsprefill_pairs_causal": "Query-key pairs that dense causal prefill attention computes, per layer.",
    "vsprefill_pairs_computed": "Query-key pairs of prefill attention that were computed, per layer.",
    "vsprefill_chunks": "Prefill chunks by layer and path (sparse or dense).",
}


@dataclass(slots=True)
class LayerCounts:
    """Running totals of one layer. ``handed_back``: dense chunks whose selection exceeded ``max_density``."""

    computed: int = 0
    causal: int = 0
    sparse_chunks: int = 0
    dense_chunks: int = 0
    handed_back: int = 0

    @property
    def density(self) -> float:
        """Share of the causal pairs that was computed; 1 where nothing ran yet."""
        return self.computed / self.causal if self.causal else 1.0

    def __add__(self, other: LayerCounts) -> LayerCounts:
        return LayerCounts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __sub__(self, other: LayerCounts) -> LayerCounts:
        return LayerCounts(*(a - b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, int, int, int, int]:
        """The numbers, in the order of the fields."""
        return self.computed, self.causal, self.sparse_chunks, self.dense_chunks, self.handed_back

    def __iadd__(self, other: LayerCounts) -> LayerCounts:
        self.computed += other.computed
        self.causal += other.causal
        self.sparse_chunks += other.sparse_chunks
        self.dense_chunks += other.dense_chunks
        self.handed_back += other.handed_back
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
        self._totals: dict[int, LayerCounts] = {}
        self._before_prompt: dict[int, LayerCounts] = {}
        self._prompt_of_totals = 0
        self._published: dict[int, LayerCounts] = {}
        self._lock = threading.Lock()
        self._rank = rank
        self._told = 0
        self._file: Path | None = None
        self._counters: dict[str, Any] | None = None
        if _PROMETHEUS_MULTIPROCESS in os.environ:
            self._counters = _multiprocess_counters()
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
        if self._rank == 0 and self._told < TELL:
            self._tell(sum(totals.values(), LayerCounts()) - sum(self._totals.values(), LayerCounts()))
        self._totals = totals

    def _tell(self, step: LayerCounts) -> None:
        """Say so where no layer found anything to leave out in a step, the first times."""
        if not step.handed_back or step.sparse_chunks:
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
            if self._counters is not None:
                self._publish_counters(self._counters)
            if self._file is not None:
                self._publish_file(self._file)

    def _publish_counters(self, counters: dict[str, Any]) -> None:
        for layer, now in self._totals.items():
            new = now - self._published.get(layer, LayerCounts())
            label = str(layer)
            counters["vsprefill_pairs_computed"].labels(label).inc(new.computed)
            counters["vsprefill_pairs_causal"].labels(label).inc(new.causal)
            counters["vsprefill_chunks"].labels(label, "sparse").inc(new.sparse_chunks)
            counters["vsprefill_chunks"].labels(label, "dense").inc(new.dense_chunks)
            self._published[layer] = now

    def _publish_file(self, file: Path) -> None:
        payload: dict[str, Any] = {str(layer): list(counts.values()) for layer, counts in self._totals.items()}
        payload["mode"] = self.mode
        payload["last_prompt"] = {
            layer: list((counts - self._before_prompt.get(layer, LayerCounts())).values())
            for layer, counts in self._totals.items()
        }
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


def read_modes(folder: Path) -> list[str]:
    """Mode of each worker: ``sparse``, ``dense`` (by the switch) or ``off`` (by the options)."""
    return [str(payload["mode"]) for payload in _payloads(folder) if "mode" in payload]


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
        totals = _sum(payload for folder in self.folders for payload in _payloads(folder))
        if not totals:
            return
        from prometheus_client.core import CounterMetricFamily

        computed = CounterMetricFamily("vsprefill_pairs_computed", _HELP["vsprefill_pairs_computed"], labels=["layer"])
        causal = CounterMetricFamily("vsprefill_pairs_causal", _HELP["vsprefill_pairs_causal"], labels=["layer"])
        chunks = CounterMetricFamily("vsprefill_chunks", _HELP["vsprefill_chunks"], labels=["layer", "path"])
        for layer, counts in sorted(totals.items()):
            computed.add_metric([str(layer)], counts.computed)
            causal.add_metric([str(layer)], counts.causal)
            chunks.add_metric([str(layer), "sparse"], counts.sparse_chunks)
            chunks.add_metric([str(layer), "dense"], counts.dense_chunks)
        yield from (computed, causal, chunks)


_collector: FolderCollector | None = None


def install_collector() -> None:
    """Register the collector, once per process. It finds nothing until a server with VSPREFILL has been started."""
    global _collector
    if _collector is not None or _PROMETHEUS_MULTIPROCESS in os.environ:
        return
    from prometheus_client import REGISTRY

    _collector = FolderCollector()
    REGISTRY.register(_collector)


_counters: dict[str, Any] | None = None


def _multiprocess_counters() -> dict[str, Any]:
    """The counters of this process in prometheus_client's multi-process mode. Created once: names are unique."""
    global _counters
    if _counters is None:
        from prometheus_client import Counter

        _counters = {
            name: Counter(name, text, ["layer", "path"] if name == "vsprefill_chunks" else ["layer"])
            for name, text in _HELP.items()
        }
    return _counters
