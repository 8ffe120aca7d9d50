# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The image's install steps, taken from the Dockerfile and run in a virtual environment that has vLLM and nothing of
this project."""

from __future__ import annotations

import subprocess

import pytest

from tests.docker.image import Image, build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return build(tmp_path_factory.mktemp("image"))


def test_the_image_has_the_package_its_checkpoints_and_its_command(image: Image) -> None:
    code = (
        "import vllm_vsprefill.kernels.select.naive as m, vllm_vsprefill.indexer_ckpts as i; "
        "from importlib.metadata import distribution as d; "
        "print(m.__file__, i.__file__, d('vllm-vsprefill').locate_file(''))"
    )
    package = image.site / "vllm_vsprefill"
    assert (
        image.run("-c", code) == f"{package}/kernels/select/naive.py {package}/indexer_ckpts/__init__.py {image.site}"
    )
    assert list((package / "indexer_ckpts").glob("*/indexer.safetensors"))
    done = subprocess.run([image.python.parent / "vsprefill", "--help"], capture_output=True, text=True, check=True)
    assert "status" in done.stdout


def test_the_build_adds_the_package_and_nothing_else(image: Image) -> None:
    added = {path.name for path in image.site.iterdir()} - image.before
    assert {name.partition("-")[0] for name in added} == {"vllm_vsprefill"}
