# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""A process that runs ``vllm bench serve`` again and again: importing vLLM takes longer than most measurements.

Every line of its input is a JSON object with ``arguments`` of the command and the file for its output, ``log``. It is
answered with a line ``{"status": N}``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any


def _run(arguments: list[str]) -> int:
    sys.argv = ["vllm", "bench", "serve", *arguments]
    try:
        from vllm.entrypoints.cli.main import main

        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # whatever it is goes to the log, and its reader is told
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Answer every line until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        task: dict[str, Any] = json.loads(line)
        output = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for descriptor in (1, 2):  # of the process: loggers hold streams of their own
            os.dup2(output, descriptor)
        os.close(output)
        status = _run(task["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(json.dumps({"status": status}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
