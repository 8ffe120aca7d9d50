# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The harness that compares methods of sparse prefill: masks, attention, accounting, a whole run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pareto.__main__ import PLANS, expand, read_plan
from benchmarks.pareto.budgets import curves, divide
from benchmarks.pareto.chunk import Chunk, Computed, Kept, attend, pairs
from benchmarks.pareto.methods import METHODS, make
from benchmarks.pareto.report import at_density
from benchmarks.pareto.structures import (
    RowOracle,
    Structure,
    mean_query_mass,
    output_errors,
    smallest_set,
    top_keys,
)
from vllm_vsprefill.pricing.passes import dense


def chunk(rows: int = 150, n: int = 260, block: int = 32, seed: int = 0) -> Chunk:
    torch.manual_seed(seed)
    return Chunk(0, torch.randn(4, rows, 16), torch.randn(2, n, 16), torch.randn(2, n, 16), 0.5, block)


def row_mask(c: Chunk, kept: Kept) -> Tensor:
    """bool ``[Hq, T, n]``, straight from the definition."""
    at = c.first + torch.arange(c.rows)
    distance = at[:, None] - torch.arange(c.seq_len)
    mask = kept.keys[:, torch.arange(c.rows) // c.block]
    if kept.diagonals is not None:
        mask = mask | kept.diagonals[:, distance.clamp(min=0)]
    return (mask & (distance >= 0)).repeat_interleave(4 // len(mask), 0)


def masked(c: Chunk, mask: Tensor) -> Tensor:
    logits = (c.q @ c.k.repeat_interleave(2, 0).mT * c.scale).masked_fill(~mask, float("-inf"))
    return logits.softmax(-1) @ c.v.repeat_interleave(2, 0)


@pytest.mark.parametrize("lists", [2, 4])
@pytest.mark.parametrize("diagonals", [False, True])
def test_attention_and_pairs_follow_the_definition(lists: int, diagonals: bool) -> None:
    c = chunk()
    keys = (torch.rand(lists, c.blocks, c.seq_len) < 0.1) | c.nearby(20, 3)
    kept = Kept(keys, torch.rand(lists, c.seq_len) < 0.05 if diagonals else None)
    mask = row_mask(c, kept)
    torch.testing.assert_close(attend(c, kept), masked(c, mask))
    assert float(pairs(c, kept)) == pytest.approx(float(mask.sum()) / 4)


def test_dense_is_causal_at_the_end_of_a_sequence() -> None:
    c = chunk()
    everything = torch.ones(2, c.blocks, c.seq_len, dtype=torch.bool)
    torch.testing.assert_close(dense(c.q, c.k, c.v, c.scale), masked(c, row_mask(c, Kept(everything))))


def test_a_residual_of_equal_keys_is_exact() -> None:
    """Blocks whose keys are all alike lose nothing by their mean."""
    c = chunk(rows=64, n=256)
    c.k[:, :192] = c.k[:, :192].unflatten(1, (-1, 32))[:, :, :1].expand(-1, -1, 32, -1).flatten(1, 2)
    keys = c.nearby(1, 0).expand(2, -1, -1).clone()
    keys[:, 1, 192:224] = True  # what lies between the first block and the second is no whole block of equal keys
    torch.testing.assert_close(attend(c, Kept(keys, residual=32)), dense(c.q, c.k, c.v, c.scale))


def test_true_mass_is_dense_attention() -> None:
    c = chunk()
    probs = (c.q @ c.k.repeat_interleave(2, 0).mT * c.scale).masked_fill(
        torch.arange(c.seq_len) > c.first + torch.arange(c.rows)[:, None], float("-inf")
    )
    want = probs.softmax(-1).unflatten(0, (2, 2)).mean(1)
    want = torch.stack([part.sum(1) for part in want.split(c.block, 1)], 1)
    torch.testing.assert_close(c.true_mass(), want)


def test_smallest_set_and_top_keys() -> None:
    scores = torch.tensor([[0.4, -1.0, 0.1, 0.3, 0.2]])
    assert smallest_set(scores, torch.tensor([0.3])).tolist() == [[True, False, False, True, False]]
    assert smallest_set(scores, torch.tensor([0.29])).tolist() == [[True, False, False, True, True]]
    assert top_keys(scores, 2).tolist() == [[True, False, False, True, False]]
    assert top_keys(scores, 9).tolist() == [[True, False, True, True, True]]


def test_a_tile_chooses_what_its_mean_query_looks_at() -> None:
    c = chunk(rows=128, n=512, block=64)
    keys = Structure(window=16, sinks=4, keys=10, tile=64).keep(c).keys
    near = c.nearby(16, 4)
    for b in range(2):
        mean = c.q[:, 64 * b : 64 * (b + 1)].mean(1)
        logits = torch.einsum("hd,hnd->hn", mean, c.k.repeat_interleave(2, 0)) * c.scale
        probs = logits[:, : c.first + 64 * (b + 1)].softmax(-1).unflatten(0, (2, 2)).mean(1)
        for h in range(2):
            score = torch.where(near[b, : probs.shape[1]], -1.0, probs[h])
            want = near[b].clone()
            want[score.topk(10).indices] = True
            assert torch.equal(keys[h, b], want)


@pytest.mark.parametrize("rule", ["floor", "left", "mass", "peak"])
def test_rules_keep_more_as_their_level_says(rule: Any) -> None:
    c = chunk(block=64)
    c.block = 64
    counts = [int(Structure(window=16, sinks=4, tile=64, rule=rule, level=x).keep(c).keys.sum()) for x in (0.004, 0.5)]
    assert counts[0] < counts[1] if rule == "mass" else counts[0] > counts[1]
    alone = int(Structure(window=16, sinks=4, tile=64).keep(c).keys.sum())
    assert min(counts) >= alone


def test_a_bar_for_all_tiles_keeps_the_best_of_the_chunk() -> None:
    c = chunk(block=64)
    kept = Structure(window=16, sinks=4, tile=64, rule="share", keys=20).keep(c)
    near = c.nearby(16, 4)
    scores = mean_query_mass(c, 64, 1, 2).masked_fill(near, -1.0)
    added = kept.keys & ~near
    for h in range(2):
        assert int(added[h].sum()) == 20 * c.blocks
        assert scores[h][added[h]].min() >= scores[h][~added[h]].max()


def test_scales_speak_of_layers_and_lists() -> None:
    c = chunk(block=64)
    kept = Structure(window=16, sinks=4, tile=64, keys=20, scales=[[0.0, 2.0]]).keep(c)
    added = (kept.keys & ~c.nearby(16, 4)).sum(-1)
    assert added[0].tolist() == [0] * c.blocks
    assert added[1].tolist() == [40] * c.blocks


@pytest.mark.parametrize("plan", sorted(path.stem for path in PLANS.glob("*.txt")))
def test_every_line_of_a_plan_is_a_method(plan: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for mean in (512, 1024, 2048):
        (tmp_path / f"budgets_{mean}.json").write_text("[[100, 200]]")
    seen = set()
    for line in read_plan(plan):
        for method, layers in expand(line, 3):
            assert layers is None or all(0 <= layer < 3 for layer in layers)
            estimator = make(method)
            kind = re.sub(r"=[\d.e-]+", "=", method)  # one of those that differ in a number only is looked at
            if kind not in seen:
                kept = estimator.keep(chunk(rows=300, n=940, block=estimator.block))
                assert kept is None or isinstance(kept, Computed) or kept.keys.shape[2] == 940
            seen.add(kind)


def test_lines_expand() -> None:
    assert expand("structure keys={1,2} tile={3,4} @ 0,2-3", 5) == [
        (f"structure keys={k} tile={t}", [0, 2, 3]) for k in (1, 2) for t in (3, 4)
    ]
    assert expand("sampled @ except", 3) == [("sampled", [1, 2]), ("sampled", [0, 2]), ("sampled", [0, 1])]


def test_unknown_methods_and_settings_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'magic'; known: .*structure"):
        make("magic")
    with pytest.raises(ValueError, match=r"no setting .kees.; it has: .*keys"):
        make("structure kees=3")


@pytest.fixture(scope="module")
def tiny() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def test_a_run_with_everything_selected_is_the_stock_model(tiny: Any) -> None:
    from benchmarks.pareto.model import Runner

    tokens = torch.randint(97, (700,), generator=torch.Generator().manual_seed(1))
    tiny.set_attn_implementation("eager")
    with torch.inference_mode():
        logprobs = tiny(tokens[None]).logits[0].log_softmax(-1)
    stock = -logprobs[200:-1].gather(1, tokens[201:, None])[:, 0]
    runner = Runner(tiny, tokens, dense_first=200, chunk=300)
    torch.testing.assert_close(runner.reference.nll[:-1], stock)
    everything = runner.run(make("structure rule=floor level=0"), judge=True)
    assert everything["density"] == pytest.approx(1)
    assert everything["top1"] == 1
    assert abs(everything["nll"]) < 1e-5
    assert max(everything["layer_error"]) < 1e-5
    little = runner.run(make("structure window=16 sinks=2"), judge=True)
    assert little["density"] < 0.6
    assert little["kl"] > everything["kl"]
    assert min(little["layer_error"]) > 0.01
    one = runner.run(make("structure window=16 sinks=2"), [1])
    assert one["layer_density"][0] == 1 > one["layer_density"][1]
    assert one["kl"] < little["kl"]


def test_results_are_kept_and_not_repeated(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmarks.pareto.__main__ as command

    class Words:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) % 97 for c in text]}

    import transformers

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda folder: Words())
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda folder, dtype: tiny)
    text, plan, out = tmp_path / "text.txt", tmp_path / "plan.txt", tmp_path / "out.json"
    text.write_text("the quick brown fox " * 40)
    plan.write_text("structure\nmagic\n")
    words = ["pareto", "folder", str(text), "--plan", str(plan), "--out", str(out), "--length", "600"]
    monkeypatch.setattr("sys.argv", [*words, "--dense-first", "200", "--chunk", "300"])
    command.main()
    runs = json.loads(out.read_text())["runs"]
    assert ["error" in run for run in runs] == [False, True]
    assert "unknown method 'magic'" in runs[1]["error"]
    runs[0]["density"] = 7.0  # would be overwritten by a second run
    out.write_text(json.dumps({"runs": runs}))
    command.main()
    assert json.loads(out.read_text())["runs"][0]["density"] == 7.0


def test_methods_have_distinct_names() -> None:
    assert len(set(METHODS.values())) == len(METHODS)


def test_one_list_alone_may_be_sparse() -> None:
    c = chunk(block=64)
    kept = Structure(window=16, sinks=4, tile=64, only=1).keep(c)
    assert torch.equal(kept.keys[0], torch.arange(c.seq_len) < c.ends[:, None])
    assert torch.equal(kept.keys[1], c.nearby(16, 4))
    assert expand("structure @ heads", 2, 2) == [
        (f"structure only={head}", [layer]) for head in range(2) for layer in range(2)
    ]


def test_budgets_go_where_they_remove_most() -> None:
    def run(head: int, keys: int, kl: float) -> dict[str, Any]:
        return {"layers": [0], "method": f"structure keys={keys} tile=64 only={head}", "kl": kl}

    damage = {(0, 0): 1.0, (0, 100): 0.4, (0, 200): 0.3, (1, 0): 0.2, (1, 100): 0.15, (1, 200): 0.12}
    places = curves([run(head, keys, kl) for (head, keys), kl in damage.items()])
    assert divide(places, 50) == {(0, 0): 100, (0, 1): 0}
    assert divide(places, 100) == {(0, 0): 200, (0, 1): 0}
    assert divide(places, 125) == {(0, 0): 200, (0, 1): 50}
    assert divide(places, 500) == {(0, 0): 200, (0, 1): 200}


def test_the_price_of_density_decides_by_the_true_error() -> None:
    c = chunk(rows=128, n=512, block=64)
    every = [Structure(window=16, sinks=4, tile=64, keys=k).keep(c).keys for k in (0, 40, 500)]
    errors = output_errors(c, every, num_rows=128)
    full = dense(c.q, c.k, c.v, c.scale)
    for option, found in zip(every, errors, strict=True):
        difference = (attend(c, Kept(option)) - full).square().unflatten(0, (2, 2)).sum((1, 2, 3))
        torch.testing.assert_close(found, difference / full.square().sum())
    assert errors[2].max() < 1e-6 < errors[1].max() < errors[0].max()

    def density(level: float, scales: list[list[float]] | None = None) -> list[float]:
        kept = Structure(window=16, sinks=4, tile=64, rule="error", level=level, scales=scales).keep(c)
        return kept.keys.float().mean((1, 2)).tolist()

    bars, plain = (
        Structure(window=16, sinks=4, tile=64, rule="error", level=1.0, bars=b).keep(c).keys & ~c.nearby(16, 4)
        for b in (True, False)
    )
    assert bars.sum((1, 2)).tolist() == plain.sum((1, 2)).tolist() == [512, 512]  # 256 a tile, on average or each
    assert set(plain.sum(2).flatten().tolist()) == {256}
    assert len(set(bars.sum(2).flatten().tolist())) > 1
    assert max(density(100.0)) < 0.2 < 0.5 < min(density(1e-9))
    little, much = density(0.5, [[1e-9, 1e9]])
    assert little < 0.2 < 0.5 < much


def test_families_meet_at_one_density() -> None:
    runs = [
        {"method": f"structure keys={keys}", "sparse_density": density, "top1": top1, "kl": kl}
        for keys, density, top1, kl in ((1, 0.05, 0.8, 1.0), (2, 0.2, 0.9, 0.01))
    ]
    assert at_density(runs, 0.1, "top1") == {"structure keys": pytest.approx(0.85)}
    assert at_density(runs, 0.1, "kl") == {"structure keys": pytest.approx(0.1)}
    assert at_density(runs, 0.3, "kl") == {}


@pytest.mark.parametrize("lists", ["kv", "query"])
def test_a_row_keeps_its_own_keys(lists: Any) -> None:
    c = chunk(rows=128, n=300, block=64)
    found = RowOracle(window=16, sinks=4, keys=9, lists=lists, block=64).keep(c)
    at = c.first + torch.arange(c.rows)
    causal = torch.arange(c.seq_len) <= at[:, None]
    probs = (c.q @ c.k.repeat_interleave(2, 0).mT * c.scale).masked_fill(~causal, float("-inf")).softmax(-1)
    if lists == "kv":
        probs = probs.unflatten(0, (2, 2)).mean(1).repeat_interleave(2, 0)
    near = c.nearby(16, 4).repeat_interleave(64, 0) & causal
    best = probs.masked_fill(near | ~causal, -1.0).topk(9, -1).indices
    mask = near.expand(4, -1, -1).scatter(-1, best, True)
    torch.testing.assert_close(found.output, masked(c, mask))
    assert float(found.pairs) == pytest.approx(float(mask.sum()) / 4)


def test_an_ideal_prior_finds_what_means_hide() -> None:
    """Keys that the two halves of each tile want and dislike by turns: their mean query says nothing of them."""
    from benchmarks.pareto.priced import Priced

    c = chunk(rows=96, n=384, block=16, seed=3)
    c.q[..., 0], c.k[..., 0] = 0.0, 0.0
    c.q[:, :, 0] = torch.where(torch.arange(96) % 16 < 8, 8.0, -8.0)
    hidden_keys = torch.arange(40, 300, 20)
    c.k[:, hidden_keys, 0] = 6.0
    method = Priced(window=32, sinks=8)
    near, hidden = c.nearby(32, 8), c.positions >= c.ends[:, None]
    prior = method._prior(c, method._scores(c, near, hidden), ~near & ~hidden, hidden)
    others = torch.ones(384, dtype=torch.bool)
    others[hidden_keys] = False
    assert prior[:, hidden_keys].min() > prior[:, others].max()
    kept = Priced(price=1e9, window=32, sinks=8, prior="ideal").keep(c).keys
    assert torch.equal(kept, near.expand_as(kept))  # where every key is too dear, a prior brings none


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_priced_is_what_the_operations_compute(parts: int) -> None:
    """The line of the plot that stands for the backend, against the operations themselves."""
    from benchmarks.pareto.priced import Priced
    from vllm_vsprefill.kernels.price.naive import price
    from vllm_vsprefill.kernels.rank.naive import rank
    from vllm_vsprefill.kernels.types import SparsePattern

    rng = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(shape, generator=rng) for shape in ((4, 96, 16), (2, 384, 16), (2, 384, 16)))
    q *= 2.0
    chunk = Chunk(0, q, k, v, 0.25, 16)
    pattern = SparsePattern(block_q=16, block_k=1, window=32, sinks=8, dense_last=0, parts=parts)
    for cost in (0.5, 1.0, 3.0):
        kept = Priced(price=cost, window=32, sinks=8, parts=parts).keep(chunk).keys
        rows = (x.transpose(0, 1) for x in (q, k, v))
        query, key, value = rows
        bars = price(query, key, value, scale=0.25, pattern=pattern, price=cost)
        listed = rank(query, key, bars.scores, scale=0.25, pattern=pattern)
        near = chunk.nearby(32, 8)
        assert torch.equal(kept & (chunk.positions < chunk.ends[:, None]), listed | near)
