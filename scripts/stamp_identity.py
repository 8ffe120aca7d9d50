# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Write into a checkpoint which model it was trained on; ``vsprefill train`` does so by itself.

    python scripts/stamp_identity.py indexer_ckpts/needle examples/needle/model --name needle

For checkpoints of before there were identities, for a folder whose name says nothing, and for a model that was trained
on in a quantised or dequantised form: with ``--norms-only`` its original counts as the same one.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vllm_vsprefill.checkpoint import CONFIG_FILE, CheckpointError, read_config
from vllm_vsprefill.fingerprint import ModelFingerprint
from vllm_vsprefill.identity import model_name, read_identity


def stamp(checkpoint: Path, model: Path, name: str | None, revision: str | None, norms_only: bool) -> str:
    """Replace the identity in a checkpoint's description by that of a model's folder; returns what was written.

    Raises:
        ValueError: the checkpoint cannot be read or was made for other shapes, or the model's weights cannot be read.
    """
    try:
        hf_config = json.loads((model / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} is not the folder of a Hugging Face model: {error}") from None
    config = read_config(checkpoint, ModelFingerprint.from_hf_config(hf_config))
    identity = read_identity(model, config.fingerprint.num_layers, revision=revision)
    if norms_only:
        identity = identity.model_copy(update={"weights": None})
    if identity.norms is None and identity.weights is None:
        raise ValueError(f"{model} has no weights in safetensors files that could be told apart from others")
    changes: dict[str, object] = {"identity": identity}
    if name is not None:
        changes["identity"] = identity.model_copy(update={"name": name})
        if config.model == model_name(model):
            changes["model"] = name
    text = json.dumps(config.model_copy(update=changes).model_dump(mode="json"), indent=2, ensure_ascii=False)
    partial = checkpoint / f".writing.{CONFIG_FILE}"
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(checkpoint / CONFIG_FILE)
    return str(changes["identity"])


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("model", type=Path, help="folder of the model that it was trained on")
    parser.add_argument("--name", help="what the model is called, such as its Hugging Face id")
    parser.add_argument("--revision", help="commit of the id")
    parser.add_argument("--norms-only", action="store_true", help="leave out what differs in quantised versions")
    given = parser.parse_args()
    try:
        print(stamp(given.checkpoint, given.model, given.name, given.revision, given.norms_only))
    except (CheckpointError, ValueError) as error:
        print(f"stamp_identity: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
