# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Runs suites on targets, sample by sample, and keeps what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from vllm_vsprefill.eval.client import Client
from vllm_vsprefill.eval.density import Densities
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.journal import Journal
from vllm_vsprefill.eval.settings import DENSE, FLOOR
from vllm_vsprefill.eval.suites import Cell, Measures
from vllm_vsprefill.eval.targets import Plan, Target

PORTION = "portion"


class Runner:
    """Measures what a journal lacks.

    Args:
        journal: what is finished.
        suites: what to measure.
        concurrency: samples of RULER at a time.
        check: raises EvalError if a server cannot be asked with these prompts.
    """

    def __init__(
        self,
        journal: Journal,
        suites: list[Measures],
        concurrency: int,
        check: Callable[[Client], None] = lambda client: None,
    ) -> None:
        self.journal, self.suites, self.concurrency, self.check = journal, suites, concurrency, check

    def missing(self, target: str) -> list[tuple[Measures, Cell, list[int]]]:
        """Samples of a target that are not finished, by cell."""
        found = []
        for suite in self.suites:
            for cell in suite.cells():
                if target == FLOOR and cell.suite != "fidelity":
                    continue  # the floor of tasks is dense attention itself
                wanted = [i for i in range(cell.samples) if f"{cell.key(target)}/{i}" not in self.journal]
                if wanted:
                    found.append((suite, cell, wanted))
        return found

    def run(self, plan: Plan, progress: Any) -> None:
        """Measure what is missing of one target; starts or switches nothing if that is nothing.

        Raises:
            EvalError: something cannot go on. What is finished is kept.
        """
        missing = self.missing(plan.name)
        if not missing:
            return
        key = f"setting/{plan.name}"
        if key not in self.journal:
            self.journal.add(key, options=plan.options)
        elif (before := self.journal.records[key]["options"]) != plan.options:
            raise EvalError(
                f"{plan.name} stood for {before} in the run so far, and for {plan.options} now; choose another folder "
                "for --out or another name"
            )
        with plan.open() as target:
            self.check(target.client)
            self._check_lengths(target, [cell for _, cell, _ in missing])
            for suite, cell, indices in missing:
                progress.set_description(f"{target.name} {cell.suite} {cell.task} {cell.length}")
                with self._counted(target, cell):
                    self._measure(suite, target, cell, indices, progress)

    def _measure(self, suite: Measures, target: Target, cell: Cell, indices: list[int], progress: Any) -> None:
        def one(index: int) -> None:
            values = suite.measure(target, cell, index)
            self.journal.add(f"{cell.key(target.name)}/{index}", **values)
            progress.update()

        # Rows and times are to be those of a prompt by itself.
        if self.concurrency == 1 or cell.suite != "ruler":
            for index in indices:
                one(index)
            return
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            list(pool.map(one, indices))
        finally:
            pool.shutdown(cancel_futures=True)

    @contextmanager
    def _counted(self, target: Target, cell: Cell) -> Iterator[None]:
        """Keeps the density of what is computed meanwhile, also if it is interrupted."""
        before = target.client.densities()
        try:
            yield
        finally:
            now = target.client.densities()
            counted = now.since(before or Densities({}, {}, {})) if now is not None else None
            if counted is not None and any(counted.causal.values()):
                key = f"{cell.key(target.name)}/{PORTION}"
                number = sum(name.startswith(key) for name in self.journal.records)
                self.journal.add(f"{key}-{number}", computed=counted.computed, causal=counted.causal)
        if target.name == DENSE and counted is not None and counted.mean < 1:
            raise EvalError(
                f"the server computed {counted.mean:.1%} of attention where it was to be dense; is --url another one? "
                "--out holds what it answered: start again in another folder"
            )

    @staticmethod
    def _check_lengths(target: Target, cells: list[Cell]) -> None:
        limit, longest = target.client.max_model_len, max(cell.length for cell in cells)
        if limit is not None and longest > limit:
            raise EvalError(
                f"prompts of {longest:,} tokens do not fit the server's {limit:,} (--max-model-len); "
                "give shorter --lengths or start it with more"
            )
