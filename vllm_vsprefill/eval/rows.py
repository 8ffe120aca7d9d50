# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a server says about every token of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_vsprefill.eval.errors import EvalError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """Row i is what the model said after the tokens 0 to i of a prompt, about token i + 1.

    Attributes:
        ids: the likeliest tokens, likeliest first, [rows, top]; -1 where fewer were given.
        logprobs: their log-probabilities, natural logarithm, [rows, top]; -inf where fewer were given.
        actual: log-probability of the token that stands there, [rows].
        rank: its rank, 1 for the likeliest, [rows].
    """

    ids: Ints
    logprobs: Floats
    actual: Floats
    rank: Ints

    @classmethod
    def parse(cls, prompt: list[int], listed: list[dict[str, dict[str, Any]] | None], top: int) -> Rows:
        """From vLLM's ``prompt_logprobs``: one entry for each token, null for the first.

        Raises:
            EvalError: an entry is missing or has another form.
        """
        n = len(prompt) - 1
        ids = np.full((n, top), -1, np.int32)
        logprobs = np.full((n, top), -np.inf, np.float32)
        actual, rank = np.empty(n, np.float32), np.empty(n, np.int32)
        try:
            for i, (token, entry) in enumerate(zip(prompt[1:], listed[1:], strict=True)):
                assert entry is not None
                own = entry[str(token)]
                actual[i], rank[i] = own["logprob"], own["rank"]
                for name, one in entry.items():
                    if one["rank"] <= top:
                        ids[i, one["rank"] - 1] = int(name)
                        logprobs[i, one["rank"] - 1] = one["logprob"]
        except (AssertionError, KeyError, TypeError, ValueError):
            raise EvalError("the server's prompt_logprobs do not fit the prompt that was sent") from None
        return cls(ids, logprobs, actual, rank)

    def save(self, file: Path) -> None:
        """Write to a file, whole or not at all.

        Raises:
            EvalError: it cannot be written.
        """
        partial = file.with_suffix(".partial")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as out:
                np.savez(out, ids=self.ids, logprobs=self.logprobs, actual=self.actual, rank=self.rank)
            partial.replace(file)
        except OSError as error:
            raise EvalError(f"{file} cannot be written ({error.strerror or error})") from None

    @classmethod
    def load(cls, file: Path) -> Rows:
        """Read what ``save`` wrote.

        Raises:
            EvalError: the file is damaged.
        """
        try:
            with np.load(file, allow_pickle=False) as found:
                return cls(found["ids"], found["logprobs"], found["actual"], found["rank"])
        except (OSError, ValueError, KeyError) as error:
            raise EvalError(f"{file} cannot be read ({error}); remove it, and it is measured again") from None
