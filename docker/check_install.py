#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Ends the build of an image that lacks something which vllm-vsprefill needs, with one message that names all of it."""

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement  # vLLM needs it, too

COMMANDS = ("typer",)
"""What `vsprefill status` and `vsprefill mode` need besides; required by extras alone."""


def needed() -> list[Requirement]:
    """The package's requirements, and those of the commands for a running server."""
    found = [Requirement(line) for line in requires("vllm-vsprefill") or []]
    always = [one for one in found if one.marker is None]
    of_commands = {one.name: one for one in found if one.name in COMMANDS}
    return [*always, *of_commands.values()]


def problems() -> list[str]:
    """What is missing or of another version, a line each."""
    from vllm_vsprefill import _compat

    found = []
    for requirement in needed():
        try:
            present = version(requirement.name)
        except PackageNotFoundError:
            found.append(f"{requirement.name}{requirement.specifier} is missing")
            continue
        if not requirement.specifier.contains(present, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier} is needed, {present} is installed")
    try:
        reason = _compat.unsupported_version()
    except ImportError as error:
        reason = f"vLLM cannot be imported: {error}"
    return found if reason is None else [*found, reason]


def main() -> int:
    found = problems()
    for problem in found:
        print(f"vllm-vsprefill: {problem}", file=sys.stderr)
    if found:
        print("vllm-vsprefill: take an official image of a supported vLLM (VLLM_IMAGE, VLLM_VERSION).", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
