# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The documented way to LongBench, with one of its tasks on two documents of our own, where lm_eval is installed.

pip install 'lm_eval[api,longbench]==0.4.13'
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.eval import tokenizers
from tests.eval.fake import serving

lm_eval = pytest.importorskip("lm_eval")
for needed in ("jieba", "fuzzywuzzy", "rouge", "tenacity", "aiohttp"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parent.parent.parent


def documented() -> list[str]:
    """The command in docs/evaluation.md, word by word."""
    text = (ROOT / "docs" / "evaluation.md").read_text()
    match = re.search(r"^(lm_eval run .*?)\n```", text, re.M | re.S)
    assert match is not None
    return match[1].replace("\\\n", " ").split()


def test_longbench_through_lm_eval(tmp_path: Path) -> None:
    documents = [
        {"context": "Oslo has number 7. " * 50, "question": "Oslo?", "answers": ["number 7"]},
        {"context": "Rome has number 8. " * 50, "question": "Rome?", "answers": ["number 8"]},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    original = Path(lm_eval.__file__).parent / "tasks" / "longbench" / "hotpotqa.yaml"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "own.yaml").write_text(
        f"include: {original}\ntask: own_hotpotqa\ntag: own\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
    )
    asked: list[str] = []

    def complete(body: dict[str, Any]) -> tuple[int, Any]:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        asked.extend(prompts)
        texts = [" number 7" if "Oslo" in prompt else " nothing" for prompt in prompts]
        return 200, {"choices": [{"index": i, "text": text} for i, text in enumerate(texts)]}

    with serving({"/v1/completions": complete}) as url:
        given = {
            "NAME": "m",
            "http://127.0.0.1:8000": url,
            "FOLDER": str(tokenizers.NEEDLE),
            "OUT": str(tmp_path / "out"),
        }
        words = documented()
        for name, value in given.items():
            words = [word.replace(name, value) for word in words]
        words[words.index("longbench")] = "own_hotpotqa"
        words[0:2] = [sys.executable, "-m", "lm_eval", "run"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "NO_PROXY": "127.0.0.1"}
        environment["HF_HOME"] = str(tmp_path / "cache")
        done = subprocess.run(
            [*words, "--include_path", str(tmp_path / "tasks")], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["own_hotpotqa"]
    assert results["qa_f1_score,none"] == 0.5
    assert len(asked) == 2
    assert all(prompt.startswith("Answer the question based on the given passages.") for prompt in asked)
    assert all(len(prompt) > 900 for prompt in asked), "the context was cut"
