# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Exact match of the needle model's answers in stock vLLM with VSPREFILL, per task, beside the density."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import densities, environment


def main(
    length: Annotated[int, typer.Option(help="Prompt tokens.")] = 32768,
    samples: Annotated[int, typer.Option(help="Problems per task and haystack.")] = 2,
    chunk: Annotated[int, typer.Option(help="Prompt tokens vLLM computes at a time.")] = 8192,
    options: Annotated[str, typer.Option(help="VSPREFILL options, as JSON.")] = "{}",
    seed: Annotated[int, typer.Option(help="Which problems.")] = 30000,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Answer problems of every task in both haystacks and print how many are exactly right."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    import numpy as np
    from vllm import LLM, SamplingParams

    from examples.needle import tasks
    from vllm_vsprefill import stats

    folder = densities.exchange_folder()
    engine = LLM(
        str(environment.NEEDLE_MODEL),
        attention_backend="VSPREFILL",
        max_model_len=length + 64,
        max_num_batched_tokens=chunk,
        enable_prefix_caching=False,
        additional_config={"vsprefill": json.loads(options)},
    )
    sampling = SamplingParams(max_tokens=64, temperature=0)
    rng = np.random.default_rng(seed)
    right: dict[str, int] = dict.fromkeys(tasks.TASKS, 0)
    cells = [(task, haystack) for task in tasks.TASKS for haystack in tasks.HAYSTACKS for _ in range(samples)]
    for task, haystack in track(cells, "answering"):
        problem = tasks.make_problem(rng, task, haystack, length)
        prompt = {"prompt_token_ids": problem.prompt_ids.tolist()}
        answer = engine.generate([prompt], sampling, use_tqdm=False)[0].outputs[0].text
        right[task] += problem.is_correct(answer)
    counts = stats.read_counts(folder)
    density = densities.total(folder).density
    table = Table(title=f"{length:,} tokens, chunks of {chunk:,}, density {density:.1%}")
    for column in ("task", "right", "problems"):
        table.add_column(column, justify="right")
    for name, number in right.items():
        table.add_row(name, str(number), str(2 * samples))
    Console().print(table)
    if out is not None:
        record: dict[str, Any] = {**environment.describe(), "length": length, "chunk": chunk, "seed": seed}
        record |= {"options": json.loads(options), "problems_per_task": 2 * samples, "right": right}
        record["density"] = density
        record["density_per_layer"] = {layer: c.density for layer, c in sorted(counts.items())}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
