# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Train the needle model on one GPU in minutes, evaluate it, and write it as a Hugging Face model folder.

    python -m examples.needle.train --out DIR --seconds 330 --eval-seconds 110

Next-token loss on every token plus, separately averaged, the loss on the answers. Sequences start at 256 tokens; their
length doubles each time the retrieved tokens are predicted right often enough. The number of tokens per step stays the
same at every length, so everything but the attention is compiled once. Batches are made by worker processes.

Attention of sequences shorter than the longest is ordinary causal attention; no mask but the causal one is ever used.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing as mp
import os
import platform
import queue
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from examples.needle import vocabulary
from examples.needle.evaluate import Cell, evaluate, summary
from examples.needle.modeling import (
    Layer,
    NeedleConfig,
    NeedleModel,
    after_attention,
    before_attention,
    load_model,
    save_model,
)
from examples.needle.tasks import KIND_ANSWER, KIND_COUNTED, KIND_TEXT, TASKS, Problem, training_batch

SKIP_LENGTHS = (1024, 16384)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


@dataclass(frozen=True, slots=True)
class Settings:
    seconds: float
    tokens: int = 131072
    learning_rate: float = 2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    text_weight: float = 1.0
    answer_weight: float = 1.0
    # An answer token's weight is (answer tokens in its sequence) ** -this: at 0 every token counts alike and sequences
    # full of needles drown the lone ones, at 1 every sequence counts alike.
    balance: float = 0.75
    advance_at: float = 0.96
    # In a stage that takes longer than this the accuracy asked for falls: the time is better spent further on.
    patience_seconds: float = 30.0
    impatience: float = 0.004  # per second
    give_up_seconds: float = 150.0  # without leaving the first length
    decay_share: float = 0.45  # of the time, at its end, over which the learning rate falls to a twentieth
    skip_share: float = 0.5  # of the batches of SKIP_LENGTHS that skip positions
    seed: int = 1
    workers: int = 12


# -- data ----------------------------------------------------------------------------------------------------------


def _work(seed: int, tokens: int, shares: Any, out: Any) -> None:
    """Worker process: batches of lengths drawn from ``shares`` (shared, one weight per length), for ever."""
    rng = np.random.default_rng(seed)
    torch.set_num_threads(1)
    while True:
        p = np.array(shares[:])
        length = int(LENGTHS[int(rng.choice(len(LENGTHS), p=p / p.sum()))])
        out.put(training_batch(rng, length, tokens))


class Batches:
    """Batches from worker processes; :meth:`mix` sets how often each length is made from now on."""

    def __init__(self, settings: Settings) -> None:
        context = mp.get_context("fork")
        self._shares = context.Array("d", [1.0] + [0.0] * (len(LENGTHS) - 1))
        self._queue = context.Queue(maxsize=2 * settings.workers)
        self._workers = [
            context.Process(
                target=_work, args=(settings.seed * 1000 + i, settings.tokens, self._shares, self._queue), daemon=True
            )
            for i in range(settings.workers)
        ]
        for worker in self._workers:
            worker.start()
        self.waited = 0.0

    def mix(self, shares: list[float]) -> None:
        with self._shares.get_lock():
            self._shares[:] = shares

    def drop_pending(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass

    def next(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        start = time.perf_counter()
        batch = self._queue.get()
        self.waited += time.perf_counter() - start
        return batch

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()


def length_mix(stage: int) -> list[float]:
    """Shares of the lengths while the longest is ``LENGTHS[stage]``: mostly that one, all others too."""
    shares = [0.0] * len(LENGTHS)
    if LENGTHS[stage] == 65536:
        longest = {65536: 0.22, 32768: 0.28, 16384: 0.15}
    elif LENGTHS[stage] == 32768:
        longest = {32768: 0.5, 16384: 0.2}
    else:
        longest = {LENGTHS[stage]: 0.75}
    rest = [i for i in range(stage) if LENGTHS[i] not in longest]
    for length, share in longest.items():
        shares[LENGTHS.index(length)] = share
    for i in rest:
        shares[i] = (1 - sum(longest.values())) / len(rest)
    return shares


# -- one step ------------------------------------------------------------------------------------------------------


def _sdpa(backends: list[SDPBackend], expand: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if expand:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        with sdpa_kernel(backends):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not expand)

    return attend


def fastest_attention(c: NeedleConfig, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Time forward and backward of the backends at 16k tokens; a backend that disagrees with the first is left out."""
    if device.type != "cuda":
        return _sdpa([SDPBackend.MATH], False)
    candidates = {
        "flash": _sdpa([SDPBackend.FLASH_ATTENTION], False),
        "flash-expanded": _sdpa([SDPBackend.FLASH_ATTENTION], True),
        "cudnn": _sdpa([SDPBackend.CUDNN_ATTENTION], False),
        "cudnn-expanded": _sdpa([SDPBackend.CUDNN_ATTENTION], True),
    }
    torch.manual_seed(0)
    n = 16384
    make = [
        torch.randn(1, n, h, c.head_dim, device=device, dtype=torch.bfloat16).requires_grad_()
        for h in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    ]
    grad = torch.randn(1, c.num_attention_heads, n, c.head_dim, device=device, dtype=torch.bfloat16)
    reference: list[Tensor] | None = None
    best, best_ms = "flash", math.inf
    for name, attend in candidates.items():
        try:
            for p in make:
                p.grad = None
            for repeat in range(4):
                if repeat == 1:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                if repeat == 0:
                    out = attend(*(p.transpose(1, 2) for p in make))
                    out.backward(grad)
                    results = [out.detach(), *(p.grad.clone() for p in make if p.grad is not None)]
                else:
                    attend(*(p.transpose(1, 2) for p in make)).backward(grad)
            torch.cuda.synchronize()
            ms = (time.perf_counter() - start) / 3 * 1e3
            reference = reference or results
            error = max(float((a - b).norm() / b.norm()) for a, b in zip(results, reference, strict=True))
            log(f"attention {name}: {ms:.2f} ms forward+backward at {n}, deviation {error:.1e}")
            if error < 2e-2 and ms < best_ms:
                best, best_ms = name, ms
        except RuntimeError as error_:
            log(f"attention {name}: {str(error_).splitlines()[0][:100]}")
    log(f"attention: {best}")
    return candidates[best]


def _token_losses(x: Tensor, norm: Tensor, head: Tensor, eps: float, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of each token and whether the likeliest token is right."""
    xf = x.float()
    h = (xf * torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * norm.to(x.dtype)
    logits = F.linear(h, head.to(h.dtype)).float()
    return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets


class Stepper:
    """Forward and loss of one batch with the compiled pieces."""

    def __init__(self, model: NeedleModel, settings: Settings, compiled: bool) -> None:
        device = model.model.norm.weight.device
        self.model, self.settings = model, settings
        self.attend_long = fastest_attention(model.config, device)
        backends = [SDPBackend.FLASH_ATTENTION] if device.type == "cuda" else [SDPBackend.MATH]
        self.attend_short = _sdpa(backends, False)
        wrap: Callable[..., Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.before, self.after = wrap(before_attention), wrap(after_attention)
        self.losses = wrap(_token_losses)
        self.tables = model.rope(0, LENGTHS[-1], device, torch.bfloat16)
        self._random = np.random.default_rng(settings.seed)

    def rotations(self, b: int, s: int) -> tuple[Tensor, Tensor]:
        """cos and sin for ``b`` sequences of ``s`` tokens, [b * s, D // 2] each.

        Some sequences of middling length skip positions at a few random places, up to the longest length trained:
        far diagonals are seen at the price of near ones (positional skip-wise training, arXiv 2309.10400).
        """
        cos, sin = self.tables
        if not SKIP_LENGTHS[0] <= s <= SKIP_LENGTHS[1] or self._random.random() >= self.settings.skip_share:
            return cos[:s].repeat(b, 1), sin[:s].repeat(b, 1)
        places = torch.randint(1, s, (b, 4), device=cos.device)
        parts = torch.rand(b, 4, device=cos.device)
        spare = (LENGTHS[-1] - s) * torch.rand(b, 1, device=cos.device)
        gaps = (parts / parts.sum(1, keepdim=True) * spare).long()
        positions = torch.zeros(b, s, dtype=torch.long, device=cos.device).scatter_add_(1, places, gaps).cumsum(1)
        positions = (positions + torch.arange(s, device=cos.device)).view(-1)
        return cos[positions], sin[positions]

    def __call__(self, ids: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids and kinds [B, S] -> loss, text loss, answer loss, and counted tokens right and in all [tasks + 1, 2].

        The last row of the counts is of the sequences with few answers.
        """
        m, (b, s) = self.model, ids.shape
        eps = m.config.rms_norm_eps
        x = F.embedding(ids.view(-1), m.model.embed_tokens.weight.to(torch.bfloat16))
        cos, sin = self.rotations(b, s)
        attend = self.attend_long if s >= 2048 else self.attend_short
        for layer in cast(list[Layer], m.model.layers):
            q, k, v = self.before(x, cos, sin, *layer.before_weights(), eps=eps)
            q, k, v = (t.view(b, s, -1, t.shape[-1]).transpose(1, 2) for t in (q, k, v))
            attended = attend(q, k, v).transpose(1, 2).reshape(b * s, -1)
            x = self.after(x, attended, *layer.after_weights(), eps=eps)
        targets = F.pad(ids[:, 1:], (0, 1)).reshape(-1)
        kinds = F.pad(kinds[:, 1:], (0, 1)).reshape(-1)
        losses, right = self.losses(x, m.model.norm.weight, m.model.embed_tokens.weight, eps, targets)
        text, answer = kinds == KIND_TEXT, kinds >= KIND_ANSWER
        text_loss = (losses * text).sum() / text.sum().clamp(min=1)
        per_row = answer.view(b, s).sum(1, keepdim=True)
        weights = (answer.view(b, s) * per_row.clamp(min=1) ** -self.settings.balance).view(-1)
        answer_loss = (losses * weights).sum() / weights.sum().clamp(min=1e-9)
        tallies = []
        for t in range(len(TASKS)):
            counted = kinds == KIND_COUNTED + t
            tallies.append(torch.stack(((right & counted).sum(), counted.sum())))
        few = (kinds >= KIND_COUNTED) & (per_row < 100).expand(b, s).reshape(-1)
        tallies.append(torch.stack(((right & few).sum(), few.sum())))
        loss = self.settings.text_weight * text_loss + self.settings.answer_weight * answer_loss
        return loss, text_loss.detach(), answer_loss.detach(), torch.stack(tallies).float()


# -- the run -------------------------------------------------------------------------------------------------------

_start = time.perf_counter()
_log_file: Any = None


def log(line: str) -> None:
    line = f"[{time.perf_counter() - _start:7.1f}] {line}"
    print(line, flush=True)
    if _log_file is not None:
        _log_file.write(line + "\n")
        _log_file.flush()


def environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"hardware": name, "torch": torch.__version__, "python": platform.python_version(), "numpy": np.__version__}


def train(
    model: NeedleModel, batches: Batches, settings: Settings, folder: Path, compiled: bool, first_stage: int
) -> dict[str, Any]:
    device = model.model.norm.weight.device
    step_of = Stepper(model, settings, compiled)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    stage = first_stage
    batches.mix(length_mix(stage))
    batches.drop_pending()
    begin = stage_begin = saved = time.perf_counter()
    step = tokens = 0
    recent: list[tuple[int, Tensor, Tensor, Tensor]] = []  # of the last steps: length, text loss, answer loss, tallies
    history: list[dict[str, Any]] = []
    report_every = 20
    while (elapsed := time.perf_counter() - begin) < settings.seconds:
        done = elapsed / settings.seconds
        decay = max(0.0, (done - (1 - settings.decay_share)) / settings.decay_share)
        rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps) * (1 - 0.95 * decay)
        for group in optimiser.param_groups:
            group["lr"] = rate
        ids_np, kinds_np = batches.next()
        ids = torch.from_numpy(ids_np.astype(np.int32)).to(device, non_blocking=True).long()
        kinds = torch.from_numpy(kinds_np).to(device, non_blocking=True)
        loss, text_loss, answer_loss, tallies = step_of(ids, kinds)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        recent.append((ids.shape[1], text_loss, answer_loss, tallies))
        step, tokens = step + 1, tokens + ids.numel()
        # The longest lengths take a second a step: look more often there.
        if step % (report_every if LENGTHS[stage] <= 8192 else 8):
            continue
        now = time.perf_counter()
        longest = [r for r in recent if r[0] == LENGTHS[stage]]
        tally = sum((r[3] for r in longest), torch.zeros(len(TASKS) + 1, 2, device=device)).cpu()[:-1]
        accuracy = float(tally[:, 0].sum() / tally[:, 1].sum().clamp(min=1))
        per_task = {t: round(float(tally[i, 0] / tally[i, 1]), 3) for i, t in enumerate(TASKS) if tally[i, 1] > 0}
        entry = {
            "step": step,
            "seconds": round(now - begin, 1),
            "tokens": tokens,
            "length": LENGTHS[stage],
            "text_loss": round(float(torch.stack([r[1] for r in recent]).mean()), 3),
            "answer_loss": round(float(torch.stack([r[2] for r in recent]).mean()), 4),
            "accuracy": round(accuracy, 4),
            "tasks": per_task,
        }
        lengths = {}
        for length in sorted({r[0] for r in recent}):
            counts = sum((r[3] for r in recent if r[0] == length), torch.zeros(1, device=device)).cpu()
            share = counts[:, 0] / counts[:, 1].clamp(min=1)
            overall = float(counts[:-1, 0].sum() / counts[:-1, 1].sum().clamp(min=1))
            lengths[length] = (round(overall, 3), round(float(share[-1]), 3))
        history.append(entry)
        log(f"{json.dumps(entry)} lr {rate:.1e} |g| {float(norm):.2f} waited {batches.waited:.1f} {lengths}")
        recent.clear()
        if step == report_every:
            stage_begin = now  # the first steps waited for the compiler
        wanted = settings.advance_at - settings.impatience * max(0.0, now - stage_begin - settings.patience_seconds)
        if stage == 0 and now - begin > settings.give_up_seconds and accuracy < wanted:
            log("the retrieval circuit did not form")
            break
        if stage + 1 < len(LENGTHS) and float(tally[:, 1].sum()) > 200 and accuracy >= wanted:
            stage, stage_begin = stage + 1, now
            batches.mix(length_mix(stage))
            batches.drop_pending()
            log(f"length {LENGTHS[stage]}")
        if now - saved > 60:
            saved = now
            export(model, folder)
    batches.close()
    export(model, folder)
    log(f"trained {step} steps, {tokens / 1e6:.0f} M tokens, {time.perf_counter() - begin:.0f} s")
    return {
        "settings": asdict(settings),
        "steps": step,
        "tokens": tokens,
        "seconds": round(time.perf_counter() - begin, 1),
        "longest_length": LENGTHS[stage],
        "history": history,
    }


def export(model: NeedleModel, folder: Path) -> None:
    save_model(model, folder, vocabulary.IDS[vocabulary.END], vocabulary.IDS[vocabulary.PAD])


def main() -> None:
    global _log_file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=330.0)
    parser.add_argument("--eval-seconds", type=float, default=110.0)
    parser.add_argument("--resume", type=Path, help="model folder to go on from")
    parser.add_argument("--first-length", type=int, default=LENGTHS[0], choices=LENGTHS)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--tokens", type=int, default=131072, help="per step")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds in a stage before less will do")
    parser.add_argument("--impatience", type=float, default=0.004, help="how much less, per second")
    parser.add_argument("--rope-theta", type=float, default=1e8)
    parser.add_argument("--text-weight", type=float, default=1.0)
    parser.add_argument("--decay-share", type=float, default=0.45)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    folder: Path = args.out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    _log_file = (args.out / "train.log").open("w")
    device = torch.device(
        "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and torch.cuda.is_available() else "cpu"
    )
    settings = Settings(
        seconds=args.seconds,
        tokens=args.tokens,
        learning_rate=args.learning_rate,
        text_weight=args.text_weight,
        patience_seconds=args.patience,
        impatience=args.impatience,
        decay_share=args.decay_share,
        seed=args.seed,
        workers=args.workers,
    )
    batches = Batches(settings)  # the workers are forked before anything touches the GPU
    torch.manual_seed(args.seed)
    config = NeedleConfig(
        vocab_size=vocabulary.EMBEDDING_ROWS, num_hidden_layers=args.layers, rope_theta=args.rope_theta
    )
    model = NeedleModel(config)
    model.initialise()
    if args.resume:
        model.load_state_dict(load_model(args.resume).float().state_dict())
    model.requires_grad_(True)
    torch.backends.cuda.matmul.allow_tf32 = True
    model.to(device)
    result = train(model, batches, settings, folder, not args.no_compile, LENGTHS.index(args.first_length))
    vocabulary.save_tokenizer(folder)
    command = "python -m examples.needle.train " + " ".join(sys.argv[1:])
    parameters = sum(p.numel() for p in model.parameters())
    common = {"command": command, **environment(device), "parameters": parameters}
    (args.out / "training.json").write_text(json.dumps({**common, **result}, indent=1) + "\n")

    if result["longest_length"] == LENGTHS[0] and args.first_length == LENGTHS[0]:
        return
    # What is evaluated are the exported bfloat16 weights, read back.
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    stored = load_model(folder, device)
    cells: list[Cell] = []

    def report(cell: Cell, wrong: list[tuple[Problem, str]]) -> None:
        cells.append(cell)
        shown = [(p.answer_text, a[:80]) for p, a in wrong[:2]]
        log(f"{cell.length:6d} {cell.task:18s} {cell.haystack:7s} {cell.correct}/{cell.samples} {shown or ''}")
        content = {**common, "decoding": "greedy, dense attention", "lengths": summary(cells)}
        (args.out / "dense_accuracy.json").write_text(json.dumps(content, indent=1) + "\n")

    def samples(length: int) -> int:
        return 100 if length <= 8192 else 60 if length <= 32768 else 24

    # The lengths that matter most come first, should the time run out.
    order = (32768, 65536, 2048, 8192, 16384, 4096)
    evaluate(stored, order, samples, report=report, deadline=time.time() + args.eval_seconds)
    log("evaluated")


if __name__ == "__main__":
    main()
