# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a suite is to the runner, and the suite ``fidelity``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.fidelity import compare, pack
from vllm_vsprefill.eval.options import EvalCommand, Suite
from vllm_vsprefill.eval.rows import Rows
from vllm_vsprefill.eval.settings import DENSE, FLOOR
from vllm_vsprefill.eval.targets import Target
from vllm_vsprefill.eval.texts import Cutter, Prompt, Text
from vllm_vsprefill.eval.tokens import Tokens


@dataclass(frozen=True)
class Cell:
    """Samples that a figure is made of: one task at one length."""

    suite: Suite
    task: str
    length: int
    samples: int

    def key(self, target: str) -> str:
        """Of its records in a journal."""
        return f"{target}/{self.suite}/{self.task}/{self.length}"


class Measures(Protocol):
    """A suite."""

    def cells(self) -> list[Cell]:
        """What there is to measure on every target."""

    def notes(self) -> list[str]:
        """What the report says about how it was measured, and what was left out."""

    def check(self, cell: Cell) -> None:
        """EvalError if a sample of the cell cannot be made."""

    def measure(self, target: Target, cell: Cell, index: int) -> dict[str, Any]:
        """One sample, as values for a journal."""


class Fidelity:
    """Rows of dense and of sparse attention over the same text."""

    def __init__(self, options: EvalCommand, texts: list[Text], tokens: Tokens) -> None:
        self._options, self._texts = options, texts
        self._cutter = Cutter(texts, tokens)

    def cells(self) -> list[Cell]:
        """One for each length."""
        count = self._options.count("fidelity")
        return [Cell("fidelity", "text", length, count) for length in self._options.lengths]

    def notes(self) -> list[str]:
        """Of which text."""
        return [f"Text: {', '.join(text.name for text in self._texts)}."]

    def check(self, cell: Cell) -> None:
        """EvalError if the text is too short."""
        self._prompt(cell, 0)

    def _prompt(self, cell: Cell, index: int) -> Prompt:
        # A server makes one token more at the least, which a model's last position may be needed for.
        return self._cutter.cut(cell.length - 1, index)

    def _file(self, cell: Cell, index: int) -> Path:
        return self._options.out / "dense_rows" / f"{cell.length}-{index}.npz"

    def measure(self, target: Target, cell: Cell, index: int) -> dict[str, Any]:
        """Differences to dense attention by part of the prompt; of dense attention, its rows are kept in a file."""
        prompt, file = self._prompt(cell, index), self._file(cell, index)
        rows = target.rows(prompt.ids, self._options.fidelity.top)
        values: dict[str, Any] = {"text": prompt.text, "nll": round(-float(rows.actual.mean()), 6)}
        if target.name == DENSE:
            rows.save(file)
        elif not file.exists():
            raise EvalError(f"{file} is gone, with the dense rows to compare with; choose another folder for --out")
        else:
            values["parts"] = pack(compare(Rows.load(file), rows))
        if self._options.fidelity.ttft and target.name != FLOOR:
            # After the rows, which warm up what this length needs.
            values["ttft"] = round(target.client.answer(prompt.ids, 1).seconds, 4)
        return values
