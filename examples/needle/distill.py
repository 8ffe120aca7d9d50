# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Distil the needle model's VSIndexer from its own attention, calibrate its thresholds and store it as a checkpoint.

    python -m examples.needle.distill --out indexer_ckpts/needle --seconds 70

The model stays frozen. Each step runs it over a generated prompt up to the end of one prefill chunk; the targets are
the true attention probabilities of that chunk's rows, summed along columns and along diagonals, per layer and KV head
(no n x n tensor is kept); the loss is KL(true || predicted) for each. Prompt and chunk lengths and chunk ends vary.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from examples.needle.modeling import KVCache, NeedleModel, dense_attention, load_model
from examples.needle.tasks import HAYSTACKS, TASKS, make_problem, training_sequence
from vllm_vsprefill.checkpoint import CheckpointConfig, ModelFingerprint, Thresholds, load_checkpoint, save_checkpoint
from vllm_vsprefill.config import PRESETS
from vllm_vsprefill.indexer import VSIndexer
from vllm_vsprefill.kernels.mass import chunked
from vllm_vsprefill.kernels.select.naive import distributions

MODEL = Path(__file__).parent / "model"
# How often each prompt length is drawn, and the chunk lengths; "0" is the whole prompt at once.
LENGTH_SHARES = {2048: 0.22, 4096: 0.25, 8192: 0.25, 16384: 0.16, 32768: 0.1, 65536: 0.02}
CHUNKS = (1024, 2048, 2048, 4096, 8192, 0)
MOST_ROWS = 8192
VALIDATION_LENGTHS = (8192, 16384, 32768)
CALIBRATION_LENGTH = 32768
RECALL_AT = (64, 256, 1024, 4096)
# What the thresholds of each preset are calibrated to at 32k tokens: columns, and distances beyond the window.
BUDGETS: dict[str, tuple[float, float]] = {"accurate": (768, 2), "balanced": (192, 0.25), "fast": (64, 0.1)}

Layers = list[tuple[Tensor, Tensor, Tensor]]


def log(line: str) -> None:
    print(f"[{time.perf_counter():9.1f}] {line}", flush=True)


def prompt(rng: np.random.Generator, length: int) -> np.ndarray[Any, Any]:
    """A prompt as it is evaluated, or a conversation as it was trained."""
    if rng.random() < 0.6:
        task, haystack = TASKS[int(rng.integers(len(TASKS)))], HAYSTACKS[int(rng.integers(len(HAYSTACKS)))]
        return make_problem(rng, task, haystack, length).prompt_ids
    return training_sequence(rng, length)[0]


def capture(model: NeedleModel, ids: Tensor) -> Layers:
    """q [n, Hq, D], k and v [n, Hkv, D] of every layer, dense attention throughout; ids [n]."""
    layers: Layers = []

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append((q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)))
        return dense_attention(layer, q, k, v)

    model.extend(ids[None], KVCache(model.config, 1, len(ids), ids.device), attention)
    return layers


def targets(layers: Layers, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Per layer, the true column and distance distributions [Hkv, n] of the last ``rows`` rows."""
    n = layers[0][0].shape[0]
    scale = layers[0][0].shape[2] ** -0.5
    return [chunked.mass_sums(q, k, scale=scale, row_start=n - rows, row_end=n) for q, k, _ in layers]


def divergence(true: Tensor, log_predicted: Tensor) -> Tensor:
    """KL(true || predicted) per head; [H, n] each."""
    return torch.special.xlogy(true, true).sum(-1) - (true * log_predicted).sum(-1)


def losses(indexer: VSIndexer, layers: Layers, true: list[tuple[Tensor, Tensor]]) -> Tensor:
    """KL of columns and of distances per layer, mean over KV heads: [layers, 2]."""
    out = []
    for i, ((_, k, v), (columns, distances)) in enumerate(zip(layers, true, strict=True)):
        predicted = torch.log_softmax(indexer(k, v, i), dim=0)  # [n, H, 2]
        kl_columns = divergence(columns, predicted[..., 0].T)
        kl_distances = divergence(distances, predicted[..., 1].T.flip(-1))
        out.append(torch.stack((kl_columns.mean(), kl_distances.mean())))
    return torch.stack(out)


def draw(rng: np.random.Generator, longest: int) -> tuple[int, int, int]:
    """Prompt length, context length at the end of one of its chunks, and that chunk's rows."""
    lengths = [n for n in LENGTH_SHARES if n <= longest]
    shares = np.array([LENGTH_SHARES[n] for n in lengths])
    length = int(rng.choice(lengths, p=shares / shares.sum()))
    chunk = int(CHUNKS[int(rng.integers(len(CHUNKS)))]) or length
    end = min(length, chunk * int(rng.integers(1, -(-length // chunk) + 1)))
    return length, end, min(chunk, end, MOST_ROWS)


def train(
    model: NeedleModel, indexer: VSIndexer, seconds: float, learning_rate: float, seed: int, longest: int
) -> dict[str, Any]:
    device = model.model.norm.weight.device
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.Adam(indexer.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    begin = last = time.perf_counter()
    step = 0
    recent: list[Tensor] = []
    history: list[dict[str, float]] = []
    while (elapsed := time.perf_counter() - begin) < seconds:
        rate = learning_rate * min(1.0, (step + 1) / 30) * max(0.02, 1 - elapsed / seconds)
        for group in optimiser.param_groups:
            group["lr"] = rate
        length, end, rows = draw(rng, longest)
        ids = torch.from_numpy(prompt(rng, length)[:end].astype(np.int64)).to(device)
        with torch.no_grad():
            layers = capture(model, ids)
            true = targets(layers, min(rows, len(ids)))
        kl = losses(indexer, layers, true)
        optimiser.zero_grad(set_to_none=True)
        kl.sum(1).mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        recent.append(kl.detach().mean(0))
        step += 1
        if time.perf_counter() - last > 5:
            last = time.perf_counter()
            columns, distances = torch.stack(recent).mean(0).tolist()
            history.append({"step": step, "kl_columns": round(columns, 4), "kl_distances": round(distances, 4)})
            log(f"{json.dumps(history[-1])} lr {rate:.1e}")
            recent.clear()
    return {"steps": step, "seconds": round(time.perf_counter() - begin, 1), "history": history}


@torch.no_grad()
def validate(model: NeedleModel, indexer: VSIndexer, longest: int, seed: int = 77) -> dict[str, Any]:
    """Per layer: KL, that of a uniform guess, and the share of the true mass on the likeliest columns and distances."""
    device = model.model.norm.weight.device
    rng = np.random.default_rng(seed)
    kl: list[Tensor] = []
    uniform: list[Tensor] = []
    recalls: list[Tensor] = []
    for length in (n for n in VALIDATION_LENGTHS if n <= longest):
        for haystack in HAYSTACKS:
            for task in ("multi_key", "variable_tracking"):
                ids = make_problem(rng, task, haystack, length - 64).prompt_ids.astype(np.int64)
                layers = capture(model, torch.from_numpy(ids).to(device))
                true = targets(layers, min(2048, len(ids)))
                kl.append(losses(indexer, layers, true))
                n = len(ids)
                log_n = torch.log(torch.tensor(float(n), device=device))
                uniform.append(
                    torch.stack(
                        [
                            torch.stack([(torch.special.xlogy(p, p).sum(-1) + log_n).mean() for p in pair])
                            for pair in true
                        ]
                    )
                )
                rows = []
                for i, (_, k, v) in enumerate(layers):
                    found = distributions(indexer(k, v, i))
                    row = [
                        p.gather(1, by.topk(min(count, n), 1).indices).sum(1).mean()
                        for p, q in zip(true[i], found, strict=True)
                        for by in (q, p)
                        for count in RECALL_AT
                    ]
                    rows.append(torch.stack(row))
                recalls.append(torch.stack(rows))
    kl_mean, uniform_mean = torch.stack(kl).mean(0).tolist(), torch.stack(uniform).mean(0).tolist()
    shares = torch.stack(recalls).mean(0).view(len(kl_mean), 2, 2, len(RECALL_AT)).tolist()
    per_layer = []
    for i, (own, flat) in enumerate(zip(kl_mean, uniform_mean, strict=True)):
        entry: dict[str, Any] = {"layer": i}
        for j, kind in enumerate(("columns", "distances")):
            entry[kind] = {
                "kl": round(own[j], 4),
                "kl_of_uniform": round(flat[j], 4),
                "recall_at": dict(zip(map(str, RECALL_AT), (round(x, 4) for x in shares[i][j][0]), strict=True)),
                "best_recall_at": dict(zip(map(str, RECALL_AT), (round(x, 4) for x in shares[i][j][1]), strict=True)),
            }
        per_layer.append(entry)
    return {"rows": 2048, "lengths": [n for n in VALIDATION_LENGTHS if n <= longest], "layers": per_layer}


def _threshold(counts_at: Any, budget: float) -> float:
    """Largest threshold (to 0.1 % of itself) whose mean count stays within the budget; counts grow with it."""
    low, high = 1e-6, 0.99
    if counts_at(high) <= budget:
        return high
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if counts_at(middle) <= budget else (low, middle)
    return low


@torch.no_grad()
def calibrate(model: NeedleModel, indexer: VSIndexer, longest: int, seed: int = 78) -> dict[str, Thresholds]:
    """Per preset and layer, thresholds that select the preset's budget on average at 32k tokens."""
    device = model.model.norm.weight.device
    rng = np.random.default_rng(seed)
    n = min(CALIBRATION_LENGTH, longest)
    found: list[list[tuple[Tensor, Tensor]]] = []
    for haystack in HAYSTACKS:
        for task in TASKS:
            ids = make_problem(rng, task, haystack, n).prompt_ids.astype(np.int64)
            layers = capture(model, torch.from_numpy(ids).to(device))
            ends = (n // 4, n // 2, n)  # the chunks' ends: a token's logits are the same in all of them
            found += [
                [distributions(indexer(k[:end], v[:end], i)) for i, (_, k, v) in enumerate(layers)] for end in ends
            ]
    out: dict[str, Thresholds] = {}
    # Per layer, ranked cumulative probabilities of every head and context.
    ranked: list[list[list[tuple[Tensor, Tensor]]]] = []
    for i in range(len(found[0])):
        per_kind = []
        for kind in (0, 1):
            heads = [head for context in found for head in context[i][kind]]
            ordered = [head.sort(descending=True, stable=True) for head in heads]
            per_kind.append([(o.values.double().cumsum(0), o.indices) for o in ordered])
        ranked.append(per_kind)
    for preset, (most_columns, most_far) in BUDGETS.items():
        window = int(PRESETS[preset]["window"] or 0)
        taus: tuple[list[float], list[float]] = ([], [])
        for columns, distances in ranked:

            def column_count(tau: float, ranked_columns: list[tuple[Tensor, Tensor]] = columns) -> float:
                return float(np.mean([int((total < tau).sum()) + 1 for total, _ in ranked_columns]))

            far = [(total, (order >= window).cumsum(0)) for total, order in distances]

            def far_count(tau: float, ranked_far: list[tuple[Tensor, Tensor]] = far) -> float:
                return float(
                    np.mean(
                        [int(beyond[min(int((total < tau).sum()), len(beyond) - 1)]) for total, beyond in ranked_far]
                    )
                )

            taus[0].append(float(f"{_threshold(column_count, most_columns):.4g}"))
            taus[1].append(float(f"{_threshold(far_count, most_far):.4g}"))
        out[preset] = Thresholds(tau_columns=tuple(taus[0]), tau_distances=tuple(taus[1]))
        log(f"{preset}: {out[preset]}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--resume", type=Path, help="checkpoint to go on from; with --seconds 0 only calibrates it anew"
    )
    parser.add_argument("--report", type=Path, help="JSON file for the training's history and the validation")
    parser.add_argument("--seconds", type=float, default=70.0)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--longest", type=int, default=65536, help="longest prompt")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        chunked.ROWS = 512  # larger steps suit a GPU
    # Inputs are bfloat16: their products are exact in TF32.
    torch.backends.cuda.matmul.allow_tf32 = True
    model = load_model(args.model, device)
    c = model.config
    generator = torch.Generator().manual_seed(args.seed)
    before: dict[str, str | bool | int | float] = {"steps": 0, "seconds": 0.0}
    if args.resume:
        loaded = load_checkpoint(args.resume, dtype=torch.float32, device=device)
        indexer = loaded.module(trainable=True)
        before |= loaded.config.training
    else:
        heads, generator = c.num_key_value_heads, torch.Generator().manual_seed(args.seed)
        layers = range(c.num_hidden_layers)
        indexer = VSIndexer(layers, heads, c.head_dim, args.hidden_size, device=device, generator=generator)
    result = train(model, indexer, args.seconds, args.learning_rate, args.seed, args.longest)
    for p in indexer.parameters():  # what is validated and calibrated is what is stored
        p.data = p.data.bfloat16().float()
    fingerprint = ModelFingerprint.from_hf_config(json.loads((args.model / "config.json").read_text()))

    def save(thresholds: dict[str, Thresholds], summary: dict[str, str | bool | int | float]) -> None:
        config = CheckpointConfig(
            model="needle (examples/needle)",
            fingerprint=fingerprint,
            hidden_size=indexer.hidden_size,
            dtype="bfloat16",
            layers=tuple(range(c.num_hidden_layers)),
            training={
                "data": "generated retrieval prompts, 2k to 64k tokens, chunks of 1k to 8k rows",
                "loss": "KL(true || predicted), columns + distances",
                "steps": before["steps"] + result["steps"],
                "seconds": before["seconds"] + result["seconds"],
                "learning_rate": args.learning_rate,
                **summary,
            },
            thresholds=thresholds,
        )
        save_checkpoint(args.out, indexer, config)

    save({}, {})
    checked = validate(model, indexer, args.longest)
    means = {
        f"{name}_{kind}": round(float(np.mean([entry[kind][name] for entry in checked["layers"]])), 4)
        for kind in ("columns", "distances")
        for name in ("kl", "kl_of_uniform")
    }
    log(json.dumps(means))
    for entry in checked["layers"]:
        log(json.dumps(entry))
    thresholds = calibrate(model, indexer, args.longest)
    save(thresholds, means)
    if args.report:
        hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        report = {
            "command": "python -m examples.needle.distill " + " ".join(sys.argv[1:]),
            "hardware": hardware,
            "torch": torch.__version__,
            "training": result,
            "validation": checked,
        }
        args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
