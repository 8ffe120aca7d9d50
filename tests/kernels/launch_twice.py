# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Launches kernels as Triton does and again by the short cut, and compares what reaches the driver; no GPU.

A program of its own: Triton's own launcher is built and runs, over a driver library (``recording_libcuda.c``) that
executes nothing. Prints the Triton at hand, the kernels compared and the differences as JSON. Needs a C compiler, as
Triton does.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("recording_libcuda.c")
STREAM = 0x5EED


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig`` of cuda.h."""

    _fields_ = (
        *((f"{what}{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )  # fmt: skip


def build(folder: str) -> ctypes.CDLL:
    """The driver library, loaded before anything looks for one."""
    path = Path(folder) / "libcuda.so.1"
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(path), str(SOURCE)]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of a kernel."""
    (declared,) = re.findall(r"\.entry [^(]*\((.*?)\)", ptx, re.S)
    return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", declared)]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        driver_library = build(folder)

        import triton
        from triton.backends.nvidia.driver import CudaDriver
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime import driver

        from tests.kernels import compile_table
        from vllm_vsprefill.kernels import launch as launch_module
        from vllm_vsprefill.kernels import settings as settings_module

        device = CudaDriver()
        device.get_current_device = lambda: 0
        device.get_current_stream = lambda _: STREAM
        device.get_device_capability = lambda _: (9, 0)
        driver.set_active(device)
        settings_module.capability = lambda _: 90  # type: ignore[assignment]
        compile_table.attend_module.capability = lambda _: 90  # type: ignore[attr-defined]
        compile_table.tiles_module.capability = lambda _: 90  # type: ignore[attr-defined]
        compile_table.take_host_tensors()

        sizes: dict[int, list[int]] = {}
        seen: list[dict[str, Any]] = []
        init_handles = CompiledKernel._init_handles

        def init_and_note(self: Any) -> None:
            init_handles(self)
            sizes[self.function] = parameter_sizes(self.asm["ptx"])

        CompiledKernel._init_handles = init_and_note

        @ctypes.CFUNCTYPE(None, ctypes.POINTER(LaunchConfig), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
        def observe(config: Any, function: int, params: Any) -> None:
            about = {name: getattr(config.contents, name) for name, *_ in LaunchConfig._fields_ if name != "attributes"}
            about["function"] = function
            about["params"] = [ctypes.string_at(params[i], size).hex() for i, size in enumerate(sizes[function])]
            seen.append(about)

        driver_library.set_observer(observe)
        compared: dict[str, int] = {}
        differences: list[Any] = []
        once = launch_module.launch

        def twice(kernel: Any, grid: Any, args: Any, *rest: Any, **options: Any) -> None:
            launch_module._compiled.clear()  # the first one is Triton's
            seen.clear()
            for _ in range(2):
                once(kernel, grid, args, *rest, **options)
            name = kernel.__name__
            compared[name] = compared.get(name, 0) + 1
            if len(seen) != 2 or seen[0] != seen[1] or seen[0]["stream"] != STREAM or not seen[0]["params"]:
                differences.append({"kernel": name, "seen": list(seen)})

        for module in list(sys.modules.values()):
            if module.__name__.startswith("vllm_vsprefill.kernels") and module is not launch_module:
                for name, value in list(vars(module).items()):
                    if value is once:
                        setattr(module, name, twice)

        compile_table.attend(64, "bf16", 4, 16)
        for block_q in (32, 48):  # the version for capability 9.0 and the portable one
            compile_table.attend_tiles(64, "bf16", 4, block_q)
        compile_table.score(64, "bf16", 64)
        compile_table.sampled(64, "bf16", 4)
        compile_table.others(16, 4, "fp32")
        print(json.dumps({"triton": triton.__version__, "compared": compared, "differences": differences}))


if __name__ == "__main__":
    main()
