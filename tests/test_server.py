# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A server over HTTP, used the way people use one: the openai client, several at once, impatient, in error."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from typer.testing import CliRunner

from examples.needle import tasks
from tests.test_stats import values
from vllm_vsprefill.cli import app
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.eval.server import ServerError, VLLMServer, loopback
from vllm_vsprefill.metrics import FAMILIES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "needle" / "model"
OPTIONS = {"min_seq_len": 1024}
TAIL = VSPrefillConfig().dense_last_rows
LIMIT = 8192
ARGUMENTS = ["--served-model-name", "needle", "--max-model-len", str(LIMIT), "--max-num-batched-tokens", "1024"]
ARGUMENTS += ["--dtype", "float32"]  # processors without AVX512-BF16 compute bfloat16 several times slower
EAGER = "--enforce-eager"  # compiled only where most tests are: half of a start on the CPU
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def serve(folder: Path, *extra: str, options: Any = OPTIONS, **environment: str) -> VLLMServer:
    return VLLMServer(
        str(MODEL),
        "vsprefill",
        folder / "server.log",
        arguments=[*ARGUMENTS, *extra],
        options=options,
        environment={**ENVIRONMENT, **environment},
        timeout=300,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMServer]:
    with serve(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def client(server: VLLMServer) -> openai.OpenAI:
    return server.client()


def problem(tokens: int, seed: int = 0, task: tasks.Task = "single") -> tasks.Problem:
    return tasks.make_problem(np.random.default_rng((tokens, seed)), task, "words", tokens)


def ask(client: openai.OpenAI, asked: tasks.Problem, **settings: Any) -> str:
    messages: Any = asked.messages()
    answer = client.chat.completions.create(model="needle", messages=messages, max_tokens=48, temperature=0, **settings)
    return answer.choices[0].message.content or ""


def test_chat_answers_a_long_prompt_sparsely(server: VLLMServer, client: openai.OpenAI) -> None:
    asked = problem(6000)
    before = server.densities()
    assert asked.is_correct(ask(client, asked))
    counted = server.densities().since(before)
    assert counted.ran_sparse
    assert sorted(counted.layers) == list(range(6))
    assert 0 < counted.mean < 1


def test_streaming(client: openai.OpenAI) -> None:
    asked = problem(4000)
    messages: Any = asked.messages()
    stream = client.chat.completions.create(
        model="needle", messages=messages, max_tokens=48, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert asked.is_correct("".join(pieces))
    assert sum(bool(piece) for piece in pieces) > 2


def test_completions_with_token_ids(client: openai.OpenAI) -> None:
    asked = problem(3000)
    answer = client.completions.create(model="needle", prompt=asked.prompt_ids.tolist(), max_tokens=48, temperature=0)
    assert asked.is_correct(answer.choices[0].text)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3000


def test_eight_prompts_of_different_lengths_at_once(server: VLLMServer, client: openai.OpenAI) -> None:
    lengths = (300, 900, 1500, 2100, 3000, 4100, 5000, 7000)
    asked = [problem(length, 1) for length in lengths]
    before = server.densities()
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(client, one), asked))
    assert [one.is_correct(answer) for one, answer in zip(asked, answers, strict=True)] == [True] * len(asked)
    assert server.densities().since(before).ran_sparse


def test_client_that_leaves_while_its_prompt_is_read(server: VLLMServer, client: openai.OpenAI) -> None:
    """The server drops the request, and the next answer, over reused blocks, is right."""
    body = {"model": "needle", "messages": problem(8000, 2).messages(), "max_tokens": 48, "stream": True}
    with pytest.raises(httpx.ReadTimeout), loopback(httpx.Timeout(30, read=0.3)) as http:
        http.post(f"{server.url}/v1/chat/completions", json=body)
    deadline = time.monotonic() + 60
    while "vllm:num_requests_running{" in (text := server.get("/metrics")) and time.monotonic() < deadline:
        if all(line.endswith(" 0.0") for line in text.splitlines() if line.startswith("vllm:num_requests_running{")):
            break
        time.sleep(0.2)
    else:
        pytest.fail("the request still runs a minute after its client left")
    asked = problem(6000, 3)
    assert asked.is_correct(ask(client, asked))


def test_prompt_one_token_over_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"maximum context length|max_model_len|longer than"):
        client.completions.create(model="needle", prompt=problem(LIMIT + 1).prompt_ids.tolist(), max_tokens=1)


def test_prompt_of_exactly_the_limit(client: openai.OpenAI) -> None:
    asked = problem(LIMIT - 32)
    answer = client.completions.create(model="needle", prompt=asked.prompt_ids.tolist(), max_tokens=32, temperature=0)
    assert asked.is_correct(answer.choices[0].text)


def test_shared_prefix_is_reused_and_the_answer_stays(server: VLLMServer, client: openai.OpenAI) -> None:
    asked = problem(5000, 4)
    before = server.densities()
    first = ask(client, asked)
    middle = server.densities()
    assert ask(client, asked) == first
    after = server.densities()
    assert sum(after.since(middle).causal.values()) < 0.2 * sum(middle.since(before).causal.values())


def scraped(server: VLLMServer) -> dict[str, float]:
    return values("\n".join(line for line in server.get("/metrics").splitlines() if "vsprefill_" in line))


def test_metrics_follow_from_the_plan(server: VLLMServer, client: openai.OpenAI) -> None:
    """A prompt of three chunks, the last of which has 952 rows, and a short one: what is counted, to the last token."""
    before = scraped(server)
    for length in (3000, 100):
        prompt = np.random.default_rng(length).integers(100, 1000, length).tolist()
        client.completions.create(
            model="needle", prompt=prompt, max_tokens=4, temperature=0, extra_body={"ignore_eos": True}
        )
    now = scraped(server)
    new = {name: value - before.get(name, 0.0) for name, value in now.items()}
    counted = {name.removeprefix("vsprefill_"): value for name, value in new.items() if value}
    tokens = {name: value for name, value in counted.items() if name.startswith("tokens_total")}
    assert tokens == {
        'tokens_total{path="sparse",reason="none"}': 3000 - 3 * TAIL,
        'tokens_total{path="dense",reason="last_rows"}': 3 * TAIL,
        'tokens_total{path="dense",reason="short_sequence"}': 100,
        # Known when the next prompt is computed: those of the first answer, and of the test before this one.
        'tokens_total{path="dense",reason="decode"}': tokens['tokens_total{path="dense",reason="decode"}'],
    }
    assert tokens['tokens_total{path="dense",reason="decode"}'] >= 3
    assert counted['request_chunks_total{path="sparse",reason="none"}'] == 3
    assert counted['request_chunks_total{path="dense",reason="short_sequence"}'] == 1
    assert counted['index_logits_total{source="scored"}'] == 6 * 3000
    assert counted['index_logits_total{source="cached"}'] == 6 * (1024 + 2048)
    for layer in range(6):  # whether its selection exceeds max_density is for each layer to say
        paths = [counted.get(f'chunks_total{{layer="{layer}",path="{path}"}}', 0) for path in ("sparse", "dense")]
        assert sum(paths) == 4
    for name in ("density_ratio", "choose_seconds"):
        assert [counted[f'{name}_count{{quarter="{q}"}}'] for q in range(1, 5)] == [6, 3, 6, 3]  # 6 layers, 3 steps
    handed_back = sum(value for name, value in counted.items() if 'reason="max_density"' in name)
    assert sum(value for name, value in counted.items() if name.startswith("columns_count")) == 18 - handed_back
    page = server.get("/metrics")
    for family in FAMILIES:  # an indexer's columns are the chunk's: no tile has a list of its own
        assert (f"# HELP {family}" in page) == (family != "vsprefill_tile_keys")


def test_the_log_names_the_estimator(server: VLLMServer) -> None:
    log = server.log.read_text()
    assert "Using VSPREFILL on top of stock CPU attention" in log
    assert "trained indexer for needle" in log
    assert "Traceback" not in log


def test_two_servers_and_two_api_processes(server: VLLMServer, client: openai.OpenAI, tmp_path: Path) -> None:
    """A second server beside the first, with two API processes, counts on its own and disturbs nobody."""
    with serve(tmp_path, EAGER, "--api-server-count", "2") as second:
        other = second.client()
        before = server.densities()
        asked = problem(4000, 5)
        assert asked.is_correct(ask(other, asked))
        assert second.densities().ran_sparse
        text = second.get("/metrics")
        found = values("\n".join(line for line in text.splitlines() if "prompt_tokens_total" in line))
        (asked_for,) = (value for name, value in found.items() if name.startswith("vllm:prompt_tokens_total"))
        counted = {name: value for name, value in scraped(second).items() if name.startswith("vsprefill_tokens_total")}
        assert sum(value for name, value in counted.items() if "decode" not in name) == asked_for
        assert counted['vsprefill_tokens_total{path="sparse",reason="none"}'] == asked_for - 4 * TAIL
        assert not server.densities().since(before).ran_sparse
        assert asked.is_correct(ask(client, asked))


def test_refusal_reaches_the_terminal(tmp_path: Path) -> None:
    """Before any engine process starts, with every problem and without a page of pydantic."""
    with pytest.raises(ServerError) as caught, serve(tmp_path, options={"tau_colums": 2, "window": "x"}):
        pass
    text = str(caught.value)
    assert "did you mean tau_columns" in text
    assert "window" in text
    log = (tmp_path / "server.log").read_text()
    assert "EngineCore" not in log
    assert "validation error" not in log
    assert "input_value" not in log


def test_environment_options_reach_the_engine(tmp_path: Path) -> None:
    with serve(tmp_path, EAGER, options=None, VSPREFILL_ENABLED="false") as running:
        client = running.client()
        asked = problem(4000, 6)
        assert asked.is_correct(ask(client, asked))
        assert "switched off" in running.log.read_text()
        assert not running.densities().ran_sparse


def test_ctrl_c_ends_the_server(tmp_path: Path) -> None:
    """In the middle of a prefill; no process is left and the exchange folder is gone.

    The client gives up some seconds later: vLLM, with any backend, may leave a request that it dropped without an
    answer, and waits for the connection.
    """
    with serve(tmp_path, EAGER) as running:
        assert running.process is not None
        client = running.client()
        ask(client, problem(3000))
        exchange = Path(os.environ["VSPREFILL_STATS_DIR"]), f"vsprefill-{running.process.pid}-*"
        assert list(exchange[0].glob(exchange[1]))
        body = {"model": "needle", "prompt": problem(8000, 7).prompt_ids.tolist(), "max_tokens": 4}
        sender = threading.Thread(target=lambda: _swallow(running.url, body))
        sender.start()
        time.sleep(0.5)
        running.process.send_signal(2)
        assert running.process.wait(timeout=60) is not None
        sender.join(timeout=60)
        assert not list(exchange[0].glob(exchange[1]))


def _swallow(url: str, body: dict[str, Any]) -> None:
    with contextlib.suppress(httpx.HTTPError), loopback(10) as http:
        http.post(f"{url}/v1/completions", json=body)


def test_starting_from_the_repository_root_by_module(tmp_path: Path) -> None:
    """`python -m` puts the working folder, with this project's `kernels/`, first on the path."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "attention" in done.stdout


def test_bench_times_both_modes_and_shares_no_cache_between_them(server: VLLMServer, tmp_path: Path) -> None:
    """`vllm bench serve` itself: one portion of a length and some load, dense and sparse on the same server."""
    pytest.importorskip("pandas")
    words = ["bench", "--url", server.url, "--out", str(tmp_path), "--lengths", "4k", "--samples", "1"]
    words += ["--rate", "2", "--seconds", "2", "--prefix-share", "1", "--output-tokens", "4", "--ttft-limit", "100"]
    words += ["--seed", "3"]  # of which the first four prompts go on from the same document
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    found = {(f["loop"], f["target"]): f for f in json.loads((tmp_path / "results.json").read_text())["figures"]}
    for loop, requests in (("closed", 1), ("open", 4)):
        dense, sparse = found[loop, "dense"], found[loop, "sparse"]
        assert dense["density"] == 1
        assert 0 < sparse["density"] < 1
        assert dense["prompt_tokens"] == sparse["prompt_tokens"]
        assert 3800 < min(dense["prompt_tokens"]) <= max(dense["prompt_tokens"]) <= 4092
        assert [(f["requests"], f["failed"]) for f in (dense, sparse)] == [(requests, 0)] * 2
    for target in ("dense", "sparse"):
        # Both were sent the same prompts, of which neither may find what the other has left.
        assert found["closed", target]["prefix_hits"] == 0
        assert found["open", target]["prefix_hits"] > 0.2
        assert found["open", target]["goodput"] == found["open", target]["requests_per_second"]
        theirs = json.loads((tmp_path / "runs" / f"{target}-open-2-2s.json").read_text())
        for name in ("p50", "p99"):
            assert found["open", target][f"ttft_{name}"] == pytest.approx(theirs[f"{name}_ttft_ms"] / 1e3, rel=1e-3)
        throughput = theirs["total_token_throughput"]
        assert found["open", target]["tokens_per_second"] == pytest.approx(throughput, rel=1e-2)
