# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Wheel, source distribution and editable installs, used outside the repository and in front of a checkout.

Each install has a virtual environment of its own: this one's packages lie behind it, without its editable install of
this project. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests import models
from tests.test_packaging import ROOT, copy_of_the_project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # several commands a test

MODULES = {
    "vllm_vsprefill": "vllm_vsprefill",
    "kernels": "vllm_vsprefill/kernels",
    "indexer_ckpts": "vllm_vsprefill/indexer_ckpts",
}
SITE = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")


def run(command: list[object], cwd: Path, *path: Path, **environment: str) -> str:
    """Output of a command; `path` becomes its PYTHONPATH."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), **environment}
    shown = [str(part) for part in command]
    done = subprocess.run(shown, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, f"{shown}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what `python -m build` makes: a source distribution, and a wheel made from that."""
    tree = copy_of_the_project(tmp_path_factory.mktemp("tree") / "source")
    sample = tree / "indexer_ckpts" / "sample"
    sample.mkdir()
    (sample / "config.json").write_text("{}")
    (sample / "indexer.safetensors").write_bytes(b"0")
    (sample / "optimizer.pt").write_bytes(b"0")
    run([sys.executable, "-P", "-m", "build", "--no-isolation", tree], tree.parent)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (found,) = distributions.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(distributions: Path) -> Path:
    (found,) = distributions.glob("*.tar.gz")
    return found


class Environment:
    """A virtual environment with one install of this project in front of the packages of the present one."""

    def __init__(self, folder: Path, *install: object) -> None:
        run([sys.executable, "-m", "venv", "--without-pip", folder], folder.parent)
        self.folder, self.site, self.python = folder, folder / SITE, folder / "bin" / "python"
        (self.site / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [sys.executable, "-P", "-m", "pip", "--python", self.python, "install", "-q", "--no-index", "--no-deps"]
        run([*pip, "--no-build-isolation", "--ignore-installed", *install], folder.parent)

    def add_library(self) -> Path:
        """A stand-in for Hugging Face's `kernels`, complete enough for transformers to use it."""
        library = self.site / "kernels"
        (library / "layer").mkdir(parents=True)
        (library / "layer" / "__init__.py").write_text("MARK = 'the library'\n")
        (library / "__init__.py").write_text(
            "from transformers.utils.import_utils import KERNELS_MIN_VERSION as __version__\n"
            "def __getattr__(name):\n"
            "    if name.startswith('__'):\n"
            "        raise AttributeError(name)\n"
            "    return lambda *_, **__: lambda decorated: decorated\n"
        )
        return library


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("wheel") / "env", wheel)


@pytest.fixture(scope="module")
def beside_library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("library") / "env", wheel)
    environment.add_library()
    return environment


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = models.save_random_model(tmp_path_factory.mktemp("model") / "random")
    models.save_random_indexer(folder / "indexer", folder)
    return folder


def test_both_distributions_hold_every_module_as_a_file_and_nothing_else(wheel: Path, sdist: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if not (member.isfile() or member.isdir())] == []
    in_sdist = {member.name.partition("/")[2] for member in members if member.isfile()}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in MODULES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".md", ".pyc")
    }
    assert {"vllm_vsprefill/py.typed", "vllm_vsprefill/kernels/settings.json"} <= expected
    assert expected - names == set()
    assert expected - in_sdist == set()
    for held in (names, in_sdist):
        assert {name for name in held if "/sample/" in name} == {
            "vllm_vsprefill/indexer_ckpts/sample/config.json",
            "vllm_vsprefill/indexer_ckpts/sample/indexer.safetensors",
        }
        folders = {name.split("/")[0] for name in held if "/" in name}
        assert {name for name in folders if not name.endswith((".dist-info", ".egg-info"))} == {"vllm_vsprefill"}
    assert any(name.endswith(("licenses/LICENSE", ".dist-info/LICENSE")) for name in names)
    assert "LICENSE" in in_sdist


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    texts = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(texts["METADATA"]).decode()
    assert "Requires-Python: >=3.10" in metadata
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert required
    # A requirement on either would put a CUDA build over a working CPU build.
    assert not [line for line in required if line.startswith(("torch", "vllm"))]
    entry_points = archive.read(texts["entry_points.txt"]).decode()
    assert "[vllm.general_plugins]\nvsprefill = vllm_vsprefill.registration:register" in entry_points


WHERE = """
import importlib.metadata, vllm_vsprefill.kernels.select.naive as m, vllm_vsprefill.indexer_ckpts as i
from vllm_vsprefill.kernels.settings import settings
print(m.__file__, i.__path__[0], importlib.metadata.distribution("vllm-vsprefill").locate_file(""))
"""


def test_an_install_of_the_source_distribution_is_that_of_the_wheel(
    sdist: Path, installed: Environment, tmp_path: Path
) -> None:
    other = Environment(tmp_path / "env", sdist)
    for environment in (installed, other):
        package = environment.site / "vllm_vsprefill"
        expected = f"{package}/kernels/select/naive.py {package}/indexer_ckpts {environment.site}"
        assert run([environment.python, "-c", WHERE], tmp_path) == expected

    def files(environment: Environment) -> dict[str, bytes]:
        folder = environment.site / "vllm_vsprefill"
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.suffix not in ("", ".pyc")}

    assert files(other) == files(installed)


@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install_follows_the_sources(mode: str, tmp_path: Path) -> None:
    tree = copy_of_the_project(tmp_path / "source")
    settings = ["--config-settings", "editable_mode=strict"] if mode == "strict" else []
    environment = Environment(tmp_path / "env", *settings, "-e", tree)
    with (tree / "kernels" / "select" / "naive.py").open("a") as file:
        file.write("\nMARK = 'changed'\n")
    code = WHERE + "print(m.MARK, i.__file__)"
    first, second = run([environment.python, "-c", code], tmp_path).splitlines()
    assert Path(first.split()[0]).resolve() == tree / "kernels" / "select" / "naive.py"
    mark, checkpoints = second.split()
    assert mark == "changed"
    assert Path(checkpoints).resolve() == tree / "indexer_ckpts" / "__init__.py"


# --- the wheel in one folder, the repository's root in front of it: `kernels/` must hide nothing

IMPORT = """
import sys, transformers
from transformers import Qwen2ForCausalLM
from transformers.utils import is_kernels_available
import vllm_vsprefill.kernels.select.naive as m
print(m.__file__, is_kernels_available())
if is_kernels_available():
    import kernels, kernels.layer
    print(kernels.__file__, kernels.layer.MARK)
"""


def test_transformers_finds_no_library_in_the_repository_root(installed: Environment, tmp_path: Path) -> None:
    expected = f"{ROOT}/vllm_vsprefill/kernels/select/naive.py False"
    assert run([installed.python, "-c", IMPORT], tmp_path, ROOT) == expected
    assert run([installed.python, "-c", IMPORT], ROOT) == expected


def test_transformers_finds_the_library_behind_the_repository_root(beside_library: Environment, tmp_path: Path) -> None:
    found = run([beside_library.python, "-c", IMPORT], tmp_path, ROOT).splitlines()
    assert found == [
        f"{ROOT}/vllm_vsprefill/kernels/select/naive.py True",
        f"{beside_library.site}/kernels/__init__.py the library",
    ]


@pytest.mark.parametrize("place", ["outside", "checkout", "library"])
def test_training_starts(
    place: str, installed: Environment, beside_library: Environment, model: Path, tmp_path: Path
) -> None:
    environment = beside_library if place == "library" else installed
    path = [] if place == "outside" else [ROOT]
    command = environment.folder / "bin" / "vsprefill"
    assert "--exclude-window" in run([command, "train", "--help"], tmp_path, *path, COLUMNS="200")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [i * j % 512 for j in range(400)]}) + "\n" for i in range(1, 9)))
    arguments = ["--model", model, "--data", data, "--out", tmp_path / "out", "--max-length", 128, "--min-length", 64]
    arguments += ["--steps", 1, "--validation-sequences", 1, "--hidden-size", 8, "--chunk-lengths", 0]
    run([command, "train", *arguments], tmp_path, *path)
    assert (tmp_path / "out" / "indexer.safetensors").is_file()


SERVE = """
import json, sys
from vllm import LLM, SamplingParams
import vllm_vsprefill
from vllm_vsprefill import exchange, stats

if __name__ == "__main__":
    model = sys.argv[1]
    options = {"checkpoint": model + "/indexer", "tau_columns": 0.3, "tau_diagonals": 0.01, "max_diagonals": 2}
    options |= {"min_seq_len": 512, "window": 64, "max_density": 1.0}
    llm = LLM(
        model, attention_backend="VSPREFILL", max_model_len=2048, max_num_batched_tokens=1024, dtype="float32",
        skip_tokenizer_init=True, enforce_eager=True, additional_config={"vsprefill": options},
    )
    prompt = {"prompt_token_ids": [i * i % 512 for i in range(1500)]}
    output = llm.generate([prompt], SamplingParams(max_tokens=2, temperature=0, detokenize=False), use_tqdm=False)
    layers = stats.read_counts(exchange.opened()[-1])
    sparse = [layers[layer].sparse_chunks for layer in sorted(layers)]
    print("FOUND", json.dumps([vllm_vsprefill.__file__, len(output[0].outputs[0].token_ids), sparse]))
"""


@pytest.mark.parametrize("place", ["outside", "checkout", "library"])
def test_vllm_serves(
    place: str, installed: Environment, beside_library: Environment, model: Path, tmp_path: Path
) -> None:
    environment = beside_library if place == "library" else installed
    path = [] if place == "outside" else [ROOT]
    script = tmp_path / "serve.py"
    script.write_text(SERVE)
    variables = {"VSPREFILL_STATS_DIR": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1"}
    output = run([environment.python, script, model], tmp_path, *path, **variables)
    line = next(line for line in output.splitlines() if line.startswith("FOUND"))
    package, tokens, sparse = json.loads(line.removeprefix("FOUND"))
    assert Path(package).parent == (environment.site if place == "outside" else ROOT) / "vllm_vsprefill"
    assert tokens == 2
    assert sparse == [2, 2]  # chunks of 1,024 and 476 rows, in each of two layers
