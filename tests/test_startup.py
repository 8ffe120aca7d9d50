# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What happens before an engine starts: any model, options in the wrong place, and what reaches other processes."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from tests import models
from vllm_vsprefill import checkpoint, exchange, startup
from vllm_vsprefill.config import ConfigError, ShippedOptions, VSPrefillConfig
from vllm_vsprefill.fingerprint import ModelFingerprint
from vllm_vsprefill.startup import StartupError


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load_general_plugins()
    monkeypatch.setenv(exchange.STATS_DIR_VARIABLE, str(tmp_path / "servers"))
    monkeypatch.delenv(exchange.EXCHANGE_VARIABLE, raising=False)


def served(config: Any, **options: Any) -> Any:
    """As much of vLLM's configuration as the checks read."""
    model = SimpleNamespace(hf_config=config, hf_text_config=config.get_text_config())
    return SimpleNamespace(model_config=model, additional_config={"vsprefill": options})


@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING))
def test_any_model_that_transformers_knows(model_type: str) -> None:
    """It starts, with a fingerprint or without; and a trained estimator without an indexer is refused by name."""
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:  # made of others that must be given, or of a library that is not here
        pytest.skip(f"{type(error).__name__} in transformers")
    startup.check(served(config))
    wanted = "no installed indexer was trained"
    try:
        fingerprint = startup.fingerprint(served(config))
        assert ModelFingerprint.model_validate_json(fingerprint.model_dump_json()) == fingerprint
    except ValueError:
        wanted = "cannot have an indexer"
    with pytest.raises(StartupError, match=wanted):
        startup.check(served(config, estimator="vsindexer"))


GEMMA4 = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "vocab_size": 1000,
    "architectures": ["Gemma4ForCausalLM"],
}


def engine_config(model: Path, **settings: Any) -> Any:
    """vLLM's own configuration of an engine, checked as before a start."""
    settings = {"attention_backend": "VSPREFILL", "dtype": "float32", "max_model_len": 1024} | settings
    return EngineArgs(model=str(model), skip_tokenizer_init=True, **settings).create_engine_config()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save_random_model(tmp_path_factory.mktemp("model"))


def test_heads_that_differ_from_layer_to_layer(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["gemma4_text"](**GEMMA4)
    config.save_pretrained(tmp_path)
    vllm_config = engine_config(tmp_path)
    assert startup.locate_checkpoint(startup.read_options(vllm_config), vllm_config).folder is None
    for source in (config, json.loads((tmp_path / "config.json").read_text())):
        with pytest.raises(ValueError, match="head_dim differs from layer to layer"):
            ModelFingerprint.from_hf_config(source)
    with pytest.raises(StartupError, match=r"cannot have an indexer: head_dim differs.*Use estimator 'priced'"):
        engine_config(tmp_path, additional_config={"vsprefill": {"checkpoint": str(tmp_path)}})
    with pytest.raises(StartupError, match="the model has 6 layers"):
        engine_config(tmp_path, additional_config={"vsprefill": {"dense_layers": [6]}})


@pytest.mark.parametrize(
    ("additional", "expected"),
    [
        ({"VSPREFILL": {"preset": "fast"}}, "has 'VSPREFILL'; did you mean 'vsprefill'?"),
        ({"vs-prefill": {}, "vsprefill": {}}, "has 'vs-prefill'; did you mean 'vsprefill'?"),
        ({"vllm_vsprefill": {}}, "has 'vllm_vsprefill'; did you mean 'vsprefill'?"),
        ({"preset": "fast"}, "has 'preset' at its top level, where nobody reads it; the option belongs into"),
        ({"vsprefill.tau-columns": 0.5}, '{"vsprefill": {"tau_columns": ...}}'),
        ({"VSPREFILL_WINDOW": 5}, '{"vsprefill": {"window": ...}}'),
        ({"attention": {"vsprefill": {"preset": "fast"}}}, "has 'vsprefill' inside of 'attention'"),
        ({"a": {"b": {"VSPREFILL": {}}}}, "has 'vsprefill' inside of 'a.b'"),
        ({"vsprefill": {"vsprefill": {"preset": "fast"}}}, "unknown option 'vsprefill'"),
        ({"vsprefill": {"PRESET": "fast"}}, "unknown option 'PRESET'; did you mean preset"),
        ({"vsprefill": {"VSPREFILL_TAU_COLUMNS": 1}}, "did you mean tau_columns"),
    ],
)
def test_options_in_the_wrong_place(model: Path, additional: dict[str, Any], expected: str) -> None:
    with pytest.raises(StartupError) as caught:
        engine_config(model, additional_config=additional)
    assert expected in str(caught.value)


def test_sections_of_others_are_left_alone(model: Path) -> None:
    engine_config(
        model, additional_config={"ascend": {"preset": 3}, "gdn_prefill_backend": "auto", "prefill": {"a": 1}}
    )


def test_everything_wrong_at_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSPREFILL_WINDOW", "wide")
    with pytest.raises(StartupError) as caught:
        engine_config(model, additional_config={"preset": "fast", "vsprefill": {"tau_column": 1, "checkpoint": "./no"}})
    for part in ("'preset' at its top level", "VSPREFILL_WINDOW", "did you mean tau_columns", "no such folder"):
        assert part in str(caught.value)


def test_options_without_the_backend_are_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(**settings: Any) -> str:
        config = engine_config(model, attention_backend=None, **settings)
        return startup.unread(config) or ""

    assert told() == ""
    assert "section 'vsprefill'" in told(additional_config={"vsprefill": {}})
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "vsprefill")
    monkeypatch.setenv("VSPREFILL_PRESET", "nonsense")  # nobody reads it, so it stops nobody
    said: list[str] = []
    logger = logging.getLogger("vllm.vsprefill")

    def keep(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return True

    logger.addFilter(keep)
    text = told()
    logger.removeFilter(keep)
    assert "VLLM_ATTENTION_BACKEND=vsprefill is set" in text
    assert "VSPREFILL_PRESET is set" in text
    assert "--attention-backend VSPREFILL" in text
    assert text in "\n".join(said)


def test_options_are_resolved_once_and_shipped(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VSPREFILL_PRESET", "fast")
    monkeypatch.setenv("VSPREFILL_DENSE_LAYERS", "0-1")
    users = {"vsprefill": {"window": 96}, "other": {"x": 1}}
    vllm_config = engine_config(model, additional_config=users)
    assert users == {"vsprefill": {"window": 96}, "other": {"x": 1}}
    monkeypatch.setenv("VSPREFILL_PRESET", "accurate")  # comes too late, as in a process with another environment
    options = startup.read_options(vllm_config)
    assert (options.preset, options.window, options.dense_layers) == ("fast", 96, (0, 1))
    assert options.model_fields_set == {"preset", "window", "dense_layers"}
    assert vllm_config.additional_config["other"] == {"x": 1}
    assert json.loads(json.dumps(vllm_config.additional_config))["vsprefill"]["preset"] == "fast"
    # vLLM finds compiled code by a hash of the configuration, which the folder of this very start is no part of.
    monkeypatch.delenv("VSPREFILL_PRESET")
    monkeypatch.delenv("VSPREFILL_DENSE_LAYERS")
    same = {"vsprefill": {"dense_layers": "0,1", "window": 96, "preset": "fast"}, "other": {"x": 1}}
    again = engine_config(model, additional_config=same)
    assert again.compute_hash() == vllm_config.compute_hash()
    assert startup.shipped(again).exchange != startup.shipped(vllm_config).exchange  # type: ignore[union-attr]


def test_a_configuration_made_from_another_stays_that_of_its_server(model: Path) -> None:
    from vllm.config.utils import replace

    vllm_config = engine_config(model, additional_config={"vsprefill": {"preset": "fast"}})
    before = startup.shipped(vllm_config)
    after = startup.shipped(replace(vllm_config, instance_id="other"))
    assert before is not None
    assert after is not None
    assert (after, after.exchange, after.trained) == (before, before.exchange, False)
    assert len(exchange.servers(exchange.base_folder())) == 1


def test_a_worker_with_another_environment_sees_the_same(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a worker of Ray or a spawned one does: unpickle the configuration, then ask for what concerns it."""
    monkeypatch.setenv("VSPREFILL_PRESET", "fast")
    monkeypatch.setenv("VSPREFILL_TAU_COLUMNS", "0.25")
    monkeypatch.chdir(model.parent)
    models.save_random_indexer(model.parent / "indexer", model)
    vllm_config = engine_config(model, additional_config={"vsprefill": {"checkpoint": "indexer"}})
    file = tmp_path / "config"
    file.write_bytes(pickle.dumps(vllm_config))
    program = (
        "import json, pickle, sys\n"
        "config = pickle.load(open(sys.argv[1], 'rb'))\n"
        "from vllm_vsprefill import startup\n"
        "options = startup.read_options(config)\n"
        "found = startup.locate_checkpoint(options, config)\n"
        "shipped = startup.shipped(config)\n"
        "print(json.dumps([options.given(), str(found.folder), shipped.exchange, shipped.trained]))\n"
    )
    environ = {name: value for name, value in os.environ.items() if not name.startswith("VSPREFILL_")}
    environ |= {"VSPREFILL_PRESET": "nonsense", "VSPREFILL_NO_OPTION": "1", "PYTHONPATH": str(models.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    given, checkpoint, folder, trained = json.loads(done.stdout.splitlines()[-1])
    indexer = str((model.parent / "indexer").resolve())
    assert given == {"preset": "fast", "tau_columns": 0.25, "checkpoint": indexer}
    assert checkpoint == indexer
    assert Path(folder).parent == exchange.base_folder()
    assert trained is True


def test_workers_that_find_another_indexer_than_the_server_stop(model: Path) -> None:
    vllm_config = engine_config(model)
    startup.check_agreement(vllm_config, trained=False)
    with pytest.raises(StartupError, match=r"finds a trained indexer .* found none.* on every machine"):
        startup.check_agreement(vllm_config, trained=True)
    startup.check_agreement(SimpleNamespace(additional_config={}), trained=True)


@pytest.fixture
def installed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed indexers, with one for ``model``."""
    folder = tmp_path / "installed"
    models.save_random_indexer(folder / "own", model)
    monkeypatch.setattr(checkpoint, "files", lambda package: folder)
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model of the shapes of ``model`` with other weights."""
    return models.save_random_model(tmp_path / "relative", seed=1)


class Said(logging.Handler):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def notes(self) -> list[tuple[int, str]]:
        """Level and text of what was said of indexers since the last call."""
        found = [(record.levelno, record.getMessage()) for record in self.records]
        self.records = []
        return [(level, text) for level, text in found if "indexer" in text]


@pytest.fixture
def said() -> Iterator[Said]:
    """What the plugin logs."""
    logger, handler = logging.getLogger("vllm.vsprefill"), Said()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def rename(folder: Path, identity: dict[str, str]) -> None:
    """Change what a checkpoint says of its model; nothing: it says nothing."""
    description = json.loads((folder / "config.json").read_text())
    description["identity"] = description["identity"] | identity if identity else {}
    (folder / "config.json").write_text(json.dumps(description))


def test_an_installed_indexer_of_the_model_itself_is_taken(model: Path, installed: Path, said: Said) -> None:
    section = startup.shipped(engine_config(model))
    assert section is not None
    assert (section.trained, section.indexer) == (True, "own")
    assert said.notes() == []


def test_an_installed_indexer_of_a_relative_is_not_taken(model: Path, other: Path, installed: Path, said: Said) -> None:
    vllm_config = engine_config(other)
    section = startup.shipped(vllm_config)
    assert section is not None
    assert (section.trained, section.indexer) == (False, None)
    assert startup.locate_checkpoint(startup.read_options(vllm_config), vllm_config).folder is None
    ((level, text),) = said.notes()
    assert level == logging.WARNING
    for part in (
        "no installed indexer was trained on the served model relative",
        f"own was trained on {model.name}, the served one has other weights",
        f'"checkpoint": "{installed / "own"}"',
        "The training-free estimator is used",
    ):
        assert part in text
    with pytest.raises(StartupError, match=f"own was trained on {model.name}.* or use estimator 'auto' or 'priced'"):
        engine_config(other, additional_config={"vsprefill": {"estimator": "vsindexer"}})


def test_an_indexer_of_a_relative_is_taken_if_it_is_given(
    model: Path, other: Path, installed: Path, said: Said
) -> None:
    given = {"vsprefill": {"checkpoint": str(installed / "own")}}
    vllm_config = engine_config(other, additional_config=given)
    located = startup.locate_checkpoint(startup.read_options(vllm_config), vllm_config)
    assert (located.folder, located.note) == (installed / "own", "")  # a worker says nothing once more
    assert located.is_doubtful  # but looks at its recall
    ((level, text),) = said.notes()
    assert level == logging.WARNING
    assert f"own was trained on {model.name}; the served model relative has its shapes, but other weights" in text
    vllm_config = engine_config(model, additional_config=given)
    assert said.notes() == []
    assert not startup.locate_checkpoint(startup.read_options(vllm_config), vllm_config).is_doubtful


@pytest.mark.parametrize("case", ["checkpoint", "dummy weights", "no safetensors"])
def test_what_is_not_known_is_taken_for_its_shapes(case: str, other: Path, installed: Path, said: Said) -> None:
    settings: dict[str, Any] = {}
    expected = "are not in safetensors files, or not here yet"
    if case == "checkpoint":
        rename(installed / "own", {})
        expected = "the checkpoint does not say which weights"
    elif case == "dummy weights":
        settings["load_format"] = "dummy"
    else:
        (other / "model.safetensors").unlink()
    for additional in ({}, {"vsprefill": {"checkpoint": str(installed / "own")}}):
        vllm_config = engine_config(other, additional_config=additional, **settings)
        section = startup.shipped(vllm_config)
        assert section is not None
        assert section.trained is True
        for one in (vllm_config, pickle.loads(pickle.dumps(vllm_config))):
            located = startup.locate_checkpoint(startup.read_options(one), one)
            assert located.is_doubtful == (case != "dummy weights")  # there is no recall to speak of
        ((level, text),) = said.notes()
        assert level == logging.INFO
        assert "is taken for its shapes" in text
        assert expected in text


def test_of_several_indexers_that_of_the_model_is_taken_by_every_process(other: Path, installed: Path) -> None:
    models.save_random_indexer(installed / "second", other)
    models.save_random_indexer(installed / "a_third", other)
    rename(installed / "a_third", {})
    vllm_config = engine_config(other)
    section = startup.shipped(vllm_config)
    assert section is not None
    assert section.indexer == "second"
    copy = pickle.loads(pickle.dumps(vllm_config))
    # A worker that does not see the weights, or not all, takes what the server has chosen.
    (other / "model.safetensors").unlink()
    located = startup.locate_checkpoint(startup.read_options(copy), copy)
    assert (located.folder, located.note) == (installed / "second", "")
    shutil.rmtree(installed / "second")
    assert startup.locate_checkpoint(startup.read_options(copy), copy).folder is None
    with pytest.raises(StartupError, match="finds no trained indexer"):
        startup.check_agreement(copy, trained=False)


def test_before_the_weights_of_an_id_are_here_its_name_counts(model: Path, installed: Path) -> None:
    from transformers import AutoConfig

    rename(installed / "own", {"name": "owner/model-coder"})
    vllm_config = served(AutoConfig.from_pretrained(model))
    options = VSPrefillConfig()
    for name, folder in (("owner/model-coder", installed / "own"), ("owner/model", None)):
        vllm_config.model_config.model = name
        located = startup.locate_checkpoint(options, vllm_config)
        assert located.folder == folder
        assert located.is_warning == (folder is None)
    assert "owner/model, though" in located.note
    assert "own was trained on owner/model-coder, the served one has another name; its weights are not here" in (
        located.note
    )


def test_shipped_options_pickle_with_what_is_beside_them() -> None:
    section = ShippedOptions(preset="fast")
    section.exchange, section.trained, section.indexer = "/somewhere", True, "needle"
    section.doubtful = True
    copy = pickle.loads(pickle.dumps(section))
    assert copy.doubtful
    assert (copy, copy.exchange, copy.trained, copy.indexer) == ({"preset": "fast"}, "/somewhere", True, "needle")
    assert VSPrefillConfig.from_sources(copy).preset == "fast"


def test_given_options_make_the_same_options_again() -> None:
    options = VSPrefillConfig.from_sources(
        {"dense_layers": "0-2", "max_columns": "none", "enabled": "False", "checkpoint": "x", "tau_columns": "0.1"}
    )
    again = VSPrefillConfig.from_sources(json.loads(json.dumps(options.given())))
    assert again == options
    assert again.model_fields_set == options.model_fields_set


def test_a_model_without_a_configuration() -> None:
    nothing = SimpleNamespace(model_config=None, additional_config={})
    startup.check(nothing)
    with pytest.raises(ConfigError, match="no configuration"):
        startup.locate_checkpoint(VSPrefillConfig(estimator="vsindexer"), nothing)
