# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What an evaluation has finished so far: one JSON object a line, so that an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from vllm_vsprefill.eval.errors import EvalError

FILE = "journal.jsonl"


class Journal:
    """Finished samples of one evaluation, in a folder.

    The first line says what the samples depend on; a run in which any of it differs is another evaluation.

    Args:
        folder: made if it is not there.
        settings: what every sample depends on.

    Raises:
        EvalError: the folder holds another evaluation or something else, or cannot be written to.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.file = folder, folder / FILE
        self.records: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self._whole_lines()
            if lines:
                self._check(json.loads(lines[0]), settings)
            else:
                self._append({"settings": settings})
            for line in lines[1:]:
                record = json.loads(line)
                self.records[record["key"]] = record
        except OSError as error:
            raise EvalError(f"--out {folder}: cannot be used ({error.strerror or error})") from None
        except (ValueError, KeyError, TypeError):
            raise EvalError(f"{self.file} is damaged; choose another folder for --out, or remove it") from None

    def _whole_lines(self) -> list[bytes]:
        """Lines of the file; one that an interruption cut short is taken off it."""
        if not self.file.exists():
            return []
        data = self.file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.file.open("r+b") as out:
                out.truncate(len(whole))
        return whole.splitlines()

    def _check(self, first: dict[str, Any], settings: dict[str, Any]) -> None:
        before = first["settings"]
        now = json.loads(json.dumps(settings))
        changed = [
            f"  - {name}: {before.get(name)!r} in the run so far, {now.get(name)!r} now"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise EvalError(
                f"--out {self.folder} holds figures of other settings; choose another folder or set them back:"
                "\n" + "\n".join(changed)
            )

    def _append(self, record: dict[str, Any]) -> None:
        with self.file.open("ab") as out:
            out.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def add(self, key: str, **values: Any) -> None:
        """Keep a finished sample.

        Raises:
            EvalError: it cannot be written; what was written before is intact.
        """
        record = {"key": key, **values}
        with self._lock:
            try:
                self._append(record)
            except OSError as error:
                raise EvalError(f"{self.file} cannot be written to ({error.strerror or error})") from None
            self.records[key] = record
