# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What can go wrong in these commands and is for their user to mend; and text of strangers made fit for a terminal."""

from __future__ import annotations


class ToolError(RuntimeError):
    """The message says what was found, what was expected and what to do."""


def plain(text: str) -> str:
    """Text that came from elsewhere, without characters that a terminal would obey; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
