# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``python -m benchmarks.load`` with a program of a few lines in vLLM's place, which serves and measures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load

ROOT = Path(__file__).resolve().parents[2]
NEEDLE = ROOT / "examples" / "needle" / "model"

PROGRAM = """
import contextlib, http.client, json, os, pathlib, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

def measure(given):
    lines = pathlib.Path(given["--dataset-path"]).read_text().splitlines()
    with contextlib.closing(http.client.HTTPConnection(given["--base-url"].split("//")[1])) as connection:
        connection.request("GET", "/speed")
        answer = connection.getresponse()
        ttft = float(given["--request-rate"]) / float(answer.read())
    many = [ttft] * len(lines)
    result = {"duration": 10.0, "input_lens": [9] * len(lines), "output_lens": [1] * len(lines), "ttfts": many}
    result |= {"itls": [[]] * len(lines), "errors": [""] * len(lines)}
    pathlib.Path(given["--result-dir"], given["--result-filename"]).write_text(json.dumps(result))

def serve(given):
    backend = given.get("--attention-backend", "stock")
    if os.environ.get("BROKEN") == backend:
        sys.exit("no such backend")
    model = {"id": sys.argv[2], "root": sys.argv[2], "max_model_len": int(given["--max-model-len"])}
    answers = {
        "/health": {}, "/v1/models": {"data": [model]}, "/version": {"version": "0.1"}, "/metrics": {},
        "/v1/completions": {"choices": [{"text": ""}]}, "/speed": 2 if backend == "VSPREFILL" else 1,
    }
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            data = json.dumps(answers[self.path]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

    HTTPServer(("127.0.0.1", int(given["--port"])), Handler).serve_forever()

def main():
    given = dict(zip(sys.argv[2:], [*sys.argv[3:], ""]))
    (serve if sys.argv[1] == "serve" else measure)(given)

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "instead" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "main.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'instead'}{os.pathsep}{ROOT}")
    monkeypatch.chdir(tmp_path)  # `python -m` looks there first
    return tmp_path / "load.json"


def run(out: Path, **given: Any) -> dict[str, Any]:
    data = str(ROOT / "docs")
    load.main(NEEDLE, out, lengths="256,512", rates="1,2", seconds=5, ttft_limit=1.0, data=data, **given)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_what_both_servers_take(result: Path) -> None:
    found = run(result)
    assert found["capacity"] == {"stock": {"rate": 1.0, "goodput": 0.5}, "vsprefill": {"rate": 2.0, "goodput": 1.0}}
    assert [(f["target"], f["rate"], f.get("times_stock")) for f in found["figures"]] == [
        ("stock", 1.0, None), ("vsprefill", 1.0, 2.0), ("stock", 2.0, None), ("vsprefill", 2.0, 2.0)
    ]  # fmt: skip
    assert found["servers"]["stock"]["vllm"] == "0.1"
    assert "--max-model-len 512" in found["servers"]["vsprefill"]["command"]
    assert str(ROOT) not in result.read_text()
    assert not found["failed"]


def test_one_that_fails_leaves_the_other(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "VSPREFILL")
    with pytest.raises(SystemExit, match="failed: vsprefill"):
        run(result)
    found = json.loads(result.read_text())
    assert "no such backend" in found["failed"]["vsprefill"]
    assert [f["target"] for f in found["figures"]] == ["stock", "stock"]
    monkeypatch.delenv("BROKEN")
    monkeypatch.setenv("BROKEN", "stock")  # which is finished, and need not start again
    found = run(result)
    assert len(found["figures"]) == 4


def test_no_time_left_is_told(result: Path) -> None:
    with pytest.raises(SystemExit, match="failed: stock, vsprefill"):
        run(result, limit_s=0.5)
    assert "stock" in json.loads(result.read_text())["failed"]
