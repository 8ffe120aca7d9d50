# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Launching a compiled kernel again: against Triton's own launcher, and with a stand-in that notes what it is given."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.programs import run_compiler
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

    def __init__(self, compiled: type[Compiled] = Compiled) -> None:
        self.log: list[Any] = []
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def first(*args: Any, **options: Any) -> Compiled:
            self.log.append(("first", grid, args, options))
            return self.compiled(self.log)

        return first


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_interpreted", lambda: False)
    monkeypatch.setattr(module, "_compiled", {})
    monkeypatch.setattr(module, "_direct", True)
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA driver is here; tests marked gpu launch kernels on it")
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler")
def test_the_driver_sees_what_triton_shows_it() -> None:
    """Through Triton's own launcher, for every kernel that a layer launches this way."""
    done = run_compiler("launch_twice")
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["differences"] == []
    for name in ("attend", "attend_tiles", "score", "missing", "sum", "cut", "tie", "count", "list", "guard", "forget"):
        assert told["compared"].get(f"_{name}_kernel", 0) > 0, name


def test_a_launcher_with_other_arguments_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a Triton that is newer than this: it refuses them before it launches anything."""

    class Changed(Compiled):
        def run(self, *args: Any) -> None:
            raise TypeError("function takes exactly 17 arguments (18 given)")

    told: list[str] = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *args: told.append(text % args))
    kernel, x = Kernel(Changed), torch.zeros(64)
    for _ in range(3):
        launch(kernel, (3,), (x, 7), DEPTH=5, WIDTH=4)
    assert [entry[0] for entry in kernel.log] == ["first"] * 3
    assert [("17 arguments" in line) for line in told] == [True]


def test_a_wrong_argument_of_ours_is_no_changed_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own launch of the same arguments fails as well: the error is raised, and launches stay direct."""

    class Strict(Compiled):
        def run(self, *args: Any) -> None:
            if not isinstance(args[0], int):
                raise TypeError("'float' object cannot be interpreted as an integer")
            super().run(*args)

    class Careful(Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            if not isinstance(grid[0], int):
                raise TypeError(f"a grid of {grid}")
            return super().__getitem__(grid)

    told: list[str] = []
    monkeypatch.setattr(module.logger, "warning", lambda text, *args: told.append(text % args))
    kernel, x = Careful(Strict), torch.zeros(64)
    launch(kernel, (3,), (x, 7), DEPTH=5, WIDTH=4)
    with pytest.raises(TypeError, match="a grid of"):
        launch(kernel, (3.0,), (x, 7), DEPTH=5, WIDTH=4)  # type: ignore[arg-type]
    launch(kernel, (3,), (x, 7), DEPTH=5, WIDTH=4)
    assert [entry[0] for entry in kernel.log] == ["first", "again"]
    assert module._direct
    assert told == []


def test_a_device_without_a_stream_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails before the launcher is called is no sign of a changed one."""

    def no_stream(device_index: int | None) -> str:
        raise TypeError(f"no stream on device {device_index}")

    kernel, x = Kernel(), torch.zeros(64)
    launch(kernel, (3,), (x, 7), DEPTH=5, WIDTH=4)
    monkeypatch.setattr(module, "_current_stream", no_stream)
    with pytest.raises(TypeError, match="no stream"):
        launch(kernel, (3,), (x, 7), DEPTH=5, WIDTH=4)
    assert [entry[0] for entry in kernel.log] == ["first"]
    assert module._direct


def test_errors_of_the_compiler_are_told_from_ours() -> None:
    import triton

    def caught(call: Callable[[], object]) -> Exception:
        with pytest.raises(Exception) as found:
            call()
        return found.value

    def wrong(q: int) -> int:
        return q

    compile_any: Any = triton.compiler.compile
    assert module.raised_by_compiler(caught(lambda: compile_any(object())))
    assert module.raised_by_compiler(triton.CompilationError("a kernel", None, "no such function"))
    assert module.raised_by_compiler(triton.OutOfResources(300_000, 232_448, "shared memory"))
    assert not module.raised_by_compiler(caught(lambda: wrong(1, 2)))  # type: ignore[call-arg]
    assert not module.raised_by_compiler(caught(lambda: compile_any(surplus=1)))  # not in it: on the way to it
    assert not module.raised_by_compiler(AttributeError("'NoneType' object has no attribute 'stride'"))


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
