# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What starts servers and talks to them, with a server of a few lines in the place of vLLM."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from vllm_vsprefill.eval import server as helper
from vllm_vsprefill.eval.server import ServerError, VLLMServer, free_port, loopback

ROOT = Path(__file__).resolve().parent.parent.parent

SERVER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def answer(self, text, kind="text/plain"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.answer('vsprefill_pairs_causal_total{{layer="0"}} 4.0')

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {{"index": 0, "text": "hello", "finish_reason": "stop"}}
        body = {{"id": "1", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}}
        self.answer(json.dumps(body), "application/json")

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose proxy nobody answers at, under every name it goes by."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv(name.upper(), f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def running(tmp_path: Path, behind_a_proxy: None) -> Iterator[VLLMServer]:
    program = tmp_path / "vllm"
    program.write_text(SERVER.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    made = VLLMServer("m", "VSPREFILL", tmp_path / "log", timeout=30)
    made.command[0] = str(program)
    with made:
        yield made


def test_no_request_to_this_machine_goes_through_a_proxy(running: VLLMServer) -> None:
    assert running.densities().causal == {0: 4.0}
    assert running.client().completions.create(model="m", prompt="x").choices[0].text == "hello"
    with loopback() as http:
        assert http.get(running.url).status_code == 200
    with pytest.raises(httpx.ConnectError):  # the proxy is in force
        httpx.get(running.url)
    with pytest.raises(openai.APIConnectionError):
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0).models.list()


def test_nothing_else_in_the_repository_talks_to_servers() -> None:
    """Every other way would have to think of proxies again."""
    names = ("urllib.request", "requests.get", "requests.post", "httpx.get", "httpx.post", "httpx.stream", "OpenAI(")
    for folder in ("benchmarks", "examples", "scripts", "tests", "vllm_vsprefill"):
        for file in (ROOT / folder).rglob("*.py"):
            if file not in (Path(helper.__file__), Path(__file__)):
                assert not [name for name in names if name in file.read_text()], file


def test_a_server_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    made = VLLMServer("m", "VSPREFILL", tmp_path / "log", timeout=30)
    made.command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with pytest.raises(ServerError, match=r"exit code 3[\s\S]*no such model"), made:
        pass
