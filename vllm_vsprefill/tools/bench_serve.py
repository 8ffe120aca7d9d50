# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``vllm bench serve`` on a list of prompts, and what it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_vsprefill.eval.client import Client
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.tools.bench_prompts import Request
from vllm_vsprefill.tools.errors import plain

EXTRAS = "pip install 'vllm[bench]' (with the CPU build: pip install pandas datasets)"
HERE = "localhost,127.0.0.1,0.0.0.0,::1"  # reached without a proxy
LOOK = 0.3  # seconds between two looks at how far it is


def check() -> None:
    """EvalError if ``vllm bench serve`` cannot run here."""
    if find_spec("vllm") is None:
        raise EvalError("vllm bench serve is vLLM's: run this command where vLLM is installed")
    if find_spec("pandas") is None:
        raise EvalError(f"vllm bench serve needs what its extra installs, and pandas is missing: {EXTRAS}")


@dataclass(frozen=True)
class Measured:
    """One run; the lists have an entry for each request, in the order in which they were sent.

    Attributes:
        seconds: from the first request to the last answer.
        prompts: tokens of the prompt.
        answers: tokens of the answer.
        ttfts: seconds to the first token; 0 where there is none.
        latencies: seconds to the last one.
        errors: why a request failed; empty where it did not.
    """

    seconds: float
    prompts: list[int]
    answers: list[int]
    ttfts: list[float]
    latencies: list[float]
    errors: list[str]

    @classmethod
    def parse(cls, found: dict[str, Any]) -> Measured:
        """Read a result of ``vllm bench serve --save-detailed``.

        Raises:
            EvalError: it is none.
        """
        try:
            ttfts = [float(t) for t in found["ttfts"]]
            waits = [sum(between) for between in found["itls"]]
            made = cls(
                float(found["duration"]),
                [int(n) for n in found["input_lens"]],
                [int(n) for n in found["output_lens"]],
                ttfts,
                [first + rest for first, rest in zip(ttfts, waits, strict=True)],
                [
                    str(error) or ("" if first else "no token came")
                    for error, first in zip(found["errors"], ttfts, strict=True)
                ],
            )
            if {len(made.prompts), len(made.answers)} != {len(ttfts)}:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise EvalError(
                "vllm bench serve wrote a result that this version of vllm-vsprefill cannot read; expected duration, "
                "input_lens, output_lens, ttfts, itls and errors"
            ) from None
        return made

    @classmethod
    def of(cls, record: dict[str, Any]) -> Measured:
        """What ``record`` packed."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})

    def record(self) -> dict[str, Any]:
        """For a line of a journal."""
        rounded = {name: [round(x, 6) for x in getattr(self, name)] for name in ("ttfts", "latencies")}
        return {**asdict(self), **rounded, "seconds": round(self.seconds, 6), "errors": list(map(reason, self.errors))}


def reason(error: str) -> str:
    """A traceback's last line."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return plain(lines[-1])[:300] if lines else ""


class Bench:
    """Runs ``vllm bench serve`` in a process of its own, which is started when it is first needed.

    Use as a context manager; leaving it ends the process.

    Args:
        folder: for results and logs.
        tokenizer: folder or id.
        output_tokens: of every answer.
        seed: of the arrivals.
    """

    def __init__(self, folder: Path, tokenizer: str, output_tokens: int, seed: int) -> None:
        self.folder, self.tokenizer, self.output_tokens, self.seed = folder, tokenizer, output_tokens, seed
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process, whatever it is at."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it holds nothing but a connection
            process.communicate()

    def run(
        self,
        client: Client,
        requests: Sequence[Request],
        name: str,
        salt: str,
        *,
        rate: float | None = None,
        concurrency: int | None = None,
        until: float | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Measured:
        """Send prompts to a server.

        Args:
            client: of the server and its model.
            requests: in the order in which they are sent.
            name: of the files of this run.
            salt: of the prefix cache; runs with another one share nothing.
            rate: requests a second, by a Poisson process; None: as soon as may be.
            concurrency: at most so many at a time; None: as many as arrive.
            until: when to give up, by ``time.monotonic``.
            progress: called with the number of requests that are finished.

        Raises:
            EvalError: it could not run or no request was answered. The message says why.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        prompts, result, log = (self.folder / f"{name}.{kind}" for kind in ("jsonl", "json", "log"))
        result.unlink(missing_ok=True)
        try:
            prompts.write_text("".join(json.dumps({"prompt": one.text}) + "\n" for one in requests))
            command = self._arguments(client, prompts, result, len(requests), salt, rate, concurrency)
            status = self._ask({"arguments": command, "log": str(log.resolve())}, log, until, progress)
        finally:
            prompts.unlink(missing_ok=True)  # large, and made again from the seed
        said = log.read_text(errors="replace") if log.exists() else ""
        if status or not result.exists():
            if "vllm[bench]" in said or "No module named" in said:
                raise EvalError(f"vllm bench serve needs what its extra installs ({reason(said)}): {EXTRAS}")
            why = reason(said) or "it said nothing"
            raise EvalError(f"vllm bench serve failed: {why}\nThe whole log: {_shown(log)}")
        measured = Measured.parse(json.loads(result.read_text()))
        if all(measured.errors):
            why = reason(measured.errors[0])
            raise EvalError(f"{client.url} answered none of {len(requests)} requests ({why}); its log says more")
        return measured

    def _arguments(
        self,
        client: Client,
        prompts: Path,
        result: Path,
        count: int,
        salt: str,
        rate: float | None,
        concurrency: int | None,
    ) -> list[str]:
        made = ["--backend", "openai", "--base-url", client.url, "--endpoint", "/v1/completions"]
        made += ["--model", client.model, "--tokenizer", self.tokenizer]
        made += ["--dataset-name", "custom", "--dataset-path", str(prompts.resolve()), "--num-prompts", str(count)]
        made += ["--disable-shuffle", "--skip-chat-template", "--custom-output-len", str(self.output_tokens)]
        made += ["--ignore-eos", "--temperature", "0", "--seed", str(self.seed), "--ready-check-timeout-sec", "0"]
        made += ["--extra-body", json.dumps({"cache_salt": salt})]
        made += ["--request-rate", str(rate)] if rate is not None else []
        made += ["--max-concurrency", str(concurrency)] if concurrency is not None else []
        made += ["--save-result", "--save-detailed", "--metric-percentiles", "50,99"]
        return [*made, "--result-dir", str(result.parent.resolve()), "--result-filename", result.name]

    def _ask(self, task: dict[str, Any], log: Path, until: float | None, progress: Callable[[int], None]) -> int:
        log.unlink(missing_ok=True)
        try:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(task) + "\n")
                process.stdin.flush()
            while not select.select([process.stdout], [], [], LOOK)[0]:
                progress(_finished(log))
                if until is not None and time.monotonic() > until:
                    raise EvalError("vllm bench serve did not finish in the time given")
            answer = process.stdout.readline()
        except BaseException:
            self.stop()
            raise
        if not answer:  # it ended, which a failure of the command does not make it do
            code = process.wait()
            self.stop()
            return code or 1
        return int(json.loads(answer)["status"])

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {**os.environ, "VLLM_USE_RUST_BENCH": "0", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
            for variable in ("no_proxy", "NO_PROXY"):
                environment[variable] = f"{os.environ.get(variable, '')},{HERE}".lstrip(",")
            # A session of its own: Ctrl-C reaches this process only.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm_vsprefill.tools.bench_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                start_new_session=True,
            )
        return self._process


def _finished(log: Path) -> int:
    """Requests that its progress bar counts."""
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(max(log.stat().st_size - 400, 0))
        if found := re.findall(rb"(\d+)/\d+ \[", file.read()):
            return int(found[-1])
    return 0


def _shown(path: Path) -> str:
    return os.path.relpath(path)
