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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import openai
import typer
from rich.console import Console
from rich.table import Table

from examples.needle import tasks
from examples.server import Densities, ServerError, VLLMServer

ROOT = Path(__file__).resolve().parent.parent
NEEDLE_MODEL = ROOT / "examples" / "needle" / "model"
LOGS = ROOT / "out" / "demo"
ANSWER_TOKENS = 64
SERVED_NAME = "demo"

console = Console(highlight=False)


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


def needle_question(tokens: int, seed: int) -> Question:
    """A problem for the needle model: one magic number among many, in a haystack of random words."""
    problem = tasks.make_problem(np.random.default_rng(seed), "multi_key", "words", tokens)
    return Question(problem.content, problem.question, problem.answer_text, problem)


def generic_question(tokens: int, seed: int) -> Question:
    """A number hidden in a repeated English passage, for a model with a vocabulary of its own.

    A passage of 32 words takes about 40 tokens in today's vocabularies; the server reports the exact number.
    """
    rng = np.random.default_rng(seed)
    passage = (
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
        "The river runs past the mill and the old road follows it down to the sea. "
    )
    city, number = str(rng.choice(["Lisbon", "Oslo", "Quito", "Hanoi"])), str(rng.integers(100000, 999999))
    copies = tokens // 34
    place = int(rng.integers(copies // 4, 3 * copies // 4))
    needle = f"The magic number for {city} is {number}. "
    shown = f"What is the magic number for {city} mentioned above? Answer with the number only."
    content = passage * place + needle + passage * (copies - place) + "\n\n" + shown
    return Question(content, shown, number)


def ask(server: VLLMServer, question: Question) -> Result:
    """Send the prompt, print the answer as it arrives, measure the time to its first token."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0)
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


def server(model: str, backend: str, tokens: int, *, gpu: bool, chunk: int) -> VLLMServer:
    """A server whose settings do not depend on the backend, so that two of them can be compared."""
    arguments = ["--served-model-name", SERVED_NAME, "--max-model-len", str(tokens)]
    arguments += ["--max-num-batched-tokens", str(chunk), "--max-num-seqs", "8"]
    environment = {}
    if not gpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "4")
    name = f"{backend.lower()}.log"
    status = console.status(f"starting vLLM with {backend}")
    status.start()

    def on_wait(seconds: float, line: str) -> None:
        status.update(f"starting vLLM with {backend}: {seconds:.0f} s  [dim]{line[:90]}[/dim]")

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
    table.add_row("VSPREFILL", sparse.answer, expected, f"{sparse.ttft:.2f} s")
    if stock is not None:
        table.add_row(stock_backend, stock.answer, expected, f"{stock.ttft:.2f} s")
    console.print(table)
    if stock is not None:
        console.print(f"VSPREFILL answered {stock.ttft / sparse.ttft:.2f}x as fast as {stock_backend}.")


def main(
    prompt: Annotated[Path | None, typer.Option(help="A text file to send instead of the built-in question.")] = None,
    model: Annotated[str, typer.Option(help="Model folder or Hugging Face id.")] = str(NEEDLE_MODEL),
    tokens: Annotated[int, typer.Option(help="Length of the built-in prompt, in tokens.", min=1024)] = 32768,
    seed: Annotated[int, typer.Option(help="Which built-in question is asked.")] = 0,
    chunk: Annotated[int, typer.Option(help="Prompt tokens vLLM computes at a time.", min=256)] = 8192,
    compare: Annotated[bool, typer.Option(help="Ask the stock backend too.")] = True,
) -> None:
    """Ask one question about a long text, with VSPREFILL and with the stock backend."""
    if prompt is not None:
        try:
            text = prompt.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            console.print(f"[red]{prompt}: {error}[/red]")
            raise typer.Exit(2) from None
        question = Question(text, f"({prompt}, {len(text):,} characters)", None)
        # Room for one token per character and a half is generous for any vocabulary in use.
        limit = max(tokens, int(len(text) / 1.5)) + 512
    elif Path(model).resolve() == NEEDLE_MODEL.resolve():
        question = needle_question(tokens, seed)
        limit = tokens + ANSWER_TOKENS + 64
    else:
        question = generic_question(tokens, seed)
        limit = 2 * tokens + 512
    gpu = has_gpu()
    stock_backend = "FLASH_ATTN" if gpu else "CPU_ATTN"
    console.print(f"[bold]question[/bold]  {question.shown}", markup=True)
    try:
        results: dict[str, Any] = {}
        for backend in ("VSPREFILL", stock_backend) if compare else ("VSPREFILL",):
            running = server(model, backend, limit, gpu=gpu, chunk=chunk)
            try:
                console.print(f"[bold]server[/bold]    {' '.join(running.command)}", soft_wrap=True, markup=True)
                results[backend] = ask(running, question)
            finally:
                with console.status("ending the server"):
                    running.stop()
    except KeyboardInterrupt:
        console.print("\nstopped")
        raise typer.Exit(130) from None
    except (ServerError, openai.OpenAIError) as error:
        console.print(f"[red]{error}[/red]", markup=True)
        console.print(f"Logs are in {LOGS.relative_to(ROOT)}.")
        raise typer.Exit(2) from None
    sparse = results["VSPREFILL"]
    report(question, sparse, results.get(stock_backend), stock_backend)
    problems = []
    if question.is_right(sparse.answer) is False:
        problems.append("the answer is wrong")
    if not sparse.densities.ran_sparse:
        problems.append("no layer ran sparse (is the prompt shorter than min_context?)")
    for problem in problems:
        console.print(f"[red]FAILED: {problem}[/red]")
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
