# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Mixed traffic on the needle model for a while: every answer is checked, the log is read, memory is watched.

Prompts of random lengths, a third of them asked before, so that cached blocks are used again, some given up while they
are computed, in a KV cache too small for all of them, so that requests are preempted and blocks change hands. An
answer is right or wrong by the problem it belongs to. Wrong ones are asked again afterwards, alone and with an empty
cache: the same wrong answer then is the model's (or the selection's), another one is a fault of what happened in the
traffic.

    python -m benchmarks.traffic --seconds 600 --out FILE.json
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import densities, environment

if TYPE_CHECKING:
    from examples.needle.tasks import Task

TASKS: tuple[Task, ...] = ("single", "multi_key", "multi_query", "variable_tracking")
ANSWER = 48
SPARSE = '{"min_seq_len": 1024, "min_pairs": 0, "min_rows": 0}'  # whatever may be, paying or not
HARMLESS = ("seed", "Enforce eager", "Sampling", "swap", "max_num_seqs", "deprecated")


class Log(logging.Handler):
    """Keeps warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname}: {record.getMessage()}"[:500])


class Prompts:
    """Problems of random lengths, some of them asked several times."""

    def __init__(self, seed: int, shortest: int, longest: int) -> None:
        import numpy as np

        self.rng = np.random.default_rng(seed)
        self.random = random.Random(seed)
        self.shortest, self.longest = shortest, longest
        self.recent: list[Any] = []

    def next(self) -> Any:
        """A problem; now and then one that was asked before, whose prompt may be cached."""
        from examples.needle import tasks

        if self.recent and self.random.random() < 0.35:
            return self.random.choice(self.recent)
        share = self.random.random()
        length = int(self.shortest * (self.longest / self.shortest) ** share)
        problem = tasks.make_problem(self.rng, self.random.choice(TASKS), self.random.choice(tasks.HAYSTACKS), length)
        self.recent = [*self.recent[-15:], problem]
        return problem


def memory() -> dict[str, int]:
    """Bytes held by this process."""
    import psutil
    import torch

    found = {"host": psutil.Process().memory_info().rss}
    if torch.cuda.is_available():
        found |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    return found


def preemptions(llm: Any) -> int | None:
    """As vLLM counts them."""
    found = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
    return int(sum(found)) if found else None


def main(
    seconds: Annotated[float, typer.Option(help="How long to keep requests coming.")] = 600.0,
    concurrency: Annotated[int, typer.Option(help="Requests at a time.")] = 16,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.")] = 512,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 32768,
    chunk: Annotated[int, typer.Option(help="Prompt tokens a step.")] = 4096,
    cache_tokens: Annotated[int, typer.Option(help="Size of the KV cache.")] = 65536,
    aborted: Annotated[float, typer.Option(help="Share of requests that are given up.")] = 0.1,
    options: Annotated[str, typer.Option(help="VSPREFILL options, as JSON.")] = SPARSE,
    seed: Annotated[int, typer.Option(help="Which requests.")] = 0,
    utilization: Annotated[float, typer.Option(help="vLLM's gpu_memory_utilization.")] = 0.5,
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("traffic.json"),
) -> None:
    """Exit status 1 if an answer changed, the log holds an error, or device memory grew."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    folder = densities.exchange_folder()
    from vllm import LLM, SamplingParams

    log = Log()
    block = 16 if _is_cuda() else 128
    llm = LLM(
        str(environment.NEEDLE_MODEL),
        attention_backend="VSPREFILL",
        additional_config={"vsprefill": json.loads(options)},
        max_model_len=longest + 64,
        max_num_batched_tokens=chunk,
        max_num_seqs=2 * concurrency,
        enable_prefix_caching=True,
        num_gpu_blocks_override=cache_tokens // block,
        block_size=block,
        gpu_memory_utilization=utilization,
        disable_log_stats=False,
    )
    logging.getLogger("vllm").addHandler(log)
    engine = llm.llm_engine
    prompts, chance = Prompts(seed, shortest, longest), random.Random(seed + 1)
    params = SamplingParams(max_tokens=ANSWER, temperature=0.0)
    running: dict[str, Any] = {}
    answers = 0
    wrong: list[tuple[Any, str, list[int]]] = []  # nothing is kept of the others: the memory that grows is vLLM's
    samples: list[dict[str, float]] = []
    numbers = itertools.count()
    given_up = 0
    started = time.monotonic()
    next_sample = 0.0
    while (now := time.monotonic() - started) < seconds or running:
        while len(running) < concurrency and now < seconds:
            name, problem = f"request-{next(numbers)}", prompts.next()
            engine.add_request(name, {"prompt_token_ids": problem.prompt_ids.tolist()}, params)
            running[name] = problem
        for output in engine.step():
            if output.finished and output.request_id in running:
                problem = running.pop(output.request_id)
                answers += 1
                if not problem.is_correct(output.outputs[0].text):
                    wrong.append((problem, output.outputs[0].text, list(output.outputs[0].token_ids)))
        if running and chance.random() < aborted / 20:
            name = chance.choice(list(running))
            engine.abort_request([name])
            del running[name]
            given_up += 1
        if now >= next_sample:
            samples.append({"seconds": now, **memory()})
            print(f"{now:6.0f} s  {answers} answers", flush=True)
            next_sample = now + 10.0
    changed = []
    seen: dict[int, list[int]] = {}
    for problem, text, tokens in wrong:
        if id(problem) not in seen:
            llm.reset_prefix_cache()
            again = llm.generate([{"prompt_token_ids": problem.prompt_ids.tolist()}], params, use_tqdm=False)
            seen[id(problem)] = list(again[0].outputs[0].token_ids)
        if seen[id(problem)] != tokens:
            changed.append({"task": problem.task, "tokens": len(problem.prompt_ids), "answer": text})
    counts = densities.total(folder)
    record = {
        **environment.describe(),
        "options": json.loads(options),
        "seconds": time.monotonic() - started,
        "answers": answers,
        "right": answers - len(wrong),
        "wrong_also_alone": len(wrong) - len(changed),
        "changed_by_traffic": changed,
        "given_up": given_up,
        "preemptions": preemptions(llm),
        "density": counts.density,
        "sparse_chunks": counts.sparse_chunks,
        "dense_chunks": counts.dense_chunks,
        "log": [
            text for text in log.messages if not (text.startswith("WARNING") and any(word in text for word in HARMLESS))
        ],
        "memory": samples,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    shown = {key: value for key, value in record.items() if key not in ("memory", "log")}
    print(json.dumps(shown, indent=1))
    problems = [f"{len(changed)} answers changed by traffic"] if changed else []
    problems += [] if counts.sparse_chunks else ["no chunk ran sparse"]
    problems += [f"log: {text}" for text in record["log"] if text.startswith(("ERROR", "CRITICAL"))]
    half = [sample["reserved"] for sample in samples[len(samples) // 2 :] if "reserved" in sample]
    if half and max(half) > min(half) + 64 * 2**20:
        problems.append(f"reserved device memory grew by {(max(half) - min(half)) / 2**20:.0f} MiB in the second half")
    if problems:
        sys.exit("\n".join(problems))


def _is_cuda() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


if __name__ == "__main__":
    typer.run(main)
