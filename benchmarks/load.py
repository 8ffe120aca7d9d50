# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Stock vLLM and VSPREFILL under the same open-loop load, one server after the other on the same machine.

Requests of mixed lengths arrive by a Poisson process. A share of them goes on from documents that others have asked
about, too (``vllm_vsprefill/tools/bench_prompts.py``). Prompts and arrivals are the same for both servers. At every
rate ``vllm bench serve`` measures times to first token and throughput. The highest rate of which P99 keeps within
``--ttft-limit`` is what a server can take. With ``--samples`` single prompts of each length are timed first.

What fails is told in the result file, and all else is measured. Runs are kept in a folder beside the result file: the
same command goes on where it stopped.

    python -m benchmarks.load --model FOLDER --rates 0.5,1,2,4 --out FILE.json
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import environment
from vllm_vsprefill.eval.client import Client
from vllm_vsprefill.eval.errors import EvalError
from vllm_vsprefill.eval.server import ServerError, VLLMServer
from vllm_vsprefill.eval.targets import CPU_CACHE, CPU_CACHE_GIB, Plan, Target
from vllm_vsprefill.tools import bench_report, bench_serve
from vllm_vsprefill.tools.bench_figures import capacity
from vllm_vsprefill.tools.bench_options import BenchCommand
from vllm_vsprefill.tools.benching import Measurement, check_lengths

TARGETS = ("stock", "vsprefill")
SERVE = "--max-num-batched-tokens 8192 --gpu-memory-utilization 0.9"


def measure(name: str, server: VLLMServer, measurement: Measurement, until: float) -> dict[str, Any]:
    """Start a server, measure what is missing of it, end it.

    Returns:
        What it was: version, seconds to start.

    Raises:
        EvalError, ServerError: it did not start, or something failed; what is finished is kept.
    """
    started = time.monotonic()
    with server, Client(server.url) as client:
        about = {"vllm": client.version(), "start_seconds": round(time.monotonic() - started, 1)}
        print(f"{name}: started in {about['start_seconds']} s", flush=True)
        check_lengths(measurement.options, client)
        measurement.run([Plan(name, lambda: contextlib.nullcontext(Target(name, client)))], until)
    return about


def shown(command: list[str]) -> str:
    """A server's command without folders of this machine."""
    words = [Path(word).name if word.startswith("/") else word for word in command]
    return shlex.join(["vllm", *words[words.index("serve") :]])


def main(
    model: Annotated[Path, typer.Option(help="Folder of the model.")],
    out: Annotated[Path, typer.Option(help="Result file.")] = Path("load.json"),
    lengths: Annotated[str, typer.Option(help="Tokens of prompts and answers.")] = "4k..128k",
    rates: Annotated[str, typer.Option(help="Requests a second.")] = "0.5,1,1.5,2",
    seconds: Annotated[float, typer.Option(help="For how long requests arrive at each rate.")] = 60.0,
    prefix_share: Annotated[float, typer.Option(help="Share of requests that go on from a document.")] = 0.5,
    ttft_limit: Annotated[float, typer.Option(help="Seconds to the first token.")] = 10.0,
    samples: Annotated[int, typer.Option(help="Prompts of each length that are timed alone first.")] = 0,
    output_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 16,
    targets: Annotated[str, typer.Option(help=f"Some of {', '.join(TARGETS)}.")] = ",".join(TARGETS),
    serve_args: Annotated[str, typer.Option(help="Arguments of both servers, as on a command line.")] = SERVE,
    options: Annotated[str, typer.Option(help="VSPREFILL's options, as JSON.")] = "{}",
    data: Annotated[str, typer.Option(help="Text files and folders; else Python's standard library.")] = "",
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    start_timeout: Annotated[float, typer.Option(help="Seconds that a server may take to start.")] = 300.0,
    limit_s: Annotated[float, typer.Option(help="Seconds in all; targets share what is left evenly.")] = 3600.0,
    note: Annotated[str, typer.Option(help="Kept in the result file.")] = "",
) -> None:
    """Exit status 1 if something failed."""
    begin = time.monotonic()
    names = [name for name in targets.split(",") if name]
    work = out.parent / f"{out.stem}-runs"
    made: dict[str, Any] = {"out": work, "lengths": lengths, "rate": rates, "seconds": seconds, "samples": samples}
    made |= {"prefix_share": prefix_share, "ttft_limit": ttft_limit, "output_tokens": output_tokens, "data": data}
    try:
        if unknown := [name for name in names if name not in TARGETS]:
            raise ValueError(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
        # The address is not asked: servers are started here.
        command = BenchCommand.model_validate({**made, "seed": seed, "server": {"url": "http://127.0.0.1"}})
        vsprefill = json.loads(options)
    except ValueError as error:
        sys.exit(str(error))
    arguments = shlex.split(serve_args)
    if not any(word.split("=")[0] == "--max-model-len" for word in arguments):
        arguments += ["--max-model-len", str(max(command.lengths))]
    record: dict[str, Any] = {
        **environment.describe(),
        "note": note,
        "model": model.name,
        "load": {
            **command.model_dump(mode="json", include={*made, "seed"}, exclude={"out", "data"}),
            "arrivals": "Poisson process, the same and with the same prompts for all servers",
        },
        "servers": {},
        "failed": {},
    }
    try:
        bench_serve.check()
        out.parent.mkdir(parents=True, exist_ok=True)
        measurement = Measurement(command, model.name, str(model))
        measurement.missing(names)  # whether what is in the folder belongs to this load
    except (EvalError, OSError) as error:
        sys.exit(str(error))
    for number, name in enumerate(names):
        share = (begin + limit_s - time.monotonic()) / (len(names) - number)
        server = VLLMServer(
            str(model),
            "VSPREFILL" if name == "vsprefill" else None,
            work / f"{name}.log",
            arguments=arguments,
            options=vsprefill if name == "vsprefill" else None,
            environment={CPU_CACHE: CPU_CACHE_GIB, "HF_HUB_OFFLINE": "1"},
            timeout=min(start_timeout, max(share, 1.0)),
        )
        record["servers"][name] = {"command": shown(server.command)}
        try:
            until = time.monotonic() + share
            if measurement.missing([name]):
                record["servers"][name] |= measure(name, server, measurement, until)
        except (EvalError, ServerError) as error:
            record["failed"][name] = str(error)[-4000:]
        except Exception:  # the other server is to be measured all the same
            record["failed"][name] = traceback.format_exc()[-4000:]
        if name in record["failed"]:
            print(f"{name}: {record['failed'][name]}", flush=True)
        collect(record, work, names, ttft_limit)
        out.write_text(json.dumps(record, indent=1) + "\n")
    table = {"about": {"model": model.name, "hardware": record["hardware"]}, "notes": [], "complete": True}
    print(bench_report.render({**table, "figures": record["figures"]}))
    print(json.dumps(record["capacity"], indent=1))
    if record["failed"]:
        sys.exit(f"failed: {', '.join(record['failed'])}")


def collect(record: dict[str, Any], work: Path, names: list[str], limit: float) -> None:
    """Take the figures so far into a result file's record."""
    file = work / bench_report.RESULTS
    found = json.loads(file.read_text())["figures"] if file.exists() else []
    order = {name: number for number, name in enumerate(names)}
    found.sort(key=lambda f: (f["loop"], f.get("length", 0), f.get("rate", 0), order.get(f["target"], len(order))))
    record["figures"] = found
    record["capacity"] = {name: capacity(found, name, limit) for name in names}
    stock = {(f["loop"], f.get("length"), f.get("rate")): f for f in found if f["target"] == "stock"}
    for figure in found:
        key = "ttft" if figure["loop"] == "closed" else "ttft_p50"
        base = stock.get((figure["loop"], figure.get("length"), figure.get("rate")))
        if base is not None and figure is not base:
            figure["times_stock"] = round(base[key] / figure[key], 3)


if __name__ == "__main__":
    typer.run(main)
