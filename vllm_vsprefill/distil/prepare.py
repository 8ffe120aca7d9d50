# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What a run needs before it starts: a device, processes, a folder to write to, sequences of text."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_vsprefill.distil import state
from vllm_vsprefill.distil.data import PackedTokens, Source, open_sources
from vllm_vsprefill.distil.errors import INSTALL, DistilError, first_line
from vllm_vsprefill.distil.model import load_tokenizer
from vllm_vsprefill.distil.options import DataOptions, ModelOptions
from vllm_vsprefill.distil.synthetic import Synthetic


def device(name: str | None) -> torch.device:
    """The device of a name; without one CUDA's, if there is one.

    Raises:
        DistilError: there is no such device, or no model can run on it.
    """
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise DistilError(f"--device {name}: {first_line(error)}") from None
    if place.type not in ("cpu", "cuda"):
        raise DistilError(f"--device {name}: expected cpu, cuda or one GPU, cuda:N")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise DistilError(f"--device {name}: there is no CUDA device that PyTorch can use")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise DistilError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return place


def accelerator(place: torch.device) -> Any:
    """accelerate's view of this process and the others.

    Raises:
        DistilError: accelerate is not installed, or several processes were given one GPU.
    """
    try:
        from accelerate import Accelerator
    except ImportError:
        raise DistilError(f"training needs accelerate: {INSTALL}") from None
    made = Accelerator(cpu=place.type == "cpu")
    if place.type == "cuda" and place.index is not None:
        if made.num_processes > 1:
            raise DistilError(f"--device {place}: each of several processes takes a GPU of its own; say cuda")
        # A single process's accelerator takes whatever device is the current one.
        torch.cuda.set_device(place)
    return made


def check_out(out: Path, model: str, resume: bool) -> None:
    """Make the folder of a run.

    Raises:
        DistilError: it cannot be written to or holds something else: found out before anything heavy.
    """
    if out.exists() and not out.is_dir():
        raise DistilError(f"--out {out}: expected a folder, found a file")
    folder = Path(model).expanduser()
    if folder.is_dir() and out.exists() and out.samefile(folder):
        raise DistilError(f"--out {out}: that is the model's own folder, whose config.json would be lost")
    if not resume:
        state.check_unused(out)
        held = [name for name in ("config.json", "indexer.safetensors") if (out / name).exists()]
        if held:
            raise DistilError(f"--out {out}: it already holds {' and '.join(held)}; choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise DistilError(f"--out {out}: cannot be written to ({error.strerror})") from None


def sources(
    options: DataOptions,
    model: ModelOptions,
    vocabulary: int,
    *,
    tokens: int,
    min_length: int,
    max_length: int,
    packing: bool = True,
    validation_share: float = 0.0,
    seed: int = 0,
    log: Callable[[str], None],
) -> tuple[Source, Source, int]:
    """Training and held-out stream.

    Args:
        options: what to read.
        model: whose tokenizer it is read with.
        vocabulary: rows of the model's embedding.
        tokens: how many suffice, of both streams.
        min_length: shortest sequence that will be asked for.
        max_length: longest sequence that will be asked for.
        packing: as for ``open_sources``.
        validation_share: as for ``open_sources``.
        seed: of generated documents and of the order of others.
        log: takes a line for the user.

    Returns:
        The streams, and the longest sequence that they can give.

    Raises:
        DistilError: as ``open_sources`` does.
    """
    if options.data == "synthetic":
        made = load_tokenizer(model)
        train, held_out = (Synthetic(made, vocabulary, seed, held) for held in (False, True))
        return train, held_out, max_length
    from tqdm import tqdm

    with tqdm(unit="token", unit_scale=True, desc="reading", disable=None) as bar:
        read, rest = open_sources(
            options,
            lambda: load_tokenizer(model),
            min_length=min_length,
            max_length=max_length,
            vocabulary=vocabulary,
            max_tokens=tokens,
            packing=packing,
            validation_share=validation_share,
            seed=seed,
            progress=lambda total: bar.update(total - bar.n) and None,
            note=log,
        )
    log(read.description)
    longest = max_length
    if isinstance(read, PackedTokens) and isinstance(rest, PackedTokens):
        longest = min(longest, len(read.tokens), len(rest.tokens))
        if longest < max_length:
            log(f"the text suffices for {longest:,} tokens a sequence: they are cut to that")
    return read, rest, longest
