# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Greedy answers to generated problems, scored by exact match; dense or sparse attention by the caller's choice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from examples.needle.modeling import Attention, KVCache, NeedleModel, dense_attention
from examples.needle.tasks import ANSWER_ROOM, HAYSTACKS, TASKS, Haystack, Problem, Task, make_problem
from examples.needle.vocabulary import END, IDS, decode


@dataclass(frozen=True, slots=True)
class Cell:
    """Exact matches of one task in one haystack at one length."""

    task: Task
    haystack: Haystack
    length: int
    samples: int
    correct: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples


@torch.no_grad()
def generate(
    model: NeedleModel,
    prompts: Tensor,
    *,
    attention: Attention = dense_attention,
    chunk: int | None = None,
    max_new_tokens: int = ANSWER_ROOM,
) -> list[list[int]]:
    """Greedy continuations of prompts [B, n], each up to and without its end token.

    The prompt is prefilled in chunks of ``chunk`` tokens (None: at once) through ``attention``; decoding is dense.
    """
    b, n = prompts.shape
    cache = KVCache(model.config, b, n + max_new_tokens, prompts.device)
    step = chunk or n
    for start in range(0, n, step):
        x = model.extend(prompts[:, start : start + step], cache, attention)
    token = model.logits(x[:, -1]).argmax(-1)
    out = [token]
    end = IDS[END]
    ended = token == end
    while len(out) < max_new_tokens and not bool(ended.all()):
        x = model.extend(token[:, None], cache, dense_attention)
        token = model.logits(x[:, -1]).argmax(-1)
        out.append(token)
        ended |= token == end
    rows = torch.stack(out, 1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def problems(task: Task, haystack: Haystack, length: int, samples: int, seed: int) -> list[Problem]:
    """The problems of one cell: the same for the same arguments. Prompt and answer together fit in ``length``."""
    key = [seed, TASKS.index(task), HAYSTACKS.index(haystack), length]
    rng = np.random.default_rng(key)
    return [make_problem(rng, task, haystack, length - ANSWER_ROOM) for _ in range(samples)]


def answer_all(
    model: NeedleModel,
    batch: list[Problem],
    *,
    attention: Attention = dense_attention,
    chunk: int | None = None,
    tokens_at_once: int = 262144,
) -> list[str]:
    """Answers to problems of one length, as text."""
    device = model.model.norm.weight.device
    size = max(1, tokens_at_once // len(batch[0].prompt_ids))
    answers: list[str] = []
    for i in range(0, len(batch), size):
        ids = np.stack([p.prompt_ids for p in batch[i : i + size]]).astype(np.int64)
        rows = generate(model, torch.from_numpy(ids).to(device), attention=attention, chunk=chunk)
        answers += [decode(row) for row in rows]
    return answers


def evaluate(
    model: NeedleModel,
    lengths: Iterable[int],
    samples: Callable[[int], int],
    *,
    attention: Attention = dense_attention,
    chunk: int | None = None,
    tokens_at_once: int = 262144,
    tasks: Iterable[Task] = TASKS,
    haystacks: Iterable[Haystack] = HAYSTACKS,
    seed: int = 20_000,
    report: Callable[[Cell, list[tuple[Problem, str]]], None] | None = None,
    deadline: float | None = None,
) -> list[Cell]:
    """Exact-match accuracy per length, task and haystack; stops between cells once ``deadline`` (time.time) passed."""
    cells: list[Cell] = []
    for length in lengths:
        for task in tasks:
            for haystack in haystacks:
                if deadline is not None and time.time() > deadline:
                    return cells
                batch = problems(task, haystack, length, samples(length), seed)
                answers = answer_all(model, batch, attention=attention, chunk=chunk, tokens_at_once=tokens_at_once)
                wrong = [(p, a) for p, a in zip(batch, answers, strict=True) if not p.is_correct(a)]
                cells.append(Cell(task, haystack, length, len(batch), len(batch) - len(wrong)))
                if report is not None:
                    report(cells[-1], wrong)
    return cells


def summary(cells: Iterable[Cell]) -> dict[str, dict[str, float | dict[str, float]]]:
    """Per length: each task's accuracy over both haystacks, each cell's, and their mean."""
    by_length: dict[int, list[Cell]] = {}
    for cell in cells:
        by_length.setdefault(cell.length, []).append(cell)
    out: dict[str, dict[str, float | dict[str, float]]] = {}
    for length, group in by_length.items():
        per_task: dict[str, float] = {}
        for task in TASKS:
            mine = [c for c in group if c.task == task]
            if mine:
                per_task[task] = round(sum(c.correct for c in mine) / sum(c.samples for c in mine), 4)
        out[str(length)] = {
            "mean": round(sum(per_task.values()) / len(per_task), 4),
            "samples_per_cell": group[0].samples,
            "tasks": per_task,
            "cells": {f"{c.task}/{c.haystack}": round(c.accuracy, 4) for c in group},
        }
    return out
