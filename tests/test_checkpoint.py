# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Checkpoints: round trips, tensor-parallel slices, finding one, and every refusal by its message."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_vsprefill import checkpoint
from vllm_vsprefill.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    ModelFingerprint,
    ModelIdentity,
    Thresholds,
    find_checkpoint,
    find_checkpoints,
    kv_head_range,
    load_checkpoint,
    read_config,
    resolve_checkpoint,
    save_checkpoint,
)
from vllm_vsprefill.distil.student import initial_weights

MODEL = ModelFingerprint(
    architecture="qwen3",
    num_layers=6,
    num_query_heads=8,
    num_kv_heads=4,
    head_size=8,
    hidden_size=256,
    rope_theta=1e6,
)
LAYERS = (0, 2, 5)
HIDDEN = 16


def description(**changes: Any) -> CheckpointConfig:
    values: dict[str, Any] = {
        "model": "needle",
        "fingerprint": MODEL,
        "hidden_size": HIDDEN,
        "dtype": "float32",
        "layers": LAYERS,
    }
    return CheckpointConfig(**values | changes)


def indexer(seed: int = 0) -> dict[str, torch.Tensor]:
    return initial_weights(LAYERS, 4, 16, HIDDEN, seed)


def parts(tensors: dict[str, torch.Tensor], layer: int) -> list[torch.Tensor]:
    return [tensors[f"layers.{layer}.{part}"] for part in ("w1", "b1", "w2", "b2")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "needle", indexer(), description(training={"steps": 3, "data": "filler"}))


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        if value is ...:
            del content[name]
        else:
            content[name] = value
    (folder / "config.json").write_text(json.dumps(content))


def edit_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "indexer.safetensors") | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "indexer.safetensors")


def refuse(folder: Path, expected: ModelFingerprint | None = None, *, headers_suffice: bool = True) -> str:
    """Message with which loading is refused; checks that the cheap start-up check gives the same one."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, expected)
    message = str(caught.value)
    assert str(folder) in message
    if headers_suffice:
        with pytest.raises(CheckpointError) as early:
            read_config(folder, expected)
        assert str(early.value) == message
    return message


# --- round trips


def test_thresholds_per_head_go_to_the_ranks_that_hold_the_heads(tmp_path: Path) -> None:
    by_head = ((0.1, 0.2, 0.3, 0.4), 0.5, (0.6, 0.7, 0.8, 0.9))
    written = description(thresholds={"fast": Thresholds(tau_columns=by_head, tau_diagonals=(0.9, 0.8, 0.7))})
    path = save_checkpoint(tmp_path / "a", indexer(), written)
    assert load_checkpoint(path).thresholds("fast", LAYERS[0]) == (by_head[0], 0.9)
    part = load_checkpoint(path, kv_head_range=(2, 3))
    assert part.thresholds("fast", LAYERS[0]) == ((0.3,), 0.9)
    assert part.thresholds("fast", LAYERS[1]) == (0.5, 0.8)


def test_thresholds_per_head_must_be_one_for_each(folder: Path) -> None:
    edit(folder, thresholds={"fast": {"tau_columns": [0.5, [0.5, 0.5], 0.5]}})
    assert "one number per layer or one per KV head (4), found an entry of 2" in refuse(folder)
    edit(folder, thresholds={"fast": {"tau_distances": [0.5, 0.5, 0.5]}})
    assert "thresholds.fast: tau_distances is called tau_diagonals now" in refuse(folder)
    edit(folder, thresholds={"fast": {"tau_columns": [0.5, [0.5, 0.5, 0.5, 2], 0.5]}})
    assert "thresholds.fast.tau_columns.1.3: " in refuse(folder)


def test_the_recall_of_a_calibration_is_kept_by_layer(folder: Path) -> None:
    written = description(thresholds={"fast": Thresholds(tau_columns=(0.5, 0.6, 0.7), recall=(0.8, 0.9, 1.0))})
    loaded = load_checkpoint(save_checkpoint(folder, indexer(), written))
    assert [loaded.recall("fast", layer) for layer in LAYERS] == [0.8, 0.9, 1.0]
    assert loaded.recall("balanced", 2) is None
    edit(folder, thresholds={"fast": {"recall": [0.8, 0.9]}})
    assert "thresholds.fast.recall must have one value per covered layer (3), found 2" in refuse(folder)
    edit(folder, thresholds={"fast": {"recall": [0.8, 0.9, 1.1]}})
    assert "thresholds.fast.recall.2: " in refuse(folder)
    edit(folder, thresholds={"fast": {"tau_columns": [0.5, 0.6, 0.7]}})
    assert load_checkpoint(folder).recall("fast", 2) is None


def test_an_indexer_with_other_inputs_is_not_served(tmp_path: Path) -> None:
    tensors = {
        name: torch.zeros(tensor.shape[0], 8, *tensor.shape[2:]) if name.endswith("w1") else tensor
        for name, tensor in indexer().items()
    }
    path = save_checkpoint(tmp_path / "keys", tensors, description(inputs="k"))
    assert "its indexer reads k of a token, but only k+v can be served" in refuse(path)
    assert find_checkpoint(MODEL, [tmp_path]) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip(tmp_path: Path, dtype: str) -> None:
    thresholds = {"balanced": Thresholds(tau_columns=(0.9, 0.8, 0.7))}
    written = description(dtype=dtype, thresholds=thresholds, training={"kl": 0.25, "steps": 7, "ok": True})
    source = indexer()
    path = save_checkpoint(tmp_path / "a" / "b", source, written)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "indexer.safetensors"]
    loaded = load_checkpoint(str(path), MODEL)
    assert loaded.config == written
    assert loaded.name == "b"
    assert loaded.kv_heads == (0, 4)
    assert tuple(loaded.layers) == LAYERS
    for layer in LAYERS:
        for found, expected in zip(loaded.layer_weights(layer), parts(source, layer), strict=True):
            assert found.dtype == getattr(torch, dtype)
            assert torch.equal(found, expected.detach().to(found.dtype))
    assert loaded.thresholds("balanced", 2) == (0.8, None)
    assert loaded.thresholds("fast", 2) == (None, None)


def test_the_identity_of_the_model_is_kept(tmp_path: Path) -> None:
    known = ModelIdentity(name="owner/name", revision="v1", norms="0" * 32, weights="f" * 32)
    path = save_checkpoint(tmp_path / "a", indexer(), description(identity=known))
    assert read_config(path).identity == known
    edit(path, identity={"norms": "abc", "path": "x"})
    message = refuse(path)
    assert "identity.norms: " in message
    assert "identity.path: " in message
    edit(path, identity=...)  # written before there were any
    assert read_config(path).identity == ModelIdentity()


def test_config_file_is_readable_json_with_a_version(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    assert content["format_version"] == 1
    assert content["inputs"] == "kv"
    assert content["activation"] == "relu"
    assert content["training"] == {"steps": 3, "data": "filler"}
    assert content["fingerprint"]["num_kv_heads"] == 4


def test_dtype_can_be_changed_on_loading(folder: Path) -> None:
    loaded = load_checkpoint(folder, dtype=torch.bfloat16)
    assert {t.dtype for weights in loaded.layers.values() for t in weights} == {torch.bfloat16}


def test_only_wanted_layers(folder: Path) -> None:
    assert tuple(load_checkpoint(folder, layers=iter([5, 1, 2])).layers) == (2, 5)
    assert load_checkpoint(folder, layers=[1]).layers == {}


def test_a_rank_reads_only_its_heads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    read = []

    class Slice:
        def __init__(self, part: Any, name: str) -> None:
            self.part, self.name = part, name

        def __getattr__(self, name: str) -> Any:
            return getattr(self.part, name)

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor = self.part[index]
            read.append((self.name, tuple(tensor.shape)))
            return tensor

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __enter__(self) -> Spy:
            self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return list(self.file.keys())

        def get_slice(self, name: str) -> Slice:
            return Slice(self.file.get_slice(name), name)

    real = safetensors.safe_open
    full = indexer()
    monkeypatch.setattr(safetensors, "safe_open", Spy)
    loaded = load_checkpoint(folder, MODEL, kv_head_range=(1, 3), layers=[2])
    assert loaded.kv_heads == (1, 3)
    assert dict(read) == {
        "layers.2.w1": (2, 16, HIDDEN),
        "layers.2.b1": (2, HIDDEN),
        "layers.2.w2": (2, HIDDEN, 2),
        "layers.2.b2": (2, 2),
    }
    for found, expected in zip(loaded.layers[2], [part[1:3] for part in parts(full, 2)], strict=True):
        assert torch.equal(found, expected)


def test_head_range_outside_the_model(folder: Path) -> None:
    for heads in ((0, 5), (2, 2), (-1, 2), (3, 1)):
        with pytest.raises(ValueError, match="kv_head_range must satisfy 0 <= start < stop <= 4"):
            load_checkpoint(folder, kv_head_range=heads)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)),
    layers=st.sets(st.integers(0, 11), min_size=1, max_size=4),
    data=st.data(),
)
def test_slices_of_ranks_make_up_the_whole(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, int, int], layers: set[int], data: st.DataObject
) -> None:
    heads, size, hidden = shape
    model = MODEL.model_copy(update={"num_layers": 12, "num_kv_heads": heads, "head_size": size})
    config = CheckpointConfig(
        model="m", fingerprint=model, hidden_size=hidden, dtype="float32", layers=tuple(sorted(layers))
    )
    source = initial_weights(layers, heads, 2 * size, hidden, 0)
    folder = save_checkpoint(tmp_path_factory.mktemp("ckpt") / "x", source, config)
    tp = data.draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    shares = [load_checkpoint(folder, model, kv_head_range(heads, tp, rank)) for rank in range(tp)]
    for layer in layers:
        for index, whole in enumerate(parts(source, layer)):
            assert torch.equal(torch.cat([share.layers[layer][index] for share in shares]), whole)


# --- heads of a rank


@pytest.mark.parametrize(
    ("heads", "tp", "ranges"),
    [
        (8, 1, [(0, 8)]),
        (8, 2, [(0, 4), (4, 8)]),
        (2, 2, [(0, 1), (1, 2)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 3, [(0, 1)] * 3),
    ],
)
def test_kv_head_range(heads: int, tp: int, ranges: list[tuple[int, int]]) -> None:
    assert [kv_head_range(heads, tp, rank) for rank in range(tp)] == ranges


@given(heads=st.integers(1, 64), factor=st.integers(1, 16), replicated=st.booleans())
def test_kv_head_range_covers_every_head_equally(heads: int, factor: int, replicated: bool) -> None:
    total, tp = (heads, heads * factor) if replicated else (heads * factor, heads)
    seen = [h for rank in range(tp) for h in range(*kv_head_range(total, tp, rank))]
    assert seen == sorted(seen)
    assert {seen.count(h) for h in range(total)} == {max(1, tp // total)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 4, 0), "6 KV heads cannot be divided among 4 tensor-parallel ranks"),
        ((2, 3, 0), "3 tensor-parallel ranks cannot be divided among 2 KV heads"),
        ((2, 2, 2), "0 <= tp_rank < tp_size"),
        ((0, 1, 0), "total_kv_heads >= 1"),
    ],
)
def test_kv_head_range_refusals(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_head_range(*arguments)


# --- refusals


def test_missing_files(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refuse(tmp_path / "empty")
    assert "config.json is missing; get the checkpoint again" in message
    assert "indexer.safetensors is missing" in message
    (folder / "indexer.safetensors").unlink()
    (folder / "indexer.bin").write_bytes(b"x")
    assert "indexer.safetensors is missing (indexer.bin is there, but pickles are never read)" in refuse(folder)


def test_pickles_are_never_opened(folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (pytest.fail, ("a pickle was read",))

    for name in ("indexer.safetensors", "indexer.bin", "indexer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    assert "indexer.safetensors is truncated or not a safetensors file" in refuse(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.json is not valid JSON"),
        ('{"model": ', "config.json is not valid JSON"),
        ("[1]", "config.json must hold an object, found list"),
        ("{}", "format_version is missing"),
        ("\xff", "config.json is not valid JSON"),
    ],
)
def test_unreadable_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert message in refuse(folder)


def test_newer_format_says_to_update_and_nothing_else(folder: Path) -> None:
    edit(folder, format_version=2, quantisation="int8", inputs="kvq")
    message = refuse(folder)
    assert "format version 2 is newer than this version of vllm-vsprefill reads (1); update vllm-vsprefill" in message
    assert "quantisation" not in message


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"format_version": "one"}, ["format_version: ", "found 'one'"]),
        ({"format_version": 0}, ["format_version: ", "found 0"]),
        ({"extra": 1}, ["extra: Extra inputs are not permitted, found 1"]),
        ({"dtype": "int8", "hidden_size": 0}, ["dtype: ", "found 'int8'", "hidden_size: ", "found 0"]),
        ({"model": ...}, ["model: Field required"]),
        ({"inputs": "qkv"}, ["inputs: ", "'kv'"]),
        ({"activation": "gelu"}, ["activation: ", "'relu'"]),
        ({"layers": []}, ["layers: "]),
        ({"layers": [2, 0, 5]}, ["layers must be ascending and distinct"]),
        ({"layers": [0, 2, 6]}, ["layers must be below fingerprint.num_layers = 6"]),
        (
            {"thresholds": {"fast": {"tau_columns": [0.5]}}},
            ["thresholds.fast.tau_columns must have one value per covered layer (3), found 1"],
        ),
        ({"thresholds": {"fast": {"tau_columns": [0.5, 2, 0.5]}}}, ["thresholds.fast.tau_columns.1: "]),
        ({"training": {"losses": [1, 2]}}, ["training.losses"]),
    ],
)
def test_wrong_fields_of_the_config(folder: Path, changes: dict[str, Any], messages: list[str]) -> None:
    edit(folder, **changes)
    message = refuse(folder)
    for part in messages:
        assert part in message


def test_wrong_model_lists_every_difference(folder: Path) -> None:
    other = MODEL.model_copy(
        update={"num_kv_heads": 8, "rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    )
    message = refuse(folder, other)
    assert "trained for another model (needle): num_kv_heads is 4 in the checkpoint, 8 in the model served" in message
    assert "rope_theta is 1000000.0 in the checkpoint, 500000.0 in the model served" in message
    assert "rope_scaling is None in the checkpoint, {'factor': 4.0, 'rope_type': 'yarn'}" in message.replace(
        "{'rope_type': 'yarn', 'factor': 4.0}", "{'factor': 4.0, 'rope_type': 'yarn'}"
    )
    assert message.count("trained for another model") == 3
    assert "or estimator 'priced', which needs none" in message
    assert read_config(folder, MODEL) == read_config(folder)


def test_missing_and_unexpected_tensors(folder: Path) -> None:
    edit_tensors(folder, {"layers.2.b1": None, "layers.0.w2": None, "layers.1.w1": torch.zeros(1)})
    message = refuse(folder)
    assert (
        "indexer.safetensors lacks layers.0.w2, layers.2.b1; expected w1, b1, w2, b2 for each of the layers 0, 2, 5"
        in (message)
    )
    assert "holds unexpected tensors layers.1.w1; config.json covers the layers 0, 2, 5" in message


def test_wrong_shapes_and_dtypes(folder: Path) -> None:
    edit_tensors(
        folder,
        {
            "layers.0.w1": torch.zeros(4, 16, HIDDEN - 1),
            "layers.2.b2": torch.zeros(4, 2, dtype=torch.float16),
            "layers.5.b1": torch.zeros(2, HIDDEN, dtype=torch.int64),
        },
    )
    message = refuse(folder)
    assert "layers.0.w1 has shape [4, 16, 15], expected [4, 16, 16] (KV heads, head size and hidden_size" in message
    assert "layers.2.b2 is F16, expected F32 (dtype 'float32' in config.json)" in message
    assert "layers.5.b1 has shape [2, 16], expected [4, 16]" in message
    assert "layers.5.b1 is I64, expected F32" in message


def test_hidden_size_that_does_not_match_the_tensors(folder: Path) -> None:
    edit(folder, hidden_size=32)
    message = refuse(folder)
    assert message.count("expected [4, 16, 32]") == len(LAYERS)


def test_nan_and_infinity(folder: Path) -> None:
    tensors = load_file(folder / "indexer.safetensors")
    tensors["layers.0.w1"][0, 0, :2] = float("nan")
    tensors["layers.5.b2"][3, 1] = float("-inf")
    save_file(tensors, folder / "indexer.safetensors")
    message = refuse(folder, headers_suffice=False)
    assert "layers.0.w1 holds 2 values that are NaN or infinite, expected none" in message
    assert "layers.5.b2 holds 1 values" in message
    # Another rank's heads are not read, so they are not judged either.
    assert load_checkpoint(folder, kv_head_range=(1, 3)).kv_heads == (1, 3)


@given(keep=st.floats(0, 1, exclude_max=True))
def test_truncated_weights(tmp_path_factory: pytest.TempPathFactory, keep: float) -> None:
    folder = save_checkpoint(tmp_path_factory.mktemp("ckpt") / "x", indexer(), description())
    path = folder / "indexer.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    message = refuse(folder)
    assert "indexer.safetensors is truncated or not a safetensors file" in message
    assert "get the checkpoint again" in message


def test_problems_of_both_files_come_together(folder: Path) -> None:
    edit(folder, dtype="int4")
    (folder / "indexer.safetensors").write_bytes(b"not")
    message = refuse(folder)
    assert "dtype: " in message
    assert "truncated or not a safetensors file (3 bytes" in message


# --- where from


def test_paths(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_download", lambda *_: pytest.fail("a local path must not touch the network"))
    assert resolve_checkpoint(folder) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_checkpoint("needle") == Path("needle")
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_checkpoint("owner/name") == Path("owner/name")  # an existing folder is never taken for an id
    with pytest.raises(CheckpointError, match="found a file; give its folder"):
        resolve_checkpoint(folder / "indexer.safetensors")
    for missing in ("./owner/nothing", str(tmp_path / "gone"), "gone", "a/b/c", "~/no such folder", "../x"):
        with pytest.raises(CheckpointError, match=r"no such folder; expected a folder that holds config\.json and"):
            resolve_checkpoint(missing)


def test_hub_id_fetches_only_the_two_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls = []

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        calls.append((repo, kwargs))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_checkpoint("owner/some-indexer", MODEL).folder == folder
    assert resolve_checkpoint("owner/some-indexer@refs/pr/1") == folder
    files = {"allow_patterns": ["config.json", "indexer.safetensors"]}
    assert calls == [
        ("owner/some-indexer", {"revision": None} | files),
        ("owner/some-indexer", {"revision": "refs/pr/1"} | files),
    ]


def test_hub_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="not in the local cache and cannot be fetched"):
        resolve_checkpoint("owner/some-indexer")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "no such folder, and no such Hugging Face repository"),
        ("RevisionNotFoundError", "has no revision 'v2'"),
        ("GatedRepoError", "is gated; ask for access"),
        ("LocalEntryNotFoundError", "not in the local cache and cannot be fetched"),
        ("HFValidationError", "not a valid Hugging Face id"),
        (None, "fetching it from Hugging Face failed (RuntimeError: boom); give a local folder"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, error: str | None, message: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot_download(*_: Any, **__: Any) -> str:
        if error is None:
            raise RuntimeError("boom")
        kind = getattr(errors, error)
        raised = kind.__new__(kind)  # their constructors want a response of the HTTP client of the day
        Exception.__init__(raised, "refused")
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint("owner/some-indexer@v2")
    assert message in str(caught.value)


# --- finding an installed one


def test_find_by_fingerprint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = MODEL.model_copy(update={"rope_theta": 1e4})
    save_checkpoint(tmp_path / "b", indexer(), description())
    save_checkpoint(tmp_path / "c", indexer(), description())
    save_checkpoint(tmp_path / "a", indexer(), description(fingerprint=other))
    (tmp_path / "__pycache__").mkdir()
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(MODEL, [tmp_path / "nowhere", tmp_path]) == tmp_path / "b"
        assert find_checkpoint(other, [tmp_path]) == tmp_path / "a"
        assert [found.name for found, _ in find_checkpoints(MODEL, [tmp_path])] == ["b", "c"]
        assert find_checkpoint(MODEL.model_copy(update={"head_size": 16}), [tmp_path]) is None
    assert not caplog.records


def test_find_warns_about_what_it_cannot_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken, halved = (save_checkpoint(tmp_path / name, indexer(), description()) for name in ("a", "b"))
    good = save_checkpoint(tmp_path / "c", indexer(), description())
    (broken / "config.json").write_text("{")
    (halved / "indexer.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(MODEL, [tmp_path]) == good
    assert len(caplog.records) == 2
    assert "config.json is not valid JSON" in caplog.text
    assert "indexer.safetensors is truncated" in caplog.text


def test_every_installed_checkpoint_is_readable_and_found_by_its_fingerprint() -> None:
    folders = list(checkpoint.candidates(None))
    for folder in folders:
        config = read_config(folder)
        found = find_checkpoint(config.fingerprint)
        assert found is not None
        assert read_config(found).fingerprint == config.fingerprint
        assert load_checkpoint(folder).layers.keys() == set(config.layers)
    assert find_checkpoint(MODEL.model_copy(update={"architecture": "no such model"})) is None


# --- writing


def test_save_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    tensors = {name: value.detach().clone() for name, value in indexer().items()}
    tensors["layers.0.b2"][0, 0] = 1e30  # infinite in float16
    del tensors["layers.5.w1"]
    tensors["layers.2.b1"] = tensors["layers.2.b1"][:2]
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path / "x", tensors, description(dtype="float16"))
    for part in (
        "lacks layers.5.w1",
        "layers.2.b1 has shape [2, 16]",
        "layers.0.b2 holds 1 values that are NaN or inf",
    ):
        assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder to write to, found a file"):
        save_checkpoint(tmp_path / "file", indexer(), description())


def test_saving_again_replaces_both_files_and_nothing_else(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    save_checkpoint(folder, indexer(1), description(model="second"))
    assert read_config(folder).model == "second"
    assert torch.equal(load_checkpoint(folder).layers[0].w1, indexer(1)["layers.0.w1"])
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_interrupted_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path / "x", indexer(), description())
    assert list(tmp_path.iterdir()) == []


# --- fingerprints of models


def qwen(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "hidden_size": 256,
        "rope_theta": 1000000,
    } | changes


YARN = {"factor": 4, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    "config",
    [
        qwen(),
        SimpleNamespace(**qwen()),
        qwen(rope_scaling=None, partial_rotary_factor=1.0),
        qwen(rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        qwen(rope_theta=None, rope_parameters={"rope_theta": 1e6, "original_max_position_embeddings": 4096}),
        {"model_type": "wrapped", "hidden_size": 1, "text_config": qwen()},
        SimpleNamespace(text_config=SimpleNamespace(**qwen(architectures=None))),
        qwen(
            rope_theta=None,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        ),
    ],
)
def test_spellings_of_one_model_have_one_fingerprint(config: Any) -> None:
    assert ModelFingerprint.from_hf_config(config) == MODEL


def test_rope_scaling_spellings() -> None:
    old = ModelFingerprint.from_hf_config(qwen(rope_scaling={"type": "yarn"} | YARN))
    new = ModelFingerprint.from_hf_config(
        qwen(rope_theta=None, rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "beta_fast": None} | YARN)
    )
    assert old == new
    assert old.rope_scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768.0}
    assert old.differences(MODEL) == {"rope_scaling": (old.rope_scaling, None)}
    half = [
        ModelFingerprint.from_hf_config(qwen(partial_rotary_factor=0.5)),
        ModelFingerprint.from_hf_config(qwen(rope_parameters={"rope_theta": 1e6, "partial_rotary_factor": 0.5})),
    ]
    assert half[0] == half[1]
    assert half[0].rope_scaling == {"partial_rotary_factor": 0.5}


def test_fingerprint_survives_json() -> None:
    scaling = {"rope_type": "longrope", "long_factor": [1, 2.5], "short_factor": [1, 1], "flag": True}
    fingerprint = ModelFingerprint.from_hf_config(qwen(rope_scaling=scaling))
    assert ModelFingerprint.model_validate_json(fingerprint.model_dump_json()) == fingerprint
    assert fingerprint.rope_scaling is not None
    assert fingerprint.rope_scaling["long_factor"] == (1.0, 2.5)
    assert fingerprint.rope_scaling["flag"] is True


def test_defaults_of_sizes() -> None:
    fingerprint = ModelFingerprint.from_hf_config(qwen(num_key_value_heads=None, head_dim=None))
    assert (fingerprint.num_kv_heads, fingerprint.head_size) == (8, 32)


@pytest.mark.parametrize("name", ["Qwen3Config", "LlamaConfig", "MistralConfig", "Gemma3Config", "Gemma2Config"])
def test_configurations_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name)()
    text = config.get_text_config()
    fingerprint = ModelFingerprint.from_hf_config(config)
    assert fingerprint == ModelFingerprint.from_hf_config(text)
    assert fingerprint.architecture == text.model_type
    assert fingerprint.num_layers == text.num_hidden_layers
    assert fingerprint.num_kv_heads == text.num_key_value_heads
    assert fingerprint.head_size == text.head_dim
    assert fingerprint.rope_theta == (1e6 if name == "Gemma3Config" else 1e4)
    assert fingerprint.rope_scaling is None
    # As written to and read from disk, too.
    assert ModelFingerprint.from_hf_config(json.loads(config.to_json_string(use_diff=False))) == fingerprint


def test_a_configuration_without_attention() -> None:
    with pytest.raises(ValueError, match="has no num_attention_heads, num_hidden_layers"):
        ModelFingerprint.from_hf_config({"model_type": "cnn", "hidden_size": 4})
