# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which model it is: copies are the same, other weights are not, and what cannot be read is unknown."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import models
from vllm_vsprefill import identity
from vllm_vsprefill.checkpoint import read_config
from vllm_vsprefill.distil.model import load
from vllm_vsprefill.distil.options import ModelOptions
from vllm_vsprefill.identity import ModelIdentity, model_name, module_identity, read_identity

LAYERS = 12
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with norms as training leaves them, in bfloat16's precision and of float32's type."""
    folder = models.save_random_model(tmp_path_factory.mktemp("made") / "tiny", layers=LAYERS)
    rng = torch.Generator().manual_seed(0)

    def trained(name: str, value: Tensor) -> Tensor:
        return (torch.rand(value.shape, generator=rng) + 0.5 if "norm" in name else value).bfloat16().float()

    change(folder, trained)
    return folder


def change(folder: Path, how: Any) -> None:
    """Replace every tensor of a model by ``how(name, tensor)``; None removes it."""
    found = {name: how(name, value) for name, value in load_file(folder / WEIGHTS).items()}
    save_file({name: value for name, value in found.items() if value is not None}, folder / WEIGHTS)


def copy(model: Path, folder: Path, how: Any = lambda name, value: value) -> ModelIdentity:
    """Identity of a changed copy."""
    shutil.copytree(model, folder)
    change(folder, how)
    return read_identity(folder, LAYERS)


def test_copies_of_other_types_are_the_same(model: Path, tmp_path: Path) -> None:
    known = read_identity(model, LAYERS)
    assert known.name == "tiny"
    assert known.norms is not None
    assert known.weights is not None
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        found = copy(model, tmp_path / str(dtype), lambda _, value, dtype=dtype: value.to(dtype))
        assert (found.norms, found.weights) == (known.norms, known.weights)
        assert found.relation(known) == "same"


def test_shards_and_memory_and_other_formats_are_the_same(model: Path, tmp_path: Path) -> None:
    import transformers

    known = read_identity(model, LAYERS)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    shards = tmp_path / "tiny"
    loaded.save_pretrained(shards, max_shard_size="200KB")
    assert (shards / identity.INDEX_FILE).is_file()
    assert len(list(shards.glob("*.safetensors"))) > 3
    assert read_identity(shards, LAYERS) == known
    (shards / identity.INDEX_FILE).unlink()
    assert read_identity(shards, LAYERS) == known
    assert module_identity("tiny", loaded, LAYERS) == known
    assert module_identity("tiny", loaded.bfloat16().get_decoder(), LAYERS) == known
    # Mistral's own files beside those of transformers do not count; alone they do, whatever the names.
    both = tmp_path / "both"
    shutil.copytree(model, both)
    tensors = load_file(both / WEIGHTS)
    names = {"model.": "", "self_attn.": "attention.", "k_proj": "wk", "v_proj": "wv", "input_layernorm": "ffn_norm"}
    renamed = {}
    for name, value in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = value
    save_file(renamed, both / "consolidated.safetensors")
    assert read_identity(both, LAYERS).relation(known) == "same"
    (both / WEIGHTS).unlink()
    assert read_identity(both, LAYERS).relation(known) == "same"


def test_the_decoder_of_a_multimodal_model(model: Path, tmp_path: Path) -> None:
    known = read_identity(model, LAYERS)
    tensors = {name.replace("model.", "model.language_model."): t for name, t in load_file(model / WEIGHTS).items()}
    tensors["model.vision_tower.encoder.layers.0.layer_norm1.weight"] = torch.rand(8)
    save_file(tensors, tmp_path / WEIGHTS)
    assert read_identity(tmp_path, LAYERS).relation(known) == "same"


def test_other_weights_are_another_model(model: Path, tmp_path: Path) -> None:
    known = read_identity(model, LAYERS)
    tuned = copy(model, tmp_path / "a", lambda name, t: t * 1.02 if "norm" in name else t)
    assert tuned.weights == known.weights
    assert tuned.relation(known) == known.relation(tuned) == "other"
    # As an adapter of low rank that was merged into one projection.
    rank_1 = 0.01 * torch.ones(128, 1) @ torch.ones(1, 64)
    merged = copy(model, tmp_path / "b", lambda name, t: t + rank_1 if "v_proj" in name else t)
    assert merged.norms == known.norms
    assert merged.relation(known) == "other"
    untrained = read_identity(models.save_random_model(tmp_path / "c", layers=LAYERS, seed=1), LAYERS)
    assert untrained.norms is None
    assert untrained.relation(known) == "other"


def test_quantised_weights_leave_the_norms_to_compare(model: Path, tmp_path: Path) -> None:
    known = read_identity(model, LAYERS)
    fp8 = copy(model, tmp_path / "a", lambda n, t: t.to(torch.float8_e4m3fn) if "proj" in n else t.bfloat16())
    packed = copy(model, tmp_path / "b", lambda name, t: None if "proj" in name else t)
    for found in (fp8, packed):
        assert (found.norms, found.weights) == (known.norms, None)
        assert found.relation(known) == "same"


def test_norms_that_were_never_trained_say_nothing(model: Path, tmp_path: Path) -> None:
    found = copy(model, tmp_path / "a", lambda name, t: torch.ones_like(t) if "norm" in name else t)
    assert found.norms is None
    assert found.weights == read_identity(model, LAYERS).weights


def test_only_a_little_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = identity._rounded

    def counting(tensor: Tensor) -> bytes | None:
        sizes.append(tensor.numel())
        return real(tensor)

    monkeypatch.setattr(identity, "_rounded", counting)
    read_identity(model, LAYERS)
    # Of 8 layers: two norms and a row of two projections of 64 channels, norms of q and k of 64.
    assert sizes == [64] * len(sizes)
    assert len(sizes) == 8 * 6


def test_what_cannot_be_read_is_unknown(model: Path, tmp_path: Path) -> None:
    def unknown(folder: Path | str, layers: int = LAYERS) -> None:
        found = read_identity(folder, layers)
        assert (found.norms, found.weights) == (None, None)
        assert found.relation(read_identity(model, LAYERS)) == "unknown"

    unknown(tmp_path / "nowhere")
    unknown("no id")
    unknown(tmp_path)
    unknown(model, LAYERS + 8)  # not all layers are there
    shards = tmp_path / "shards"
    shutil.copytree(model, shards)
    weights = (shards / WEIGHTS).read_bytes()
    for broken in (b"", weights[:7], weights[: len(weights) // 2], b"version https://git-lfs.github.com/spec/v1"):
        (shards / WEIGHTS).write_bytes(broken)
        unknown(shards)
    (shards / WEIGHTS).write_bytes(weights)
    missing = {"weight_map": {"model.layers.0.input_layernorm.weight": "model-00001-of-00009.safetensors"}}
    for index in ("", "[]", "{}", '{"weight_map": 3}', json.dumps(missing)):
        (shards / identity.INDEX_FILE).write_text(index)
        unknown(shards)
    assert read_identity("owner/name", LAYERS, revision="v1") == ModelIdentity(name="owner/name", revision="v1")


def test_a_model_in_the_cache_of_the_hub(model: Path, tmp_path: Path) -> None:
    known = read_identity(model, LAYERS)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--owner--some-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(model, repo / "snapshots" / commit)
    expected = known.model_copy(update={"name": "owner/some-model", "revision": commit})
    assert read_identity("owner/some-model", LAYERS, cache_dir=tmp_path) == expected
    assert read_identity(repo / "snapshots" / commit, LAYERS) == expected
    assert read_identity("owner/some-model", LAYERS, revision="other", cache_dir=tmp_path).norms is None


def test_names_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert model_name("owner/name") == "owner/name"
    assert model_name(tmp_path / "owner" / "name") == "name"
    monkeypatch.chdir(tmp_path / "owner")
    assert model_name("name/../name/") == "name"
    assert model_name(".") == "owner"
    assert model_name("/no/such/folder") == "folder"
    assert read_identity("s3://bucket/folder\n\x1b", 2) == ModelIdentity(name="folder__")
    assert read_identity("/", 2).name is None
    for path in ("/no/such/folder", "a/b/c", "..\\x", "x\x1b[2J", ""):
        with pytest.raises(ValidationError, match="name"):
            ModelIdentity(name=path)


def test_relations() -> None:
    a, b = "0" * 32, "1" * 32

    def relation(here: dict[str, str], there: dict[str, str]) -> str:
        forth = ModelIdentity(**here).relation(ModelIdentity(**there))
        assert forth == ModelIdentity(**there).relation(ModelIdentity(**here))
        return forth

    assert relation({}, {}) == "unknown"
    assert relation({"norms": a}, {"weights": a}) == "unknown"
    assert relation({"norms": a, "weights": b}, {"norms": a}) == "same"
    assert relation({"norms": a, "weights": b}, {"norms": a, "weights": a}) == "other"
    # Ids count only where nothing better is known: mirrors have other names, folders have any.
    assert relation({"name": "a/b", "norms": a}, {"name": "c/b", "norms": a}) == "same"
    assert relation({"name": "a/b", "norms": a}, {"name": "c/b"}) == "other"
    assert relation({"name": "a/b", "norms": a}, {"name": "A/b"}) == "unknown"
    assert relation({"name": "a/b", "norms": a}, {"name": "folder"}) == "unknown"


def test_a_loaded_teacher_knows_which_model_it_is(model: Path) -> None:
    teacher = load(ModelOptions(model=str(model), dtype="float16"), torch.device("cpu"))
    assert teacher.identity == read_identity(model, LAYERS)


def test_the_needle_model_is_the_one_its_indexer_was_trained_on() -> None:
    config = read_config(models.ROOT / "indexer_ckpts" / "needle")
    found = read_identity(models.ROOT / "examples" / "needle" / "model", config.fingerprint.num_layers)
    assert None not in (config.identity.norms, config.identity.weights)
    assert config.identity == found.model_copy(update={"name": "needle"})


def test_stamping_a_checkpoint(model: Path, tmp_path: Path) -> None:
    indexer = models.save_random_indexer(tmp_path / "indexer", model)
    before = read_config(indexer)

    def stamp(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(models.ROOT / "scripts" / "stamp_identity.py"), str(indexer), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    done = stamp(str(model), "--name", "owner/name", "--revision", "v1", "--norms-only")
    assert done.returncode == 0, done.stderr
    wanted = {"name": "owner/name", "revision": "v1", "norms": before.identity.norms, "weights": None}
    after = read_config(indexer)
    assert after.identity.model_dump() == wanted
    assert after.model_copy(update={"identity": before.identity}) == before
    other = models.save_random_model(tmp_path / "other", layers=2)
    done = stamp(str(other))
    assert done.returncode == 1
    assert "num_layers is 12 in the checkpoint, 2 in the model" in done.stderr
    assert "Traceback" not in done.stderr
    assert read_config(indexer) == after
