# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A measurement from its options to its report."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vllm_vsprefill
from vllm_vsprefill.eval import targets
from vllm_vsprefill.eval.client import Client
from vllm_vsprefill.eval.density import Densities
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.journal import Journal
from vllm_vsprefill.eval.settings import DENSE
from vllm_vsprefill.eval.targets import SPARSE, Plan, Target
from vllm_vsprefill.eval.texts import read_texts
from vllm_vsprefill.eval.tokens import LocalTokens, check_tokens, fingerprint
from vllm_vsprefill.tools import bench_report, bench_serve
from vllm_vsprefill.tools.bench_figures import Job, figures, jobs
from vllm_vsprefill.tools.bench_options import BenchCommand
from vllm_vsprefill.tools.bench_prompts import Prompts

Say = Callable[[str], None]


def bench(options: BenchCommand, say: Say) -> None:
    """Measure what is asked for and write the report, also of what was finished before an interruption.

    Raises:
        EvalError: something cannot start or go on.
        KeyboardInterrupt: from the keyboard; the report of what is finished is written.
    """
    bench_serve.check()
    server = options.server
    with targets.connect(server.url, server.model) as client:
        check_lengths(options, client)
        measurement = Measurement(options, Path(client.model).name, _tokenizer(options, client))
        check_tokens(measurement.tokens, client, measurement.tokenizer)
        versions = {"sparse": client.version()} if options.mode != "dense" else {}
    if server.dense_url is not None:
        with targets.connect(server.dense_url, None) as client:
            check_lengths(options, client)
            check_tokens(measurement.tokens, client, measurement.tokenizer)
            versions["dense"] = client.version()
    found = plans(options, say)
    try:
        measurement.run(found)
    finally:
        if measurement.journal.records:
            measurement.write([plan.name for plan in found], {"vllm": versions}, say)
    say(f"report: {options.out / bench_report.REPORT}")


def check_lengths(options: BenchCommand, client: Client) -> None:
    """EvalError if a server cannot take prompts of all lengths."""
    longest, limit = max(options.lengths), client.max_model_len
    if limit is not None and longest > limit:
        raise EvalError(
            f"prompts of {longest:,} tokens, answer included, do not fit the {limit:,} of {client.url} "
            "(--max-model-len); give shorter --lengths or start it with more"
        )


def _tokenizer(options: BenchCommand, client: Client) -> str:
    if options.server.tokenizer is not None:
        return options.server.tokenizer
    if not Path(client.root).is_dir():
        raise EvalError(
            f"{client.url} has its model from {client.root!r}, which is no folder on this machine; give the folder or "
            "id of its tokenizer with --tokenizer"
        )
    return client.root


def plans(options: BenchCommand, say: Say) -> list[Plan]:
    """The servers, or states of one, that are compared; dense first. One alone is taken as it is found if need be.

    Raises:
        EvalError: there is no way to have both.
    """
    wanted = options.server.for_targets()
    sparse = Plan(SPARSE, partial(targets.running, SPARSE, wanted.url, wanted.model))
    if wanted.dense_url is not None:
        dense = Plan(DENSE, partial(targets.running, DENSE, wanted.dense_url, None))
    else:
        dense = Plan(DENSE, partial(targets.running, DENSE, wanted.url, wanted.model))
        try:
            here = targets.local_server(wanted)
        except EvalError:
            if options.mode == "both":
                raise
            say("the server cannot be switched from here: it is measured in the mode that it is in")
        else:
            sparse = Plan(SPARSE, partial(targets.switched, SPARSE, wanted, here, SPARSE))
            dense = Plan(DENSE, partial(targets.switched, DENSE, wanted, here, DENSE))
    return [plan for plan in (dense, sparse) if options.mode in ("both", plan.name)]


class Measurement:
    """Runs what a journal lacks.

    Args:
        options: of the command; which servers is said by plans.
        model: what it is called; all servers have the same.
        tokenizer: folder or id.

    Raises:
        EvalError: texts, tokenizer or folder cannot be used.
    """

    def __init__(self, options: BenchCommand, model: str, tokenizer: str) -> None:
        self.options, self.tokenizer, self.model = options, tokenizer, model
        texts = read_texts(options.data)
        self.tokens = LocalTokens(tokenizer)
        self.prompts = Prompts(texts, self.tokens, options.seed, options.output_tokens)
        self._texts = {text.name: text.digest for text in texts}
        self._session = uuid.uuid4().hex  # what an earlier command left in a server's cache is not found
        self._warm: set[str] = set()
        self._journal: Journal | None = None

    @property
    def journal(self) -> Journal:
        """What is finished; the folder is made when it is first asked for."""
        if self._journal is None:
            o = self.options
            depends = {name: getattr(o, name) for name in ("seed", "output_tokens", "prefix_share", "lengths")}
            depends |= {"version": 1, "model": self.model, "tokenizer": fingerprint(self.tokens), "texts": self._texts}
            self._journal = Journal(o.out, {**depends, "concurrency": o.concurrency})
        return self._journal

    def missing(self, names: Iterable[str]) -> list[tuple[Job, str]]:
        """What is to be run, in this order: the targets in turn, and which comes first in turn, too."""
        found = []
        for number, job in enumerate(jobs(self.options)):
            order = list(names)[:: -1 if number % 2 else 1]
            found += [(job, name) for name in order if f"{name}/{job.key}" not in self.journal]
        return found

    def run(self, found: Sequence[Plan], until: float | None = None) -> None:
        """Run what is missing.

        Args:
            found: the targets.
            until: when to stop, by ``time.monotonic``.

        Raises:
            EvalError: something cannot go on. What is finished is kept.
        """
        by_name = {plan.name: plan for plan in found}
        missing = self.missing(by_name)
        kept = len(by_name) * len(jobs(self.options)) - len(missing)
        if missing:
            self.prompts.check(self.options.lengths)
        bar = tqdm(total=sum(job.count for job, _ in missing), unit="request", disable=None, dynamic_ncols=True)
        if kept:
            bar.write(
                f"{kept} runs are in {self.options.out.name} already, {len(missing)} are missing", file=sys.stderr
            )
        with (
            bar,
            bench_serve.Bench(
                self.options.out / "runs", self.tokenizer, self.options.output_tokens, self.options.seed
            ) as runner,
        ):
            for job, name in missing:
                if until is not None and time.monotonic() > until:
                    raise EvalError(f"{name}: no time was left for {job.key}")
                bar.set_description(f"{name} {job.key}")
                with by_name[name].open() as target:
                    self._one(runner, target, job, until, bar)

    def _one(self, runner: bench_serve.Bench, target: Target, job: Job, until: float | None, bar: Any) -> None:
        self._warm_up(target)
        requests, begin = job.requests(self.prompts), bar.n
        densities, hits = target.client.densities(), _prefix_cache(target.client)
        key = f"{target.name}/{job.key}"

        def progress(done: int) -> None:
            bar.n = begin + min(done, len(requests))
            bar.refresh()

        measured = runner.run(
            target.client,
            requests,
            key.replace("/", "-"),
            f"{self._session}-{key}".replace("/", "-"),
            rate=job.rate,
            concurrency=job.concurrency,
            until=until,
            progress=progress,
        )
        after = target.client.densities()
        counted = after.since(densities or Densities({}, {}, {})) if after is not None else None
        if counted is not None and target.name == DENSE and counted.mean < 1:
            raise EvalError(
                f"the server computed {counted.mean:.1%} of attention where it was to be dense; is {target.client.url} "
                "the right one, is something else switching it?"
            )
        cache = {name: now - hits.get(name, 0.0) for name, now in _prefix_cache(target.client).items()}
        self.journal.add(
            key,
            **measured.record(),
            lengths=[one.length for one in requests],
            pairs=None if counted is None else [sum(counted.computed.values()), sum(counted.causal.values())],
            cache=cache,
        )
        progress(len(requests))
        self.write([target.name], {}, None)

    def _warm_up(self, target: Target) -> None:
        """A prompt of each length, the first of which pay for what is compiled then."""
        if target.name in self._warm:
            return
        for length in self.options.lengths:
            text = self.prompts.closed(length, -1, 0)[0].text
            target.client.answer(self.tokens.prefix() + self.tokens.encode(text), self.options.output_tokens)
        self._warm.add(target.name)

    def write(self, names: Sequence[str], about: dict[str, Any], say: Say | None) -> dict[str, Any]:
        """Write the report; with the plot if there is somebody to tell. Returns what is in it."""
        found = {name.partition("/")[0] for name in self.journal.records}
        order = [*names, *sorted(found - {*names})] if say is not None else sorted(found)
        made = figures(self.journal, self.options, order)
        notes = [self.options.note] if self.options.note is not None else []
        if any(f["target"] == SPARSE and f["density"] is None for f in made):
            notes.append("the server that was to be sparse counts no densities: it is none with VSPREFILL")
        results = {
            "about": {
                "model": self.model,
                "command": _command(),
                "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
                "vllm_vsprefill": vllm_vsprefill.__version__,
                "machine": f"{platform.machine()}, {os.cpu_count()} processors",
                "lengths": list(self.options.lengths),
                "output_tokens": self.options.output_tokens,
                "prefix_share": self.options.prefix_share,
                "seconds": self.options.seconds,
                "concurrency": self.options.concurrency,
                "ttft_limit": self.options.ttft_limit,
                "seed": self.options.seed,
                "texts": self._texts,
                **about,
            },
            "notes": notes,
            "complete": not self.missing(order),
            "figures": made,
        }
        try:
            bench_report.write(self.options.out, results, say)
        except OSError as error:
            raise EvalError(f"the report cannot be written to {self.options.out} ({error.strerror or error})") from None
        return results


def _prefix_cache(client: Client) -> dict[str, float]:
    """Prompt tokens that a server looked up in its prefix cache, and that it found there."""
    text = client.metrics() or ""
    found = {}
    for name in ("queries", "hits"):
        values = re.findall(rf"^vllm:prefix_cache_{name}_total(?:\{{.*\}})? (\S+)", text, re.M)
        if values:
            found[name] = sum(map(float, values))
    return found


def _command() -> str:
    """The command line; a file given by its whole path is shown by its name, for folders of a machine say nothing."""
    words = [",".join(Path(p).name if p.startswith("/") else p for p in word.split(",")) for word in sys.argv[1:]]
    return shlex.join(["vsprefill", *words])
