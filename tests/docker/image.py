# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The Dockerfile's steps on a virtual environment in the place of the official image. Nothing is downloaded."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from tests.docker.project import DOCKER, instructions
from tests.test_packaging import LEFT_OUT, ROOT

SITE = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")


@dataclass(frozen=True)
class Image:
    """An environment with the package in it, the way the Dockerfile puts it there.

    Attributes:
        python: its interpreter.
        site: where its packages are; those of the present environment lie behind.
        before: what was there before.
        source: the folder that the wheel was made in.
    """

    python: Path
    site: Path
    before: frozenset[str]
    source: Path

    def run(self, *arguments: str) -> str:
        """Output of its interpreter."""
        command = [str(self.python), "-P", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=self.site, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.strip()


def build(folder: Path) -> Image:
    """Carry out the steps that install something; CalledProcessError with the output of a step that fails."""
    environment, source, wheels = folder / "env", folder / "src", folder / "wheels"
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", environment], check=True, capture_output=True, timeout=120
    )
    site = environment / SITE
    (site / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # pip, setuptools and vLLM
    image = Image(environment / "bin" / "python3", site, frozenset(path.name for path in site.iterdir()), source)
    source.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = os.pathsep.join([str(environment / "bin"), os.environ["PATH"]])
    for one in instructions():
        if one.name == "COPY":
            *copied, target = shlex.split(one.text)
            for name in copied:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / target, ignore=LEFT_OUT, symlinks=True)
                else:
                    shutil.copy(ROOT / name, source / target)
        elif one.name == "RUN" and "pip" in one.text:
            step = re.sub(r"--mount=\S+\s+", "", one.text)
            step = step.replace("/wheels", str(wheels)).replace("/check_install.py", str(DOCKER / "check_install.py"))
            subprocess.run(
                ["sh", "-ec", step], cwd=source, env=variables, check=True, capture_output=True, text=True, timeout=240
            )
    return image
