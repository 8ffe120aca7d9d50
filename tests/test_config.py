# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""Options: sources, presets, and every refusal by its message."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_vsprefill.config import PRESETS, RESERVED_ENV, ConfigError, VSPrefillConfig, env_name
from vllm_vsprefill.tuning import CPU, CUDA, PlatformTuning, cuda_tuning

OPTIONS = tuple(VSPrefillConfig.model_fields)


def refuse(additional: object = None, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        VSPrefillConfig.from_sources(additional, env)
    return str(caught.value)


def test_nothing_given_is_the_balanced_preset() -> None:
    config = VSPrefillConfig.from_sources()
    assert config.enabled
    assert config.preset == "balanced"
    assert config.estimator == "auto"
    assert config.checkpoint is None
    assert config.dense_layers == ()
    assert config.model_fields_set == set()
    for name, value in PRESETS["balanced"].items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("source", ["additional", "env"])
def test_preset_sets_what_is_not_given(preset: str, source: str) -> None:
    additional = {"preset": preset} if source == "additional" else None
    env = {"VSPREFILL_PRESET": preset.upper()} if source == "env" else None
    config = VSPrefillConfig.from_sources(additional, env)
    assert {name: getattr(config, name) for name in PRESETS[preset]} == PRESETS[preset]
    given_too = VSPrefillConfig.from_sources({"preset": preset, "tau_columns": 0.123, "window": 7})
    assert given_too.tau_columns == 0.123
    assert given_too.window == 7
    assert given_too.tau_diagonals == PRESETS[preset]["tau_diagonals"]
    assert given_too.model_fields_set == {"preset", "tau_columns", "window"}


def test_presets_set_the_same_options_and_keep_less_in_order() -> None:
    assert len({frozenset(values) for values in PRESETS.values()}) == 1
    taus = [PRESETS[name]["tau_columns"] for name in ("accurate", "balanced", "fast")]
    assert taus == sorted(taus, reverse=True)  # type: ignore[type-var]


def test_additional_config_wins_over_environment_wins_over_preset() -> None:
    env = {"VSPREFILL_TAU_COLUMNS": "0.5", "VSPREFILL_TAU_DIAGONALS": "0.6", "VSPREFILL_PRESET": "fast", "HOME": "x"}
    config = VSPrefillConfig.from_sources({"tau_columns": 0.4}, env)
    assert (config.tau_columns, config.tau_diagonals, config.preset) == (0.4, 0.6, "fast")
    assert config.max_columns == PRESETS["fast"]["max_columns"]


def test_a_value_overridden_by_additional_config_is_not_looked_at() -> None:
    assert VSPrefillConfig.from_sources({"window": 32}, {"VSPREFILL_WINDOW": "abc"}).window == 32


def test_strings_as_dotted_command_line_options_give_them() -> None:
    config = VSPrefillConfig.from_sources(
        {
            "enabled": "False",
            "tau_columns": " 0.25",
            "min_columns": "3",
            "max_columns": "none",
            "max_diagonals": "77",
            "checkpoint": "null",
            "dense_layers": " 0-2, 7 ,5",
            "estimator": "Sampled",
            "block_q": "256",
        }
    )
    assert config.enabled is False
    assert (config.tau_columns, config.min_columns, config.max_columns, config.max_diagonals) == (0.25, 3, None, 77)
    assert config.checkpoint is None
    assert config.dense_layers == (0, 1, 2, 5, 7)
    assert (config.estimator, config.block_q) == ("sampled", 256)


@pytest.mark.parametrize(
    ("value", "layers"),
    [([3, 1, 1], (1, 3)), ("", ()), (None, ()), (4, (4,)), (["0-1", 9], (0, 1, 9)), ((2,), (2,)), ("5-5", (5,))],
)
def test_dense_layers_spellings(value: object, layers: tuple[int, ...]) -> None:
    assert VSPrefillConfig.from_sources({"dense_layers": value}).dense_layers == layers


def test_empty_and_reserved_variables_are_not_options() -> None:
    env = dict.fromkeys(RESERVED_ENV, "something") | {"VSPREFILL_WINDOW": "  "}
    assert VSPrefillConfig.from_sources({}, env) == VSPrefillConfig.from_sources()


@pytest.mark.parametrize("service", ["VSPREFILL", "VSPREFILL_GPU", "VSPREFILL_8B_EU"])
def test_variables_that_kubernetes_makes_of_a_service_are_not_options(service: str) -> None:
    address = "tcp://10.0.0.1:8000"
    env = {
        f"{service}_SERVICE_HOST": "10.0.0.1",
        f"{service}_SERVICE_PORT": "8000",
        f"{service}_SERVICE_PORT_HTTP": "8000",
        f"{service}_SERVICE_PORT_HTTP_METRICS": "9090",
        f"{service}_PORT": address,
        f"{service}_PORT_8000_TCP": address,
        f"{service}_PORT_8000_TCP_PROTO": "tcp",
        f"{service}_PORT_8000_TCP_PORT": "8000",
        f"{service}_PORT_8000_TCP_ADDR": "10.0.0.1",
        f"{service}_PORT_53_UDP": "udp://10.0.0.1:53",
        f"{service}_NAME": "/web/vsprefill",
        f"{service}_ENV_PATH": "/bin",
    }
    assert VSPrefillConfig.from_sources({}, env) == VSPrefillConfig.from_sources()
    assert VSPrefillConfig.from_sources({}, env | {"VSPREFILL_WINDOW": "7"}).window == 7


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("VSPREFILL_PORT", "8000"),
        ("VSPREFILL_SERVICE", "x"),
        ("VSPREFILL_SERVICE_HOSTS", "10.0.0.1"),
        ("VSPREFILL_NAME", "fast"),
        ("VSPREFILL_PORT_TCP", "1"),
        ("VSPREFILL_PRESETS", "tcp://10.0.0.1:8000"),
        ("vsprefill_service_host", "10.0.0.1"),
    ],
)
def test_a_typo_that_looks_a_little_like_a_service_stays_an_error(name: str, text: str) -> None:
    assert f"environment variable {name}: unknown option" in refuse({}, {name: text})


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("preset", "quick", "one of 'accurate', 'balanced', 'fast'"),
        ("preset", 3, "one of 'accurate', 'balanced', 'fast'"),
        ("enabled", "maybe", "true or false"),
        ("enabled", 2, "true or false"),
        ("estimator", "oracle", "one of 'auto', 'vsindexer', 'priced', 'sampled'"),
        ("checkpoint", 3, "a folder or a Hugging Face id"),
        ("tau_columns", 0, "a number > 0 and <= 1"),
        ("tau_columns", 1.01, "a number > 0 and <= 1"),
        ("tau_columns", float("nan"), "a number > 0 and <= 1"),
        ("tau_columns", True, "a number > 0 and <= 1"),
        ("tau_columns", None, "a number > 0 and <= 1"),
        ("tau_diagonals", "most", "a number > 0 and <= 1"),
        ("tau_diagonals", [0.5], "a number > 0 and <= 1"),
        ("min_columns", -1, "an integer from 0 to 2147483647"),
        ("min_columns", 1.5, "an integer from 0 to 2147483647"),
        ("min_columns", True, "an integer from 0 to 2147483647"),
        ("max_columns", 0, "an integer from 1 to 2147483647, or null for no cap"),
        ("max_columns", False, "an integer from 1 to 2147483647, or null for no cap"),
        ("min_diagonals", 2**31, "an integer from 0 to 2147483647"),
        ("max_diagonals", "all", "an integer from 1 to 2147483647, or null for no cap"),
        ("min_seq_len", -5, "an integer from 0 to 2147483647"),
        ("dense_layers", "3-1", "layer indices from 0 to 9999"),
        ("dense_layers", [-1], "layer indices from 0 to 9999"),
        ("dense_layers", [True], "layer indices from 0 to 9999"),
        ("dense_layers", 1.5, "layer indices from 0 to 9999"),
        ("dense_layers", "0-99999999999", "layer indices from 0 to 9999"),
        ("window", -1, "an integer from 0 to 2147483647"),
        ("sinks", 65537, "an integer from 0 to 65536"),
        ("dense_last_rows", "x", "an integer from 0 to 65536"),
        ("tile_parts", 3, "1, 2, or null for what suits the platform"),
        ("tile_variance", "perhaps", "true, false, or null for what suits the platform"),
        ("block_q", 17, "a multiple of 16 from 16 to 1024, or null for what suits the platform"),
        ("block_q", 0, "a multiple of 16 from 16 to 1024, or null for what suits the platform"),
        ("block_k", 2048, "an integer from 1 to 1024, or null for what suits the platform"),
        ("sampled_rows", 0, "an integer from 1 to 4096"),
    ],
)
def test_a_wrong_value_is_named_with_its_source_and_what_is_allowed(option: str, value: object, allowed: str) -> None:
    message = refuse({option: value})
    assert f'{option} (additional_config["vsprefill"]): found {value!r}, expected {allowed}' in message
    assert "1 problem\n" in message


@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "checkpoint"])  # any text may be a checkpoint
def test_a_wrong_variable_is_named(option: str) -> None:
    message = refuse(None, {env_name(option): "?!"})
    assert f"{option} (environment variable {env_name(option)}): found '?!', expected " in message


def test_unknown_options_come_with_the_closest_known_ones() -> None:
    assert "unknown option 'tau_colums'; did you mean tau_columns" in refuse({"tau_colums": 0.5})
    assert "unknown option 3; known are preset, enabled" in refuse({3: 4})
    assert "unknown option 'vsprefill'; it stands inside itself, write its options one level higher" in refuse(
        {"vsprefill": {"preset": "fast"}}
    )
    message = refuse(None, {"VSPREFILL_DENSE_LAYER": "1"})
    assert "environment variable VSPREFILL_DENSE_LAYER: unknown option; did you mean VSPREFILL_DENSE_LAYERS" in message
    assert "unknown option 'min_context'; it is called min_seq_len now" in refuse({"min_context": 4096})
    message = refuse(None, {"VSPREFILL_MAX_DISTANCES": "9"})
    assert "VSPREFILL_MAX_DISTANCES: unknown option; it is called VSPREFILL_MAX_DIAGONALS now" in message
    message = refuse(None, {"VSPREFILL_XYZZY": "1"})
    assert "environment variable VSPREFILL_XYZZY: unknown option; known are VSPREFILL_PRESET" in message
    assert "environment variable vsprefill_window: unknown option; did you mean VSPREFILL_WINDOW" in refuse(
        None, {"vsprefill_window": "1"}
    )


@pytest.mark.parametrize("value", ["fast", 3, ["preset"], True])
def test_options_that_are_not_an_object(value: object) -> None:
    assert f'additional_config["vsprefill"]: found {value!r} ({type(value).__name__}), expected an object' in refuse(
        value
    )


def test_contradictions_name_both_values_and_where_they_come_from() -> None:
    message = refuse({"min_columns": 10}, {"VSPREFILL_MAX_COLUMNS": "9"})
    assert (
        "min_columns must not exceed max_columns: found min_columns = 10 "
        '(additional_config["vsprefill"]), max_columns = 9 (environment variable VSPREFILL_MAX_COLUMNS)'
    ) in message
    message = refuse({"preset": "fast", "min_diagonals": 100_000})
    assert "min_diagonals must not exceed max_diagonals" in message
    assert f"max_diagonals = {PRESETS['fast']['max_diagonals']} (preset fast)" in message
    assert "estimators 'sampled' and 'priced' use no checkpoint" in refuse({"estimator": "sampled", "checkpoint": "x"})


def test_all_problems_of_both_sources_in_one_message() -> None:
    message = refuse(
        {"preset": "quick", "tau_colum": 1, "tau_columns": 7, "min_diagonals": 9, "max_diagonals": 3, "block_k": 0},
        {"VSPREFILL_WINDOW": "abc", "VSPREFILL_FOO": "1", "VSPREFILL_BLOCK_K": "5"},
    )
    assert "7 problems\n" in message
    for part in (
        "preset (additional_config",
        "unknown option 'tau_colum'",
        "tau_columns (additional_config",
        "min_diagonals must not exceed max_diagonals",
        "block_k (additional_config",
        "window (environment variable VSPREFILL_WINDOW)",
        "VSPREFILL_FOO: unknown option",
    ):
        assert message.count(part) == 1, part


def test_no_relation_is_reported_about_a_value_that_is_wrong_itself() -> None:
    message = refuse({"min_columns": "many", "max_columns": 1})
    assert "1 problem\n" in message
    assert "must not exceed" not in message


def test_frozen_and_survives_a_process_boundary() -> None:
    config = VSPrefillConfig.from_sources({"window": 3})
    with pytest.raises(ValueError, match="frozen"):
        config.window = 4  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.model_fields_set == {"window"}


def test_direct_construction_checks_relations_as_well() -> None:
    with pytest.raises(ValueError, match="min_columns must not exceed max_columns"):
        VSPrefillConfig(min_columns=2, max_columns=1)


def test_pattern_carries_the_geometry() -> None:
    config = VSPrefillConfig.from_sources({"block_q": 32, "block_k": 16, "window": 5, "sinks": 6, "dense_last_rows": 7})
    pattern = config.pattern()
    assert (pattern.block_q, pattern.block_k, pattern.window, pattern.sinks, pattern.dense_last) == (32, 16, 5, 6, 7)


def test_parts_of_tiles_are_the_platforms_where_they_are_not_given() -> None:
    assert VSPrefillConfig.from_sources({}).resolved(CPU).tile_pattern(CPU).parts == CPU.tile_parts == 2
    assert VSPrefillConfig.from_sources({"tile_parts": 1}).resolved(CPU).tile_pattern(CPU).parts == 1
    assert VSPrefillConfig.from_sources({"tile_parts": 2}).resolved(CPU).pattern().parts == 1  # columns have no tiles


@pytest.mark.parametrize(
    ("given", "expected"), [(None, CPU.tile_variance), ("null", CPU.tile_variance), (False, False), ("TRUE", True)]
)
def test_the_variance_is_the_platforms_where_it_is_not_given(given: object, expected: bool) -> None:
    config = VSPrefillConfig.from_sources({"tile_variance": given}).resolved(CPU)
    assert config.tile_pattern(CPU).variance is expected
    assert config.pattern().variance is False  # columns have no tiles


def test_dense_layers_are_checked_against_the_model() -> None:
    config = VSPrefillConfig.from_sources({"dense_layers": "0,5,6"})
    config.check_layers(7)
    with pytest.raises(
        ConfigError, match=r"dense_layers: found \[5, 6\], expected indices from 0 to 4: the model has 5"
    ):
        config.check_layers(5)


def test_describe_is_one_line_with_what_matters() -> None:
    options = VSPrefillConfig.from_sources({"checkpoint": "here", "dense_layers": [1, 4], "preset": "fast"})
    assert "blocks=autoxauto" in options.describe()
    line = options.resolved(CPU).describe()
    assert "\n" not in line
    for part in ("preset=fast", "tau=0.8/0.8", "columns=64..4096", "checkpoint=here", "dense_layers=1,4", "128x64"):
        assert part in line
    assert "columns=128..all" in VSPrefillConfig.from_sources().describe()
    assert "price" not in options.describe(by_tile=False)
    assert "disabled" in VSPrefillConfig.from_sources({"enabled": False}).describe()


def test_lists_of_tiles_have_a_window_and_tiles_of_their_own() -> None:
    options = VSPrefillConfig.from_sources({"price": 0.5, "block_k": 8}).resolved(CPU)
    line = options.for_tiles(CPU).describe(by_tile=True)
    for part in ("price=0.5", f"window={CPU.tile_window}", f"blocks={CPU.tile_q}x8"):
        assert part in line
    assert "tau" not in line
    assert "columns" not in line
    assert "tile_parts" not in line
    assert "tile_variance" not in line
    assert "tile_variance=false" in VSPrefillConfig.from_sources({"tile_variance": False}).describe(True)
    halves = VSPrefillConfig.from_sources({"tile_parts": 2})
    assert ["tile_parts=2" in halves.describe(by_tile) for by_tile in (None, True, False)] == [True, True, False]
    on_gpu = VSPrefillConfig.from_sources({"window": 77}).resolved(CUDA[9, 0]).for_tiles(CUDA[9, 0])
    assert (on_gpu.window, on_gpu.block_q, on_gpu.block_k) == (77, None, CUDA[9, 0].tile_k)


def test_a_platform_fills_in_what_is_not_given() -> None:
    later = PlatformTuning(block_q=32, block_k=2, min_seq_len=16384)
    options = VSPrefillConfig.from_sources({"block_k": 8}).resolved(later)
    assert (options.block_q, options.block_k, options.min_seq_len) == (32, 8, 16384)
    assert options.model_fields_set == {"block_k"}
    left_open = VSPrefillConfig.from_sources({"block_k": 8, "min_pairs": None}).resolved(later)
    assert left_open.model_fields_set == {"block_k"}  # null is no choice of the user's
    assert VSPrefillConfig.from_sources({"min_seq_len": 100}).resolved(later).min_seq_len == 100
    earlier = PlatformTuning(block_q=32, block_k=2, min_seq_len=1)
    assert VSPrefillConfig.from_sources().resolved(earlier).min_seq_len == PRESETS["balanced"]["min_seq_len"]
    with pytest.raises(ValueError, match="resolved"):
        VSPrefillConfig.from_sources().pattern()


def test_a_platform_fills_in_what_suits_lists_by_tile() -> None:
    tuning = PlatformTuning(block_q=32, block_k=2, priced_rows=8, tile_max_density=1.0, tile_min_seq_len=512)

    def chosen(given: dict[str, object], trained: bool = False) -> tuple[int, float, int]:
        options = VSPrefillConfig.from_sources(given).resolved(tuning).for_estimator(trained, tuning)
        assert options.given() == given  # a platform's choice is not the user's
        return options.sampled_rows, options.max_density, options.min_seq_len

    assert chosen({}) == chosen({"estimator": "priced"}) == (8, 1.0, 512)
    assert chosen({"sampled_rows": 64, "max_density": 0.5, "min_seq_len": 8192}) == (64, 0.5, 8192)
    assert chosen({"estimator": "sampled"}) == chosen({}, trained=True) == (64, 0.5, 8192)
    hopper = cuda_tuning((9, 0))
    options = VSPrefillConfig.from_sources().resolved(hopper).for_estimator(False, hopper)
    assert options.max_density == hopper.tile_max_density == 0.6


def test_tuning_goes_by_capability() -> None:
    assert cuda_tuning((9, 0)) == cuda_tuning((9, 9)) == cuda_tuning((12, 0))
    assert cuda_tuning(None) == cuda_tuning((7, 5)) == cuda_tuning((8, 9))


def test_importable_without_torch_and_vllm() -> None:
    code = (
        "import sys; import vllm_vsprefill.config as c; c.VSPrefillConfig.from_sources({}, {}); "
        "sys.exit(bool({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@given(
    additional=st.dictionaries(st.sampled_from(OPTIONS) | st.text(max_size=12), _json, max_size=5) | _json,
    env=st.dictionaries(
        st.sampled_from([env_name(name) for name in OPTIONS]) | st.text(max_size=6).map(env_name),
        st.text(max_size=8),
        max_size=4,
    ),
)
def test_any_input_gives_options_in_range_or_a_refusal(additional: object, env: dict[str, str]) -> None:
    try:
        config = VSPrefillConfig.from_sources(additional, env)
    except ConfigError:
        return
    assert 0 < config.tau_columns <= 1
    assert 0 < config.tau_diagonals <= 1
    assert config.max_columns is None or config.min_columns <= config.max_columns
    assert config.block_q is None or config.block_q % 16 == 0
    assert config.block_k is None or config.block_k >= 1
    assert list(config.dense_layers) == sorted(set(config.dense_layers))
    assert VSPrefillConfig.model_validate(config.model_dump()) == config
    assert config.describe()
