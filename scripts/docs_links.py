# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""MkDocs hooks.

Pages that ``nav`` does not list come last. Links that leave ``docs/`` lead to files of the repository, which the site
names but does not hold.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_config(config: Any) -> Any:
    """The configuration, with every page in ``nav``."""
    listed = str(config["nav"])
    pages = sorted(path.name for path in Path(config["docs_dir"]).glob("*.md"))
    config["nav"] += [page for page in pages if f"'{page}'" not in listed]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with such links as text: the words, and the file's path where the words are not that already."""

    def named(link: re.Match[str]) -> str:
        text, path = link[1], link[2]
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return OUTSIDE.sub(named, markdown)
