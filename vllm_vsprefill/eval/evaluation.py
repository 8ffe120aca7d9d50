# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""An evaluation from its options to its report."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

import vllm_vsprefill
from vllm_vsprefill.eval import report, summary, targets
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.in_prompt import InPrompt
from vllm_vsprefill.eval.journal import Journal
from vllm_vsprefill.eval.options import EvalCommand
from vllm_vsprefill.eval.ruler.suite import Ruler
from vllm_vsprefill.eval.run import Runner
from vllm_vsprefill.eval.suites import Fidelity, Measures
from vllm_vsprefill.eval.texts import Text, read_texts
from vllm_vsprefill.eval.tokens import LocalTokens, Tokens, check_tokens, fingerprint, open_tokens

Say = Callable[[str], None]


def evaluate(options: EvalCommand, say: Say) -> None:
    """Measure what is asked for and write the report, also of what was finished before an interruption.

    Raises:
        EvalError: something cannot start or go on.
        KeyboardInterrupt: from the keyboard; the report of what is finished is written.
    """
    with ExitStack() as open_clients:
        _evaluate(options, say, open_clients)


def _evaluate(options: EvalCommand, say: Say, open_clients: ExitStack) -> None:
    texts = read_texts(options.fidelity.data) if {"fidelity", "in-prompt"} & set(options.suite) else []
    tokens, model = _tokens(options, open_clients)  # first: everything else is idle where no server answers
    plans = targets.plans(options, say)
    suites = _suites(options, texts, tokens)
    journal = Journal(options.out, _depends_on(options, model, tokens, texts))
    name = options.server.tokenizer or model
    runner = Runner(journal, suites, options.server.concurrency, lambda client: check_tokens(tokens, client, name))
    for suite in suites:
        for cell in suite.cells():
            suite.check(cell)
    missing = sum(len(indices) for plan in plans for _, _, indices in runner.missing(plan.name))
    kept = sum("/portion-" not in key and not key.startswith("setting/") for key in journal.records)
    if kept:
        say(f"{kept} samples are in {options.out.name} already, {missing} are missing")
    try:
        with tqdm(total=missing, unit="sample", disable=None, dynamic_ncols=True) as progress:
            for plan in plans:
                runner.run(plan, progress)
                _write(options, journal, runner, plans, model, lambda line: None)
    finally:
        if len(journal.records):
            _write(options, journal, runner, plans, model, say)
    say(f"report: {options.out / 'report.md'}")


def _tokens(options: EvalCommand, open_clients: ExitStack) -> tuple[Tokens, str]:
    """The tokenizer, which may ask a server, and what the model is called."""
    server = options.server
    if server.url is None:
        assert server.model is not None
        return LocalTokens(server.tokenizer or server.model), Path(server.model).name
    client = open_clients.enter_context(targets.connect(server.url, server.model))
    return open_tokens(client, server.tokenizer), Path(client.model).name


def _suites(options: EvalCommand, texts: list[Text], tokens: Tokens) -> list[Measures]:
    made: list[Measures] = []
    for suite in dict.fromkeys(options.suite):
        if suite == "fidelity":
            made.append(Fidelity(options, texts, tokens))
        elif suite == "ruler":
            made.append(Ruler(options, tokens))
        else:
            made.append(InPrompt(options, texts, tokens))
    return made


def _depends_on(options: EvalCommand, model: str, tokens: Tokens, texts: list[Text]) -> dict[str, Any]:
    """What every sample of an evaluation depends on; lengths and settings are in their keys, and may be added to."""
    server = options.server
    return {
        "version": 1,
        "model": model,
        "tokenizer": fingerprint(tokens),
        "seed": options.seed,
        "split": options.split,
        "texts": {text.name: text.digest for text in texts},
        "top": options.fidelity.top,
        "template": options.template,
        "serve_args": list(server.serve_args),
    }


def _write(
    options: EvalCommand, journal: Journal, runner: Runner, plans: list[targets.Plan], model: str, say: Say
) -> None:
    cells = [cell for suite in runner.suites for cell in suite.cells()]
    names = [plan.name for plan in plans]
    notes = [options.note] if options.note is not None else []
    results = {
        "about": {
            "model": model,
            "command": _command(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "vllm_vsprefill": vllm_vsprefill.__version__,
            "machine": f"{platform.machine()}, {os.cpu_count()} processors",
            "split": options.split,
            "seed": options.seed,
        },
        "notes": notes + [note for suite in runner.suites for note in suite.notes()],
        "complete": not any(runner.missing(name) for name in names),
        "figures": summary.summarise(journal, cells, names),
    }
    try:
        report.write(options.out, results, say)
    except OSError as error:
        raise EvalError(f"the report cannot be written to {options.out} ({error.strerror or error})") from None


def _command() -> str:
    """The command line; a file given by its whole path is shown by its name, for folders of a machine say nothing."""
    words = [",".join(Path(p).name if p.startswith("/") else p for p in word.split(",")) for word in sys.argv[1:]]
    return shlex.join(["vsprefill", *words])
