# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""How far sparse prefill is from dense prefill on the same tokens; no labels are needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_vsprefill.eval.rows import Floats, Rows

BINS = 16
"""Parts of a prompt, equally long, that differences are reported for."""


@dataclass(frozen=True)
class Differences:
    """Sums over rows; ratios of sums of several prompts are means over all their rows.

    Attributes:
        rows: how many.
        agree: rows with the same likeliest token.
        nll: change of the negative log-likelihood of the token that stands there, in nats.
        absolute: absolute difference of its log-probability.
        kl: KL(dense || sparse) over the top tokens, see :func:`row_kl`.
    """

    rows: float = 0
    agree: float = 0
    nll: float = 0
    absolute: float = 0
    kl: float = 0

    def __add__(self, other: Differences) -> Differences:
        return Differences(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def means(self) -> dict[str, float]:
        """Top-1 agreement, change of NLL, absolute difference and KL of a row, by name."""
        n = max(self.rows, 1)
        return {"top1": self.agree / n, "nll": self.nll / n, "absolute": self.absolute / n, "kl": self.kl / n}


def row_kl(dense: Rows, sparse: Rows) -> Floats:
    """KL(dense || sparse) of each row's next token, in nats, [rows].

    Tokens among the likeliest of both count one by one and all others together as one more outcome. Merging outcomes
    only lowers a KL divergence (data-processing inequality), so this is a lower bound of the one over the vocabulary.
    """
    p, q = dense.logprobs.astype(np.float64), np.full(dense.logprobs.shape, -np.inf)
    for column in range(sparse.ids.shape[1]):
        same = (dense.ids == sparse.ids[:, column : column + 1]) & (dense.ids >= 0)
        q = np.where(same, sparse.logprobs[:, column : column + 1], q)
    both = np.isfinite(p) & np.isfinite(q)
    p, q = np.where(both, p, -np.inf), np.where(both, q, -np.inf)
    tiny = 1e-12  # log-probabilities are rounded: what is left over may come out as nothing, or less
    rest_p = np.clip(1 - np.exp(p).sum(1), tiny, 1)
    rest_q = np.clip(1 - np.exp(q).sum(1), tiny, 1)
    listed = np.where(both, np.exp(p) * (np.where(both, p, 0) - np.where(both, q, 0)), 0).sum(1)
    total = listed + rest_p * (np.log(rest_p) - np.log(rest_q))
    return np.asarray(np.maximum(total, 0), np.float32)


def compare(dense: Rows, sparse: Rows, bins: int = BINS) -> list[Differences]:
    """Differences of two measurements of one prompt, by part of the prompt.

    Raises:
        ValueError: they are of prompts of different lengths.
    """
    n = len(dense.actual)
    if len(sparse.actual) != n:
        raise ValueError(f"rows of different prompts: {n} and {len(sparse.actual)}")
    change = dense.actual.astype(np.float64) - sparse.actual
    part = np.arange(n) * bins // max(n, 1)

    def total(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.asarray(np.bincount(part, weights=values.astype(np.float64), minlength=bins), np.float64)

    agree = dense.ids[:, 0] == sparse.ids[:, 0]
    columns = (np.ones(n), agree, change, np.abs(change), row_kl(dense, sparse))
    return [Differences(*row) for row in np.stack([total(column) for column in columns], 1).tolist()]


def pack(parts: list[Differences]) -> list[dict[str, float]]:
    """For a line of a journal."""
    return [{name: round(value, 6) for name, value in asdict(part).items()} for part in parts]


def unpack(parts: list[dict[str, float]]) -> list[Differences]:
    """What ``pack`` packed."""
    return [Differences(**part) for part in parts]
