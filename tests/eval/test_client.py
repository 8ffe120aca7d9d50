# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a person is told when a server is not there, not the right one or in trouble."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.eval.fake import MODELS, serving
from vllm_vsprefill.eval.client import Client, is_loopback
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.server import free_port
from vllm_vsprefill.eval.tokens import ServerTokens, check_tokens, open_tokens


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def test_nobody_there() -> None:
    with pytest.raises(EvalError, match=r"no server answers at http://127.0.0.1:\d+.*is --url right"):
        Client(f"http://127.0.0.1:{free_port()}")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_no_address(url: str) -> None:
    with pytest.raises(EvalError, match="is no address of a server"):
        Client(url)


def test_wrong_model_names_those_there_are() -> None:
    with (
        serving({"/v1/models": (200, MODELS)}) as url,
        pytest.raises(EvalError, match="does not serve 'n'; it serves m"),
    ):
        Client(url, "n")


def test_several_models_need_a_name() -> None:
    two = {"data": [{"id": "a", "root": "a"}, {"id": "b", "root": "b"}]}
    with serving({"/v1/models": (200, two)}) as url:
        with pytest.raises(EvalError, match="several models: say which with --model: a, b"):
            Client(url)
        assert Client(url + "/v1/", "b").model == "b"


def test_not_an_openai_server() -> None:
    with serving({"/v1/models": (200, "<html>")}) as url, pytest.raises(EvalError, match="something else than a JSON"):
        Client(url)


def test_a_refusal_is_shown_with_its_reason() -> None:
    refusal = (400, {"error": {"message": "the prompt is too long"}})
    with serving({"/v1/models": (200, MODELS), "/v1/completions": refusal}) as url, Client(url) as client:
        refused = pytest.raises(EvalError, match="refused: 400, the prompt is too long")
        with refused:
            client.answer([1, 2], 1)


def test_one_failure_is_forgiven() -> None:
    seen: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body)
        return (503, "busy") if len(seen) == 1 else (200, {"choices": [{"text": "yes"}]})

    with serving({"/v1/models": (200, MODELS), "/v1/completions": reply}) as url, Client(url) as client:
        assert client.answer([1, 2], 1).text == "yes"
        client.answer([1, 2], 1)
    assert seen[1]["temperature"] == 0
    assert seen[1]["cache_salt"] != seen[2]["cache_salt"]  # nothing comes from a cache


def test_a_server_without_prompt_logprobs() -> None:
    answer = (200, {"choices": [{"text": "a"}]})
    with serving({"/v1/models": (200, MODELS), "/v1/completions": answer}) as url, Client(url) as client:
        refused = pytest.raises(EvalError, match="expected vLLM")
        with refused:
            client.rows([1, 2], 1)


def test_a_server_without_counters() -> None:
    with serving({"/v1/models": (200, MODELS), "/metrics": (200, "up 1\n")}) as url, Client(url) as client:
        assert client.densities() is None


def test_loopback_needs_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    with serving({"/v1/models": (200, MODELS)}) as url:
        assert Client(url).model == "m"
    assert is_loopback("http://localhost:8000")
    assert is_loopback("http://[::1]:8000")
    assert is_loopback("http://0.0.0.0:8000")
    assert not is_loopback("http://10.0.0.1:8000")


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "ftp://proxy"])
def test_a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(EvalError, match=r"a proxy that the environment names cannot be used .*NO_PROXY=\*"):
        Client("http://vsprefill.invalid:8000")
    monkeypatch.setenv("NO_PROXY", "*")  # the remedy of the message
    with pytest.raises(EvalError, match="no server answers"):
        Client("http://vsprefill.invalid:8000")


class Characters:
    """A tokenizer of single characters."""

    has_chat = False

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def prefix(self) -> list[int]:
        return []

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        raise NotImplementedError


def test_a_tokenizer_that_is_not_the_servers() -> None:
    replies: dict[str, Any] = {"/v1/models": (200, MODELS), "/tokenize": (200, {"tokens": [1, 2, 3]})}
    with (
        serving(replies) as url,
        Client(url) as client,
        pytest.raises(EvalError, match=r"the tokenizer of 'mine' is not the server's.*the server 3, .*--tokenizer"),
    ):
        check_tokens(Characters(), client, "mine")


def test_the_servers_tokenizer_where_there_is_none_here() -> None:
    def tokenize(body: dict[str, Any]) -> tuple[int, Any]:
        bos = [7] if body.get("add_special_tokens") else []
        return 200, {"tokens": bos + [ord(c) for c in body["prompt"]]}

    with serving({"/v1/models": (200, MODELS), "/tokenize": tokenize}) as url, Client(url) as client:
        tokens = open_tokens(client, None)
        assert isinstance(tokens, ServerTokens)
        assert tokens.prefix() == [7]
        assert tokens.encode("ab") == [97, 98]
        check_tokens(Characters(), client, "mine")


def test_another_kind_of_tokenize() -> None:
    replies = {"/v1/models": (200, MODELS), "/tokenize": (200, {"ids": []})}
    with serving(replies) as url, Client(url) as client, pytest.raises(EvalError, match="not answer as vLLM's; name a"):
        ServerTokens(client).encode("a")
