# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Two processes train what one process with twice the sequences per step would train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distil.conftest import ROOT

pytest.importorskip("accelerate")

SCRIPT = """
import sys
import numpy as np
from accelerate import Accelerator
from pathlib import Path
from tests.distil import tiny
from vllm_vsprefill.distil.data import PackedTokens
from vllm_vsprefill.distil.model import wrap
from vllm_vsprefill.distil.options import train_options
from vllm_vsprefill.distil.trainer import Trainer

accelerator = Accelerator(cpu=True)
accumulation = int(sys.argv[2])
data = PackedTokens(np.random.default_rng(0).integers(4096, size=4000, dtype=np.uint32), "noise")
options = train_options(
    {"hidden_size": 8}, max_length=64, min_length=64, chunk_lengths=(0,), steps=3, accumulation=accumulation,
    learning_rate=5e-3, compute_dtype="float32", validate_every=3, validation_sequences=3, save_every=3,
)
Trainer(options, wrap(tiny.model("qwen3"), "tiny"), data, data, Path(sys.argv[1]), accelerator).run()
if accelerator.is_main_process:
    print(f"processes {accelerator.num_processes}", flush=True)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_share_the_work_of_one(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    runs = {"two": ([*launcher, str(script)], "1"), "one": ([str(script)], "2")}
    for name, (command, accumulation) in runs.items():
        done = subprocess.run(
            [sys.executable, *command, str(tmp_path / name), accumulation], cwd=ROOT, env=environ, capture_output=True,
            text=True, check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"processes {2 if name == 'two' else 1}" in done.stdout
    logs = [
        [json.loads(line) for line in (tmp_path / name / "training.jsonl").read_text().splitlines()] for name in runs
    ]
    for two, one in zip(*logs, strict=True):
        assert two.keys() == one.keys()
        if "loss" in two:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        else:
            assert two["validation"]["loss"] == pytest.approx(one["validation"]["loss"], rel=1e-4)
            assert two["validation"]["recall"][0] == pytest.approx(one["validation"]["recall"][0], abs=1e-3)
