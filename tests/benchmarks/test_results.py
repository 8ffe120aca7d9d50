# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Rows of a result file that several processes and runs write."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.ttft import Results


def test_a_row_that_is_measured_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.json")
    key = ("setting", "length")
    for setting, length, seconds in (("dense", 1, 1.0), ("dense", 2, 2.0), ("fast", 1, 3.0), ("dense", 1, 4.0)):
        results.add("ttft", {"setting": setting, "length": length, "seconds": seconds}, key)
    results.add("failed", {"setting": "fast"})
    results.add("failed", {"setting": "fast"})
    record = json.loads((tmp_path / "results.json").read_text())
    found = [(row["setting"], row["length"], row["seconds"]) for row in record["ttft"]]
    assert found == [("dense", 2, 2.0), ("fast", 1, 3.0), ("dense", 1, 4.0)]
    assert len(record["failed"]) == 2
