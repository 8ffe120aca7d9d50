# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The stored needle model, its tokenizer and its indexer: complete, loadable by the stock library, and right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from examples.needle import sparse
from examples.needle.distill import Prompts, write_prompts
from examples.needle.evaluate import answer_all, generate, problems
from examples.needle.modeling import KVCache, NeedleConfig, NeedleModel, dense_attention, load_model, save_model
from examples.needle.sparse import SparseAttention, SparseSettings
from examples.needle.tasks import HAYSTACKS, TASKS, make_problem
from examples.needle.vocabulary import EMBEDDING_ROWS, END, IDS, PAD, TOKENS, encode, save_tokenizer
from vllm_vsprefill.checkpoint import ModelFingerprint, find_checkpoint, load_checkpoint
from vllm_vsprefill.distil.capture import LayerCall
from vllm_vsprefill.distil.model import load
from vllm_vsprefill.distil.options import ModelOptions
from vllm_vsprefill.distil.targets import Range, TargetKind, compute
from vllm_vsprefill.kernels.attend.naive import attend
from vllm_vsprefill.kernels.score.naive import score
from vllm_vsprefill.kernels.select.naive import distributions, select
from vllm_vsprefill.kernels.types import Budgets, SparsePattern

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "needle" / "model"
CHECKPOINT = ROOT / "indexer_ckpts" / "needle"
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> NeedleModel:
    return load_model(MODEL)


# -- files -----------------------------------------------------------------------------------------------------------


def test_the_files_are_small_enough_to_keep() -> None:
    shards = list(MODEL.glob("*.safetensors"))
    index = json.loads((MODEL / "model.safetensors.index.json").read_text())
    assert {shard.name for shard in shards} == set(index["weight_map"].values())
    assert all(shard.stat().st_size <= 15 * MEGABYTE for shard in shards)
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 24 * MEGABYTE
    assert (CHECKPOINT / "indexer.safetensors").stat().st_size <= 4 * MEGABYTE
    assert not [f for f in (*MODEL.iterdir(), *CHECKPOINT.iterdir()) if f.suffix in (".bin", ".pt", ".pkl")]


def test_the_configuration_is_what_stock_libraries_expect() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["vocab_size"] == EMBEDDING_ROWS >= len(TOKENS)
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert config["max_position_embeddings"] >= 65536
    assert config["eos_token_id"] == IDS[END]


# -- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("haystack", HAYSTACKS)
@pytest.mark.parametrize("task", TASKS)
def test_text_and_ids_agree_through_the_chat_template(tokenizer: Any, task: Any, haystack: Any) -> None:
    p = make_problem(np.random.default_rng(1), task, haystack, 600)
    ids = tokenizer.apply_chat_template(p.messages(), add_generation_prompt=True, return_dict=False)
    assert list(ids) == p.prompt_ids.tolist()
    assert tokenizer.decode(p.answer_ids.tolist(), skip_special_tokens=True) == p.answer_text
    # Line breaks and runs of spaces are the same to the tokenizer, so a file may be wrapped for reading.
    wrapped = [{"role": "user", "content": p.content.replace(". ", ".\n\n")}]
    assert list(tokenizer.apply_chat_template(wrapped, add_generation_prompt=True, return_dict=False)) == list(ids)


def test_any_text_can_be_sent(tokenizer: Any) -> None:
    text = "Ünïcödé 漢字 → 3.14159 don't\tstop <b>now</b> 👍 x_y 000123456"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == encode(text)
    assert max(ids) < len(TOKENS)


def test_a_conversation_with_a_system_message_renders(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You are happy."},
        {"role": "user", "content": "Question: What?"},
        {"role": "assistant", "content": "Lisbon: 417."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>You are happy.<|end|><|user|>Question: What?<|end|><|assistant|>Lisbon: 417.<|end|><|assistant|>"
    )
    assert tokenizer.eos_token == END


def test_the_stored_tokenizer_is_the_one_the_source_builds(tokenizer: Any, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    stored = json.loads((MODEL / "tokenizer.json").read_text())
    built = json.loads((tmp_path / "tokenizer.json").read_text())
    assert stored["model"]["vocab"] == built["model"]["vocab"] == IDS
    assert tokenizer.chat_template == (tmp_path / "chat_template.jinja").read_text()


# -- model -----------------------------------------------------------------------------------------------------------


def test_transformers_loads_it_and_computes_the_same(model: NeedleModel) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    p = make_problem(np.random.default_rng(2), "multi_query", "repeat", 500)
    ids = torch.from_numpy(p.prompt_ids.astype(np.int64))[None]
    with torch.no_grad():
        expected = theirs(ids).logits[0].float()
    whole = model.extend(ids, KVCache(model.config, 1, 500, ids.device), dense_attention)
    cache = KVCache(model.config, 1, 500, ids.device)
    chunks = torch.cat([model.extend(part, cache, dense_attention) for part in ids.split(192, 1)], 1)
    for hidden in (whole, chunks):
        logits = model.logits(hidden[0]).float()
        assert (logits - expected).norm() / expected.norm() < 2e-2


def test_transformers_answers_greedily(tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
    for task in ("multi_value", "variable_tracking"):
        p = make_problem(np.random.default_rng(9), task, "words", 1024)
        ids = torch.from_numpy(p.prompt_ids.astype(np.int64))[None]
        out = theirs.generate(ids, max_new_tokens=32, do_sample=False)
        assert p.is_correct(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.slow
@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_it_answers_prompts_of_2k_tokens(model: NeedleModel, haystack: Any) -> None:
    for task in TASKS:
        batch = problems(task, haystack, 2048, 2, seed=123)
        answers = answer_all(model, batch)
        assert [p.is_correct(a) for p, a in zip(batch, answers, strict=True)] == [True, True], (task, answers)


def test_generation_stops_at_the_end_token(model: NeedleModel) -> None:
    p = make_problem(np.random.default_rng(4), "single", "words", 300)
    rows = generate(model, torch.from_numpy(p.prompt_ids.astype(np.int64))[None], max_new_tokens=20)
    assert rows == [p.answer_ids.tolist()[:-1]]


def test_a_model_can_be_stored_and_read_back(tmp_path: Path) -> None:
    small = NeedleModel(NeedleConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1))
    small.initialise()
    save_model(small, tmp_path, IDS[END], IDS[PAD])
    again = load_model(tmp_path)
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.bfloat16()), name


# -- indexer ---------------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_for_this_model_and_is_found_by_it() -> None:
    fingerprint = ModelFingerprint.from_hf_config(json.loads((MODEL / "config.json").read_text()))
    loaded = load_checkpoint(CHECKPOINT, fingerprint)
    assert loaded.config.layers == tuple(range(6))
    found = find_checkpoint(fingerprint, search_dirs=[CHECKPOINT.parent])
    assert found is not None
    for preset in ("accurate", "balanced", "fast"):
        assert all(None not in loaded.thresholds(preset, layer) for layer in loaded.config.layers)


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    p = make_problem(np.random.default_rng(6), "multi_key", "words", 1500)
    return torch.from_numpy(p.prompt_ids.astype(np.int64))


@pytest.fixture(scope="module")
def captured(prompt: torch.Tensor) -> dict[int, LayerCall]:
    calls: dict[int, LayerCall] = {}
    load(ModelOptions(model=str(MODEL)), torch.device("cpu")).run(prompt, lambda call: calls.update({call.layer: call}))
    return calls


def test_the_trainer_sees_the_models_queries_keys_and_values(
    model: NeedleModel, prompt: torch.Tensor, captured: dict[int, LayerCall]
) -> None:
    own: list[tuple[torch.Tensor, ...]] = []

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        own.append((q, k, v))
        return dense_attention(layer, q, k, v)

    model.extend(prompt[None], KVCache(model.config, 1, len(prompt), prompt.device), attention)
    assert sorted(captured) == list(range(6))
    for layer, expected in enumerate(own):
        for found, x in zip(captured[layer][1:4], expected, strict=True):
            # The residual stream is bfloat16 in both, rounded at different places.
            difference = (found.float() - x[0].transpose(0, 1).float()).norm() / x.float().norm()
            assert float(difference) < 0.03


def test_the_indexer_finds_what_it_was_trained_to_find(captured: dict[int, LayerCall]) -> None:
    loaded = load_checkpoint(CHECKPOINT, dtype=torch.float32)
    training = loaded.config.training
    kind = TargetKind(
        str(training.get("target", "mass")),
        int(training.get("exclude_window", 0)),
        float(training.get("peak_power", 1)),
    )
    n = 1500
    shares = []
    for layer, call in captured.items():
        true = compute(call, Range(n - 512, n), [kind])[kind].columns
        with torch.no_grad():
            columns, _ = distributions(score(call.k, call.v, loaded.layers[layer]))
        best = columns.topk(n // 10, 1).indices
        shares.append(float(true.gather(1, best).sum(1).mean()))
    # A tenth of the columns chosen at random holds a tenth. The first two layers are local: which columns their rows
    # favour depends on where the chunk begins, which a token cannot know.
    assert min(shares[2:]) > 0.2, shares
    assert np.mean(shares) > 0.25, shares


def test_prompts_are_repeatable_and_can_be_written_for_the_command(tmp_path: Path) -> None:
    one, again, other = Prompts(1), Prompts(1), Prompts(1, held_out=True)
    for position, length in ((0, 300), (1, 1000), (2, 1000)):
        assert len(one.sequence(position, length)) == length
        assert np.array_equal(one.sequence(position, length), again.sequence(position, length))
        assert not np.array_equal(one.sequence(position, length), other.sequence(position, length))
    write_prompts(tmp_path / "p.jsonl", 3, 500, seed=1)
    records = [json.loads(line)["input_ids"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert records == [one.sequence(i, 500).tolist() for i in range(3)]


@pytest.mark.slow
def test_distillation_through_the_package(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from typer.testing import CliRunner

    from examples.needle import distill

    app = typer.Typer()
    app.command()(distill.main)
    out = tmp_path / "indexer"
    sizes = ["--max-length", "512", "--min-length", "256", "--steps", "4", "--validate-every", "2"]
    sizes += ["--hidden-size", "16", "--calibration-length", "1024", "--calibration-prompts", "1"]
    done = CliRunner().invoke(app, ["--out", str(out), *sizes])
    assert done.exit_code == 0, done.output
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "indexer.safetensors"]
    assert set(load_checkpoint(out).config.thresholds) == {"accurate", "balanced", "fast"}


@pytest.mark.parametrize(("first", "rows"), [(0, 300), (128, 200), (384, 64), (256, 130)])
@pytest.mark.parametrize(("window", "sinks", "dense_last"), [(0, 0, 0), (32, 10, 5), (100, 64, 64)])
def test_the_evaluators_sparse_attention_is_that_of_the_kernels(
    first: int, rows: int, window: int, sinks: int, dense_last: int
) -> None:
    torch.manual_seed(first + rows + window)
    n = first + rows
    q, k, v = torch.randn(rows, 8, 16), torch.randn(n, 2, 16), torch.randn(n, 2, 16)
    pattern = SparsePattern(128, 64, window, sinks, dense_last)
    probabilities = distributions(torch.randn(n, 2, 2) * 3)
    selection = select(*probabilities, tau_columns=0.5, tau_diagonals=0.3, budgets=Budgets(max_diagonals=5))
    out, visited = sparse.attend(q, k, v, selection, pattern, scale=16**-0.5)
    expected, count = attend(q, k, v, selection, pattern, scale=16**-0.5)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert visited == int(count)


def test_sparse_prefill_answers_and_counts(model: NeedleModel) -> None:
    loaded = load_checkpoint(CHECKPOINT, dtype=torch.float32)
    settings = SparseSettings(tau_columns=0.05, tau_diagonals=0.01, window=64, min_seq_len=512, max_diagonals=2)
    attention = SparseAttention(loaded.layers, settings)
    for task in ("multi_query", "variable_tracking"):
        p = make_problem(np.random.default_rng(8), task, "repeat", 1536)
        assert p.is_correct(answer_all(model, [p], attention=attention, chunk=512)[0])
    assert 0.1 < attention.density < 0.6
    assert len(attention.layer_densities()) == 6
    dense = SparseAttention(loaded.layers, SparseSettings(min_seq_len=10**6))
    answer_all(model, [p], attention=dense, chunk=512)
    assert dense.density == 1.0
