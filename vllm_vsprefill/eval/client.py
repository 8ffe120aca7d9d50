# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A client of an OpenAI-compatible server, with what vLLM adds: log-probabilities of a prompt, counters."""

from __future__ import annotations

import ipaddress
import itertools
import time
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from vllm_vsprefill.eval.density import Densities
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.rows import Rows

TIMEOUT = httpx.Timeout(1800.0, connect=10.0)  # a long prompt on a CPU takes minutes
ATTEMPTS = 2


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own, to be reached without a proxy."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified  # 0.0.0.0, as servers print it, leads here, too
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Answer:
    """Greedy answer to a prompt."""

    text: str
    seconds: float


class Client:
    """One server and one of its models.

    Args:
        url: root of the server, with or without ``/v1``.
        model: name the server knows it by; None where it serves one.
        api_key: sent as a bearer token, if the server wants one.

    Raises:
        EvalError: there is no server, or it does not have the model.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        url = url.rstrip("/").removesuffix("/v1")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise EvalError(f"{url!r} is no address of a server; expected one such as http://127.0.0.1:8000")
        self.url = url
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._http = httpx.Client(base_url=url, timeout=TIMEOUT, headers=headers, trust_env=not is_loopback(url))
        except (ImportError, ValueError) as error:
            raise EvalError(
                f"a proxy that the environment names cannot be used ({error}); correct or unset its variable, or set "
                "NO_PROXY=* to use none"
            ) from None
        # Salts of this client and no other: a prompt sent twice is computed twice.
        self._salt, self._sent = uuid.uuid4().hex, itertools.count()
        try:
            self._find_model(model)
        except EvalError:
            self.close()
            raise

    def _find_model(self, model: str | None) -> None:
        served = self.get("/v1/models").get("data")
        if not isinstance(served, list) or not served:
            raise EvalError(f"{self.url}/v1/models lists no model: expected an OpenAI-compatible server")
        names = [str(entry.get("id")) for entry in served]
        if model is None and len({entry.get("root", entry.get("id")) for entry in served}) > 1:
            raise EvalError(f"{self.url} serves several models: say which with --model: {', '.join(names)}")
        if model is not None and model not in names:
            raise EvalError(f"{self.url} does not serve {model!r}; it serves {', '.join(names)}")
        entry = served[names.index(model) if model is not None else 0]
        self.model = str(entry["id"])
        self.root = str(entry.get("root") or self.model)
        limit = entry.get("max_model_len")
        self.max_model_len = int(limit) if limit is not None else None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path."""
        return self._json(self._send("GET", path), path)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON object that a request is answered with."""
        return self._json(self._send("POST", path, body), path)

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                response = self._http.request(method, path, json=body)
            except httpx.ConnectError as error:
                if attempt < ATTEMPTS:
                    time.sleep(1)
                    continue
                raise EvalError(f"no server answers at {self.url} ({error}); is it running, is --url right?") from None
            except httpx.TimeoutException:
                raise EvalError(f"{self.url}{path} did not answer in {TIMEOUT.read:.0f} s") from None
            except httpx.HTTPError as error:
                if attempt < ATTEMPTS:
                    time.sleep(1)
                    continue
                raise EvalError(f"{self.url}{path}: the connection broke ({error or type(error).__name__})") from None
            if response.status_code >= 500 and attempt < ATTEMPTS:
                time.sleep(1)
                continue
            if response.status_code >= 400:
                raise EvalError(f"{self.url}{path} refused: {response.status_code}, {_reason(response)}")
            return response
        raise AssertionError("unreachable")

    def _json(self, response: httpx.Response, path: str) -> dict[str, Any]:
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise EvalError(f"{self.url}{path} answered with something else than a JSON object")
        return found

    def _fresh(self, prompt: list[int], max_tokens: int) -> dict[str, Any]:
        salt = f"{self._salt}-{next(self._sent)}"
        return {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "cache_salt": salt}

    def answer(self, prompt: list[int], max_tokens: int) -> Answer:
        """Greedy continuation of a prompt that is computed anew, and how long it took."""
        begin = time.perf_counter()
        found = self.post("/v1/completions", self._fresh(prompt, max_tokens))
        seconds = time.perf_counter() - begin
        return Answer(str(self._choice(found).get("text", "")), seconds)

    def rows(self, prompt: list[int], top: int) -> Rows:
        """Log-probabilities of every token of a prompt after the first, and of the ``top`` likeliest in its place."""
        found = self.post("/v1/completions", {**self._fresh(prompt, 1), "prompt_logprobs": top})
        listed = self._choice(found).get("prompt_logprobs")
        if not isinstance(listed, list) or len(listed) != len(prompt):
            raise EvalError(f"{self.url} gives no log-probabilities of prompts (prompt_logprobs); expected vLLM")
        return Rows.parse(prompt, listed, top)

    def _choice(self, found: dict[str, Any]) -> dict[str, Any]:
        choices = found.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EvalError(f"{self.url}/v1/completions answered without a choice")
        return choices[0]

    def densities(self) -> Densities | None:
        """Counters of ``vsprefill_*`` as they stand now; None where the server has none.

        Counts of a device arrive a little after the answer, so they are read until they stand still.
        """
        before = self._densities()
        for _ in range(20):
            if before is None:
                return None
            time.sleep(0.15)
            now = self._densities()
            if now == before:
                break
            before = now
        return before

    def _densities(self) -> Densities | None:
        text = self.metrics()
        found = Densities.parse(text) if text is not None else None
        return found if found is not None and found.causal else None

    def version(self) -> str | None:
        """vLLM's version; None where the server does not say."""
        try:
            return str(self.get("/version")["version"])
        except (EvalError, KeyError):
            return None

    def metrics(self) -> str | None:
        """The text of ``/metrics``; None where there is none."""
        try:
            response = self._http.get("/metrics")
        except httpx.HTTPError:
            return None
        return response.text if response.status_code == 200 else None


def _reason(response: httpx.Response) -> str:
    """What a refusal says."""
    try:
        found = response.json()
        error = found.get("error", found) if isinstance(found, dict) else found
        message = error.get("message") if isinstance(error, dict) else None
    except ValueError:
        message = None
    return str(message or response.text or response.reason_phrase).strip()[:500]
