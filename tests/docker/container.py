# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What an engine makes of the compose file, as far as a machine without one can: the server's user, no capabilities, a
root file system that cannot be written to, fresh folders where volumes and tmpfs are mounted.

It takes root, since mounts do. The user may read everything (``CAP_DAC_READ_SEARCH``), because interpreters may lie
below root's home here, which an image does not do; it may write no more than in a container.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.test_packaging import ROOT
from vllm_vsprefill.eval.server import HOST, VLLMServer

HOME = "/home/vllm"
PREFIXES = (Path(sys.prefix), Path(sys.base_prefix))

# A folder of /tmp that is needed is kept reachable below /home while a tmpfs is put over /tmp.
MOUNTS = """
set -e
mount -t tmpfs -o mode=755 tmpfs /home
mkdir {home} /home/keep
chown {user} {home}
number=0
for folder in {kept}; do
    number=$((number + 1)); mkdir /home/keep/$number; mount --rbind "$folder" /home/keep/$number
done
mount -t tmpfs -o mode=1777,exec tmpfs /tmp
number=0
for folder in {kept}; do
    number=$((number + 1)); mkdir -p "$folder"; mount --rbind /home/keep/$number "$folder"; umount -l /home/keep/$number
    mount -o remount,bind,ro "$folder"
done
mount -o remount,bind,ro /
cd {home}
exec {command}
"""


def unavailable() -> str | None:
    """Why no such process can be started here, or None."""
    for name, package in (("unshare", "util-linux"), ("nsenter", "util-linux"), ("setpriv", "util-linux")):
        if shutil.which(name) is None:
            return f"needs {name} (Debian package {package})"
    if os.geteuid() != 0:
        return "needs root, to mount"
    if hidden := [str(folder) for folder in (ROOT, *PREFIXES) if folder.is_relative_to("/home")]:
        return f"what the server needs lies below /home, where a volume is mounted: {', '.join(hidden)}"
    done = subprocess.run(Container("2000:0", {}, ()).command(["true"]), capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"mounts are not allowed here: {done.stderr.strip()[-200:]}"


class Container:
    """Runs commands as a service's user, with its root file system read-only.

    Args:
        user: user and group, as numbers.
        environment: all variables that the commands see, besides the home folder.
        kept: folders that the commands need, wherever they are.
    """

    def __init__(self, user: str, environment: Mapping[str, str], kept: Sequence[Path]) -> None:
        self.user = user
        self.environment = {"HOME": HOME, "LANG": "C.UTF-8", **environment}
        # What all tests run with: an image has its bytecode, too, and a machine of its own.
        for name in ("PYTHONPYCACHEPREFIX", "OMP_WAIT_POLICY"):
            if name in os.environ:
                self.environment[name] = os.environ[name]
        kept = [*kept, *PREFIXES]
        self.kept = list(dict.fromkeys(folder for folder in kept if folder.is_relative_to("/tmp")))

    @property
    def drop(self) -> list[str]:
        """Command that gives up root for good."""
        user, _, group = self.user.partition(":")
        read = "-all,+dac_read_search"
        return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", f"--inh-caps={read}",
                f"--ambient-caps={read}", f"--bounding-set={read}", "--no-new-privs"]  # fmt: skip

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that starts `command` in a root file system of its own."""
        script = MOUNTS.format(
            home=HOME,
            user=self.user,
            kept=shlex.join(map(str, self.kept)),
            command=shlex.join([*self.drop, *command]),
        )
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]

    def enter(self, process: int, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run another command where a process is, as `docker compose exec` does."""
        enter = ["nsenter", f"--target={process}", "--mount", "--wd", *self.drop, *command]
        return subprocess.run(
            enter,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )


class ContainedServer(VLLMServer):
    """A service of the compose file on a port of this machine.

    Args:
        service: the service, with all variables filled in.
        python: interpreter of the environment that stands for the image's.
        replaced: paths inside the container, and what they are here.
        container: what runs it; None starts it as the present user.
    """

    def __init__(
        self,
        service: dict[str, Any],
        python: Path,
        replaced: Mapping[str, Path],
        log: Path,
        container: Container | None,
    ) -> None:
        super().__init__("", None, log, timeout=280)
        self.container, self.python = container, python
        arguments = [str(replaced.get(word, word)) for word in shlex.split(service["command"])]
        entry = [str(python), "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
        self.command = [*entry, *arguments, "--host", HOST, "--port", str(self.port)]
        self.environment = {**os.environ, **service["environment"]}
        self.environment.pop("PYTHONPATH", None)  # the environment's package, not that of a checkout
        if container is not None:
            self.environment = container.environment
            self.command = container.command(self.command)

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the server."""
        assert self.process is not None
        if self.container is not None:
            return self.container.enter(self.process.pid, command)
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)


def path(python: Path) -> str:
    """`PATH` with an environment in front."""
    return os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
