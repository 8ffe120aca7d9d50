# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The package started from a checkout, and the scripts that set it up; installs have their own file."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", ".cache", "*_cache", "__pycache__", "build", "*.egg-info", "out", ".gpu", ".whl", ".hypothesis"
)


def run_python(code: str, cwd: Path, *path: Path) -> str:
    """Output of a fresh interpreter."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_of_the_project(tree: Path) -> Path:
    """A copy to build in: building leaves folders behind, and what an earlier build left would get into the wheel."""
    tree.mkdir()
    for name in ("vllm_vsprefill", "kernels", "indexer_ckpts"):
        shutil.copytree(ROOT / name, tree / name, ignore=LEFT_OUT, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tree)
    return tree


def sources(folder: str) -> set[str]:
    return {
        str(path.relative_to(ROOT / folder))
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }


def test_a_bare_checkout_works(tmp_path: Path) -> None:
    for name in ("vllm_vsprefill", "kernels", "indexer_ckpts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=LEFT_OUT, symlinks=True)
    code = (
        "import vllm_vsprefill.kernels.merge.naive as m, vllm_vsprefill.indexer_ckpts as i\n"
        "print(m.__file__, i.__file__)"
    )
    package = tmp_path / "vllm_vsprefill"
    expected = f"{package}/kernels/merge/naive.py {package}/indexer_ckpts/__init__.py"
    assert run_python(code, tmp_path) == expected


def test_the_folder_kernels_does_not_shadow_the_library_of_that_name(tmp_path: Path) -> None:
    library = tmp_path / "kernels"
    (library / "layer").mkdir(parents=True)
    (library / "__init__.py").write_text("from .layer import MARK\n")
    (library / "layer" / "__init__.py").write_text("MARK = 'the library'\n")
    code = "import kernels, kernels.layer; from kernels import MARK; print(MARK, kernels.__file__)"
    assert run_python(code, ROOT, tmp_path) == f"the library {library / '__init__.py'}"


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, vllm_vsprefill, vllm_vsprefill.registration; "
        "print(sorted({'torch', 'vllm', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert run_python(code, ROOT) == "[]"


def test_installed_entry_point_and_version() -> None:
    import vllm_vsprefill

    installed = distribution("vllm-vsprefill")
    assert installed.version == vllm_vsprefill.__version__
    points = [point for point in installed.entry_points if point.group == "vllm.general_plugins"]
    assert [(point.name, point.value) for point in points] == [("vsprefill", "vllm_vsprefill.registration:register")]
    assert callable(points[0].load())


def test_sources_that_lost_their_links_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """As `python -m zipfile` and some copies leave them."""
    tree = copy_of_the_project(tmp_path / "source")
    for name in ("kernels", "indexer_ckpts"):
        (tree / "vllm_vsprefill" / name).unlink()
        (tree / "vllm_vsprefill" / name).write_text(f"../{name}")
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert done.stderr.startswith("vllm_vsprefill/kernels is a file, but should be a link to the folder kernels")
    assert "Traceback" not in done.stderr


# --- scripts


def test_requirements_of_cpu_vllm_are_filtered() -> None:
    torch, others = script("setup_env").wanted_requirements(
        [
            "regex",
            "Torch_Audio; sys_platform == 'linux'",
            'torch==2.13.0+cpu; platform_machine == "x86_64"',
            'torch==2.13.0; platform_system == "Darwin"',
            "torchaudio; platform_machine != 's390x'",
            "torchvision",
            "TorchCodec>=0.14",
            "torch-like>=1",
            'pandas; extra == "bench"',
            "fastapi[standard]<0.137.0,>=0.133.0",
            "",
        ]
    )
    assert torch == ['torch==2.13.0+cpu; platform_machine == "x86_64"', 'torch==2.13.0; platform_system == "Darwin"']
    assert others == [
        "regex",
        "Torch_Audio; sys_platform == 'linux'",
        "torch-like>=1",
        "fastapi[standard]<0.137.0,>=0.133.0",
    ]


def test_unfit_interpreters_are_named() -> None:
    problem = script("setup_env").interpreter_problem
    assert problem((3, 11), True) is None
    assert problem((3, 8), True) == "Python 3.11 to 3.14 is needed, this is 3.8"
    assert "this is 3.15" in problem((3, 15), True)
    assert "venv or ensurepip module is missing" in problem((3, 12), False)
    assert "python3.12-venv" in problem((3, 12), False)


def test_uv_is_told_what_pip_is_told(tmp_path: Path) -> None:
    settings = script("setup_env").uv_settings
    best = ["--index-strategy", "unsafe-best-match"]
    assert settings("", []) == (best, {})
    configuration = f"""global.extra-index-url='https://a/simple file://{tmp_path} file:///not/there'
global.find-links='/old'
freeze.exclude='x'
:env:.args=''
:env:.cert='/ca.pem'
:env:.default-timeout='180'
:env:.find-links='/wheels'
"""
    arguments, environment = settings(configuration, ["--extra-index-url", "https://b", "--find-links=/c"])
    places = ["--extra-index-url", "https://a/simple", "--extra-index-url", f"file://{tmp_path}"]
    places += ["--find-links", "/wheels", "--extra-index-url", "https://b", "--find-links", "/c"]
    assert arguments == best + places
    assert environment == {"SSL_CERT_FILE": "/ca.pem"}


@pytest.mark.parametrize(
    ("configuration", "pip_args"),
    [
        ("global.require-hashes='true'", []),
        ("global.index-url=", []),
        ("", ["--pre"]),
        ("", ["--extra-index-url"]),
        ("", ["something"]),
    ],
)
def test_pip_does_what_uv_does_not_know(configuration: str, pip_args: list[str]) -> None:
    assert script("setup_env").uv_settings(configuration, pip_args) is None


def test_pip_takes_over_where_uv_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_env = script("setup_env")
    monkeypatch.setenv("PIP_ARGS", "--find-links /c")
    monkeypatch.delenv("INSTALLER", raising=False)
    runner = setup_env.Runner(tmp_path)
    ran: list[list[str]] = []

    def run(command: list[object], title: str) -> str:
        ran.append([str(part) for part in command])
        if "uv" in Path(ran[-1][0]).name:
            raise setup_env.SetupError("no")
        return ""

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setattr(runner, "ask", lambda code: "")
    for _ in range(2):
        runner.pip(["-e", "."], "installing")
    pip = [str(tmp_path / "bin" / "python"), "-m", "pip", "install", "--progress-bar", "off", "--find-links", "/c"]
    assert [command for command in ran if command[0] == pip[0]] == [
        [*pip, setup_env.UV],
        [*pip, "-e", "."],
        [*pip, "-e", "."],
    ]
    (by_uv,) = (command for command in ran if command[0] != pip[0])
    assert by_uv[-4:] == ["--find-links", "/c", "-e", "."]
    monkeypatch.setenv("INSTALLER", "pip")
    ran.clear()
    other = setup_env.Runner(tmp_path)
    monkeypatch.setattr(other, "run", run)
    other.pip(["x"], "installing")
    assert ran == [[*pip, "x"]]


def fake_executable(folder: Path, name: str, output: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{output}'\n")
    path.chmod(0o755)
    return path


def test_an_old_interpreter_is_replaced_by_one_from_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_env = script("setup_env")
    old = fake_executable(tmp_path, "python3", "3 8 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(old))
    with pytest.raises(setup_env.SetupError, match=r"needed, this is 3\.8\.\n.*make PYTHON=/path/to/python3\.11"):
        setup_env.pick_interpreter()
    fake_executable(tmp_path, "python3.12", "3 12 0")  # without venv
    good = fake_executable(tmp_path, "python3.13", "3 13 1")
    assert setup_env.pick_interpreter() == str(good)


def test_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_env = script("setup_env")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("VLLM_TARGET", raising=False)
    assert setup_env.detect_target() == "cpu"
    fake_executable(tmp_path, "nvidia-smi", "No devices were found")
    assert setup_env.detect_target() == "cpu"
    fake_executable(tmp_path, "nvidia-smi", "GPU 0: NVIDIA H200 (UUID: GPU-1)")
    assert setup_env.detect_target() == "cuda"
    monkeypatch.setenv("VLLM_TARGET", "CPU")
    assert setup_env.detect_target() == "cpu"
    monkeypatch.setenv("VLLM_TARGET", "tpu")
    with pytest.raises(setup_env.SetupError, match="VLLM_TARGET='tpu': expected cpu, cuda or auto"):
        setup_env.detect_target()


def test_a_finished_environment_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_env = script("setup_env")
    monkeypatch.setenv("VLLM_TARGET", "cpu")
    for name in ("make_venv", "Runner"):
        monkeypatch.setattr(setup_env, name, lambda *_: pytest.fail("nothing was to be done"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    stamp = {"fingerprint": setup_env.fingerprint((3, 11), "cpu"), "extras": ["demo", "test"], "version": [3, 11]}
    (tmp_path / setup_env.STAMP).write_text(json.dumps(stamp))
    setup_env.setup(tmp_path, {"demo"})
    with pytest.raises(pytest.fail.Exception):
        setup_env.setup(tmp_path, {"dev"})
    monkeypatch.setenv("VLLM_TARGET", "cuda")
    with pytest.raises(pytest.fail.Exception):
        setup_env.setup(tmp_path, {"demo"})


class FailingTorch:
    """Stands in for the runner where the index has no CPU build of torch."""

    def __init__(self, venv: Path) -> None:
        self.venv, self.log = venv, venv / "log"

    def ask(self, *_: object) -> str:
        return "torch==2.13.0+cpu\nregex\n"

    def pip(self, arguments: list[object], title: str) -> None:
        if "torch" in title:
            raise script_error(f"{title} failed (exit status 1):\n   | ERROR: No matching distribution found")


script_error: type[Exception] = Exception


def test_a_missing_cpu_build_of_torch_comes_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_env = script("setup_env")
    monkeypatch.setattr(sys.modules[__name__], "script_error", setup_env.SetupError)
    monkeypatch.setenv("MAKE_GOAL", "demo")
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.install_cpu_vllm(FailingTorch(tmp_path))
    message = str(caught.value)
    assert "No matching distribution found" in message
    assert 'make demo PIP_ARGS="--extra-index-url <address of PyTorch\'s CPU wheel index>"' in message


def test_makefile_passes_a_persons_text_and_model_on() -> None:
    command = ["make", "--no-print-directory", "-n", "demo", "PROMPT=a file's name.txt", "MODEL=owner/name"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 'examples.demo ${PROMPT:+--prompt "$PROMPT"} ${MODEL:+--model "$MODEL"}' in shown
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "demo", "test", "lint", "bench-cpu", "clean"):
        assert f"make {target} " in help_text


def test_pickles_are_found_by_their_names_and_in_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = script("check_sources")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "good.safetensors").write_text("x")
    (tmp_path / "bad.pt").write_text("x")
    found = [problem for path in check.files(tmp_path) for problem in check.problems(path)]
    assert found == ["bad.pt: weights are kept as .safetensors only"]
    pytest.importorskip("ruff")
    source = tmp_path / "reads.py"
    source.write_text("import torch\n\ntorch.load(str())\n")
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "TID251 `torch.load` is banned" in done.stdout
