# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A question about a long text, answered by stock vLLM with VSPREFILL and, for comparison, without.

Starts ``vllm serve MODEL --attention-backend VSPREFILL``, sends one long prompt through the openai client, streams the
answer and reads from ``/metrics`` how much of the attention was computed; then does the same with the stock backend.

Exit code: 0 if the answer is right and some layer ran sparse, 1 if not, 2 if the demo could not run.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import openai
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from examples.needle import tasks
from vllm_vsprefill.eval.density import Densities
from vllm_vsprefill.eval.server import ServerError, VLLMServer
from vllm_vsprefill.fingerprint import ModelFingerprint, read_setting

ROOT = Path(__file__).resolve().parent.parent
NEEDLE_MODEL = ROOT / "examples" / "needle" / "model"
LOGS = ROOT / "out" / "demo"
ANSWER_TOKENS = 64
SERVED_NAME = "demo"

console = Console(highlight=False)


class DemoError(RuntimeError):
    """The demo cannot do what it was asked for; the message says why."""


@dataclass(frozen=True)
class Question:
    """What is sent, and what should come back (None: nobody knows)."""

    content: str
    shown: str
    expected: str | None
    problem: tasks.Problem | None = None

    def is_right(self, answer: str) -> bool | None:
        """Whether an answer is right; None where nobody knows."""
        if self.problem is not None:
            return self.problem.is_correct(answer)
        return None if self.expected is None else self.expected in answer


@dataclass(frozen=True)
class Result:
    """One server's answer."""

    answer: str
    prompt_tokens: int
    ttft: float
    densities: Densities


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that vLLM would use."""
    return shutil.which("nvidia-smi") is not None and not vllm_is_cpu_build()


def vllm_is_cpu_build() -> bool:
    """Whether the installed vLLM is the build for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def computes_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for bfloat16 (True where Linux does not say); others take many times as
    long for it as for float32."""
    try:
        words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return True
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"}) or not words


def needle_question(tokens: int, seed: int) -> Question:
    """A problem for the needle model: one magic number among many, in a haystack of random words."""
    problem = tasks.make_problem(np.random.default_rng(seed), "multi_key", "words", tokens)
    return Question(problem.content, problem.question, problem.answer_text, problem)


def generic_question(tokens: int, seed: int, count: Callable[[str], int]) -> Question:
    """A number hidden in a repeated English passage, for a model with a vocabulary of its own.

    Args:
        tokens: most tokens of the whole prompt.
        seed: which number, where.
        count: tokens of a user message, chat template included.
    """
    rng = np.random.default_rng(seed)
    passage = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
        "The river runs past the mill and the old road follows it down to the sea. "
    )
    city, number = str(rng.choice(["Lisbon", "Oslo", "Quito", "Hanoi"])), str(rng.integers(100000, 999999))
    needle = f"The magic number for {city} is {number}. "
    shown = f"What is the magic number for {city} mentioned above? Answer with the number only."

    def content(copies: int) -> str:
        before = copies // 3
        return passage * before + needle + passage * (copies - before) + "\n\n" + shown

    each = (count(content(210)) - count(content(10))) / 200
    copies = max(1, int((tokens - count(content(0))) / each))
    return Question(content(copies), shown, number)


@dataclass(frozen=True)
class Limits:
    """What a model takes and needs.

    Attributes:
        positions: longest sequence.
        bytes_per_token: size of one token in the KV cache, all layers, 16-bit.
        count: tokens of a user message, chat template included.
    """

    positions: int
    bytes_per_token: int
    count: Callable[[str], int]

    @classmethod
    def of(cls, model: str) -> Limits:
        """Read them from the model's configuration and tokenizer. Raises DemoError if there is no such model."""
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(model).get_text_config()
            tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        except Exception as error:
            # transformers and the hub raise many kinds; to the user they all mean that the model cannot be had.
            raise DemoError(f"the model {model!r} cannot be read: {error}") from error
        positions, layers, hidden = (
            read_setting(config, name) for name in ("max_position_embeddings", "num_hidden_layers", "hidden_size")
        )
        if not all(isinstance(value, int) for value in (positions, layers, hidden)):
            raise DemoError(f"the configuration of {model!r} does not say how long a text it takes, or how many layers")
        try:
            shape = ModelFingerprint.from_hf_config(config)
            channels = shape.num_kv_heads * shape.head_size
        except ValueError:  # layers of different shapes, say; more than enough
            channels = 2 * hidden

        def count(text: str) -> int:
            messages = [{"role": "user", "content": text}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return len(tokenizer(rendered, add_special_tokens=False).input_ids)

        return cls(positions, 4 * layers * channels, count)


def ask(server: VLLMServer, question: Question) -> Result:
    """Send the prompt, print the answer as it arrives, measure the time to its first token."""
    client = server.client(timeout=3600)
    # The first request of a process pays for things done once (compiled kernels, memory); it is not the one to time.
    warm_up = "The quick brown fox. " * 64
    client.chat.completions.create(
        model=SERVED_NAME, messages=[{"role": "user", "content": warm_up}], max_tokens=2, temperature=0
    )
    before = server.densities()
    answer, ttft, prompt_tokens = "", None, 0
    with console.status("reading the prompt") as status:
        start = time.perf_counter()
        stream = client.chat.completions.create(
            model=SERVED_NAME,
            messages=[{"role": "user", "content": question.content}],
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            # Models that think aloud would use up the answer's tokens on it; templates without the switch ignore it.
            extra_body={"chat_template_kwargs": {"enable_thinking": False}},
        )
        for chunk in stream:
            if chunk.usage is not None:
                prompt_tokens = chunk.usage.prompt_tokens
            text = chunk.choices[0].delta.content if chunk.choices else None
            if not text:
                continue
            if ttft is None:
                ttft = time.perf_counter() - start
                status.stop()
                console.print("[bold]answer[/bold]    ", end="")
            answer += text
            console.print(text, end="", markup=False)
    console.print()
    if ttft is None:
        raise ServerError("the server's answer is empty")
    return Result(answer.strip(), prompt_tokens, ttft, server.densities().since(before))


def server(model: str, backend: str, tokens: int, *, cache_gib: int | None, chunk: int, dtype: str) -> VLLMServer:
    """A server whose settings do not depend on the backend, so that two of them can be compared."""
    arguments = ["--served-model-name", SERVED_NAME, "--max-model-len", str(tokens)]
    arguments += ["--max-num-batched-tokens", str(chunk), "--max-num-seqs", "8", "--dtype", dtype]
    environment = {}
    if cache_gib is not None:
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", str(cache_gib))
    name = f"{backend.lower()}.log"
    status = console.status(f"starting vLLM with {backend}")
    status.start()

    def on_wait(seconds: float, line: str) -> None:
        status.update(Text(f"starting vLLM with {backend}: {seconds:.0f} s  {line[:90]}"))

    made = VLLMServer(
        model, backend, LOGS / name, arguments=arguments, environment=environment, on_wait=on_wait, timeout=1200
    )
    try:
        made.__enter__()
    finally:
        status.stop()
    return made


def report(question: Question, sparse: Result, stock: Result | None, stock_backend: str) -> None:
    """Print the outcome."""
    layers = Table(title="share of the causal attention that was computed")
    layers.add_column("layer", justify="right")
    layers.add_column("density", justify="right")
    for layer, density in sparse.densities.layers.items():
        layers.add_row(str(layer), f"{density:.1%}")
    layers.add_row("mean", f"{sparse.densities.mean:.1%}", style="bold")
    console.print(layers)
    table = Table(title=f"{sparse.prompt_tokens:,} prompt tokens")
    for column in ("backend", "answer", "expected", "time to first token"):
        table.add_column(column)
    expected = question.expected or "(unknown)"
    table.add_row("VSPREFILL", Text(sparse.answer), Text(expected), f"{sparse.ttft:.2f} s")
    if stock is not None:
        table.add_row(stock_backend, Text(stock.answer), Text(expected), f"{stock.ttft:.2f} s")
    console.print(table)
    if stock is not None:
        console.print(f"VSPREFILL answered {stock.ttft / sparse.ttft:.2f}x as fast as {stock_backend}.")


def make_question(prompt: Path | None, model: str, tokens: int, seed: int, count: Callable[[str], int]) -> Question:
    """What to ask: the user's text, a problem for the needle model, or a number hidden in English."""
    if prompt is not None:
        try:
            text = prompt.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(f"{prompt}: {error}") from error
        if not text.strip():
            raise DemoError(f"{prompt} is empty")
        return Question(text, f"({prompt}, {len(text):,} characters)", None)
    if Path(model).resolve() == NEEDLE_MODEL.resolve():
        return needle_question(tokens, seed)
    return generic_question(tokens, seed, count)


def say(label: str, text: str) -> None:
    """A labelled line; the text is shown as it is, brackets and all."""
    console.print(Text(f"{label:10}", style="bold") + Text(text, style="default"), soft_wrap=True)


def main(
    prompt: Annotated[Path | None, typer.Option(help="A text file to send instead of the built-in question.")] = None,
    model: Annotated[str, typer.Option(help="Model folder or Hugging Face id.")] = str(NEEDLE_MODEL),
    tokens: Annotated[
        int | None, typer.Option(help="Length of the built-in prompt, in tokens. By default 32,768.", min=1024)
    ] = None,
    seed: Annotated[int, typer.Option(help="Which built-in question is asked.")] = 0,
    chunk: Annotated[int, typer.Option(help="Prompt tokens vLLM computes at a time.", min=256)] = 8192,
    dtype: Annotated[str, typer.Option(help="vLLM's --dtype; auto: the model's, if the processor has it.")] = "auto",
    compare: Annotated[bool, typer.Option(help="Ask the stock backend too.")] = True,
) -> None:
    """Ask one question about a long text, with VSPREFILL and with the stock backend."""
    gpu = has_gpu()
    stock_backend = "FLASH_ATTN" if gpu else "CPU_ATTN"
    slow = not gpu and not computes_bfloat16()
    if tokens is None:
        tokens = 16384 if slow else 32768
    results: dict[str, Result] = {}
    try:
        with console.status("reading the model's tokenizer"):
            limits = Limits.of(model)
            question = make_question(prompt, model, min(tokens, limits.positions - ANSWER_TOKENS), seed, limits.count)
            needed = limits.count(question.content) + ANSWER_TOKENS
        if needed > limits.positions:
            raise DemoError(
                f"the prompt takes {needed - ANSWER_TOKENS:,} tokens and the answer up to {ANSWER_TOKENS}; the model "
                f"takes {limits.positions:,} in all"
            )
        say("question", question.shown)
        cache_gib = None if gpu else 2 + needed * limits.bytes_per_token // 2**30
        if dtype == "auto" and slow and question.problem is not None:
            dtype = "float32"
            say("slow", f"no bfloat16 in this processor: float32, {needed - ANSWER_TOKENS:,} tokens of prompt")
        for backend in ("VSPREFILL", stock_backend) if compare else ("VSPREFILL",):
            running = server(model, backend, needed, cache_gib=cache_gib, chunk=chunk, dtype=dtype)
            try:
                say("server", " ".join(running.command))
                results[backend] = ask(running, question)
            finally:
                with console.status("ending the server"):
                    running.stop()
    except KeyboardInterrupt:
        console.print("\nstopped")
        raise typer.Exit(130) from None
    except (DemoError, ServerError, openai.OpenAIError, OSError) as error:
        console.print(
            f"{error}\nLogs of the servers, if any ran, are in {LOGS.relative_to(ROOT)}.", style="red", markup=False
        )
        raise typer.Exit(2) from None
    sparse = results["VSPREFILL"]
    report(question, sparse, results.get(stock_backend), stock_backend)
    problems = []
    if question.is_right(sparse.answer) is False:
        problems.append("the answer is wrong")
    if not sparse.densities.ran_sparse:
        problems.append("no layer ran sparse (is the prompt below min_seq_len, or are its chunks below min_pairs?)")
    for problem in problems:
        console.print(f"[red]FAILED: {problem}[/red]")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
