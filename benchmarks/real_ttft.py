# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Time to first token of a real model on real text: the stock backend and VSPREFILL, each in an engine.

Prompts are pieces of the given texts, a new one for every measurement and the same ones for every setting; prefix
caching is off, chunks have 8,192 tokens. Each setting is an engine in a process of its own; its rows are written as
they are measured, and a setting that fails does not keep the next from running.

    python -m benchmarks.real_ttft MODEL_FOLDER book.txt code.txt --settings dense,balanced --lengths 8192,32768 \\
        --out results.json

With ``--turns`` all engines are started first and take turns, prompt by prompt, while the others wait: on a CPU that
has other work to do, times of neighbouring measurements can be compared, those of different minutes cannot. It takes
memory for all engines at once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import environment
from benchmarks.ttft import ATTENTION, CHUNK, Results
from vllm_vsprefill.eval.settings import DENSE, KNOWN

WARM = 100
"""Number of the first prompt that warms up."""


KEY = ("setting", "length")
"""What tells the rows of a result file apart: a row that is measured again replaces the earlier one."""


class RealEngine:
    """One engine in this process."""

    def __init__(self, task: dict[str, Any], options: dict[str, Any] | None) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.platforms import current_platform

        stock = "CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN"
        self.sparse = options is not None
        self.llm = LLM(
            model=task["model"],
            attention_backend="VSPREFILL" if self.sparse else stock,
            additional_config={"vsprefill": options} if options else {},
            max_model_len=max(task["lengths"]) + 16,
            max_num_batched_tokens=task["chunk"],
            max_num_seqs=16,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.8,
            enforce_eager=task["eager"],
            cudagraph_capture_sizes=None if task["eager"] else [1, 2, 4, 8, 16],
            disable_log_stats=True,
        )
        tokenizer = self.llm.get_tokenizer()
        self.tokens = [tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"] for text in task["texts"]]

    def prompt(self, length: int, number: int) -> dict[str, list[int]]:
        """Piece ``number`` of the texts; texts take turns."""
        tokens = self.tokens[number % len(self.tokens)]
        start = number // len(self.tokens) * length
        if start + length > len(tokens):
            start = (number * 997) % max(len(tokens) - length, 1)
        piece = tokens[start : start + length]
        if len(piece) < length:
            piece = (tokens * (length // len(tokens) + 1))[:length]
        return {"prompt_token_ids": piece}

    def generate(self, prompt: dict[str, list[int]]) -> float:
        """Seconds until the first token."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, ignore_eos=True)
        started = time.perf_counter()
        self.llm.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - started

    def counts(self) -> Any:
        """Counts of all layers, and those by layer."""
        from vllm_vsprefill.runtime import Runtime
        from vllm_vsprefill.stats import LayerCounts

        time.sleep(0.5)  # the worker's reader publishes by itself
        (runtime,) = [value for value in Runtime._instances.values() if value.layers]
        layers = dict(runtime.recorder._totals)
        return sum(layers.values(), LayerCounts()), layers


def measure(task: dict[str, Any]) -> None:
    """Everything of one setting."""
    results, name = Results(Path(task["out"])), task["setting"]
    engine = RealEngine(task, task["options"])
    for length in task["lengths"]:
        for warm in range(task["warm"]):
            engine.generate(engine.prompt(length, WARM + warm))
        before = engine.counts() if engine.sparse else None
        times = [engine.generate(engine.prompt(length, number)) for number in range(task["runs"])]
        results.add("ttft", {**row(name, length, times), **densities(engine, before)}, KEY)
    if task["profile"]:
        results.add("profile", {"setting": name, **profile(engine, max(task["lengths"]))}, KEY)


def row(name: str, length: int, times: list[float]) -> dict[str, Any]:
    """The times of one setting and length."""
    return {"setting": name, "length": length, "seconds": statistics.median(times), "runs": times}


def densities(engine: RealEngine, before: Any) -> dict[str, Any]:
    """What has been computed since ``before``, which is None for the stock backend."""
    if before is None:
        return {}
    from vllm_vsprefill.stats import LayerCounts

    total, layers = engine.counts()
    return {
        "density": (total - before[0]).density,
        "layer_density": [round((layers[i] - before[1].get(i, LayerCounts())).density, 4) for i in sorted(layers)],
    }


def serve(task: dict[str, Any], asked: Connection) -> None:
    """An engine in this process that does what it is asked for, until it is asked for None."""
    engine, before = RealEngine(task, task["options"]), None
    asked.send(None)
    for action, *numbers in iter(asked.recv, None):
        if action == "generate":
            asked.send(engine.generate(engine.prompt(*numbers)))
        elif action == "begin":
            before = engine.counts() if engine.sparse else None
            asked.send(None)
        else:
            asked.send(densities(engine, before))


def take_turns(tasks: list[dict[str, Any]], results: Results) -> None:
    """All settings, prompt by prompt in turns.

    Raises:
        EOFError: an engine has died.
    """
    context = multiprocessing.get_context("spawn")
    engines: dict[str, Connection] = {}

    def ask(name: str, *question: Any) -> Any:
        engines[name].send(question)
        return engines[name].recv()

    for task in tasks:
        engines[task["setting"]], theirs = context.Pipe()
        context.Process(target=serve, args=(task, theirs)).start()
        theirs.close()
        engines[task["setting"]].recv()  # it is ready
    for length in tasks[0]["lengths"]:
        for warm in range(tasks[0]["warm"]):
            for name in engines:
                ask(name, "generate", length, WARM + warm)
        for name in engines:
            ask(name, "begin")
        times: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(tasks[0]["runs"]):
            for name in engines:
                times[name].append(ask(name, "generate", length, number))
                print(length, name, f"{times[name][-1]:.2f} s", flush=True)
        for name in engines:
            results.add("ttft", {**row(name, length, times[name]), **ask(name, "end")}, KEY)
    for engine in engines.values():
        engine.send(None)


def profile(engine: RealEngine, length: int) -> dict[str, Any]:
    """Time on the device by kernel, of one prompt."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds = engine.generate(engine.prompt(length, 50))
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if spent := getattr(event, "device_time", 0.0):
            kernels.setdefault(event.name, []).append(spent / 1e3)
    ordered = sorted(((sum(spent), len(spent), name) for name, spent in kernels.items()), reverse=True)
    return {
        "length": length,
        "seconds_with_profiler": seconds,
        "device_ms": sum(total for total, _, _ in ordered),
        "attention_ms": sum(total for total, _, name in ordered if ATTENTION.search(name)),
        "kernels": [{"ms": round(total, 3), "calls": n, "name": name[:100]} for total, n, name in ordered[:25]],
    }


def main(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder")],
    texts: Annotated[list[Path], typer.Argument(help="files of plain text")],
    out: Annotated[Path, typer.Option(help="JSON file")],
    settings: Annotated[str, typer.Option(help="names known to vsprefill eval, or of --options")] = "dense,balanced",
    options: Annotated[str, typer.Option(help="JSON: further settings by name")] = "{}",
    lengths: Annotated[str, typer.Option(help="tokens of prompts")] = "8192,32768",
    runs: Annotated[int, typer.Option(help="measurements of a length")] = 5,
    chunk: Annotated[int, typer.Option(help="max_num_batched_tokens")] = CHUNK,
    eager: Annotated[bool, typer.Option(help="no compilation, no graphs")] = False,
    warm: Annotated[int, typer.Option(help="prompts of a length before it is measured")] = 2,
    turns: Annotated[bool, typer.Option(help="engines take turns, prompt by prompt")] = False,
    profile: Annotated[bool, typer.Option(help="time by kernel of the longest prompt, too")] = False,
) -> None:
    """Measure every setting, one engine after the other or, with --turns, all in turns. Exit status 1 if one failed."""
    try:
        known = {**KNOWN, **json.loads(options)}
        wanted = {name: known[name] for name in settings.split(",")}
    except (ValueError, TypeError) as error:
        sys.exit(f"--options: expected a JSON object of names and options ({error})")
    except KeyError as error:
        sys.exit(f"--settings: {error} is neither of --options nor one of {', '.join(KNOWN)}")
    results = Results(out)
    facts = {"model": model.name, "texts": [text.name for text in texts], "chunk": chunk, "eager": eager}
    facts |= {"turns": True} if turns else {}

    def describe(record: dict[str, Any]) -> None:
        # The file may hold rows of other settings already.
        record.update({**environment.describe(), **facts, "settings": {**record.get("settings", {}), **wanted}})

    results.update(describe)
    tasks = [
        {
            "model": str(model),
            "texts": [str(text) for text in texts],
            "out": str(out),
            "setting": name,
            "options": None if name == DENSE else known[name],
            "lengths": [int(length) for length in lengths.split(",")],
            "runs": runs,
            "chunk": chunk,
            "eager": eager,
            "warm": warm,
            "profile": profile,
        }
        for name in wanted
    ]
    if turns:
        take_turns(tasks, results)
        return
    failed = False
    for task in tasks:
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(task, file)
        status = subprocess.run([sys.executable, "-m", "benchmarks.real_ttft", "--worker", file.name]).returncode
        if status:
            results.add("failed", {"setting": task["setting"], "status": status}, ("setting",))
            failed = True
    sys.exit(failed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        measure(json.loads(Path(sys.argv[2]).read_text()))
    else:
        typer.run(main)
