# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Exchange folders: made, found, inherited, left behind and removed."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from vllm_vsprefill import exchange
from vllm_vsprefill.eval.server import free_port
from vllm_vsprefill.exchange import EXCHANGE_VARIABLE, OWNER_FILE, STATS_DIR_VARIABLE, open_exchange, servers
from vllm_vsprefill.stats import Recorder, read_modes


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(STATS_DIR_VARIABLE, str(tmp_path / "a" / "b"))
    monkeypatch.delenv(EXCHANGE_VARIABLE, raising=False)
    monkeypatch.setattr(exchange, "_opened", [])
    return tmp_path / "a" / "b"


def made() -> Path:
    """The folder of a server that is started in this process."""
    found = open_exchange()
    assert found.folder is not None
    assert found.made
    return found.folder


def program(text: str, base: Path) -> subprocess.Popen[str]:
    """A Python process with ``exchange`` imported and ``VSPREFILL_STATS_DIR`` set."""
    environ = {name: value for name, value in os.environ.items() if name != EXCHANGE_VARIABLE}
    environ[STATS_DIR_VARIABLE] = str(base)
    code = "import os, sys, time\nfrom vllm_vsprefill import exchange\n" + text
    return subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True)


def test_every_engine_gets_a_folder_of_its_own(base: Path) -> None:
    first, second = made(), made()
    assert first.parent == second.parent == base
    assert first != second
    assert exchange.opened() == [first, second]
    assert [server.is_running() for server in servers(base)] == [True, True]
    assert {server.folder for server in servers(base)} == {first, second}
    assert servers(first)[0].folder == first  # the folder itself may be named, too
    started = servers(first)[0].started
    assert started is not None
    assert abs(started - time.time()) < 60
    assert first.stat().st_mode & 0o777 == 0o700


def test_a_killed_server_is_known_and_removed_by_the_next(base: Path) -> None:
    process = program("print(exchange.open_exchange().folder, flush=True)\ntime.sleep(60)", base)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    (folder / "mode").write_text("dense\n")
    (server,) = servers(base)
    assert (server.pid, server.folder, server.is_running()) == (process.pid, folder, True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not server.is_running()
    # The process id is no proof: here, and in a restarted container, another process has it.
    reused = folder.rename(base / f"vsprefill-{os.getpid()}-{server.name}")
    assert not servers(base)[0].is_running()
    fresh = made()
    assert not reused.exists()
    assert [one.folder for one in servers(base)] == [fresh]
    assert not (fresh / "mode").exists()


def test_which_port_a_server_listens_on(base: Path) -> None:
    """In the process itself or, as with several API servers, in a child."""
    text = (
        "import socket\n"
        "exchange.open_exchange()\n"
        "own, other = (socket.create_server(('127.0.0.1', 0)) for _ in range(2))\n"
        "print(own.getsockname()[1], other.getsockname()[1], flush=True)\n"
        "if os.fork(): other.close()\n"
        "else: own.close()\n"
        "time.sleep(60)\n"
    )
    process = program(text, base)
    assert process.stdout is not None
    ports = [int(port) for port in process.stdout.readline().split()]
    (server,) = servers(base)
    try:
        assert all(server.listens_on(port) for port in ports)
        assert server.listens_on(free_port()) is False
        with socket.create_server(("127.0.0.1", 0)) as another:
            assert server.listens_on(another.getsockname()[1]) is False
    finally:
        for one in psutil.Process(process.pid).children():
            one.kill()
        process.kill()
        process.wait()
    assert server.listens_on(ports[0]) is None


def test_removed_at_exit(base: Path) -> None:
    process = program("print(exchange.open_exchange().folder)", base)
    folder = Path(process.communicate()[0].strip())
    assert folder.parent == base
    assert not folder.exists()


def test_a_forked_child_removes_nothing_and_keeps_its_server_running(base: Path) -> None:
    text = (
        "folder = exchange.open_exchange().folder\n"
        "pid = os.fork()\n"
        "if not pid: time.sleep(60)\n"
        "print(folder, pid, flush=True)\n"
        "os._exit(0)\n"
    )
    process = program(text, base)
    assert process.stdout is not None
    folder, child = process.stdout.readline().split()
    process.wait()
    (server,) = servers(base)
    assert server.is_running()  # a worker that outlives the process that forked it
    os.kill(int(child), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while server.is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not server.is_running()
    assert Path(folder).exists()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_belong_to_the_server_of_their_parent(base: Path, tmp_path: Path, method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from vllm_vsprefill import exchange\n"
        "def child(queue):\n"
        "    queue.put((exchange.open_exchange().folder, exchange.opened()))\n"
        "if __name__ == '__main__':\n"
        f"    context = multiprocessing.get_context({method!r})\n"
        "    own, queue = exchange.open_exchange().folder, context.Queue()\n"
        "    process = context.Process(target=child, args=(queue,)); process.start()\n"
        "    folder, opened = queue.get(); process.join()\n"
        "    print(folder == own, opened == [own], own.exists())\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]
    # A server that is started from within another one's environment is none of its children.
    inherited = {**environ, EXCHANGE_VARIABLE: str(base / "vsprefill-1-aa")}
    done = subprocess.run([sys.executable, str(script)], env=inherited, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "True"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_every_engine_of_a_child_gets_a_folder_of_its_own(base: Path, tmp_path: Path, method: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from vllm_vsprefill import exchange\n"
        "def child():\n"
        "    made = [exchange.open_exchange().folder for _ in range(3)]\n"
        "    print(len(set(made)), exchange.opened() == made)\n"
        "if __name__ == '__main__':\n"
        f"    process = multiprocessing.get_context({method!r}).Process(target=child)\n"
        "    process.start(); process.join()\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    further_up = {**environ, EXCHANGE_VARIABLE: str(base / f"vsprefill-{os.getpid()}-aa")}
    for env in (environ, further_up):
        done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["3", "True"]


def test_a_folder_that_cannot_be_made_is_told(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = base.parent
    blocked.parent.mkdir(exist_ok=True)
    blocked.write_text("a file where the folder should be")
    found = open_exchange()
    assert found.folder is not None
    assert not found.made
    for part in (str(base), "The server runs", "vsprefill mode", STATS_DIR_VARIABLE, "TMPDIR"):
        assert part in caplog.text
    blocked.unlink()  # a worker tries again, and the commands find its server
    Recorder(0, found.folder, exists=False).publish()
    (server,) = servers(base)
    assert server.is_running()
    assert read_modes(server.folder) == ["sparse"]
    monkeypatch.delenv(STATS_DIR_VARIABLE)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError(2, "none")))
    assert open_exchange() == (None, False)
    assert "the temporary folder" in caplog.text


def test_what_is_being_made_is_not_removed(base: Path) -> None:
    """Between two system calls the folder of another server is not locked yet; it may be in another container."""
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    making = base / f"vsprefill-{dead.pid}-aa"
    making.mkdir(parents=True)
    exchange.remove_stale(base)
    assert making.exists()
    os.utime(making, (time.time() - 7200,) * 2)
    exchange.remove_stale(base)
    assert not making.exists()


def test_without_locks_a_folder_is_judged_by_its_process(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    made()
    assert servers(base)[0].is_running()
    other = base / "vsprefill-999999999-aa"
    other.mkdir()
    (other / OWNER_FILE).write_text("{}")
    assert not next(server for server in servers(base) if server.name == "aa").is_running()
    exchange.remove_stale(base)
    assert other.exists()  # it may be another container's


def test_imports_neither_torch_nor_vllm() -> None:
    code = "import sys; import vllm_vsprefill.exchange; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
