# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which of this machine's servers is the one at a URL."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_vsprefill.eval import targets
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.options import ServerOptions
from vllm_vsprefill.exchange import Server


class Listening(Server):
    """A server that listens on the port that is its process id; 0: nobody can say."""

    def listens_on(self, port: int) -> bool | None:
        return None if self.pid == 0 else self.pid == port


def chosen(monkeypatch: pytest.MonkeyPatch, *pids: int, server: str | None = None) -> int:
    found = [Listening(pid, f"name{pid}", Path("nowhere")) for pid in pids]
    monkeypatch.setattr(targets, "find_servers", lambda: found)
    return targets.local_server(ServerOptions(url="http://127.0.0.1:8000", server=server)).pid


def test_the_server_that_listens_at_the_url_is_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, 7999, 8000, 8001) == 8000
    assert chosen(monkeypatch, 0, 7999) == 0  # in a container, say
    assert chosen(monkeypatch, 0, 8000) == 8000
    assert chosen(monkeypatch, 7999, server="7999") == 7999  # as the user says


def test_another_server_of_the_machine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EvalError, match="no server with VSPREFILL"):
        chosen(monkeypatch, 7999)
    with pytest.raises(EvalError, match="several servers"):
        chosen(monkeypatch, 0, 0)
