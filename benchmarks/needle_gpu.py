# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The needle model in stock vLLM, dense and with VSPREFILL: same tokens where everything is selected, and accuracy.

One engine after the other, each in a process of its own:

``stock``       the platform's own attention.
``everything``  VSPREFILL with thresholds of 1, so that every key is selected; its tokens must be those of ``stock``.
``vsindexer``, ``sampled``   VSPREFILL as it is served, with the trained indexer and without.

The first two answer every prompt for every chunk size, with prefix caching each prompt twice, so that the second time
most of it comes from the cache. Kernels round differently: where two tokens are almost equally likely, greedy decoding
may take the other one. A difference counts as a near tie if the stock engine's own log-probabilities of the two tokens
differ by less than ``--tie``; all others are errors. Both are reported.

    python -m benchmarks.needle_gpu --lengths 1024,4096,16384,65536 --chunks 512,2048,8192,16384 --out FILE.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import densities, environment

ENGINES = ("stock", "everything", "vsindexer", "sampled")
COMPARED = ("stock", "everything")
OPTIONS: dict[str, dict[str, Any]] = {
    "everything": {"tau_columns": 1.0, "tau_diagonals": 1.0, "max_density": 1.0, "min_seq_len": 256, "min_pairs": 0},
    "vsindexer": {"estimator": "vsindexer"},
    "sampled": {"estimator": "sampled"},
}
# Values of multi_value may come in any order: the model is unsure by construction.
EQUAL_TASKS = ("single", "multi_key", "multi_query", "variable_tracking")
ANSWER = 48


def problems(lengths: list[int], samples: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of every task, haystack and length."""
    import numpy as np

    from examples.needle import tasks

    rng = np.random.default_rng(seed)
    found = []
    for length in lengths:
        for task in tasks.TASKS:
            for haystack in tasks.HAYSTACKS:
                for _ in range(samples):
                    problem = tasks.make_problem(rng, task, haystack, length)
                    found.append({"problem": problem, "length": length, "task": task, "haystack": haystack})
    return found


def set_chunk(llm: Any, chunk: int) -> None:
    """Let the scheduler of an engine in this process hand out at most ``chunk`` tokens a step."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    scheduler.max_num_scheduled_tokens = chunk


def worker(task: dict[str, Any]) -> None:
    """Answers of one engine."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    folder = densities.exchange_folder()
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    name, lengths, chunks = task["engine"], task["lengths"], task["chunks"]
    stock = "CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN"
    started = time.monotonic()
    llm = LLM(
        str(environment.NEEDLE_MODEL),
        attention_backend=stock if name == "stock" else "VSPREFILL",
        additional_config={} if name == "stock" else {"vsprefill": {**OPTIONS[name], **task["options"]}},
        max_model_len=max(lengths) + 64,
        max_num_batched_tokens=max(chunks),
        max_num_seqs=32,
        enable_prefix_caching=True,
        gpu_memory_utilization=task["utilization"],
        cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32],
        disable_log_stats=True,
        **task["engine_options"],
    )
    record: dict[str, Any] = {"start_seconds": time.monotonic() - started, "answers": [], "accuracy": {}}
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0, logprobs=5)
    cells = problems(lengths, task["samples"], task["seed"])

    def answer(cell: dict[str, Any]) -> tuple[list[int], list[dict[int, float]], str]:
        ids = cell["problem"].prompt_ids.tolist()
        output = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0].outputs[0]
        likely = [{token: entry.logprob for token, entry in place.items()} for place in output.logprobs]
        return list(output.token_ids), likely, output.text

    for chunk in chunks if name in COMPARED else [max(chunks)]:
        set_chunk(llm, chunk)
        llm.reset_prefix_cache()
        for number, cell in enumerate(cells):
            turns = ("cold", "cached") if name in COMPARED else ("cold",)
            for turn in turns:
                tokens, likely, text = answer(cell)
                where = {key: cell[key] for key in ("length", "task", "haystack")}
                right = bool(cell["problem"].is_correct(text))
                record["answers"].append(
                    {"problem": number, **where, "chunk": chunk, "turn": turn, "right": right, "tokens": tokens}
                    | ({"likely": likely} if name == "stock" else {})
                )
    density = densities.total(folder)
    record["density"] = density.density
    record["sparse_chunks"], record["dense_chunks"] = density.sparse_chunks, density.dense_chunks
    Path(task["out"]).write_text(json.dumps(record))


def compare(stock: list[dict[str, Any]], other: list[dict[str, Any]], tie: float) -> dict[str, Any]:
    """Answers that differ, and whether at the first difference the stock engine had a choice to speak of."""
    rows: dict[str, Any] = {"answers": 0, "equal": 0, "near_ties": [], "errors": []}
    for a, b in zip(stock, other, strict=True):
        if a["task"] not in EQUAL_TASKS:
            continue
        rows["answers"] += 1
        if a["tokens"] == b["tokens"]:
            rows["equal"] += 1
            continue
        pairs = zip(a["tokens"], b["tokens"], strict=False)
        place = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
        where = {key: a[key] for key in ("problem", "length", "task", "haystack", "chunk", "turn")}
        margin = None
        if place is not None:
            likely = {int(token): value for token, value in a["likely"][place].items()}
            margin = likely[a["tokens"][place]] - likely.get(b["tokens"][place], float("-inf"))
        kind = "near_ties" if margin is not None and margin < tie else "errors"
        rows[kind].append({**where, "place": place, "margin": margin})
    return rows


def accuracy(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Right answers by length and task, of prompts computed cold in the largest chunks."""
    largest = max(row["chunk"] for row in answers)
    table: dict[str, dict[str, list[int]]] = {}
    for row in answers:
        if row["chunk"] == largest and row["turn"] == "cold":
            cell = table.setdefault(str(row["length"]), {}).setdefault(row["task"], [0, 0])
            cell[0] += row["right"]
            cell[1] += 1
    return table


def main(
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("needle_gpu.json"),
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1024,4096,16384,65536",
    chunks: Annotated[str, typer.Option(help="Prompt tokens a step.")] = "512,2048,8192,16384",
    engines: Annotated[str, typer.Option(help=f"Some of {', '.join(ENGINES)}.")] = ",".join(ENGINES),
    samples: Annotated[int, typer.Option(help="Problems per task, haystack and length.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 40000,
    tie: Annotated[float, typer.Option(help="Difference of log-probabilities that counts as a near tie.")] = 0.1,
    options: Annotated[str, typer.Option(help="Further VSPREFILL options, as JSON.")] = "{}",
    engine_options: Annotated[str, typer.Option("--engine", help="Further arguments of vLLM's LLM, as JSON.")] = "{}",
    utilization: Annotated[float, typer.Option(help="vLLM's gpu_memory_utilization.")] = 0.6,
    task: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Compare answers; exit status 1 if any differs for a reason other than a near tie."""
    if task:
        worker(json.loads(task))
        return
    chosen = engines.split(",")
    if unknown := set(chosen) - set(ENGINES):
        sys.exit(f"unknown engines {', '.join(sorted(unknown))}; known are {', '.join(ENGINES)}")
    record: dict[str, Any] = {**environment.describe(), "seed": seed, "tie": tie, "engines": {}}
    answers: dict[str, list[dict[str, Any]]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in chosen:
            part = Path(scratch) / f"{name}.json"
            arguments = {
                "engine": name,
                "out": str(part),
                "lengths": [int(text) for text in lengths.split(",")],
                "chunks": [int(text) for text in chunks.split(",")],
                "samples": samples,
                "seed": seed,
                "options": json.loads(options) if name != "stock" else {},
                "utilization": utilization,
                "engine_options": json.loads(engine_options),
            }
            command = [sys.executable, "-m", "benchmarks.needle_gpu", "--task", json.dumps(arguments)]
            if subprocess.run(command, cwd=environment.ROOT, check=False).returncode or not part.exists():
                failed.append(f"engine {name} failed")
                continue
            found = json.loads(part.read_text())
            answers[name] = found.pop("answers")
            found["accuracy"] = accuracy(answers[name])
            record["engines"][name] = found
            print(name, json.dumps(found), flush=True)
            if name == "everything" and "stock" in answers:
                record["comparison"] = compare(answers["stock"], answers["everything"], tie)
                print("comparison", json.dumps(record["comparison"]), flush=True)
                if record["comparison"]["errors"]:
                    failed.append("different tokens")
            out.write_text(json.dumps(record, indent=1) + "\n")
    if failed:
        sys.exit("; ".join(failed))


if __name__ == "__main__":
    typer.run(main)
