# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Launching a compiled kernel again. The stand-in takes note of who is called with what."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_vsprefill.kernels import launch as module
from vllm_vsprefill.kernels.launch import launch


class Compiled:
    function = "function"
    packed_metadata = "metadata"

    def __init__(self, log: list[Any]) -> None:
        self._log = log

    def run(self, *args: Any) -> None:
        self._log.append(("again", args[:3], args[3:9], args[9:]))


class Kernel:
    """Like a ``triton.jit`` function with the parameters ``p_x, n, WIDTH, DEPTH``."""

    arg_names = ("p_x", "n", "WIDTH", "DEPTH")

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*args: Any, **options: Any) -> Compiled:
            self.log.append(("first", grid, args, options))
            return Compiled(self.log)

        return first


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_interpreted", lambda: False)
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "_current_stream", lambda device_index: "stream")


def test_the_second_launch_is_direct() -> None:
    kernel, x = Kernel(), torch.zeros(64)
    for _ in range(2):
        launch(kernel, (3, 2), (x, 7), DEPTH=5, WIDTH=4)
    assert [entry[0] for entry in kernel.log] == ["first", "again"]
    assert kernel.log[0][3] == {"WIDTH": 4, "DEPTH": 5, "num_warps": 4, "num_stages": 3}
    # Three axes, a pointer as a number, constants in the order of the parameters
    assert kernel.log[1][1] == (3, 2, 1)
    assert kernel.log[1][2] == ("stream", "function", "metadata", None, None, None)
    assert kernel.log[1][3] == (x.data_ptr(), 7, 4, 5)


def test_triton_runs_a_compiled_kernel_with_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed Triton's own way from a compiled kernel to its launcher, which ``launch`` takes a short cut of."""
    from triton import knobs
    from triton.compiler.compiler import CompiledKernel

    class Noted(CompiledKernel):
        function, packed_metadata = "function", "metadata"

        def __init__(self) -> None:
            self.module, self._run = None, self.note

        def note(self, *args: Any) -> None:
            self.log = args

        def _init_handles(self) -> None:
            pass

        def launch_metadata(self, *args: Any) -> None:
            pass

    kernel = Noted()
    kernel[(3, 2, 1)](1000, 7, stream="stream")
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    assert kernel.log == (3, 2, 1, "stream", "function", "metadata", None, *hooks, 1000, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"args": (torch.zeros(64, dtype=torch.float16), 7)},
        {"args": (torch.zeros(65)[1:], 7)},
        {"args": (torch.zeros(64), 1)},
        {"args": (torch.zeros(64), 16)},
        {"args": (torch.zeros(64), 2**31)},
        {"args": (torch.zeros(64), None)},
        {"args": (torch.zeros(64), 7.0)},
        {"WIDTH": 8},
        {"num_warps": 8},
    ],
    ids=["dtype", "alignment", "one", "multiple of 16", "64 bits", "None", "float", "constant", "warps"],
)
def test_whatever_triton_distinguishes_goes_through_triton(change: dict[str, Any]) -> None:
    kernel = Kernel()
    settings: dict[str, Any] = {"args": (torch.zeros(64), 7), "WIDTH": 4, "DEPTH": 5}
    launch(kernel, (1,), **settings)
    launch(kernel, (1,), **(settings | change))
    assert [entry[0] for entry in kernel.log] == ["first", "first"]


def test_values_without_a_say_do_not() -> None:
    kernel = Kernel()
    launch(kernel, (1,), (torch.zeros(64), 7), WIDTH=4, DEPTH=5)
    launch(kernel, (9,), (torch.zeros(32), 9), WIDTH=4, DEPTH=5)
    assert [entry[0] for entry in kernel.log] == ["first", "again"]
    assert kernel.log[1][3][1] == 9
