# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Checkpoints of trained indexers: a folder with ``config.json`` and ``indexer.safetensors``.

``indexer.safetensors`` holds ``layers.{i}.w1|b1|w2|b2`` for every covered layer, the KV heads stacked on dimension 0,
so that a tensor-parallel rank reads only its own heads. ``config.json`` says which model they were trained for: its
shapes (``fingerprint``), and which one of all with these shapes (``identity``). Nothing
else in the folder is read; in particular no pickle (``.bin``, ``.pt``).

Everything that is wrong with a checkpoint is reported in one :class:`CheckpointError`.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from vllm_vsprefill.fingerprint import ModelFingerprint
from vllm_vsprefill.identity import ModelIdentity

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from vllm_vsprefill.kernels.types import IndexerLayerWeights

__all__ = [
    "CheckpointConfig",
    "CheckpointError",
    "LoadedIndexer",
    "ModelFingerprint",
    "ModelIdentity",
    "Thresholds",
    "candidates",
    "find_checkpoint",
    "find_checkpoints",
    "kv_head_range",
    "load_checkpoint",
    "read_config",
    "resolve_checkpoint",
    "save_checkpoint",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "indexer.safetensors"
PARTS = ("w1", "b1", "w2", "b2")
MAX_CONFIG_BYTES = 16 * 2**20
"""Of ``config.json``; thresholds of every head of a large model are well below a mebibyte."""

# dtype in config.json -> dtype in a safetensors header
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names every problem: expected, found, what to do."""

    def __init__(self, where: object, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"indexer checkpoint {where} cannot be used:\n{lines}")


_Share = Annotated[float, Field(gt=0.0, le=1.0)]
# One threshold for all KV heads of a layer, or one for each.
_LayerShare = Annotated[
    Annotated[_Share, Tag("layer")] | Annotated[tuple[_Share, ...], Tag("heads")],
    # Told apart by type, so that a wrong value is reported once and not for each alternative.
    Discriminator(lambda value: "heads" if isinstance(value, (list, tuple)) else "layer"),
]


class Thresholds(BaseModel):
    """Calibrated thresholds of one preset: an entry per covered layer, in the order of ``layers``.

    An entry is a number for the whole layer, or one number for each of the model's KV heads. ``recall`` is the share of
    the true attention that they covered of the text they were calibrated with, a number for each layer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tau_columns: tuple[_LayerShare, ...] | None = None
    tau_diagonals: tuple[_LayerShare, ...] | None = None
    recall: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        if isinstance(value, dict) and "tau_distances" in value:
            raise ValueError("tau_distances is called tau_diagonals now; rename it in config.json")
        return value


def _known_version(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value > FORMAT_VERSION:
        raise ValueError(
            f"format version {value} is newer than this version of vllm-vsprefill reads ({FORMAT_VERSION}); update "
            "vllm-vsprefill"
        )
    return value


class CheckpointConfig(BaseModel):
    """Contents of ``config.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Annotated[Literal[1], BeforeValidator(_known_version)] = 1
    model: str = Field(min_length=1, description="Name of the model it was trained for; for people to read.")
    fingerprint: ModelFingerprint
    identity: ModelIdentity = Field(
        ModelIdentity(), description="Which of the models with this fingerprint: its name and hashes of some weights."
    )
    hidden_size: int = Field(ge=1, le=65536, description="Width between the indexer's two linear layers.")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="Covered layers, ascending.")
    inputs: Literal["kv", "k", "v", "q", "kq", "kvq"] = Field(
        "kv",
        description="What the indexer reads of one token: key (with RoPE) and value. Others exist to be compared with; "
        "they cannot be served.",
    )
    activation: Literal["relu"] = "relu"
    training: dict[str, str | bool | int | float] = Field(
        default_factory=dict, description="Summary of the training: data, steps, losses, recall."
    )
    thresholds: dict[str, Thresholds] = Field(
        default_factory=dict, description="Calibrated thresholds by preset name; they replace the preset's own."
    )

    @model_validator(mode="after")
    def _check_layers(self) -> CheckpointConfig:
        problems = []
        if any(b <= a for a, b in zip(self.layers, self.layers[1:], strict=False)):
            problems.append("layers must be ascending and distinct")
        if max(self.layers) >= self.fingerprint.num_layers:
            problems.append(f"layers must be below fingerprint.num_layers = {self.fingerprint.num_layers}")
        for preset, thresholds in self.thresholds.items():
            for name in ("tau_columns", "tau_diagonals", "recall"):
                values = getattr(thresholds, name)
                if values is not None and len(values) != len(self.layers):
                    problems.append(
                        f"thresholds.{preset}.{name} must have one value per covered layer ({len(self.layers)}), "
                        f"found {len(values)}"
                    )
                heads = self.fingerprint.num_kv_heads
                sizes = [len(entry) for entry in values or () if isinstance(entry, tuple)]
                wrong = [size for size in sizes if size != heads]
                if wrong:
                    problems.append(
                        f"thresholds.{preset}.{name} must have one number per layer or one per KV head ({heads}), "
                        f"found an entry of {wrong[0]}"
                    )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and full shape of every tensor in ``indexer.safetensors``."""
        heads, size, hidden = self.fingerprint.num_kv_heads, self.fingerprint.head_size, self.hidden_size
        shapes = {
            "w1": (heads, len(self.inputs) * size, hidden),
            "b1": (heads, hidden),
            "w2": (heads, hidden, 2),
            "b2": (heads, 2),
        }
        return {f"layers.{layer}.{part}": shapes[part] for layer in self.layers for part in PARTS}


@dataclass(frozen=True)
class LoadedIndexer:
    """Tensors of a checkpoint, for some KV heads and layers.

    Attributes:
        folder: where it was read from.
        config: its description.
        kv_heads: ``(start, stop)`` of the model's KV heads that ``layers`` holds.
        layers: weights by layer index; layers that the checkpoint does not cover are absent.
    """

    folder: Path
    config: CheckpointConfig
    kv_heads: tuple[int, int]
    layers: dict[int, IndexerLayerWeights]

    @property
    def name(self) -> str:
        """Short name for logs."""
        return self.folder.name

    def layer_weights(self, layer_index: int) -> IndexerLayerWeights:
        """Weights of one layer; KeyError if it was not read or is not covered."""
        return self.layers[layer_index]

    def thresholds(
        self, preset: str, layer_index: int
    ) -> tuple[float | tuple[float, ...] | None, float | tuple[float, ...] | None]:
        """Calibrated ``(tau_columns, tau_diagonals)`` of a layer; None for each that was not calibrated.

        Each is a number for all KV heads, or a tuple with one for each of the heads in ``kv_heads``.
        """
        calibrated = self.config.thresholds.get(preset)
        if calibrated is None:
            return None, None
        position = self.config.layers.index(layer_index)

        def own(entries: tuple[float | tuple[float, ...], ...] | None) -> float | tuple[float, ...] | None:
            entry = None if entries is None else entries[position]
            return entry[slice(*self.kv_heads)] if isinstance(entry, tuple) else entry

        return own(calibrated.tau_columns), own(calibrated.tau_diagonals)

    def recall(self, preset: str, layer_index: int) -> float | None:
        """Share of a layer's attention that the preset's calibrated thresholds covered; None where it is not known."""
        calibrated = self.config.thresholds.get(preset)
        if calibrated is None or calibrated.recall is None:
            return None
        return calibrated.recall[self.config.layers.index(layer_index)]


def kv_head_range(total_kv_heads: int, tp_size: int, tp_rank: int) -> tuple[int, int]:
    """KV heads ``(start, stop)`` that a tensor-parallel rank holds.

    With more ranks than KV heads vLLM replicates: rank ``r`` holds head ``r // (tp_size // total_kv_heads)``.

    Raises:
        ValueError: heads and ranks do not divide each other, or the rank is out of range.
    """
    if total_kv_heads < 1 or tp_size < 1 or not 0 <= tp_rank < tp_size:
        raise ValueError(
            f"expected total_kv_heads >= 1 and 0 <= tp_rank < tp_size, got total_kv_heads={total_kv_heads}, "
            f"tp_size={tp_size}, tp_rank={tp_rank}"
        )
    if tp_size <= total_kv_heads:
        if total_kv_heads % tp_size:
            raise ValueError(f"{total_kv_heads} KV heads cannot be divided among {tp_size} tensor-parallel ranks")
        share = total_kv_heads // tp_size
        return tp_rank * share, (tp_rank + 1) * share
    if tp_size % total_kv_heads:
        raise ValueError(f"{tp_size} tensor-parallel ranks cannot be divided among {total_kv_heads} KV heads")
    head = tp_rank // (tp_size // total_kv_heads)
    return head, head + 1


# ----------------------------------------------------------------------------------------------------------------------
# finding


def resolve_checkpoint(path_or_id: str | os.PathLike[str]) -> Path:
    """Folder of a checkpoint given as a path or as a Hugging Face id (``owner/name`` or ``owner/name@revision``).

    Anything that exists locally is a path and never touches the network; of a repository only the two files are
    fetched.

    Raises:
        CheckpointError: neither a folder nor a repository that can be fetched.
    """
    text = os.fspath(path_or_id)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            text,
            [
                f"expected a folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}, found a file; give its folder "
                "(only safetensors are read, never .bin or .pt)"
            ],
        )
    match = _HUB_ID.fullmatch(text)
    if match is None:
        raise CheckpointError(
            text,
            [
                f"no such folder; expected a folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}, or a Hugging Face id "
                "such as owner/name"
            ],
        )
    return _download(match["repo"], match["revision"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{repo}@{revision}" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except GatedRepoError:  # a subclass of RepositoryNotFoundError, so it comes first
        reason = "the Hugging Face repository is gated; ask for access on its page and log in (hf auth login)"
    except RevisionNotFoundError:
        reason = f"the Hugging Face repository has no revision {revision!r}"
    except RepositoryNotFoundError:
        reason = "no such folder, and no such Hugging Face repository (or it is private: log in with hf auth login)"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = (
            "no such folder, and as a Hugging Face repository it is not in the local cache and cannot be fetched "
            "(no connection, or HF_HUB_OFFLINE is set); download it first and give the folder"
        )
    except HFValidationError as error:
        reason = f"no such folder, and not a valid Hugging Face id: {error}"
    except Exception as error:
        # Clients of the hub have raised errors of several HTTP libraries over time; to the user they are all one.
        reason = f"fetching it from Hugging Face failed ({type(error).__name__}: {error}); give a local folder"
    raise CheckpointError(name, [reason])


def find_checkpoint(
    fingerprint: ModelFingerprint, search_dirs: Iterable[str | os.PathLike[str]] | None = None
) -> Path | None:
    """First of :func:`find_checkpoints`, or None: one that fits the model, whatever it was trained on."""
    return next((folder for folder, _ in find_checkpoints(fingerprint, search_dirs)), None)


def find_checkpoints(
    fingerprint: ModelFingerprint, search_dirs: Iterable[str | os.PathLike[str]] | None = None
) -> Iterator[tuple[Path, CheckpointConfig]]:
    """Checkpoints, in order of folder and name, that were trained for a model with this fingerprint.

    Those that cannot be read are skipped with a warning. Which of the models with this fingerprint they were trained on
    is for the caller to compare (:meth:`ModelIdentity.relation`).

    Args:
        fingerprint: of the model to serve.
        search_dirs: folders that hold checkpoint folders; by default the installed ``vllm_vsprefill.indexer_ckpts``.
    """
    for folder in candidates(search_dirs):
        try:
            if _parse_config(folder).fingerprint != fingerprint:
                continue
            config = read_config(folder)  # the weights as well: one that cannot be loaded is no find
        except CheckpointError as error:
            logger.warning("VSPREFILL skips a checkpoint: %s", error)
            continue
        yield folder, config


def candidates(search_dirs: Iterable[str | os.PathLike[str]] | None = None) -> Iterator[Path]:
    """Folders with a ``config.json`` in these folders, by name; by default the installed checkpoints."""
    if search_dirs is None:
        installed = files("vllm_vsprefill.indexer_ckpts")
        search_dirs = [installed] if isinstance(installed, Path) else []
    for directory in map(Path, search_dirs):
        if directory.is_dir():
            yield from sorted(folder for folder in directory.iterdir() if (folder / CONFIG_FILE).is_file())


# ----------------------------------------------------------------------------------------------------------------------
# reading


def read_config(folder: str | os.PathLike[str], expected: ModelFingerprint | None = None) -> CheckpointConfig:
    """Description of a checkpoint, after checking everything short of the numbers themselves.

    Reads ``config.json`` and the header of ``indexer.safetensors``: cheap enough for a server's start-up checks.

    Args:
        folder: the checkpoint.
        expected: fingerprint of the model to serve; None accepts any.

    Raises:
        CheckpointError: every problem with either file, and every field in which the model differs.
    """
    path = Path(folder)
    config, problems = _inspect(path, expected)
    if problems or config is None:
        raise CheckpointError(path, problems)
    return config


def load_checkpoint(
    path_or_id: str | os.PathLike[str],
    expected: ModelFingerprint | None = None,
    kv_head_range: tuple[int, int] | None = None,
    layers: Iterable[int] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> LoadedIndexer:
    """Read a checkpoint, or one rank's part of it.

    Args:
        path_or_id: folder or Hugging Face id.
        expected: fingerprint of the model to serve; None accepts any.
        kv_head_range: ``(start, stop)`` of the KV heads to read; None reads all. Only these bytes are read.
        layers: layers to read, those the checkpoint does not cover being left out; None reads all that it covers.
        dtype: of the tensors returned; None keeps the stored one.
        device: of the tensors returned.

    Raises:
        CheckpointError: anything that keeps it from being used, all at once.
        ValueError: ``kv_head_range`` does not lie within the model's KV heads.
    """
    from safetensors import safe_open

    from vllm_vsprefill.kernels.types import IndexerLayerWeights

    folder = resolve_checkpoint(path_or_id)
    config = read_config(folder, expected)
    total = config.fingerprint.num_kv_heads
    start, stop = (0, total) if kv_head_range is None else kv_head_range
    if not 0 <= start < stop <= total:
        raise ValueError(f"kv_head_range must satisfy 0 <= start < stop <= {total}, got ({start}, {stop})")
    chosen = set(config.layers if layers is None else layers)
    wanted = [layer for layer in config.layers if layer in chosen]
    loaded: dict[int, IndexerLayerWeights] = {}
    problems = []
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for layer in wanted:
            tensors = []
            for part in PARTS:
                name = f"layers.{layer}.{part}"
                tensor: Tensor = file.get_slice(name)[start:stop]
                problems += _number_problems(name, tensor)
                tensors.append(tensor.to(device=device, dtype=dtype))
            loaded[layer] = IndexerLayerWeights(*tensors)
    if problems:
        raise CheckpointError(folder, problems)
    return LoadedIndexer(folder, config, (start, stop), loaded)


def _inspect(folder: Path, expected: ModelFingerprint | None) -> tuple[CheckpointConfig | None, list[str]]:
    """The description, if it could be read, and everything that is wrong short of the numbers."""
    problems: list[str] = []
    config = None
    try:
        config = _parse_config(folder)
    except CheckpointError as error:
        problems += error.problems
    if config is not None and expected is not None:
        for name, (found, wanted) in config.fingerprint.differences(expected).items():
            problems.append(
                f"trained for another model ({config.model}): {name} is {found!r} in the checkpoint, {wanted!r} in the "
                "model served; use a checkpoint made for this model, or estimator 'priced', which needs none"
            )
    if config is not None and config.inputs != "kv":
        problems.append(
            f"its indexer reads {'+'.join(config.inputs)} of a token, but only k+v can be served: it was trained for "
            "comparison; train one with --inputs k+v"
        )
    header, header_problem = _read_header(folder / WEIGHTS_FILE)
    if header_problem is not None:
        problems.append(header_problem)
    elif config is not None:
        problems += _header_problems(config, header)
    return config, problems


def _parse_config(folder: Path) -> CheckpointConfig:
    """``config.json``; CheckpointError with everything that is wrong with it."""
    path = folder / CONFIG_FILE
    again = "get the checkpoint again, or save it with vllm_vsprefill.checkpoint.save_checkpoint"
    if not path.is_file():
        raise CheckpointError(folder, [f"{CONFIG_FILE} is missing; {again}"])
    try:
        if (size := path.stat().st_size) > MAX_CONFIG_BYTES:
            raise CheckpointError(
                folder, [f"{CONFIG_FILE} has {size:,} bytes, expected at most {MAX_CONFIG_BYTES:,}; {again}"]
            )
        content = json.loads(path.read_bytes())
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(folder, [f"{CONFIG_FILE} is not valid JSON ({error}); {again}"]) from None
    if not isinstance(content, dict):
        raise CheckpointError(folder, [f"{CONFIG_FILE} must hold an object, found {type(content).__name__}; {again}"])
    try:
        # Other fields of a newer format mean nothing here: its version is the only thing to tell.
        if "format_version" not in content:
            raise CheckpointError(folder, [f"{CONFIG_FILE}: format_version is missing; {again}"])
        _known_version(content["format_version"])
        return CheckpointConfig.model_validate(content)
    except ValidationError as error:
        problems = []
        for detail in error.errors(include_url=False):
            # The tags of the union above are no part of the file.
            field = ".".join(str(part) for part in detail["loc"] if part not in ("layer", "heads"))
            found = "" if detail["type"] == "missing" or not field else f", found {detail['input']!r}"
            text = detail["msg"].removeprefix("Value error, ")
            problems.append(f"{CONFIG_FILE}: {field + ': ' if field else ''}{text}{found}")
        raise CheckpointError(folder, problems) from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(folder, [f"{CONFIG_FILE}: {error}"]) from None


def _read_header(path: Path) -> tuple[dict[str, tuple[str, tuple[int, ...]]], str | None]:
    """``{tensor: (dtype, shape)}`` of a safetensors file, or what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
        also = f" ({', '.join(pickles)} is there, but pickles are never read)" if pickles else ""
        return {}, f"{path.name} is missing{also}; get the checkpoint again"
    try:
        # "np" would do for the header, but cannot name bfloat16.
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}, None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        return {}, (
            f"{path.name} is truncated or not a safetensors file ({size} bytes; {error}); get the checkpoint again"
        )


def _header_problems(config: CheckpointConfig, header: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    expected = config.tensor_shapes()
    dtype = _DTYPES[config.dtype]
    problems = []
    missing = [name for name in expected if name not in header]
    unexpected = sorted(name for name in header if name not in expected)
    if missing:
        problems.append(
            f"{WEIGHTS_FILE} lacks {_some(missing)}; expected {', '.join(PARTS)} for each of the layers "
            f"{_some(config.layers)}"
        )
    if unexpected:
        problems.append(
            f"{WEIGHTS_FILE} holds unexpected tensors {_some(unexpected)}; {CONFIG_FILE} covers the layers "
            f"{_some(config.layers)}"
        )
    for name, shape in expected.items():
        if name not in header:
            continue
        found_dtype, found_shape = header[name]
        if found_shape != shape:
            problems.append(
                f"{name} has shape {list(found_shape)}, expected {list(shape)} (KV heads, head size and hidden_size as "
                f"in {CONFIG_FILE})"
            )
        if found_dtype != dtype:
            problems.append(f"{name} is {found_dtype}, expected {dtype} (dtype {config.dtype!r} in {CONFIG_FILE})")
    return problems


def _some(items: Iterable[Any], max_items: int = 8) -> str:
    listed = list(items)
    more = f" and {len(listed) - max_items} more" if len(listed) > max_items else ""
    return ", ".join(map(str, listed[:max_items])) + more


def _number_problems(name: str, tensor: Tensor) -> list[str]:
    import torch

    bad = int(tensor.numel() - torch.isfinite(tensor).sum())
    if not bad:
        return []
    return [f"{name} holds {bad} values that are NaN or infinite, expected none; train it again or get it again"]


# ----------------------------------------------------------------------------------------------------------------------
# writing


def save_checkpoint(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: CheckpointConfig) -> Path:
    """Write a checkpoint, in the dtype that ``config`` names.

    A new folder appears complete or not at all. In an existing one each file is replaced whole, the description last.

    Args:
        folder: where to write it; parents are made.
        tensors: by their name in the file, KV heads stacked on dimension 0.
        config: the description; its layers and shapes must be those of the tensors.

    Raises:
        CheckpointError: missing or unexpected tensors, wrong shapes, NaN or infinite values (also those that appear in
            the conversion to the stored dtype); nothing is written then.
    """
    import torch
    from safetensors.torch import save_file

    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise CheckpointError(target, ["expected a folder to write to, found a file"])
    stored = {
        name: tensor.detach().to(device="cpu", dtype=getattr(torch, config.dtype)).contiguous()
        for name, tensor in tensors.items()
    }
    problems = _header_problems(config, {n: (_DTYPES[config.dtype], tuple(t.shape)) for n, t in stored.items()})
    for name, tensor in stored.items():
        problems += _number_problems(name, tensor)
    if problems:
        raise CheckpointError(target, problems)

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        save_file(stored, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
        (partial / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        for file in partial.iterdir():
            file.chmod(0o644)
        if target.exists():
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                (partial / name).replace(target / name)
        else:
            partial.chmod(0o755)  # mkdtemp makes folders that only the owner may read
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
