# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What the choice of columns and diagonals is worth: answers that stand inside the prompt.

A question at the end of a prompt is answered by rows that attend to everything, so it says little about the others.
Here the prompt is a long conversation with many questions and their answers, and the model is asked how likely it finds
each token of it. The share of retrieved answer tokens that it ranks first, among rows that run sparse, falls as soon as
a key that they need is left out. Runs in stock vLLM, dense and with each preset, the same prompts.

These are all tasks of the needle model, in one process. ``vsprefill eval --suite in-prompt`` does the like with any
model, on servers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks import densities, environment

SETTINGS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "accurate": {"preset": "accurate"},
    "balanced": {"preset": "balanced"},
    "fast": {"preset": "fast"},
    "sampled": {"estimator": "sampled"},
    # no column but the sinks, no diagonal but the window: what any selection has to beat
    "window only": {"preset": "fast", "tau_columns": 1e-9, "tau_diagonals": 1e-9, "min_columns": 0, "max_columns": 1},
}


def run(name: str, length: int, prompts: int, chunk: int, model: str, checkpoint: Path | None = None) -> dict[str, Any]:
    """Share of answer tokens ranked first, and the density, for one setting."""
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from examples.needle import tasks

    options = SETTINGS[name]
    if checkpoint is not None and options is not None and "estimator" not in options:
        options = {**options, "checkpoint": str(checkpoint)}
    folder = densities.exchange_folder()
    engine = LLM(
        model,
        attention_backend="CPU_ATTN" if options is None else "VSPREFILL",
        max_model_len=length + 8,
        max_num_batched_tokens=chunk,
        max_num_seqs=1,
        enable_prefix_caching=False,
        additional_config={} if options is None else {"vsprefill": options},
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    for file in folder.glob("*.json"):
        file.unlink()
    rng = np.random.default_rng(7)
    right = total = 0
    for _ in range(prompts):
        ids, kinds = tasks.training_sequence(rng, length)
        output = engine.generate([{"prompt_token_ids": ids.tolist()}], sampling, use_tqdm=False)[0]
        assert output.prompt_logprobs is not None
        # Rows of short contexts are dense in every setting and would only water the figure down.
        for position in np.flatnonzero(kinds >= tasks.KIND_COUNTED):
            ranks = output.prompt_logprobs[position]
            if position < chunk or ranks is None:
                continue
            total += 1
            right += ranks[int(ids[position])].rank == 1
    density = densities.total(folder).density
    del engine
    cleanup_dist_env_and_memory()
    return {"setting": name, "right": right, "answers": total, "density": density}


def main(
    length: Annotated[int, typer.Option(help="Prompt tokens.")] = 32768,
    prompts: Annotated[int, typer.Option(help="Prompts per setting.")] = 4,
    chunk: Annotated[int, typer.Option(help="Prompt tokens vLLM computes at a time.")] = 8192,
    only: Annotated[list[str] | None, typer.Option(help="Settings to run; all by default.")] = None,
    model: Annotated[str, typer.Option(help="Model folder.")] = str(environment.NEEDLE_MODEL),
    checkpoint: Annotated[Path | None, typer.Option(help="Indexer; by default the installed one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Print, per setting, the share of in-prompt answer tokens that the model ranks first, beside the density."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    table = Table(title=f"answers inside prompts of {length:,} tokens")
    for column in ("setting", "ranked first", "answer tokens", "density"):
        table.add_column(column, justify="right")
    rows = []
    for name in only or SETTINGS:
        row = run(name, length, prompts, chunk, model, checkpoint)
        rows.append(row)
        share = row["right"] / max(row["answers"], 1)
        table.add_row(name, f"{share:.1%}", str(row["answers"]), f"{row['density']:.1%}")
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {**environment.describe(), "length": length, "prompts": prompts, "chunk": chunk, "rows": rows}
        out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
