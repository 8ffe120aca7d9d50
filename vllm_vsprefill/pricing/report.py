# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a search has found, for people and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_vsprefill.distil.errors import DistilError
from vllm_vsprefill.pricing.search import Goal, Measured

HEAD = ("price", "density", "top-1", "below the floor", "NLL change", "KL")


def line_of(found: Measured, floor: Measured) -> tuple[str, ...]:
    """Cells of a table."""
    return (
        f"{found.price:g}",
        f"{found.density:.1%}",
        f"{found.top1:.2%}",
        "" if found is floor else f"{found.below(floor):.2f}",
        f"{found.nll:+.4f}",
        f"{max(found.kl, 0.0):.4f}",
    )


def table(lines: list[tuple[str, ...]]) -> list[str]:
    """Lines of text, columns to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]


@dataclass
class Report:
    """A search.

    Attributes:
        goal: what is wanted.
        facts: model, text and the like, fit for JSON.
        rows: rows that were compared, of each pass.
        options: what a server is to be given besides the price.
        floor: price 0, once it was measured.
        found: other prices, in the order in which they were measured.
        complete: whether the search came to its end.
    """

    goal: Goal
    facts: dict[str, Any]
    rows: int
    options: dict[str, Any]
    floor: Measured | None = None
    found: list[Measured] = field(default_factory=list)
    complete: bool = False

    @property
    def chosen(self) -> tuple[Measured, bool] | None:
        """The price to take, and whether it reaches the goal; None before any was measured."""
        if self.floor is None or not self.found:
            return None
        best = self.goal.best(self.found, self.floor)
        return (self.goal.nearest(self.found, self.floor), False) if best is None else (best, True)

    def additional_config(self, price: float) -> dict[str, Any]:
        """What ``vllm serve`` is to be given as ``--additional-config``."""
        return {"vsprefill": {**self.options, "price": price}}

    def error_of_top1(self, found: Measured) -> float:
        """One standard error of the share of rows that agree, in points, if rows were independent."""
        return float(100 * (found.top1 * (1 - found.top1) / max(self.rows, 1)) ** 0.5)

    def lines(self) -> list[str]:
        """The table, the price and the option to serve with."""
        if self.floor is None:
            return []
        floor = self.floor
        lines = table([HEAD, *(line_of(one, floor) for one in (floor, *sorted(self.found, key=lambda one: one.price)))])
        if self.chosen is None:
            return lines
        found, reached = self.chosen
        if not self.complete:
            lines.append(f"not complete: a price that was not tried may do better than {found.price:g}")
        elif not reached:
            lines.append(f"out of reach: {self.goal.describe()}; {found.price:g} is the nearest price. {self._why()}")
        value = self.goal.value(found, floor)
        shown = {
            "top1": f"{value:.2f} points below the floor (one standard error: {self.error_of_top1(found):.2f})",
            "error": f"KL {value:.4f} above the floor's",
            "density": f"density {value:.1%}",
        }[self.goal.kind]
        lines.append(f"price {found.price:g} (wanted: {self.goal.describe()}): {shown}")
        option = json.dumps(self.additional_config(found.price))
        return [*lines, f"serve with: --attention-backend VSPREFILL --additional-config '{option}'"]

    def _why(self) -> str:
        if self.goal.kind == "density":
            return (
                "Window, sinks, the dense last rows of chunks and layers above max_density take that much at this "
                "length; use longer sequences"
            )
        return "More of the text would have to be computed than at any price but 0, which computes everything"

    def figures(self) -> dict[str, Any]:
        """The same for a file."""
        floor, chosen = self.floor, self.chosen
        record: dict[str, Any] = {
            **self.facts,
            "rows": self.rows,
            "goal": {self.goal.kind: self.goal.limit},
            "complete": self.complete,
            "floor": None if floor is None else floor.figures(floor),
            "measured": [] if floor is None else [one.figures(floor) for one in self.found],
            "price": None,
        }
        if chosen is not None:
            record["price"], record["reached"] = chosen[0].price, chosen[1]
            record["additional_config"] = self.additional_config(chosen[0].price)
        return record

    def write(self, file: Path) -> None:
        """Replaces the file in one step.

        Raises:
            DistilError: it cannot be written.
        """
        part = file.with_name(f".{file.name}.part")
        try:
            part.write_text(json.dumps(self.figures(), indent=1) + "\n", encoding="utf-8")
            part.replace(file)
        except OSError as error:
            raise DistilError(f"--out {file}: cannot be written ({error.strerror})") from None
