# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The service of `compose.cpu.yaml`, started as user 2000 on a root file system that cannot be written to, from an
environment that the Dockerfile's steps made, and scraped by a real Prometheus."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from examples.needle import tasks
from tests.docker import container, image
from tests.docker.project import COMPOSE, COMPOSE_CPU, DOCKER, queries, raw, services
from tests.test_packaging import ROOT
from vllm_vsprefill.eval.server import HOST, free_port, loopback

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {
    "SERVER_ARGS": "--max-model-len 8192 --max-num-batched-tokens 1024",
    "VSPREFILL_MIN_SEQ_LEN": "1024",
    "VSPREFILL_DENSE_LAYERS": "0",
    "CPU_KVCACHE_GIB": "1",
}
INTERVAL = 1  # seconds between scrapes
WINDOW = "30s"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[container.ContainedServer]:
    folder = tmp_path_factory.mktemp("server")
    built = image.build(folder)
    service = services(COMPOSE, COMPOSE_CPU, **SETTINGS)["server"]
    here = ROOT / "examples" / "needle" / "model"
    environment = service["environment"] | {"PATH": container.path(built.python)}
    contained = None
    if container.unavailable() is None:
        contained = container.Container(service["user"], environment, [ROOT, folder])
    running = container.ContainedServer(
        service | {"environment": environment},
        built.python,
        {"/models/needle": here},
        tmp_path_factory.mktemp("log") / "server.log",
        contained,
    )
    with running:
        yield running


@pytest.fixture(scope="module")
def contained(server: container.ContainedServer) -> container.ContainedServer:
    if server.container is None:
        pytest.skip(str(container.unavailable()))
    return server


def ask(server: container.ContainedServer, tokens: int, seed: int = 0) -> bool:
    """Whether the answer to a question about a text is right."""
    asked = tasks.make_problem(np.random.default_rng((tokens, seed)), "single", "words", tokens)
    messages: Any = asked.messages()
    client: openai.OpenAI = server.client()
    answer = client.chat.completions.create(model="needle", messages=messages, max_tokens=48, temperature=0)
    return asked.is_correct(answer.choices[0].message.content or "")


def test_the_server_answers_sparsely_from_the_image_s_package(server: container.ContainedServer) -> None:
    before = server.densities()
    assert ask(server, 3000)
    assert server.densities().since(before).ran_sparse
    log = server.log.read_text()
    assert "Using VSPREFILL on top of stock CPU attention" in log
    assert "trained indexer for needle" in log
    assert "Traceback" not in log
    code = "import vllm_vsprefill as p; print(p.__file__)"
    done = server.execute(str(server.python), "-P", "-c", code)
    assert done.stdout.strip() == str(server.python.parent.parent / image.SITE / "vllm_vsprefill" / "__init__.py")


def test_it_runs_as_the_user_and_can_write_to_home_and_tmp_alone(contained: container.ContainedServer) -> None:
    assert contained.process is not None
    uids = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            same = os.readlink(process / "ns/mnt") == os.readlink(f"/proc/{contained.process.pid}/ns/mnt")
            status = (process / "status").read_text()
        except OSError:  # ended meanwhile
            continue
        if same:
            uids.add(tuple(re.findall(r"^(?:Uid|Gid):\t(\d+)", status, re.M)))
    assert uids == {("2000", "0")}
    for folder, may in (("/", False), ("/usr", False), (str(ROOT), False), ("/tmp", True), (container.HOME, True)):
        done = contained.execute("touch", f"{folder}/written")
        assert (done.returncode == 0) is may, (folder, done.stderr)
    # Nothing asked for a place to write that it did not get.
    assert not re.search(r"Read-only file system|Permission denied", contained.log.read_text())


def test_the_health_check_of_the_compose_file(server: container.ContainedServer) -> None:
    kind, _, *rest = raw(COMPOSE)["services"]["server"]["healthcheck"]["test"]
    assert kind == "CMD"
    asked = [word.replace("127.0.0.1:8000", f"{HOST}:{server.port}") for word in rest]
    assert server.execute(str(server.python), *asked).returncode == 0
    asked = [word.replace("127.0.0.1:8000", f"{HOST}:{free_port()}") for word in rest]
    assert server.execute(str(server.python), *asked).returncode != 0


def test_status_and_mode_beside_the_server(server: container.ContainedServer) -> None:
    command = str(server.python.parent / "vsprefill")
    done = server.execute(command, "status")
    assert done.returncode == 0, done.stderr
    assert "1 workers, mode sparse" in done.stdout
    before = server.densities()
    assert ask(server, 6000, 1)
    assert server.densities().since(before).ran_sparse
    assert "dense prefill from the next step on" in server.execute(command, "mode", "dense").stdout
    time.sleep(1)
    before = server.densities()
    assert ask(server, 6000, 2)
    assert not server.densities().since(before).ran_sparse
    assert server.execute(command, "mode", "sparse").returncode == 0
    time.sleep(1)
    before = server.densities()
    assert ask(server, 6000, 3)
    assert server.densities().since(before).ran_sparse


# --- Prometheus


@pytest.fixture(scope="module")
def prometheus(server: container.ContainedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prometheus with the configuration of the compose file, which has seen sparse and dense prompts."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("needs prometheus (Debian package prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    text = (DOCKER / "prometheus" / "prometheus.yml").read_text()
    assert "server:8000" in text
    text = text.replace("server:8000", f"{HOST}:{server.port}").replace("5s", f"{INTERVAL}s")
    (folder / "prometheus.yml").write_text(text)
    address = f"{HOST}:{free_port()}"
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        wait_for(lambda: query(f"http://{address}", 'up{job="vllm"} == 1'), folder / "log")
        for seed in range(2):  # a rate takes a change between two scrapes
            for tokens in (500, 3000):
                assert ask(server, tokens, 10 + seed)
            time.sleep(2.5 * INTERVAL)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def query(address: str, expression: str) -> list[float]:
    """Values that Prometheus answers, one for each series."""
    with loopback() as http:
        answer = http.get(f"{address}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", (expression, answer)
    return [float(one["value"][1]) for one in answer["data"]["result"]]


def wait_for(condition: Any, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if condition():
                return
        except (httpx.TransportError, json.JSONDecodeError, AssertionError):
            pass  # still starting
        time.sleep(0.3)
    pytest.fail(log.read_text()[-2000:])


@pytest.mark.parametrize(("title", "expression"), list(queries()))
def test_prometheus_answers_the_dashboard(title: str, expression: str, prometheus: str) -> None:
    values = query(prometheus, expression.replace("$__rate_interval", WINDOW))
    assert values, title
    assert not any(map(math.isnan, values)), (title, values)


def test_shares_lie_between_their_ends(prometheus: str) -> None:
    of = {title: [] for title, _ in queries()}  # type: dict[str, list[float]]
    for title, expression in queries():
        of[title] += query(prometheus, expression.replace("$__rate_interval", WINDOW))
    for title in ("Density now", "Sparse share now", "Density by layers", "Dense share by layers"):
        assert all(0 < value < 1 for value in of[title]), (title, of[title])
    assert len(of["Chunks of layers by path"]) == 2
    assert len(of["Density by layers"]) == 1  # six layers are one group
