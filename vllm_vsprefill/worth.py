# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Whether choosing keys has been worth it lately. Plain Python: no tensor, no vLLM.

Where nearly everything is kept, choosing costs time and saves none. What a step computed is known when it is over, on a
GPU some steps later, without anybody waiting for it. Where that was too much, the chunks that follow, of the same
request or of the next, run stock without an estimate; one in a while is tried again, since prompts differ.
"""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 0.8
"""Share of the causal pairs, over all layers, those that ran stock included, above which a step was not worth it."""

PATIENCE = 8
"""Steps in a row that must not have been worth it."""

FIRST_PAUSE, LONGEST_PAUSE = 4, 64
"""Steps that then run stock before one is tried; twice as many after each try that fails."""


@dataclass
class Worth:
    """Follows the steps of one worker.

    Attributes:
        density: computed / causal pairs of the chunks of the last step that is known, None before one is.
    """

    density: float | None = None
    _failed: int = 0
    _pause: int = 0
    _next_pause: int = FIRST_PAUSE

    def observe(self, density: float) -> None:
        """Take down what the chunks of a step computed that the gate let through."""
        self.density = density
        if density <= LIMIT:
            self._failed, self._pause, self._next_pause = 0, 0, FIRST_PAUSE
            return
        self._failed += 1
        if self._failed >= PATIENCE and not self._pause:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)

    def ask(self) -> bool:
        """Whether the chunks of a step that begins are worth choosing for; called once a step that has such chunks."""
        if not self._pause:
            return True
        self._pause -= 1
        return False
