# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Launching a Triton kernel again without having Triton look at every argument again.

Triton's own call works out types, alignment and divisibility of all arguments and looks the kernel up by them: about 20
microseconds of Python a launch, and a selection takes eight short kernels. Here the properties that Triton specialises
on are read off in a few microseconds, and a kernel that has been compiled for them is launched directly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .paged import is_interpreted

_LARGEST_INT32 = 2**31 - 1
_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], num_warps: int = 4, num_stages: int = 3,
           **constants: Any) -> None:  # fmt: skip
    """Runs a kernel on the current stream of the current device.

    Args:
        kernel: a ``triton.jit`` function whose ``constexpr`` parameters come last.
        grid: programs along up to three axes.
        args: arguments before the constants: tensors on the device, numbers, None. The first is a tensor.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        constants: values of the ``constexpr`` parameters, by name.
    """
    if is_interpreted():
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
        return
    # The key is at least as fine as what Triton distinguishes.
    key: list[Any] = [kernel, args[0].device, num_warps, num_stages, *constants.values()]
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            # Given as a number, a pointer costs the launch no call back into PyTorch and none to the driver.
            pointer = arg.data_ptr()
            values.append(pointer)
            key += (arg.dtype, pointer % 16 == 0)
            continue
        values.append(arg)
        key += (arg == 1, arg % 16 == 0, arg > _LARGEST_INT32) if isinstance(arg, int) else (type(arg),)
    found = _compiled.get(tuple(key))
    if found is None:
        compiled = kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
        _compiled[tuple(key)] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])
        return
    compiled, settled = found
    compiled[(*grid, 1, 1)[:3]](*values, *settled)
