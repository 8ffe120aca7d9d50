# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Time to first token on a CPU: stock CPU attention against VSPREFILL, on the needle model.

Every measurement runs in a process of its own, the two backends in turn (A B A B ...), so that a machine whose speed
drifts hurts both. Each prompt is new and prefix caching is off. A figure is the median of its runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import densities, environment
from vllm_vsprefill.stats import LayerCounts

STOCK, OURS = "CPU_ATTN", "VSPREFILL"


def measure(backend: str, model: str, lengths: list[int], runs: int, chunk: int, options: dict[str, Any]) -> Any:
    """Seconds to the first token of ``runs`` fresh prompts of each length, and the density of VSPREFILL's."""
    import numpy as np
    from vllm import LLM, SamplingParams

    from examples.needle import tasks

    folder = densities.exchange_folder()
    engine = LLM(
        model,
        attention_backend=backend,
        max_model_len=max(lengths) + 64,
        max_num_batched_tokens=chunk,
        max_num_seqs=1,
        enable_prefix_caching=False,
        additional_config={"vsprefill": options} if backend == OURS else {},
    )
    sampling = SamplingParams(max_tokens=1, temperature=0)
    rng = np.random.default_rng(0)

    def first_token(length: int) -> float:
        problem = tasks.make_problem(rng, "multi_key", "words", length)
        prompt = {"prompt_token_ids": problem.prompt_ids.tolist()}
        start = time.perf_counter()
        engine.generate([prompt], sampling, use_tqdm=False)
        return time.perf_counter() - start

    first_token(min(lengths))  # memory, thread pools and kernels that are set up on first use
    results: dict[str, Any] = {}
    for length in lengths:
        before = densities.total(folder)
        seconds = [first_token(length) for _ in range(runs)]
        after = densities.total(folder)
        counted = LayerCounts(after.computed - before.computed, after.causal - before.causal)
        results[str(length)] = {"seconds": seconds, "density": counted.density}
    return results


def main(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, separated by commas.")] = "4096,32768",
    runs: Annotated[int, typer.Option(help="Prompts of each length per process.", min=1)] = 3,
    rounds: Annotated[int, typer.Option(help="Processes per backend.", min=1)] = 2,
    chunk: Annotated[int, typer.Option(help="Prompt tokens vLLM computes at a time.")] = 8192,
    model: Annotated[str, typer.Option(help="Model folder.")] = str(environment.NEEDLE_MODEL),
    options: Annotated[str, typer.Option(help="VSPREFILL options, as JSON.")] = "{}",
    out: Annotated[Path | None, typer.Option(help="Write the raw figures to this file.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print median time to first token with and without VSPREFILL, and their ratio."""
    sizes = [int(part) for part in lengths.split(",")]
    vsprefill_options = json.loads(options)
    if worker is not None:
        assert out is not None
        out.write_text(json.dumps(measure(worker, model, sizes, runs, chunk, vsprefill_options)))
        return
    collected: dict[str, dict[str, dict[str, list[float]]]] = {STOCK: {}, OURS: {}}
    with Progress() as progress, tempfile.TemporaryDirectory() as scratch:
        bar = progress.add_task("measuring", total=2 * rounds)
        for turn in range(rounds):
            for backend in (STOCK, OURS):
                progress.update(bar, description=f"{backend}, round {turn + 1} of {rounds}")
                for length, figures in _in_process(backend, scratch, lengths, runs, chunk, model, options).items():
                    kept = collected[backend].setdefault(length, {"seconds": [], "density": []})
                    kept["seconds"] += figures["seconds"]
                    kept["density"].append(figures["density"])
                progress.advance(bar)
    table = Table(title=f"time to first token, median of {runs * rounds} prompts, chunks of {chunk}")
    for column in ("prompt tokens", STOCK, OURS, "ratio", "density"):
        table.add_column(column, justify="right")
    rows = []
    for size in sizes:
        stock = statistics.median(collected[STOCK][str(size)]["seconds"])
        ours = statistics.median(collected[OURS][str(size)]["seconds"])
        density = statistics.median(collected[OURS][str(size)]["density"])
        rows.append({"tokens": size, "stock_s": stock, "vsprefill_s": ours, "ratio": stock / ours, "density": density})
        table.add_row(f"{size:,}", f"{stock:.3f} s", f"{ours:.3f} s", f"{stock / ours:.2f}x", f"{density:.1%}")
    Console().print(table)
    if out is not None:
        record = {
            **environment.describe(),
            "chunk": chunk,
            "options": vsprefill_options,
            "rows": rows,
            "raw": collected,
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")


def _in_process(
    backend: str, scratch: str, lengths: str, runs: int, chunk: int, model: str, options: str
) -> dict[str, Any]:
    result, log = Path(scratch, "result.json"), Path(scratch, "log")
    command = [sys.executable, "-m", "benchmarks.cpu_ttft", "--worker", backend, "--out", str(result)]
    command += ["--lengths", lengths, "--runs", str(runs), "--chunk", str(chunk), "--model", model]
    command += ["--options", options]
    # One process, engine included: nothing but the forward passes is timed.
    environ = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
    with log.open("wb") as output:
        code = subprocess.run(command, env=environ, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        sys.exit(f"{backend}: exit code {code}\n{log.read_text(errors='replace')[-4000:]}")
    return dict(json.loads(result.read_text()))


if __name__ == "__main__":
    typer.run(main)
