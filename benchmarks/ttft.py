# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Time to first token of vLLM on a GPU: stock FlashAttention and VSPREFILL, one engine after the other.

Models have the shape of a well-known one and random weights (normal, 0.02; norms 1): nothing is downloaded, and time
does not depend on what weights mean. What attention keeps does, so the budgets of VSPREFILL are fixed here: at 131,072
tokens 4,096 columns, a local window of 1,024 positions and 64 diagonals outside the choice of which random weights have
no say (about 1,024 further keys a row in tiles of 16 positions), at shorter lengths in proportion. The densities that
result are reported beside the times; what a trained indexer chooses by itself is measured with the needle model.

Each backend is an engine in a process of its own. Rows are written to the result file as they are measured. Prefix
caching is off, prompts are random tokens, and every prompt is another one.

    python -m benchmarks.ttft --shape qwen3-4b --lengths 4096,8192,16384,32768,65536,131072,262144 --out FILE.json
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import environment

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_theta": 5000000,
    },
    "llama31-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "rope_theta": 500000.0,
    },
    # For trying this script out, not for figures.
    "tiny": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 512,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
    },
}
COMMON = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BACKENDS = ("stock", "vsindexer", "sampled")
CHUNK = 8192
BUDGET_AT = 131072
COLUMNS, WINDOW, DIAGONALS = 4096, 1024, 64
HIDDEN = 1024
DECODE_BATCH, DECODE_CONTEXT, DECODE_STEPS = 32, 8192, 128
THROUGHPUT_PROMPTS, THROUGHPUT_LENGTH = 8, 32768

# What attention consists of in a profile, by kernel name: FlashAttention, this project's kernels, and the clearing of
# their histograms.
ATTENTION = re.compile(
    r"flash|attend|prepare_varlen|^_(score|missing|gather|histogram|cut|tie|flag|count|list|guard|forget|partial|sum"
    r"|diagonal|finish)_kernel",
    re.I,
)


class Results:
    """The result file; rows are merged into what earlier processes of the same run have written."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def update(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Read, change, replace."""
        record = json.loads(self.path.read_text()) if self.path.exists() else {}
        change(record)
        environment.write(self.path, record)

    def add(self, kind: str, row: dict[str, Any], key: Collection[str] = ()) -> None:
        """Append a row and show it; those of an earlier run with the same values of ``key`` make way for it."""

        def change(record: dict[str, Any]) -> None:
            earlier = record.get(kind, [])
            kept = [one for one in earlier if not key or any(one.get(name) != row[name] for name in key)]
            record[kind] = [*kept, row]

        self.update(change)
        print(kind, json.dumps(row), flush=True)


def budgets(length: int) -> dict[str, int]:
    """Columns, window and diagonals at a length: those at ``BUDGET_AT``, below it in proportion."""
    share = min(length / BUDGET_AT, 1.0)
    return {
        "columns": max(int(COLUMNS * share), 16),
        "window": max(int(WINDOW * share), 16),
        "diagonals": max(int(DIAGONALS * share), 1),
    }


def write_model(folder: Path, shape: str, longest: int) -> Path:
    """A ``config.json`` without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**COMMON, **SHAPES[shape], "max_position_embeddings": longest}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def write_indexer(folder: Path, model: Path) -> Path:
    """An untrained indexer of the published width for a model."""
    import transformers

    from vllm_vsprefill.checkpoint import CheckpointConfig, save_checkpoint
    from vllm_vsprefill.distil.student import initial_weights
    from vllm_vsprefill.fingerprint import ModelFingerprint

    fingerprint = ModelFingerprint.from_hf_config(transformers.AutoConfig.from_pretrained(model))
    layers = tuple(range(fingerprint.num_layers))
    weights = initial_weights(layers, fingerprint.num_kv_heads, 2 * fingerprint.head_size, HIDDEN, seed=0)
    config = CheckpointConfig(
        model="random", fingerprint=fingerprint, hidden_size=HIDDEN, dtype="bfloat16", layers=layers
    )
    return save_checkpoint(folder, weights, config)


def randomise(model: Any) -> None:
    """Weights under which activations keep their size through the layers; vLLM's dummy weights are nearly zero."""
    import torch

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 and "norm" in name:
                weight.fill_(1.0)
            elif weight.is_floating_point():
                weight.normal_(0.0, 0.02)


class Engine:
    """One engine in this process."""

    def __init__(self, model: Path, backend: str, indexer: Path, longest: int, eager: bool, utilization: float) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        options: dict[str, Any] = {}
        if backend != "stock":
            options = {"tau_columns": 1.0, "tau_diagonals": 1.0, "min_columns": 0, "estimator": backend}
            options |= {"max_columns": COLUMNS, "max_diagonals": DIAGONALS, "window": WINDOW}
            if backend == "vsindexer":
                options["checkpoint"] = str(indexer)
        started = time.monotonic()
        self.llm = LLM(
            model=str(model),
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_backend=self._stock() if backend == "stock" else "VSPREFILL",
            additional_config={"vsprefill": options} if options else {},
            max_model_len=longest,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=64,
            enable_prefix_caching=False,
            gpu_memory_utilization=utilization,
            enforce_eager=eager,
            cudagraph_capture_sizes=[1, 2, 4, 8, 16, 32],
            disable_log_stats=True,
        )
        self.sparse = backend != "stock"
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.random = random.Random(0)
        self.llm.apply_model(randomise)
        self.start_seconds = time.monotonic() - started

    @staticmethod
    def _stock() -> str:
        from vllm.platforms import current_platform

        return "CPU_ATTN" if current_platform.is_cpu() else "FLASH_ATTN"

    def prompt(self, length: int) -> dict[str, list[int]]:
        """Random tokens."""
        return {"prompt_token_ids": self.random.choices(range(3, self.vocabulary), k=length)}

    def set_budgets(self, length: int) -> None:
        """Give the running engine the budgets of a length."""
        if not self.sparse:
            return
        import dataclasses

        import torch

        found = budgets(length)
        runtime = self.runtime
        runtime.options = runtime.options.model_copy(
            update={
                "max_columns": found["columns"],
                "max_diagonals": found["diagonals"],
                "window": found["window"],
            }
        )
        runtime.pattern = dataclasses.replace(runtime.pattern, window=found["window"])
        prefill = runtime.prefill_on(torch.device("cuda"))
        prefill.budgets, work = runtime.budgets, prefill.buffers.work
        prefill.buffers.work = dataclasses.replace(work, index=work.index._replace(pattern=runtime.pattern))

    @property
    def runtime(self) -> Any:
        """VSPREFILL's state; this process serves one model."""
        from vllm_vsprefill.runtime import Runtime

        (runtime,) = [value for value in Runtime._instances.values() if value.layers]
        return runtime

    def counts(self) -> Any:
        """Sum of the layers' counts so far."""
        from vllm_vsprefill.stats import LayerCounts

        total = LayerCounts()
        if self.sparse:
            time.sleep(0.5)  # the worker's reader publishes by itself
            for counts in self.runtime.recorder._totals.values():
                total += counts
        return total

    def generate(self, prompts: list[dict[str, list[int]]], tokens: int = 1) -> float:
        """Seconds until all prompts have their tokens."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, temperature=0.0, detokenize=False, ignore_eos=True)
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return seconds


def time_lengths(engine: Engine, results: Results, label: dict[str, Any], lengths: list[int], until: float) -> None:
    """Time to first token of one prompt at a time."""
    last = (0, 0.0)
    for length in lengths:
        expected = last[1] * (length / last[0]) ** 2 if last[0] else 0.0
        if time.time() + 1.1 * expected > until:
            results.add("ttft", {**label, "length": length, "skipped": "no time left"})
            continue
        engine.set_budgets(length)
        engine.generate([engine.prompt(min(length, 2 * CHUNK))])  # the first run of a length may grow buffers
        before = engine.counts()
        times: list[float] = []
        wanted = 5 if length <= 16384 else 3
        for _ in range(wanted):
            if times and time.time() + 1.5 * times[-1] > until:
                break
            times.append(engine.generate([engine.prompt(length)]))
            if length > BUDGET_AT and times[-1] > 15.0:
                break
        row = {**label, "length": length, "seconds": statistics.median(times), "runs": times}
        if engine.sparse:
            row |= {"density": (engine.counts() - before).density, **budgets(length)}
        results.add("ttft", row)
        last = (length, row["seconds"])


def time_decode(engine: Engine, results: Results, label: dict[str, Any], longest: int) -> None:
    """Tokens a second of a batch that only decodes."""
    from vllm import SamplingParams

    context = min(DECODE_CONTEXT, longest - DECODE_STEPS - 64)
    inner = engine.llm.llm_engine
    params = SamplingParams(max_tokens=2 * DECODE_STEPS + 64, temperature=0.0, detokenize=False, ignore_eos=True)
    engine.set_budgets(context)
    names = [f"decode-{i}" for i in range(DECODE_BATCH)]
    for name in names:
        inner.add_request(name, engine.prompt(context), params)
    produced: dict[str, int] = dict.fromkeys(names, 0)

    def step() -> None:
        for output in inner.step():
            produced[output.request_id] = len(output.outputs[0].token_ids)

    while min(produced.values()) < 8:
        step()
    first, started = sum(produced.values()), time.perf_counter()
    for _ in range(DECODE_STEPS):
        step()
    seconds, tokens = time.perf_counter() - started, sum(produced.values()) - first
    inner.abort_request(names)
    while inner.has_unfinished_requests():
        step()
    results.add(
        "decode",
        {**label, "batch": DECODE_BATCH, "context": context, "tokens_per_second": tokens / seconds, "steps": tokens},
    )


def time_throughput(engine: Engine, results: Results, label: dict[str, Any], longest: int) -> None:
    """Several long prompts at once."""
    length = min(THROUGHPUT_LENGTH, longest - 8)
    engine.set_budgets(length)
    prompts = [engine.prompt(length) for _ in range(THROUGHPUT_PROMPTS)]
    seconds = engine.generate(prompts)
    tokens = length * THROUGHPUT_PROMPTS
    results.add(
        "throughput",
        {**label, "prompts": len(prompts), "length": length, "seconds": seconds, "tokens_per_second": tokens / seconds},
    )


def measure_memory(engine: Engine, results: Results, label: dict[str, Any], lengths: list[int], shape: str) -> None:
    """Peak of the device memory while the longest prompt of at most 128k tokens is computed, the KV cache aside."""
    import torch

    if not torch.cuda.is_available():
        return
    length = max((n for n in lengths if n <= BUDGET_AT), default=lengths[0])
    engine.set_budgets(length)
    torch.cuda.reset_peak_memory_stats()
    engine.generate([engine.prompt(length)])
    cache = engine.llm.llm_engine.vllm_config.cache_config
    model = SHAPES[shape]
    slots = cache.num_gpu_blocks * cache.block_size
    kv_bytes = slots * model["num_hidden_layers"] * model["num_key_value_heads"] * model["head_dim"] * 2 * 2
    peak = torch.cuda.max_memory_allocated()
    row = {
        **label,
        "length": length,
        "kv_cache_tokens": slots,
        "kv_cache_bytes": kv_bytes,
        "peak_allocated_bytes": peak,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "peak_without_kv_cache_bytes": peak - kv_bytes,
    }
    if engine.sparse:
        runtime = engine.runtime
        kept = [state.logits.slots for state in runtime.layers.values() if state.logits is not None]
        weights = [part for state in runtime.layers.values() for part in state.weights or ()]
        row |= {
            "workspace_bytes": runtime.prefill_on(torch.device("cuda")).buffers.num_bytes,
            "cached_logits_bytes": sum(part.numel() * part.element_size() for part in kept),
            "indexer_bytes": sum(part.numel() * part.element_size() for part in weights),
        }
    results.add("memory", row)


def profile(engine: Engine, results: Results, label: dict[str, Any], lengths: list[int]) -> None:
    """Time on the device by kernel, of one prompt of at most 128k tokens."""
    import torch

    if not torch.cuda.is_available():
        return
    length = max((n for n in lengths if n <= BUDGET_AT), default=lengths[0])
    engine.set_budgets(length)
    prompt = [engine.prompt(length)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        seconds = engine.generate(prompt)
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        spent = getattr(event, "device_time", None) or getattr(event, "cuda_time", 0.0)
        if spent:
            times[event.name].append(spent / 1e3)
    kernels = sorted(((sum(spent), len(spent), name) for name, spent in times.items()), reverse=True)
    attention = sum(total for total, _, name in kernels if ATTENTION.search(name))
    results.add(
        "profile",
        {
            **label,
            "length": length,
            "seconds_with_profiler": seconds,
            "device_ms": sum(total for total, _, _ in kernels),
            "attention_ms": attention,
            "kernels": [
                {"ms": round(total, 3), "calls": count, "attention": bool(ATTENTION.search(name)), "name": name[:120]}
                for total, count, name in kernels[:40]
            ],
        },
    )


def worker(task: dict[str, Any]) -> None:
    """Everything that one backend is asked for."""
    results, label = Results(Path(task["out"])), {"shape": task["shape"], "backend": task["backend"]}
    engine = Engine(
        Path(task["model"]),
        task["backend"],
        Path(task["indexer"]),
        task["longest"],
        task["eager"],
        task["utilization"],
    )
    engine.set_budgets(2 * CHUNK)
    first = engine.generate([engine.prompt(min(2 * CHUNK, task["longest"] - 8))])
    engine.generate([engine.prompt(min(CHUNK, task["longest"] - 8))])
    results.add("start", {**label, "start_seconds": engine.start_seconds, "first_16k_prompt_seconds": first})
    extras = {
        "decode": lambda: time_decode(engine, results, label, task["longest"]),
        "throughput": lambda: time_throughput(engine, results, label, task["longest"]),
        "memory": lambda: measure_memory(engine, results, label, task["lengths"] or [BUDGET_AT], task["shape"]),
        "profile": lambda: profile(engine, results, label, task["lengths"] or [BUDGET_AT]),
    }
    for name, run in extras.items():
        if name in task["extras"]:
            try:
                run()
            except Exception as error:
                results.add(name, {**label, "error": f"{type(error).__name__}: {error}"})
            gc.collect()
    if not task["only_extras"]:
        time_lengths(engine, results, label, task["lengths"], task["until"])


def main(
    out: Annotated[Path, typer.Option(help="Result file; rows appear in it as they are measured.")] = Path("ttft.json"),
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "qwen3-4b",
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "4096,8192,16384,32768,65536,131072",
    backends: Annotated[str, typer.Option(help=f"Some of {', '.join(BACKENDS)}.")] = ",".join(BACKENDS),
    decode: Annotated[bool, typer.Option(help="Tokens a second of 32 requests at 8k of context.")] = False,
    throughput: Annotated[bool, typer.Option(help="8 prompts of 32k at once.")] = False,
    memory: Annotated[bool, typer.Option(help="Peak device memory at 128k.")] = False,
    profile_kernels: Annotated[bool, typer.Option("--profile", help="Device time by kernel at 128k.")] = False,
    only_extras: Annotated[bool, typer.Option(help="Leave the prompts of --lengths out.")] = False,
    limit_s: Annotated[float, typer.Option(help="Seconds after which no further length is begun.")] = 540.0,
    eager: Annotated[bool, typer.Option(help="Start without compilation and CUDA graphs.")] = False,
    utilization: Annotated[float, typer.Option(help="vLLM's gpu_memory_utilization.")] = 0.9,
    task: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure time to first token."""
    if task:
        worker(json.loads(task))
        return
    names, chosen = [int(text) for text in lengths.split(",") if text], backends.split(",")
    problems = [f"unknown shape {shape!r}; known are {', '.join(SHAPES)}"] if shape not in SHAPES else []
    problems += [
        f"unknown backend {name!r}; known are {', '.join(BACKENDS)}" for name in chosen if name not in BACKENDS
    ]
    if not names and not only_extras:
        problems.append("no lengths given")
    if problems:
        sys.exit("\n".join(problems))
    until = time.time() + limit_s
    extras = {"decode": decode, "throughput": throughput, "memory": memory, "profile": profile_kernels}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    facts = {
        **environment.describe(),
        "shape": {shape: SHAPES[shape]},
        "chunk": CHUNK,
        "budgets": {
            "at_tokens": BUDGET_AT,
            "columns": COLUMNS,
            "window": WINDOW,
            "diagonals": DIAGONALS,
            "rule": "fixed, below at_tokens in proportion to the length; random weights would choose without meaning",
        },
        "weights": "random, normal 0.02, norms 1",
    }
    Results(out).update(lambda record: record.update(facts))
    failed = []
    longest = max([*names, 0]) + 512
    if any(extras.values()):
        longest = max(longest, DECODE_CONTEXT + 2 * DECODE_STEPS + 256) if shape != "tiny" else longest
    if throughput and shape != "tiny":
        longest = max(longest, THROUGHPUT_LENGTH + 512)
    # The same path every time: torch.compile's cache goes by it, and compiling takes longer than most of the runs.
    scratch = Path(tempfile.gettempdir()) / f"vsprefill-ttft-{os.getuid()}-{shape}-{longest}"
    model = write_model(scratch / "model", shape, longest)
    indexer = scratch / "indexer"
    if "vsindexer" in chosen:
        write_indexer(indexer, model)
    for backend in chosen:
        arguments = {
            "out": str(out.resolve()),
            "shape": shape,
            "backend": backend,
            "model": str(model),
            "indexer": str(indexer),
            "longest": longest,
            "lengths": sorted(names),
            "extras": [name for name, wanted in extras.items() if wanted],
            "only_extras": only_extras,
            "until": until,
            "eager": eager,
            "utilization": utilization,
        }
        command = [sys.executable, "-m", "benchmarks.ttft", "--task", json.dumps(arguments)]
        done = subprocess.run(command, cwd=environment.ROOT, check=False)
        if done.returncode:
            failed.append(backend)
            Results(out).add("failed", {"shape": shape, "backend": backend, "exit_status": done.returncode})
    Results(out).update(compare)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def compare(record: dict[str, Any]) -> None:
    """Add how many times faster than stock each row is."""
    stock = {
        row["length"]: row["seconds"]
        for row in record.get("ttft", [])
        if row["backend"] == "stock" and "seconds" in row
    }
    for row in record.get("ttft", []):
        if row["backend"] != "stock" and "seconds" in row and row["length"] in stock:
            row["times_stock"] = stock[row["length"]] / row["seconds"]


if __name__ == "__main__":
    typer.run(main)
