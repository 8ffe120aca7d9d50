# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What ``vsprefill doctor`` finds."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        level: "ok"; "note" for what one should know; "problem" for what keeps VSPREFILL from working.
        subject: what it is about, in a word or two.
        text: what was found.
        remedy: what to do; empty where there is nothing to do or the text says it.
    """

    level: Literal["ok", "note", "problem"]
    subject: str
    text: str
    remedy: str = ""


def ok(subject: str, text: str) -> Finding:
    return Finding("ok", subject, text)


def note(subject: str, text: str, remedy: str = "") -> Finding:
    return Finding("note", subject, text, remedy)


def problem(subject: str, text: str, remedy: str = "") -> Finding:
    return Finding("problem", subject, text, remedy)


def one_line(error: BaseException) -> str:
    """An exception in one line; for those of others, whose texts may be long or empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
