# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The folder that the processes of one server, and the commands for it, meet in.

Every start of a server makes a folder of its own, ``vsprefill-<pid>-<random>``, in ``VSPREFILL_STATS_DIR`` or in the
temporary folder: nothing is carried over from a server before it, whatever its process id was. The process that made it
holds a lock on a file in it. The kernel lets go of it however the process ends, and everybody who sees the folder sees
the lock, from another container, too; so what a killed server left behind is known, and the next one removes it.

Imports neither torch nor vLLM.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import multiprocessing
import os
import re
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STATS_DIR_VARIABLE = "VSPREFILL_STATS_DIR"
"""Where servers make their exchange folders, in place of the temporary folder."""

EXCHANGE_VARIABLE = "VSPREFILL_EXCHANGE"
"""Exchange folder of this process's server; set by the plugin for the processes that it is the parent of."""

OWNER_FILE = "server"
"""File in an exchange folder that its server keeps locked; says when that was started."""

_MAKING = 3600.0  # seconds after which a folder is no longer just being made
_NAME = re.compile(r"vsprefill-(\d+)-([0-9a-f]+)")

logger = logging.getLogger("vllm.vsprefill")

_opened: list[Path] = []
_locks: list[int] = []  # file descriptors, open for as long as this process lives


class Exchange(NamedTuple):
    """Exchange folder of a server, or None where there is no place for one; and whether it exists already."""

    folder: Path | None
    made: bool


@dataclass(frozen=True)
class Server:
    """A server, running or not, by its exchange folder.

    Attributes:
        pid: process that started it, as that process sees itself.
        name: tells it apart from other servers with the same process id.
        folder: its exchange folder.
    """

    pid: int
    name: str
    folder: Path

    @property
    def started(self) -> float | None:
        """Seconds since the epoch at which it was started, where that can be read."""
        try:
            return float(json.loads((self.folder / OWNER_FILE).read_text())["started"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_running(self) -> bool:
        """Whether the process that made the folder, or one that it forked, still lives."""
        locked = self._is_locked()
        return _is_alive(self.pid) if locked is None else locked

    def listens_on(self, port: int) -> bool | None:
        """Whether the server accepts connections on a port of this machine; None where that cannot be seen."""
        try:
            import psutil  # comes with vLLM

        except ImportError:
            return None
        try:
            process = psutil.Process(self.pid)
            connections = [
                connection
                for one in (process, *process.children(recursive=True))
                for connection in one.net_connections(kind="inet")
            ]
        except psutil.Error:
            return None
        return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in connections)

    def is_certainly_gone(self) -> bool:
        """Whether nothing in the folder can be of use to anybody any more."""
        locked = self._is_locked()
        if locked is not None or (self.folder / OWNER_FILE).exists():
            return locked is False
        try:  # without a lock: just being made, maybe where process ids mean others
            return not _is_alive(self.pid) and time.time() - self.folder.stat().st_mtime > _MAKING
        except OSError:
            return False

    def _is_locked(self) -> bool | None:
        """None where nobody can say."""
        try:
            descriptor = os.open(self.folder / OWNER_FILE, os.O_RDONLY)
        except FileNotFoundError:  # somebody cleaned up the temporary folder; workers make it again, without the file
            return None
        except OSError:
            return False  # another user's, of no use here
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return None
        finally:
            os.close(descriptor)
        return False


def base_folder() -> Path:
    """Where exchange folders are: ``VSPREFILL_STATS_DIR``, else the temporary folder. OSError where there is none."""
    named = os.environ.get(STATS_DIR_VARIABLE, "").strip()
    return Path(named).expanduser().absolute() if named else Path(tempfile.gettempdir())


def servers(base: Path) -> list[Server]:
    """Servers with a folder in ``base``, whether they still run or not; ``base`` may be the folder of one, too."""
    candidates = [base] if (base / OWNER_FILE).exists() else sorted(base.glob("vsprefill-*"))
    found = []
    for folder in candidates:
        match = _NAME.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append(Server(int(match[1]), match[2], folder))
    return found


def open_exchange() -> Exchange:
    """Make the exchange folder of a server that is being started, or find that of the server that started this process.

    Where none can be made there is a warning; the server runs, and workers try again when they have something to say.
    """
    inherited = os.environ.get(EXCHANGE_VARIABLE)
    if inherited and _is_parents(Path(inherited)):
        return Exchange(Path(inherited), True)
    name, folder = f"vsprefill-{os.getpid()}-{secrets.token_hex(4)}", None
    try:
        base = base_folder()
        folder = base / name
        base.mkdir(parents=True, exist_ok=True)
        _create(folder)
    except OSError as error:
        logger.warning(
            "VSPREFILL: no folder can be made in %s (%s). The server runs, but has no density counters on /metrics, "
            "and `vsprefill status` and `vsprefill mode` do not find it, until one can. %s or TMPDIR names another.",
            os.environ.get(STATS_DIR_VARIABLE) or "the temporary folder", error.strerror or error, STATS_DIR_VARIABLE,
        )  # fmt: skip
        made = False
    else:
        made = True
        remove_stale(base)
    if folder is None:  # there is not even a temporary folder
        os.environ.pop(EXCHANGE_VARIABLE, None)
        return Exchange(None, False)
    os.environ[EXCHANGE_VARIABLE] = str(folder)
    _opened.append(folder)
    atexit.register(_remove, folder, os.getpid())
    return Exchange(folder, made)


def _is_parents(folder: Path) -> bool:
    """Whether the process that ``multiprocessing`` started this one from has made a folder. One of this process is no
    parent's, nor is one of a process further up: the next server has nothing to do with those."""
    parent, match = multiprocessing.parent_process(), _NAME.fullmatch(folder.name)
    return parent is not None and match is not None and int(match[1]) == parent.pid


def opened() -> list[Path]:
    """Exchange folders of the servers that this process started or belongs to."""
    inherited = os.environ.get(EXCHANGE_VARIABLE)
    others = [Path(inherited)] if inherited and Path(inherited) not in _opened else []
    return [*_opened, *others]


def remove_stale(base: Path) -> None:
    """Remove what servers that were killed have left in ``base``."""
    for server in servers(base):
        if server.is_certainly_gone():
            shutil.rmtree(server.folder, ignore_errors=True)  # another user's cannot be removed


def _create(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    try:
        partial = folder / f"{OWNER_FILE}.tmp"
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o600)
        _locks.append(descriptor)
        os.write(descriptor, json.dumps({"pid": os.getpid(), "started": time.time()}).encode())
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            logger.debug("VSPREFILL: the file system of %s has no locks", folder)
        partial.replace(folder / OWNER_FILE)  # whoever sees the file sees it locked
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child runs the parent's exit handlers too
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
