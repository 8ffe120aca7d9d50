# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The command as its users meet it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.distil.conftest import ROOT
from vllm_vsprefill import cli
from vllm_vsprefill.checkpoint import Thresholds, load_checkpoint, read_config
from vllm_vsprefill.config import VSPrefillConfig
from vllm_vsprefill.distil import calibrate

for _name in ("accelerate", "matplotlib", "tensorboard"):
    pytest.importorskip(_name)
SMALL = [
    "--max-length", "128", "--min-length", "64", "--steps", "4", "--validate-every", "2", "--save-every", "2",
    "--validation-sequences", "2", "--hidden-size", "8", "--chunk-lengths", "32,0",
]  # fmt: skip


def run(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, re.sub(r"\s+", " ", done.output)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy as np

    from vllm_vsprefill.distil.synthetic import document

    file = tmp_path_factory.mktemp("text") / "book.jsonl"
    rng = np.random.default_rng(0)
    file.write_text("".join(json.dumps({"text": document(rng, 400)}) + "\n" for _ in range(8)))
    return file


@pytest.fixture(scope="module")
def trained(model_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_vsprefill.distil.trainer.MIN_SEQ_LEN", 0)
        code, output = run("train", "--model", model_folder, "--data", text, "--out", out, *SMALL)
    assert code == 0, output
    return out


def test_help_names_every_command_and_option() -> None:
    code, output = run("--help")
    assert code == 0
    assert "train" in output
    assert "calibrate" in output
    for command, flags in (
        ("train", ("--resume", "--dry-run", "--target")),
        ("calibrate", ("--recall", "--per-head", "--top1")),
    ):
        code, output = run(command, "--help")
        assert code == 0
        assert all(flag in output for flag in flags), output


def test_train_writes_what_the_server_reads(trained: Path, model_folder: Path) -> None:
    config = read_config(trained)
    assert config.model == model_folder.name
    assert config.hidden_size == 8
    assert set(config.thresholds) == {"accurate", "balanced", "fast"}
    loaded = load_checkpoint(trained)
    assert all(None not in loaded.thresholds("fast", layer) for layer in (0, 1))
    assert (trained / "report.html").is_file()


def test_no_path_of_this_machine_is_stored(trained: Path, model_folder: Path, text: Path) -> None:
    written = [file for file in trained.rglob("*") if file.suffix in (".json", ".jsonl", ".html")]
    assert len(written) >= 5
    for file in written:
        for path in (text.parent, model_folder.parent, trained.parent):
            assert str(path) not in file.read_text(), file
    # As many of the documents as the run needs.
    assert re.fullmatch(r"book\.jsonl: [1-8] documents, [\d,]+ tokens", str(read_config(trained).training["data"]))


def test_resume_of_a_finished_run_changes_nothing(trained: Path, model_folder: Path, text: Path) -> None:
    # As if somebody had calibrated the preset since
    config = read_config(trained)
    theirs = Thresholds(tau_columns=(0.25, 0.5), tau_diagonals=(0.01, 0.02))
    calibrate.store(load_checkpoint(trained), {"balanced": theirs})
    before = (trained / "indexer.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm_vsprefill.distil.trainer.MIN_SEQ_LEN", 0)
        code, output = run("train", "--model", model_folder, "--data", text, "--out", trained, *SMALL, "--resume")
    assert code == 0, output
    assert "the run was complete" in output
    assert (trained / "indexer.safetensors").read_bytes() == before
    assert read_config(trained).thresholds == {**config.thresholds, "balanced": theirs}
    code, output = run("train", "--model", model_folder, "--data", text, "--out", trained, *SMALL)
    assert code == 1
    assert "holds the state of another run; go on with it by --resume" in output


def test_calibrate_sets_thresholds_per_head(trained: Path, model_folder: Path) -> None:
    before = load_checkpoint(trained)
    code, output = run(
        "calibrate", "--model", model_folder, "--checkpoint", trained, "--data", "synthetic", "--density", 0.6,
        "--preset", "fast", "--per-head", "--length", 512, "--sequences", 2, "--chunk-lengths", 256,
    )  # fmt: skip
    assert code == 0, output
    assert "fast (wanted: density 0.6)" in output
    after = load_checkpoint(trained)
    entries = after.config.thresholds["fast"].tau_columns
    assert entries is not None
    assert all(isinstance(entry, tuple) and len(entry) == 2 for entry in entries)
    assert after.config.thresholds["balanced"] == before.config.thresholds["balanced"]
    for layer in (0, 1):
        assert all((a == b).all() for a, b in zip(before.layers[layer], after.layers[layer], strict=True))
    part = load_checkpoint(trained, kv_head_range=(1, 2))
    assert part.thresholds("fast", 0)[0] == entries[0][1:]  # type: ignore[index]
    assert VSPrefillConfig.from_sources({"preset": "fast", "checkpoint": str(trained)}).preset == "fast"


def test_calibrate_for_a_recall(trained: Path, model_folder: Path) -> None:
    code, output = run(
        "calibrate", "--model", model_folder, "--checkpoint", trained, "--data", "synthetic", "--recall", 0.9,
        "--preset", "balanced", "--length", 700, "--sequences", 2, "--chunk-lengths", 0, "--platform", "cuda",
    )  # fmt: skip
    assert code == 0, output
    found = re.search(r"balanced \(wanted: recall 0.9\): recall ([\d.]+)%", output)
    assert found is not None
    assert float(found[1]) >= 89.9


def test_calibrate_says_what_is_out_of_reach(trained: Path, model_folder: Path) -> None:
    code, output = run(
        "calibrate", "--model", model_folder, "--checkpoint", trained, "--data", "synthetic", "--density", 0.01,
        "--preset", "fast", "--length", 512, "--sequences", 1, "--chunk-lengths", 256,
    )  # fmt: skip
    assert code == 0, output
    assert "% is the least: the local window" in output


def test_calibrate_wants_text_that_is_long_enough(trained: Path, model_folder: Path, tmp_path: Path) -> None:
    before = (trained / "config.json").read_text()
    short = tmp_path / "short.txt"
    short.write_text("The code of the kettle is 4711. " * 40)
    calibrating: tuple[Any, ...] = ("calibrate", "--model", model_folder, "--checkpoint", trained, "--data", short)
    code, output = run(*calibrating, "--length", 4096)
    assert code == 1
    assert "too little text" in output
    assert "the shortest sequences have 4,096" in output
    assert "held out" not in output
    code, output = run(*calibrating, "--length", 8192)
    assert code == 1
    assert "--length 8192: the model has 4096 positions" in output
    assert (trained / "config.json").read_text() == before


def test_generated_text_to_calibrate_with_is_not_that_of_training(
    trained: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_vsprefill.distil.synthetic import Synthetic

    asked: list[bool] = []
    real = Synthetic.sequence

    def sequence(self: Synthetic, position: int, length: int) -> Any:
        asked.append(self._held_out)
        return real(self, position, length)

    monkeypatch.setattr(Synthetic, "sequence", sequence)
    code, output = run(
        "calibrate", "--model", model_folder, "--checkpoint", trained, "--data", "synthetic", "--density", 0.8,
        "--preset", "accurate", "--length", 64, "--sequences", 2, "--chunk-lengths", 0,
    )  # fmt: skip
    assert code == 0, output
    assert asked == [True, True]


def test_dry_run_estimates_and_writes_nothing(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = run("train", "--model", model_folder, "--data", "missing.txt", "--out", out, "--dry-run", *SMALL)
    assert code == 0, output
    for part in ("parameters", "memory at 128 tokens", "TFLOP/s in matrix products", "time: about", "2 layers get"):
        assert part in output
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"--model": "/nowhere/model"}, ["--model /nowhere/model: no such folder"]),
        ({"--model": "EMPTY"}, ["the folder holds no config.json"]),
        ({"--model": "FILE"}, ["expected the folder of a Hugging Face model or an id, found a file"]),
        ({"--data": "missing.jsonl"}, ["--data missing.jsonl: no such file or folder"]),
        ({"--text-field": "body"}, ["column 'body' is missing; found columns 'text'", "--text-field"]),
        ({"--loss": "l1", "--target": "best"}, ["--loss", "'l1'", "--target", "'best'"]),
        ({"--inputs": "k+x"}, ["--inputs: expected 'kv', ", "found 'kx'"]),
        ({"--chunk-lengths": "2k"}, ["--chunk-lengths: expected whole numbers"]),
        ({"--hf-overrides": "{rope"}, ["--hf-overrides: not valid JSON", "found '{rope'"]),
        ({"--hf-overrides": "[1]"}, ["--hf-overrides: expected a JSON object, found '[1]'"]),
        ({"--hf-overrides": '{"rope_theater": 1}'}, ["--hf-overrides: a qwen3 configuration has no rope_theater"]),
        ({"--max-length": "100000"}, ["the model has 4096 positions"]),
        ({"--out": "FILE"}, ["expected a folder, found a file"]),
        ({"--out": "/proc/none"}, ["cannot be written to"]),
        ({"--out": "MODEL"}, ["that is the model's own folder"]),
        ({"--out": "OTHER"}, ["it already holds config.json; choose another folder"]),
        ({"--device": "warp"}, ["--device warp"]),
        ({"--device": "meta"}, ["--device meta: expected cpu, cuda or one GPU, cuda:N"]),
        ({"--dtype": "int4"}, ["--dtype: expected 'auto', 'bfloat16'"]),
        ({"--validation-share": "2"}, ["--validation-share: expected a number less than 1, found '2'"]),
    ],
)
def test_what_is_wrong_is_said(
    model_folder: Path, text: Path, tmp_path: Path, changes: dict[str, str], messages: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    known = {name.upper(): str(tmp_path / name) for name in ("empty", "file", "other")} | {"MODEL": str(model_folder)}
    given = {"--model": str(model_folder), "--data": str(text), "--out": str(tmp_path / "out")}
    given |= {flag: known.get(value, value) for flag, value in changes.items()}
    small = [part for i, part in enumerate(SMALL) if not {SMALL[i], SMALL[i - 1]} & set(changes)]
    code, output = run("train", *small, *(part for pair in given.items() for part in pair))
    assert code == 1
    for message in messages:
        assert message in output, output


def test_wrong_flags_of_calibrate_are_reported_together(model_folder: Path, trained: Path) -> None:
    calibrating = ("calibrate", "--model", model_folder, "--checkpoint", trained, "--data", "synthetic")
    code, output = run(
        *calibrating, "--recall", 2, "--preset", "slow", "--metric", "best", "--rows", 0, "--chunk-lengths", "-5"
    )
    assert code == 1
    for part in ("--recall: expected", "--preset: expected", "--metric: expected", "--rows: expected", "--chunk-len"):
        assert part in output
    code, output = run(*calibrating, "--recall", 0.5, "--density", 0.1)
    assert code == 1
    assert "not both" in output
    code, output = run(*calibrating, "--recall", 0.5)
    assert code == 1
    assert "say which preset" in output


def test_what_is_missing_is_said_at_once() -> None:
    code, output = run("train", "--steps", "few")
    assert code == 1
    for part in ("--model: is needed", "--data: is needed", "--out: is needed", "--steps: expected", "found 'few'"):
        assert part in output, output


def test_help_imports_no_torch() -> None:
    script = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from vllm_vsprefill import cli\n"
        "for command in ('--help', 'train --help', 'calibrate --help', 'status', 'mode dense'):\n"
        "    CliRunner().invoke(cli.app, command.split())\n"
        "print({'torch', 'vllm', 'transformers'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_checkpoint_of_another_model_is_not_calibrated(trained: Path) -> None:
    code, output = run(
        "calibrate", "--model", ROOT / "examples/needle/model", "--checkpoint", trained, "--data", "x.txt"
    )
    assert code == 1
    assert "trained for another model" in output
    code, output = run("calibrate", "--model", ROOT / "examples/needle/model", "--checkpoint", "nowhere", "--data", "x")
    assert code == 1
    assert "nowhere" in output


def damaged(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a model with other tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_weights_that_are_missing_or_damaged(model_folder: Path, text: Path, tmp_path: Path) -> None:
    def train(model: Path) -> str:
        code, output = run("train", "--model", model, "--data", text, "--out", tmp_path / "out", *SMALL)
        assert code == 1, output
        return output

    name = "model.layers.1.self_attn.k_proj.weight"
    less = damaged(model_folder, tmp_path / "less", lambda tensors: tensors.pop(name))
    assert f"1 of its weights are not there and would be random: {name}" in train(less)
    wide = damaged(model_folder, tmp_path / "wide", lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    assert "its weights cannot be loaded" in train(wide)
    cut = tmp_path / "cut"
    shutil.copytree(model_folder, cut)
    (cut / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:1000])
    assert "its weights cannot be loaded" in train(cut)


@pytest.mark.parametrize("goal", ["--recall", "--density"])
def test_attention_that_is_no_number_is_not_calibrated_by(
    trained: Path, model_folder: Path, tmp_path: Path, goal: str
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")

    model = damaged(model_folder, tmp_path / "nan", spoil)
    before = (trained / "config.json").read_bytes()
    code, output = run(
        "calibrate", "--model", model, "--checkpoint", trained, "--data", "synthetic", "--preset", "fast", goal, 0.5,
        "--length", 128, "--sequences", 1, "--chunk-lengths", 0,
    )  # fmt: skip
    assert code == 1, output
    assert "no numbers, in 1 of 2 layers" in output
    assert (trained / "config.json").read_bytes() == before


def test_settings_of_the_model_are_replaced(model_folder: Path, text: Path, tmp_path: Path) -> None:
    yarn = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    overrides = json.dumps({"rope_parameters": yarn})
    training = ("train", "--model", model_folder, "--data", text, "--out", tmp_path / "out", *SMALL, "--no-calibrate")
    code, output = run(*training, "--hf-overrides", overrides)
    assert code == 0, output
    stored = read_config(tmp_path / "out")
    assert stored.fingerprint.rope_scaling is not None
    assert stored.fingerprint.rope_scaling["factor"] == 4.0
    given = ("calibrate", "--model", model_folder, "--checkpoint", tmp_path / "out", "--data", "synthetic")
    calibrating = (*given, "--length", 128, "--sequences", 1, "--chunk-lengths", 0)
    code, output = run(*calibrating)
    assert code == 1
    assert "trained for another model" in output
    code, output = run(*calibrating, "--hf-overrides", overrides)
    assert code == 0, output


def test_code_of_a_model_runs_only_where_it_may(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    from transformers import dynamic_module_utils

    def ask(*arguments: object) -> str:
        raise AssertionError("asked on the terminal")

    monkeypatch.setattr(builtins, "input", ask)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "own"
    shutil.copytree(model_folder, folder)
    (folder / "configuration_own.py").write_text(
        "from transformers import Qwen3Config\n\n\nclass OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
    )
    (folder / "modeling_own.py").write_text(
        "from transformers import Qwen3ForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    settings = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    settings |= {"model_type": "own", "auto_map": classes, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(settings))
    training = ("train", "--model", folder, "--data", text, "--out", tmp_path / "out", *SMALL, "--no-calibrate")
    code, output = run(*training)
    assert code == 1
    assert "comes with code of its own; allow it to run with --trust-remote-code" in output
    code, output = run(*training, "--trust-remote-code")
    assert code == 0, output
    assert read_config(tmp_path / "out").fingerprint.architecture == "own"


def test_a_revision_is_asked_for(model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    asked: list[tuple[str, Any]] = []

    def fail(name: Any, **settings: Any) -> None:
        asked.append((str(name), settings["revision"]))
        raise OSError("not there")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)
    code, output = run(
        "train", "--model", "owner/name", "--revision", "v2", "--data", "x.txt", "--out", tmp_path / "out"
    )
    assert code == 1
    assert "no such folder, and transformers cannot load it as an id (not there)" in output
    assert asked == [("owner/name", "v2")]


def test_a_model_that_is_no_decoder(tmp_path: Path, text: Path) -> None:
    import transformers

    transformers.T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4).save_pretrained(tmp_path / "t5")
    code, output = run("train", "--model", tmp_path / "t5", "--data", text, "--out", tmp_path / "out", "--dry-run")
    assert code == 1
    assert "not a decoder" in output


def test_what_cannot_be_trained_for_is_refused_before_data_is_read(tmp_path: Path) -> None:
    import transformers

    small = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    for made, message in (
        (transformers.GptOssConfig, "no indexer can be trained for a gpt_oss model: layer 0 has attention sinks"),
        (transformers.DeepseekV3Config, "a deepseek_v3 model has multi-head latent attention (MLA)"),
    ):
        folder = tmp_path / made.model_type
        made(**small).save_pretrained(folder)
        code, output = run("train", "--model", folder, "--data", "missing.txt", "--out", tmp_path / "out", *SMALL)
        assert code == 1
        assert message in output
        assert "missing.txt" not in output
        assert not (tmp_path / "out").exists()


def test_no_traceback_for_unknown_flags() -> None:
    done = CliRunner().invoke(cli.app, ["train", "--modle", "x"])
    assert done.exit_code == 2
    assert "No such option" in done.output


@pytest.mark.slow
def test_ctrl_c_and_resume_from_a_shell(model_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    long = [*SMALL]
    long[long.index("--steps") + 1] = "400"
    command = [sys.executable, "-m", "vllm_vsprefill.cli", "train", "--model", str(model_folder), "--data", str(text)]
    command += ["--out", str(out), *long]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
    )
    log = out / "training.jsonl"
    deadline = time.monotonic() + 90
    while not (log.is_file() and log.read_text().count("\n") > 8):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "go on with --resume" in output
    assert "Traceback" not in output
    assert read_config(out).hidden_size == 8
    code, again = run("train", "--model", model_folder, "--data", text, "--out", out, *long, "--resume")
    assert code == 0, again
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss": ' in line and "kl_" in line]
    assert list(dict.fromkeys(steps)) == list(range(1, 401))
