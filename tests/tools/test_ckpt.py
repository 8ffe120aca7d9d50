# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""``vsprefill ckpt``: what it says of whole, broken and hostile checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests import models as saved_models
from tests.test_checkpoint import LAYERS, MODEL, description, edit, indexer
from vllm_vsprefill import cli
from vllm_vsprefill.checkpoint import Thresholds, save_checkpoint

CONFIG = {
    "model_type": "qwen3",
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "hidden_size": 256,
    "rope_theta": 1e6,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    thresholds = {"fast": Thresholds(tau_columns=(0.5, (0.6, 0.7, 0.8, 0.9), 0.55), recall=(0.8, 0.9, 1.0))}
    return save_checkpoint(tmp_path / "mine", indexer(), description(training={"steps": 3}, thresholds=thresholds))


def run(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["ckpt", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


def model_folder(at: Path, **changes: object) -> Path:
    at.mkdir()
    (at / "config.json").write_text(json.dumps(CONFIG | changes))
    return at


def test_list_shows_what_is_installed_and_show_finds_it_by_name() -> None:
    code, text = run("list")
    assert code == 0
    assert "needle: for needle (examples/needle); 6 of 6 layers" in text
    code, text = run("show", "needle")
    assert code == 0
    assert "layers: 0-5 (6 of 6)" in text


def test_list_of_a_folder_names_what_is_wrong_with_each(folder: Path) -> None:
    broken = save_checkpoint(folder.parent / "broken", indexer(), description())
    (broken / "indexer.safetensors").write_bytes(b"no tensors")
    rows = json.loads(run("list", "--folder", folder.parent, "--json")[1])
    assert [row["name"] for row in rows] == ["broken", "mine"]
    assert "truncated" in rows[0]["problems"][0]
    assert rows[1] | {"folder": ""} == {
        "name": "mine",
        "folder": "",
        "problems": [],
        "model": "needle",
        "layers": list(LAYERS),
        "model_layers": 6,
        "parameters": sum(tensor.numel() for tensor in indexer().values()),
        "presets": ["fast"],
    }
    assert run("list", "--folder", folder.parent / "none") == (
        1,
        f"vsprefill: no such folder: {folder.parent / 'none'}\n",
    )


def test_show_reads_no_weights(folder: Path) -> None:
    code, text = run("show", folder)
    assert code == 0
    assert "; recall 90.0%" in text
    for part in (
        "layers: 0, 2, 5 (3 of 6)",
        "columns 0.5..0.9, one for each KV head; diagonals as the preset",
        "steps: 3",
    ):
        assert part in text
    assert json.loads(run("show", folder, "--json")[1])["fingerprint"]["num_kv_heads"] == MODEL.num_kv_heads


def test_verify_a_good_one(folder: Path, tmp_path: Path) -> None:
    code, text = run("verify", folder, "--model", model_folder(tmp_path / "model"))
    assert code == 0
    assert "in order: 12 tensors of float32" in text
    assert "made for" in text


def test_identity_is_shown_and_compared(tmp_path: Path) -> None:
    served = saved_models.save_random_model(tmp_path / "served")
    relative = saved_models.save_random_model(tmp_path / "relative", seed=1)
    made = saved_models.save_random_indexer(tmp_path / "indexer", served)
    weights = json.loads((made / "config.json").read_text())["identity"]["weights"]
    code, text = run("show", made)
    assert code == 0
    assert f"identity: name served, weights {weights}" in text
    for model, expected in (
        (served, "trained on the weights of this model"),
        (relative, "trained on another model of these shapes (served); a server takes it only as an explicit"),
    ):
        code, text = run("verify", made, "--model", model)
        assert code == 0
        assert expected in text
    edit(made, identity={})
    assert "identity: no hashes of weights" in run("show", made)[1]
    assert "the weights cannot be compared" in run("verify", made, "--model", served)[1]


def test_verify_names_another_model_and_bad_numbers_at_once(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "indexer.safetensors")
    tensors["layers.2.b1"][0, 3] = torch.nan
    save_file(tensors, folder / "indexer.safetensors")
    code, text = run("verify", folder, "--model", model_folder(tmp_path / "model", num_key_value_heads=2))
    assert code == 1
    assert "num_kv_heads is 4 in the checkpoint, 2 in the model" in text
    assert "layers.2.b1 holds 1 values that are NaN or infinite" in text


def test_verify_names_wrong_shapes_and_dtypes(folder: Path) -> None:
    tensors = load_file(folder / "indexer.safetensors")
    tensors["layers.0.w2"] = tensors["layers.0.w2"][:2].clone()
    tensors["layers.5.w1"] = tensors["layers.5.w1"].half()
    save_file(tensors, folder / "indexer.safetensors")
    code, text = run("verify", folder)
    assert code == 1
    assert "layers.0.w2 has shape [2, 16, 2], expected [4, 16, 2]" in text
    assert "layers.5.w1 is F16, expected F32" in text
    assert text.count("layers.0.w2 has shape") == 1


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"format_version": 1' + b" " * (17 * 2**20), b"\xff\xfe", b"[]"])
def test_hostile_descriptions_are_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    for command in ("show", "verify"):
        code, text = run(command, folder)
        assert code == 1
        assert "cannot be used" in text


def test_texts_of_strangers_do_not_reach_the_terminal_as_they_are(folder: Path) -> None:
    edit(folder, model="good\x1b[2Jname\nsecond line")
    for arguments in (("show", folder), ("list", "--folder", folder.parent)):
        code, text = run(*arguments)
        assert code == 0
        assert "\x1b" not in text
        assert "good\\x1b[2Jname second line" in text
    edit(folder, **{"\x1b[31m": 1})
    code, text = run("verify", folder)
    assert code == 1
    assert "\x1b" not in text


@pytest.mark.parametrize("name", ["no such folder", "~nobody-of-that-name/x", "a\0b"])
def test_names_of_nothing(name: str) -> None:
    code, text = run("verify", name)
    assert code == 1
    assert "cannot be used" in text


def test_a_model_that_cannot_be_read_is_said_beside_the_rest(folder: Path, tmp_path: Path) -> None:
    code, text = run("verify", folder, "--model", folder / "indexer.safetensors")
    assert code == 1
    assert "expected the folder of a Hugging Face model or an id, found a file" in text
    assert "in order" in text
    code, text = run("verify", folder, "--model", model_folder(tmp_path / "mamba", num_attention_heads=None))
    assert code == 1


def test_help_imports_neither_torch_nor_vllm() -> None:
    code = "import sys, vllm_vsprefill.cli; sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
