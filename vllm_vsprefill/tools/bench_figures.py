# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What is run, and figures from what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vllm_vsprefill.eval.journal import Journal
from vllm_vsprefill.tools.bench_options import BenchCommand
from vllm_vsprefill.tools.bench_prompts import Prompts, Request
from vllm_vsprefill.tools.bench_serve import Measured

PORTION = 3
"""Prompts of a length that a target is asked before it is another one's turn."""


@dataclass(frozen=True)
class Job:
    """One run of ``vllm bench serve``.

    Attributes:
        key: tells it from others.
        count: requests.
        requests: makes them.
        length: of all prompts, in the closed loop.
        rate: requests a second, in the open loop.
        concurrency: requests at a time, in the closed loop.
    """

    key: str
    count: int
    requests: Callable[[Prompts], list[Request]]
    length: int | None = None
    rate: float | None = None
    concurrency: int | None = None


def _closed(length: int, first: int, last: int, prompts: Prompts) -> list[Request]:
    return prompts.closed(length, first, last)


def _opened(lengths: tuple[int, ...], share: float, count: int, prompts: Prompts) -> list[Request]:
    return prompts.opened(lengths, share, count)


def jobs(options: BenchCommand) -> list[Job]:
    """What is run on every target: some prompts of each length at a time, then the rates from the lowest."""
    made = []
    portion = max(PORTION, 2 * options.concurrency)
    for first in range(0, options.samples, portion):
        last = min(first + portion, options.samples)
        for length in options.lengths:
            key = f"closed/{length}/{first}-{last}"
            of = partial(_closed, length, first, last)
            made.append(Job(key, last - first, of, length=length, concurrency=options.concurrency))
    for rate in sorted(set(options.rate)):
        count = max(round(rate * options.seconds), 1)
        of = partial(_opened, options.lengths, options.prefix_share, count)
        made.append(Job(f"open/{rate:g}-{options.seconds:g}s", count, of, rate=rate))
    return made


def figures(journal: Journal, options: BenchCommand, targets: Sequence[str]) -> list[dict[str, Any]]:
    """Figures of all lengths and rates on all targets, as far as they have been measured."""
    found = []
    made = jobs(options)
    for length in options.lengths:
        for target in targets:
            keys = [f"{target}/{job.key}" for job in made if job.length == length]
            if records := [journal.records[key] for key in keys if key in journal]:
                found.append(
                    {"loop": "closed", "target": target, "length": length, **_closed_figures(records, options)}
                )
    for job in made:
        for target in targets:
            if job.rate is not None and (key := f"{target}/{job.key}") in journal:
                record = journal.records[key]
                found.append({"loop": "open", "target": target, "rate": job.rate, **_open_figures(record, options)})
    return found


def _common(records: list[dict[str, Any]], options: BenchCommand) -> tuple[dict[str, Any], list[float]]:
    """Figures that both loops have, and times to first token."""
    runs = [Measured.of(record) for record in records]
    seconds = sum(run.seconds for run in runs)
    done = [(run, i) for run in runs for i, error in enumerate(run.errors) if not error]
    ttfts = [run.ttfts[i] for run, i in done]
    prompts = [run.prompts[i] for run, i in done]
    answers = [run.answers[i] for run, i in done]
    requests = sum(len(run.errors) for run in runs)
    pairs = [record["pairs"] for record in records if record["pairs"] is not None]
    computed, causal = (sum(pair[i] for pair in pairs) for i in (0, 1))
    found = {
        "requests": requests,
        "failed": requests - len(done),
        "prompt_tokens": [min(prompts), max(prompts)],
        "requests_per_second": _round(len(done) / seconds),
        "tokens_per_second": _round((sum(prompts) + sum(answers)) / seconds),
        "seconds": _round(seconds),
        "density": None if not pairs else round(computed / causal, 4) if causal else 1.0,
    }
    if options.ttft_limit is not None:
        within = sum(t <= options.ttft_limit for t in ttfts)
        found |= {"within_limit": round(within / requests, 4), "goodput": _round(within / seconds)}
    queries, hits = (sum(record["cache"].get(name, 0.0) for record in records) for name in ("queries", "hits"))
    found["prefix_hits"] = round(hits / queries, 4) if queries else None
    return found, ttfts


def _closed_figures(records: list[dict[str, Any]], options: BenchCommand) -> dict[str, Any]:
    found, ttfts = _common(records, options)
    low, middle, high = (_round(float(x)) for x in np.percentile(ttfts, (25, 50, 75)))
    return {"ttft": middle, "ttft_quartiles": [low, high], **found}


def _open_figures(record: dict[str, Any], options: BenchCommand) -> dict[str, Any]:
    found, ttfts = _common([record], options)
    middle, last = (_round(float(x)) for x in np.percentile(ttfts, (50, 99)))
    by_length: dict[int, list[float]] = {}
    for length, ttft, error in zip(record["lengths"], record["ttfts"], record["errors"], strict=True):
        if not error:
            by_length.setdefault(length, []).append(ttft)
    lengths = {
        str(length): {"requests": len(times), "ttft_p50": _round(float(np.median(times)))}
        for length, times in sorted(by_length.items())
    }
    return {"ttft_p50": middle, "ttft_p99": last, **found, "by_length": lengths}


def _round(value: float) -> float:
    """Five significant digits."""
    return round(value, 4 - math.floor(math.log10(abs(value)))) if value else 0.0


def capacity(found: Sequence[dict[str, Any]], target: str, limit: float) -> dict[str, float | None]:
    """What a target can take within a limit on the time to first token.

    Args:
        found: figures with that limit.
        target: which one.
        limit: seconds.

    Returns:
        ``rate``, the highest that was tried at which P99 kept within the limit and no request failed, None if there is
        none; ``goodput``, the most requests a second that were answered within it at any rate.
    """
    rows = [f for f in found if f["loop"] == "open" and f["target"] == target]
    kept = [f["rate"] for f in rows if f["ttft_p99"] <= limit and not f["failed"]]
    return {"rate": max(kept, default=None), "goodput": max((f["goodput"] for f in rows), default=None)}
