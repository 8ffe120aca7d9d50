# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Which model it is: a name, and hashes of a few of its weights.

A fingerprint says whether an indexer fits a model; models of one family, and fine-tuned ones, share it. What tells them
apart is read from the safetensors files of the model's folder, where training and serving see the same, whatever a
server fuses, shards or quantises after loading. Only kilobytes are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ModelIdentity", "Relation", "model_name", "module_identity", "read_identity"]

Relation = Literal["same", "other", "unknown"]

INDEX_FILE = "model.safetensors.index.json"
# Layers that are looked at, first and last included.
MAX_LAYERS = 8
# float16 has bfloat16's precision down to here; below, copies in either type differ.
SMALLEST = 2.0**-16

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:.+\.)?([^.]+)\.weight$")
_NORM = re.compile(r"norm|^ln")
# The projections that keys and values come from, in the spellings of transformers' models and Mistral's files.
_KEYS_VALUES = frozenset(
    ("k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "wk", "wv", "wqkv")
)
_OTHER_PARTS = re.compile(r"vision|visual|audio|image|encoder|(?:^|\.)vit\.")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# An id or one part of a path, without what a terminal would obey.
_NAME = r"^[^/\\\x00-\x1f\x7f]+(/[^/\\\x00-\x1f\x7f]+)?$"
_HASH = r"^[0-9a-f]{32}$"


class ModelIdentity(BaseModel):
    """What is known of which model it is; None is unknown.

    Attributes:
        name: Hugging Face id or the name of its folder, never a path.
        revision: of the id: a branch, tag or commit.
        norms: hash of the weights of normalisations. Quantised versions of a model have the same.
        weights: hash of some rows of the projections of keys and values; none of quantised weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(None, pattern=_NAME)
    revision: str | None = None
    norms: str | None = Field(None, pattern=_HASH)
    weights: str | None = Field(None, pattern=_HASH)

    def relation(self, other: ModelIdentity) -> Relation:
        """Whether two models are the same: by every hash that both have, or without any, by different ids."""
        pairs = [(self.norms, other.norms), (self.weights, other.weights)]
        known = [(here, there) for here, there in pairs if here is not None and there is not None]
        if known:
            return "same" if all(here == there for here, there in known) else "other"
        if _is_hub_id(self.name) and _is_hub_id(other.name) and str(self.name).lower() != str(other.name).lower():
            return "other"
        return "unknown"


def _is_hub_id(name: str | None) -> bool:
    return name is not None and _HUB_ID.fullmatch(name) is not None


def model_name(model: str | os.PathLike[str]) -> str:
    """A model's id, or the name of its folder: paths of one machine do not belong in a checkpoint.

    A folder in the cache of the Hugging Face hub has the name of the id that it is of.
    """
    if not (path := Path(model).expanduser()).exists():
        return os.fspath(model) if _is_hub_id(os.fspath(model)) else path.name
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return path.name


def read_identity(
    model: str | os.PathLike[str],
    num_layers: int,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ModelIdentity:
    """Identity of a model on disk. What cannot be read is unknown; nothing is fetched and nothing raised.

    Args:
        model: its folder, or an id, which is looked for in the cache of the Hugging Face hub.
        num_layers: layers of its decoder.
        revision: of the id.
        cache_dir: another place of the cache.
    """
    name = re.sub(r"[\\\x00-\x1f\x7f]", "_", model_name(model)) or None
    folder = _local_folder(model, revision, cache_dir)
    if folder is None:
        return ModelIdentity(name=name, revision=revision)
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots":
        revision = resolved.name
    norms, weights = _read_hashes(folder, num_layers)
    return ModelIdentity(name=name, revision=revision, norms=norms, weights=weights)


def module_identity(name: str, module: torch.nn.Module, num_layers: int) -> ModelIdentity:
    """Identity of a transformers model, or its decoder, in memory: that of its folder, if it is in the folder's type or
    a more precise one."""
    tensors = dict(module.named_parameters())
    norms, weights = _hashes(tensors, num_layers, tensors.__getitem__, lambda key: tensors[key][-1:])
    return ModelIdentity(name=name, norms=norms, weights=weights)


def _local_folder(
    model: str | os.PathLike[str], revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> Path | None:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if not _is_hub_id(os.fspath(model)):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(os.fspath(model), revision=revision, cache_dir=cache_dir, local_files_only=True))
    except Exception:
        # Not there yet. Clients of the hub have raised errors of several libraries over time.
        return None


def _read_hashes(folder: Path, num_layers: int) -> tuple[str | None, str | None]:
    """Hashes of the norms and of the projections in a folder's safetensors files."""
    from safetensors import safe_open

    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def file(path: Path) -> Any:
            if path not in opened:
                opened[path] = stack.enter_context(safe_open(path, framework="pt"))
            return opened[path]

        def last_row(name: str) -> Tensor:
            part = file(where[name]).get_slice(name)
            row: Tensor = part[part.get_shape()[0] - 1 :]
            return row

        try:
            where = _files_by_tensor(folder, file)
            return _hashes(where, num_layers, lambda name: file(where[name]).get_tensor(name), last_row)
        except Exception:
            # Damaged, incomplete or of a type that torch does not know: whoever loads the model will say what is wrong.
            return None, None


def _files_by_tensor(folder: Path, open_file: Callable[[Path], Any]) -> dict[str, Path]:
    """The file that each tensor of a model is in; empty where there are no safetensors."""
    index = folder / INDEX_FILE
    if index.is_file():
        found = json.loads(index.read_bytes())["weight_map"]
        return {str(name): folder / str(file) for name, file in found.items()}
    # Adapters are no part of the model that they lie beside, and Mistral's models come in two formats.
    files = [path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith("adapter")]
    files = [path for path in files if not path.name.startswith("consolidated")] or files
    where: dict[str, Path] = {}
    for path in files:
        for name in open_file(path).keys():  # noqa: SIM118 - not a mapping
            where.setdefault(name, path)
    return where


def _hashes(
    names: Iterable[str], num_layers: int, read: Callable[[str], Tensor], last_row: Callable[[str], Tensor]
) -> tuple[str | None, str | None]:
    """Hashes of the norms and of the projections among tensors.

    Args:
        names: of all tensors.
        num_layers: of the model.
        read: a whole tensor.
        last_row: ``[1, ...]`` of a tensor: its last entry of dimension 0. Where q, k and v are fused, one of v.
    """
    count = min(MAX_LAYERS, num_layers)
    chosen = {i * (num_layers - 1) // max(1, count - 1) for i in range(count)}
    norms: dict[int, list[Tensor]] = {layer: [] for layer in chosen}
    rows: dict[int, list[Tensor]] = {layer: [] for layer in chosen}
    for name in names:
        match = _LAYER.search(name)
        if match is None or int(match[1]) not in chosen or _OTHER_PARTS.search(name):
            continue
        if _NORM.search(match[2]):
            norms[int(match[1])].append(read(name))
        elif match[2] in _KEYS_VALUES:
            rows[int(match[1])].append(last_row(name))
    # Every layer has norms, so one without is of a file that is not complete. Norms that are all the same number were
    # never trained and say nothing.
    if not all(norms.values()):
        return None, None
    trained = any(bool((norm != norm.flatten()[0]).any()) for found in norms.values() for norm in found)
    return _digest(norms) if trained else None, _digest(rows) if any(rows.values()) else None


def _digest(tensors: Mapping[int, list[Tensor]]) -> str | None:
    """Hash of the tensors of some layers; None where one is quantised.

    Rounded to bfloat16, so that copies in other types have the same. The names are no part of it: they differ between
    the formats of one model.
    """
    digest = hashlib.sha256()
    for layer in sorted(tensors):
        parts = [_rounded(tensor) for tensor in tensors[layer]]
        if None in parts:
            return None
        digest.update(f"{layer} {len(parts)} ".encode())
        for part in sorted(hashlib.sha256(part).digest() for part in parts if part is not None):
            digest.update(part)
    return digest.hexdigest()[:32]


def _rounded(tensor: Tensor) -> bytes | None:
    import torch

    if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return None
    values = tensor.detach().flatten().to(device="cpu", dtype=torch.bfloat16)
    values = torch.where(values.abs() < SMALLEST, torch.zeros_like(values), values)
    return values.view(torch.int16).numpy().astype("<i2").tobytes()
