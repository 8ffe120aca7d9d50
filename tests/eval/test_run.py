# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Running: what is finished is kept however a run ends, with the density of what was computed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vllm_vsprefill.eval.density import Densities
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.journal import Journal
from vllm_vsprefill.eval.run import Runner
from vllm_vsprefill.eval.suites import Cell
from vllm_vsprefill.eval.summary import density
from vllm_vsprefill.eval.targets import Plan

CELL = Cell("ruler", "vt", 64, 6)


class Bar:
    """In place of a progress bar."""

    def __init__(self) -> None:
        self.done = 0

    def set_description(self, text: str) -> None:
        pass

    def update(self) -> None:
        self.done += 1


class Client:
    """Counts a hundred pairs a sample, a quarter of which were computed unless the server is dense."""

    def __init__(self, name: str, limit: int | None = 128) -> None:
        self.max_model_len, self.computed, self.causal = limit, 0.0, 0.0
        self.share = 1.0 if name == "dense" else 0.25

    def densities(self) -> Densities | None:
        return Densities({0: self.computed}, {0: self.causal}, {}) if self.causal else None


class Suite:
    """Samples that are their own number, with an end at one of them."""

    def __init__(self, stop: int | None = None, kind: type[BaseException] = KeyboardInterrupt) -> None:
        self.stop, self.kind, self.threads = stop, kind, set[int]()

    def cells(self) -> list[Cell]:
        return [CELL]

    def notes(self) -> list[str]:
        return []

    def check(self, cell: Cell) -> None:
        pass

    def measure(self, target: Any, cell: Cell, index: int) -> dict[str, Any]:
        if index == self.stop:
            raise self.kind("stop")
        self.threads.add(threading.get_ident())
        target.client.causal += 100
        target.client.computed += 100 * target.client.share
        return {"score": float(index)}


def plan(name: str, client: Client | None = None, options: dict[str, Any] | None = None) -> tuple[Plan, list[str]]:
    seen: list[str] = []

    @contextmanager
    def opened() -> Iterator[Any]:
        seen.append("open")
        try:
            yield type("Target", (), {"name": name, "client": client or Client(name)})()
        finally:
            seen.append("closed")

    return Plan(name, opened, options), seen


@pytest.mark.parametrize("kind", [KeyboardInterrupt, EvalError])
def test_goes_on_after_an_interruption(tmp_path: Path, kind: type[BaseException]) -> None:
    first, seen = plan("fast")
    with pytest.raises(kind):
        Runner(Journal(tmp_path, {}), [Suite(4, kind)], 1).run(first, Bar())
    assert seen == ["open", "closed"]
    journal, bar = Journal(tmp_path, {}), Bar()
    again, _ = plan("fast")
    Runner(journal, [Suite()], 1).run(again, bar)
    assert bar.done == 2
    assert [journal.records[f"fast/ruler/vt/64/{i}"]["score"] for i in range(6)] == [0, 1, 2, 3, 4, 5]
    counted = density(journal, CELL, "fast")
    assert counted is not None
    assert counted.causal == {0: 600}  # of both runs
    assert counted.mean == 0.25
    unused, seen = plan("fast")
    Runner(journal, [Suite()], 1).run(unused, Bar())
    assert seen == []  # nothing is started for nothing


def test_several_at_a_time(tmp_path: Path) -> None:
    journal, bar = Journal(tmp_path, {}), Bar()
    Runner(journal, [Suite()], 3).run(plan("fast")[0], bar)
    assert bar.done == 6
    assert len(Journal(tmp_path, {}).records) == 8  # with the setting and the density


def test_dense_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"computed 25.0% of attention where it was to be dense; is --url another one"):
        Runner(Journal(tmp_path, {}), [Suite()], 1).run(plan("dense", Client("fast"))[0], Bar())


def test_a_setting_keeps_its_meaning(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {})
    with pytest.raises(EvalError):
        Runner(journal, [Suite(2, EvalError)], 1).run(plan("mine", options={"window": 64})[0], Bar())
    with pytest.raises(EvalError, match=r"mine stood for \{'window': 64\} in the run so far, and for \{'window': 32\}"):
        Runner(journal, [Suite()], 1).run(plan("mine", options={"window": 32})[0], Bar())


def test_prompts_longer_than_the_server_allows(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"prompts of 64 tokens do not fit the server's 63 \(--max-model-len\)"):
        Runner(Journal(tmp_path, {}), [Suite()], 1).run(plan("fast", Client("fast", 63))[0], Bar())


def test_a_tokenizer_that_is_not_the_servers_stops_before_anything_is_asked(tmp_path: Path) -> None:
    def check(client: Any) -> None:
        raise EvalError("not the server's")

    opened, seen = plan("fast")
    journal = Journal(tmp_path, {})
    with pytest.raises(EvalError, match="not the server's"):
        Runner(journal, [Suite()], 1, check).run(opened, Bar())
    assert seen == ["open", "closed"]
    assert list(journal.records) == ["setting/fast"]
