# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What ``/metrics`` shows, and the running totals behind it. ``stats`` brings them from the workers to the server.

Counters are monotone; histograms have one observation per layer and step. ``quarter`` is a quarter of the model's
layers, ``1`` next to the input, so that the number of series does not depend on the model.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

SPARSE, DENSE = "sparse", "dense"
NO_REASON = "none"

GATE_REASONS = ("decode", "switched_off", "few_rows", "short_sequence", "few_pairs", "not_worth")
"""Why the gate leaves a chunk to the stock kernel."""

NO_SPARSE_LAYER, LAST_ROWS = "no_sparse_layer", "last_rows"
"""The gate lets a chunk through, but no layer runs sparse; the dense last rows of a sparse chunk."""

MAX_DENSITY, UNSUPPORTED_LAYER, DENSE_LAYERS, CHECKPOINT, QUERY_TYPE = FALLBACKS = (
    "max_density", "unsupported_layer", "dense_layers", "checkpoint", "query_type",
)  # fmt: skip
"""Why a layer leaves a chunk to the stock kernel that the gate let through."""

CACHED, SCORED = "cached", "scored"

QUARTERS = ("1", "2", "3", "4")

_COUNTS = tuple(float(4**i) for i in range(10))  # 1 to 262144
_SECONDS = tuple(float(f"{mantissa}e{exponent}") for exponent in range(-5, 1) for mantissa in (1, 2, 5))
_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Family(NamedTuple):
    """A metric. ``buckets``: upper bounds of a histogram's buckets, without infinity; None for a counter."""

    text: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...] | None = None


FAMILIES = {
    "vsprefill_pairs_causal": Family(
        "Query-key pairs that dense causal prefill attention computes, per layer.", ("layer",)
    ),
    "vsprefill_pairs_computed": Family(
        "Query-key pairs of prefill attention that were computed, per layer.", ("layer",)
    ),
    "vsprefill_chunks": Family("Prefill chunks by layer and path (sparse or dense).", ("layer", "path")),
    "vsprefill_request_chunks": Family(
        "Chunks (a request's rows in one step) by path and, where dense, the reason; not per layer.", ("path", "reason")
    ),
    "vsprefill_tokens": Family(
        "Rows by path and, where dense, the reason; prompt tokens, but for the reason decode.", ("path", "reason")
    ),
    "vsprefill_fallbacks": Family(
        "Chunks that the gate let through and a layer left to the stock kernel, by reason.", ("reason", "quarter")
    ),
    "vsprefill_index_logits": Family(
        "Index logits used, in tokens of all layers: found in the cache, or scored. On a GPU of sampled steps.",
        ("source",),
    ),
    "vsprefill_density_ratio": Family(
        "Computed by causal pairs of the sparse chunks of a step, per layer.", ("quarter",), _RATIOS
    ),
    "vsprefill_columns": Family("Columns chosen for a KV head, mean of a layer's heads.", ("quarter",), _COUNTS),
    "vsprefill_diagonals": Family("Diagonals chosen for a KV head, mean of a layer's heads.", ("quarter",), _COUNTS),
    "vsprefill_tile_keys": Family(
        "Keys before its window that a tile of queries attends to, mean of a layer's tiles and KV heads.",
        ("quarter",), _COUNTS,
    ),
    "vsprefill_choose_seconds": Family(
        "Time a layer takes in a step to choose keys. On a GPU of sampled steps.", ("quarter",), _SECONDS
    ),
    "vsprefill_attend_seconds": Family(
        "Time a layer takes in a step to attend to the chosen keys. On a GPU of sampled steps.", ("quarter",), _SECONDS
    ),
}  # fmt: skip

Key = tuple[str, ...]
"""Name of a metric and its labels."""


def quarter(layer: int, num_layers: int) -> str:
    """Quarter of the model that a layer lies in."""
    return QUARTERS[min(4 * layer // max(num_layers, 1), 3)]


def _known_series() -> Iterator[Key]:
    """Counters that exist from the start, at zero, so that their first increment is seen as one."""
    reasons = [(SPARSE, NO_REASON), *((DENSE, reason) for reason in (*GATE_REASONS, NO_SPARSE_LAYER))]
    yield from (("vsprefill_request_chunks", *labels) for labels in reasons)
    yield from (("vsprefill_tokens", *labels) for labels in (*reasons, (DENSE, LAST_ROWS)))
    yield from (("vsprefill_fallbacks", *labels) for labels in itertools.product(FALLBACKS, QUARTERS))
    yield from (("vsprefill_index_logits", source) for source in (CACHED, SCORED))


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen of one layer in one step.

    Attributes:
        choose_seconds, attend_seconds: time taken; None where it was not measured.
        columns, diagonals: chosen for a KV head, on average; None where nothing was chosen.
        cached, scored: tokens whose index logits were found, and computed.
        tile_keys: keys before its window that a tile attends to, on average; None where tiles have no lists of their
            own, or nothing was chosen.
    """

    choose_seconds: float | None = None
    attend_seconds: float | None = None
    columns: float | None = None
    diagonals: float | None = None
    cached: int = 0
    scored: int = 0
    tile_keys: float | None = None


class Tally:
    """Running totals by series. Threads may share one.

    Args:
        known: whether the counters that can be foreseen exist from the start.
    """

    def __init__(self, *, known: bool = False) -> None:
        self._lock = threading.Lock()
        self._counters: dict[Key, int] = dict.fromkeys(_known_series() if known else (), 0)
        self._histograms: dict[Key, list[float]] = {}  # observations by bucket, those beyond the last one, their sum
        self.listener: Callable[[Key, float], None] | None = None
        """Told of every observation of a histogram."""

    def inc(self, amount: int, *key: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + amount

    def observe(self, value: float, *key: str) -> None:
        """Add an observation to a histogram."""
        buckets = FAMILIES[key[0]].buckets
        assert buckets is not None
        with self._lock:
            found = self._histograms.setdefault(key, [0] * (len(buckets) + 1) + [0.0])
            found[bisect.bisect_left(buckets, value)] += 1
            found[-1] += value
            if self.listener is not None:
                self.listener(key, value)

    def look(self, layer: str, look: Look) -> None:
        """Take down what was seen of a layer in the quarter ``layer``."""
        for name in ("choose_seconds", "attend_seconds", "columns", "diagonals", "tile_keys"):
            if (value := getattr(look, name)) is not None:
                self.observe(value, f"vsprefill_{name}", layer)
        for source, tokens in ((CACHED, look.cached), (SCORED, look.scored)):
            if tokens:
                self.inc(tokens, "vsprefill_index_logits", source)

    def counters(self) -> dict[Key, int]:
        """A copy of the counters."""
        with self._lock:
            return dict(self._counters)

    def dump(self) -> list[list[Any]]:
        """The totals for a JSON file: name and labels, then a number or the numbers of a histogram."""
        with self._lock:
            both = (*self._counters.items(), *((key, list(found)) for key, found in self._histograms.items()))
        return [[list(key), value] for key, value in both]

    def add(self, dumped: Iterable[list[Any]]) -> None:
        """Add what another process has dumped. Series that this version does not know are left out."""
        for names, value in dumped:
            key = tuple(names)
            family = FAMILIES.get(key[0])
            if family is None or len(key) != 1 + len(family.labels) or isinstance(value, list) != bool(family.buckets):
                continue
            if family.buckets is None:
                self.inc(value, *key)
            elif len(value) == len(family.buckets) + 2:
                found = self._histograms.get(key, [0] * len(value))
                self._histograms[key] = [a + b for a, b in zip(found, value, strict=True)]

    def collect(self) -> Iterator[Any]:
        """Metric families of prometheus_client."""
        from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily

        counters, histograms = sorted(self.counters().items()), sorted(self._histograms.items())
        for name, family in FAMILIES.items():
            metric: Any
            if family.buckets is None:
                metric = CounterMetricFamily(name, family.text, labels=family.labels)
                for key, value in counters:
                    if key[0] == name:
                        metric.add_metric(key[1:], value)
            else:
                metric = HistogramMetricFamily(name, family.text, labels=family.labels)
                bounds = [*map(str, family.buckets), "+Inf"]
                for key, found in histograms:
                    if key[0] == name:
                        metric.add_metric(
                            key[1:], list(zip(bounds, itertools.accumulate(found[:-1]), strict=True)), found[-1]
                        )
            if metric.samples:
                yield metric


def multiprocess_metrics() -> dict[str, Any]:
    """All metrics of this process in prometheus_client's multi-process mode. Names are unique: call it once."""
    from prometheus_client import Counter, Histogram

    return {
        name: Counter(name, family.text, family.labels)
        if family.buckets is None
        else Histogram(name, family.text, family.labels, buckets=family.buckets)
        for name, family in FAMILIES.items()
    }
