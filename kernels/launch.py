# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Launching a Triton kernel again without having Triton look at every argument again.

Triton's own call works out types, alignment and divisibility of all arguments and looks the kernel up by them: about 20
microseconds of Python a launch, and a layer takes about sixteen short kernels. Here the properties that Triton
specialises on are read off in a few microseconds, and a kernel that has been compiled for them is launched directly.
Triton's launch hooks are not called then: its own profiler does not see these launches, CUPTI's do.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any

import triton
from torch import Tensor

from .paged import is_interpreted

logger = logging.getLogger("vllm.vsprefill")

_direct = True  # whether Triton's launchers take the arguments that they are given here

_LARGEST_INT32 = 2**31 - 1
_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up. Triton's own works in kernels, too, and takes microseconds here for that."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least ``n``, which is positive."""
    return 1 << (n - 1).bit_length()


def _current_stream(device_index: int) -> Any:
    return triton.runtime.driver.active.get_current_stream(device_index)


def raised_by_compiler(error: BaseException) -> bool:
    """Whether an error says that this Triton does not take a kernel: one of Triton's own, or one of any kind from
    within its compiler. Wrong arguments fail before the compiler is called."""
    if isinstance(error, triton.TritonError):
        return True
    compiler = triton.compiler.compile.__code__
    return any(frame.f_code is compiler for frame, _ in traceback.walk_tb(error.__traceback__))


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], num_warps: int = 4, num_stages: int = 3,
           **constants: Any) -> None:  # fmt: skip
    """Runs a kernel on the current stream of its first argument's device.

    Args:
        kernel: a ``triton.jit`` function whose ``constexpr`` parameters come last.
        grid: programs along up to three axes.
        args: arguments before the constants: tensors on the device, numbers, None. The first is a tensor.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        constants: values of the ``constexpr`` parameters, by name.
    """
    global _direct
    if is_interpreted() or not _direct:
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
        return
    device = args[0].device
    # The key is at least as fine as what Triton distinguishes.
    key: list[Any] = [kernel, device, num_warps, num_stages, *constants.values()]
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            # Given as a number, a pointer costs the launch no call back into PyTorch and none to the driver.
            pointer = arg.data_ptr()
            values.append(pointer)
            key.append((arg.dtype,) if pointer % 16 else arg.dtype)
        elif isinstance(arg, int):
            values.append(arg)
            key.append((arg == 1) + 2 * (arg % 16 == 0) + 4 * (arg > _LARGEST_INT32))
        else:
            values.append(arg)
            key.append(type(arg))
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
        settled = tuple(constants[name] for name in kernel.arg_names[len(args) :])
        # The kernel is kept as well: it unloads its function when nobody holds it.
        _compiled[tuple(key)] = compiled.run, compiled.function, compiled.packed_metadata, settled, compiled
        return
    run, function, metadata, settled, _ = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = _current_stream(device.index)
    try:
        # What `compiled[grid](...)` does, without metadata for launch hooks and without the hooks.
        run(x, y, z, stream, function, metadata, None, None, None, *values, *settled)
    except TypeError as error:  # raised when the arguments are parsed, before the kernel is launched
        # Triton's own way decides whose error it is: it raises one of ours as well.
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
        _direct = False
        logger.warning("VSPREFILL: this Triton's launcher has changed; launches take longer: %s", error)
