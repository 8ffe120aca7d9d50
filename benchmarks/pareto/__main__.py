# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Methods of sparse prefill against dense attention on a real model and a person's own text.

    python -m benchmarks.pareto MODEL_FOLDER TEXT... --length 12288 --plan structures --out results.json

A plan is a file in ``benchmarks/pareto/plans`` (or a path): one run a line, a method with its settings such as
``structure keys=512 tile=128``, then optionally ``@`` and the layers that run sparse: ``@ 3``, ``@ 0-5,9``, ``@ each``
(one run a layer), ``@ except`` (one run a layer with all others sparse) or ``@ heads`` (one run a layer and KV head). A
list of values in braces makes one run each: ``structure keys={256,512}``. Runs that the output file holds already are
not repeated; a run that fails is written down with its message and the next one starts.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import re
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import environment

PLANS = Path(__file__).parent / "plans"
SHOWN = ("density", "sparse_density", "top1", "nll", "kl")


def expand(line: str, layers: int, heads: int = 1) -> list[tuple[str, list[int] | None]]:
    """Runs of one line of a plan: settings, and the layers that run sparse (None: all).

    ``heads`` is the number of KV heads.
    """
    method, _, where = (part.strip() for part in line.partition("@"))
    choices = re.split(r"\{([^}]*)\}", method)
    parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(choices)]
    methods = ["".join(words) for words in itertools.product(*parts)]
    if where == "heads":
        methods = [f"{method} only={head}" for method in methods for head in range(heads)]
    if where in ("each", "heads"):
        subsets: list[list[int] | None] = [[layer] for layer in range(layers)]
    elif where == "except":
        subsets = [[other for other in range(layers) if other != layer] for layer in range(layers)]
    elif where:
        subset: set[int] = set()
        for part in where.split(","):
            start, _, stop = part.partition("-")
            subset.update(range(int(start), int(stop or start) + 1))
        subsets = [sorted(subset)]
    else:
        subsets = [None]
    return [(method, subset) for method in methods for subset in subsets]


def read_plan(name: str) -> list[str]:
    """Lines of a plan, by its name or path."""
    path = Path(name) if Path(name).is_file() else PLANS / f"{name}.txt"
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


@contextlib.contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Holds a lock file, if one is given."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("texts", nargs="+", type=Path, help="files of plain text, UTF-8")
    parser.add_argument("--plan", required=True, help="name of a plan or path of a file; several with commas")
    parser.add_argument("--out", required=True, type=Path, help="JSON file; read first if it exists")
    parser.add_argument("--length", type=int, default=12288, help="tokens of each text")
    parser.add_argument("--skip", type=int, default=0, help="tokens left out at the start of each text")
    parser.add_argument("--dense-first", type=int, default=4096, help="first rows, dense in every run")
    parser.add_argument("--chunk", type=int, default=4096, help="rows of a chunk")
    parser.add_argument("--dense-last", type=int, default=64, help="last rows of a chunk, dense in every run")
    parser.add_argument("--errors", action="store_true", help="also the output error of each layer")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after this time")
    parser.add_argument("--lock", type=Path, help="file to lock during a run, on a shared machine")
    parser.add_argument("--threads", type=int, help="threads of torch")
    return parser.parse_args()


def main() -> None:
    begin = time.monotonic()
    options = arguments()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.pareto.methods import make
    from benchmarks.pareto.model import Runner

    if options.threads:
        torch.set_num_threads(options.threads)
    missing = [str(path) for path in options.texts if not path.is_file()]
    if missing:
        sys.exit(f"no such file: {', '.join(missing)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16).to(device).eval()
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    lines = [line for name in options.plan.split(",") for line in read_plan(name)]
    data: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {"runs": []}
    data["environment"] = environment.describe() | {"device_count": torch.cuda.device_count()}
    shape = {
        "model": Path(options.model).name,
        "length": options.length,
        "dense_first": options.dense_first,
        "chunk": options.chunk,
        "dense_last": options.dense_last,
    }
    done = {(r["text"], r["length"], r["method"], json.dumps(r["layers"])) for r in data["runs"] if "error" not in r}
    data["runs"] = [run for run in data["runs"] if "error" not in run]
    runners: dict[str, Runner] = {}
    for path in options.texts:
        text = path.read_text(encoding="utf-8")
        # Seven characters a token is more than any ordinary text has.
        ids = tokenizer(text[: 7 * (options.length + options.skip)])["input_ids"][options.skip :][: options.length]
        if len(ids) < options.length:
            sys.exit(f"{path.name} has {len(ids)} tokens, {options.length} are asked for")
        with turn(options.lock):
            runner = runners[path.stem] = Runner(
                model,
                torch.tensor(ids),
                dense_first=options.dense_first,
                chunk=options.chunk,
                dense_last=options.dense_last,
            )
        nll = float(runner.reference.nll.mean())
        print(f"{path.stem}: dense {runner.dense_seconds:.1f} s, nll {nll:.4f}", flush=True)
    todo = [run for line in lines for run in expand(line, layers, heads)]
    for method, subset in dict.fromkeys((method, tuple(s) if s is not None else None) for method, s in todo):
        for text, runner in runners.items():
            layer_list = None if subset is None else list(subset)
            if (text, options.length, method, json.dumps(layer_list)) in done:
                continue
            if time.monotonic() - begin > options.seconds:
                print(f"out of time before {method}", flush=True)
                return
            run: dict[str, Any] = {"text": text, **shape, "method": method, "layers": layer_list}
            try:
                with turn(options.lock):
                    run |= runner.run(make(method), layer_list, options.errors)
                figures = " ".join(f"{name} {run[name]:.4f}" for name in SHOWN)
                print(f"{text} {method} {layer_list or ''}: {figures}, {run['seconds']} s", flush=True)
            except Exception as error:
                traceback.print_exc()
                run["error"] = f"{type(error).__name__}: {error}"
            data["runs"].append(run)
            environment.write(options.out, data)


if __name__ == "__main__":
    main()
