# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The run-time switch between sparse and dense prefill, as a worker sees it: a small file that it looks at."""

from __future__ import annotations

import os
import time
from pathlib import Path

MODE_FILE = "mode"
"""Name of the file in the server's exchange folder; holds one of ``MODES``."""

MODES = ("sparse", "dense")
INTERVAL = 0.2
"""Seconds between two looks at the file."""


class Switch:
    """Follows one file. A missing or unreadable file, or one with other text, changes nothing.

    Args:
        file: the file, or None where the server has no exchange folder.
    """

    def __init__(self, file: Path | None) -> None:
        self.mode = "sparse"
        self._file = None if file is None else str(file)
        self._next = 0.0
        self._seen: tuple[int, int] | None = None

    @classmethod
    def of(cls, exchange: Path | None) -> Switch:
        """The switch of the server with an exchange folder."""
        return cls(None if exchange is None else exchange / MODE_FILE)

    def look(self) -> bool:
        """Look at the file if it is time to; whether the mode has changed."""
        if self._file is None:
            return False
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + INTERVAL
        try:
            found = os.stat(self._file)
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp == self._seen:
                return False
            text = Path(self._file).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return False
        self._seen = stamp
        if text not in MODES or text == self.mode:
            return False
        self.mode = text
        return True


def write_mode(folder: Path, mode: str) -> None:
    """Ask the workers of a server for a mode.

    Raises:
        ValueError: not one of ``MODES``.
        OSError: the folder cannot be written to.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    folder.mkdir(mode=0o700, exist_ok=True)
    partial = folder / f"{MODE_FILE}.{os.getpid()}.tmp"
    partial.write_text(mode + "\n")
    partial.replace(folder / MODE_FILE)
