# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""The options of VSPREFILL: one validated model, read from vLLM's ``--additional-config`` and the environment.

Where an option comes from, first match: ``additional_config["vsprefill"]``, the environment variable
``VSPREFILL_<OPTION>``, the preset. Everything that is wrong with both sources is reported in one message.

Importable without vLLM and without torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

if TYPE_CHECKING:
    from vllm_vsprefill.kernels.types import SparsePattern
    from vllm_vsprefill.tuning import PlatformTuning

ENV_PREFIX = "VSPREFILL_"
"""Prefix of the environment variables that set options: ``VSPREFILL_TAU_COLUMNS`` sets ``tau_columns``."""

RESERVED_ENV = frozenset({"VSPREFILL_STATS_DIR", "VSPREFILL_EXCHANGE"})
"""Variables with that prefix that are not options: where servers meet the commands for them, see ``stats``."""

ADDITIONAL_CONFIG = 'additional_config["vsprefill"]'

# What Kubernetes puts into every container of a namespace for a Service whose name begins with "vsprefill", and Docker
# for a linked container of such a name. A bare port is theirs only as an address: somebody may mean an option by it.
_SERVICE_VARIABLE = re.compile(
    r"VSPREFILL_(?:[A-Z0-9_]+_)?"
    r"(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT(?:_(?:START|END))?|ADDR))?"
    r"|ENV_.+)"
)
_SERVICE_ADDRESS = re.compile(r"VSPREFILL_(?:[A-Z0-9_]+_)?PORT(?:_START|_END)?"), re.compile(r"(?:tcp|udp|sctp)://.*")
_LINK_NAME = re.compile(r"VSPREFILL_(?:[A-Z0-9_]+_)?NAME"), re.compile(r"/[^/]+/[^/]+")

PRESETS: dict[str, dict[str, float | int | None]] = {
    "accurate": {
        "price": 0.003,
        "tau_columns": 0.97,
        "tau_diagonals": 0.97,
        "min_columns": 512,
        "max_columns": None,
        "min_diagonals": 0,
        "max_diagonals": None,
        "min_seq_len": 8192,
        "window": 1024,
    },
    "balanced": {
        "price": 0.01,
        "tau_columns": 0.9,
        "tau_diagonals": 0.9,
        "min_columns": 128,
        "max_columns": None,
        "min_diagonals": 0,
        "max_diagonals": None,
        "min_seq_len": 8192,
        "window": 512,
    },
    "fast": {
        "price": 0.04,
        "tau_columns": 0.8,
        "tau_diagonals": 0.8,
        "min_columns": 64,
        "max_columns": 4096,
        "min_diagonals": 0,
        "max_diagonals": 512,
        "min_seq_len": 8192,
        "window": 256,
    },
}
"""What each preset sets. An option given explicitly wins over it."""

RENAMED = {
    "min_context": "min_seq_len",
    "tau_distances": "tau_diagonals",
    "min_distances": "min_diagonals",
    "max_distances": "max_diagonals",
}
"""Former names of options, for messages."""


class ConfigError(ValueError):
    """Options that cannot be used. The message names every problem of every source at once."""


def _no_bool(value: Any) -> Any:
    # Python counts True as 1; as a threshold or a budget it is a mistake.
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    return value.strip() if isinstance(value, str) else value


def _optional(value: Any) -> Any:
    # The environment and dotted command-line options can only give strings.
    return None if isinstance(value, str) and value.strip().lower() in ("", "none", "null") else _no_bool(value)


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _optional_flag(value: Any) -> Any:
    value = _lower(value)
    return None if value in ("", "none", "null") else value


_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
MAX_LAYER = 9999


def _layers(value: Any) -> Any:
    """Layer indices from a list, one number, or text such as ``"0-1,5"``, as an ascending tuple."""
    if value is None:
        return ()
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",") if part.strip()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = []
        for item in value:
            if isinstance(item, bool) or not isinstance(item, (int, str)):
                raise ValueError(f"{item!r} is not a layer index")
            parts.append(str(item).strip())
    else:
        raise ValueError("not a list of layer indices")
    layers: set[int] = set()
    for part in parts:
        match = _RANGE.fullmatch(part)
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else 0
        if match is None or last < first or last > MAX_LAYER:
            raise ValueError(f"{part!r} is not a layer index or an ascending range of them")
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def _preset(name: str) -> Callable[[dict[str, Any]], Any]:
    """Default factory of a field that the preset sets."""
    return lambda data: PRESETS[data["preset"]][name]


# What a message says is allowed for a field.
@dataclass(frozen=True)
class _Allowed:
    text: str


_Share = Annotated[
    float, BeforeValidator(_no_bool), Field(gt=0.0, le=1.0, allow_inf_nan=False), _Allowed("a number > 0 and <= 1")
]
_Price = Annotated[
    float, BeforeValidator(_no_bool), Field(ge=0.0, allow_inf_nan=False), _Allowed("a number of at least 0")
]
_Count = Annotated[
    int, BeforeValidator(_no_bool), Field(ge=0, le=2**31 - 1), _Allowed("an integer from 0 to 2147483647")
]
_Cap = Annotated[
    Annotated[int, Field(ge=1, le=2**31 - 1)] | None,
    BeforeValidator(_optional),
    _Allowed("an integer from 1 to 2147483647, or null for no cap"),
]
_Rows = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, le=65536), _Allowed("an integer from 0 to 65536")]
_QueryTile = Annotated[
    Annotated[int, Field(ge=16, le=1024, multiple_of=16)] | None,
    BeforeValidator(_optional),
    _Allowed("a multiple of 16 from 16 to 1024, or null for what suits the platform"),
]
_Granule = Annotated[
    Annotated[int, Field(ge=1, le=1024)] | None,
    BeforeValidator(_optional),
    _Allowed("an integer from 1 to 1024, or null for what suits the platform"),
]
_Parts = Annotated[
    Annotated[int, Field(ge=1, le=2)] | None,
    BeforeValidator(_optional),
    _Allowed("1, 2, or null for what suits the platform"),
]
_Optional_Flag = Annotated[
    bool | None,
    BeforeValidator(_optional_flag),
    _Allowed("true, false, or null for what suits the platform"),
]
_Flag = Annotated[bool, BeforeValidator(_lower), _Allowed("true or false")]
_Layers = Annotated[
    tuple[int, ...],
    BeforeValidator(_layers),
    _Allowed('layer indices from 0 to 9999, as a list or as text such as "0-1,5"'),
]


class ShippedOptions(dict[str, Any]):
    """The options that were given, of all sources, as the processes of one server pass them on: pickled or as JSON, in
    the place of ``additional_config["vsprefill"]``. Whoever finds them reads no environment.

    Attributes:
        exchange, exchange_made: the server's exchange folder, if any, and whether it could be made yet. Beside the
            options, not among them: vLLM hashes those to find compiled code again, and the folder is another one at
            every start.
        trained: whether the process that started the server found a trained indexer; all ranks must agree.
        indexer: name of the installed one that it chose, which the other processes take, too: a rank may see more of
            the model's weights than others, while they are fetched.
        doubtful: whether it may be another model's; the workers then look at its recall.
    """

    exchange: str | None = None
    exchange_made: bool = False
    trained: bool | None = None
    indexer: str | None = None
    doubtful: bool = False


class _Options(BaseModel):
    """Every option with its own range; relations between options are checked by the subclass."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    # Comes first: the defaults of later fields look at it.
    preset: Annotated[
        Literal["accurate", "balanced", "fast"],
        BeforeValidator(_lower),
        _Allowed("one of 'accurate', 'balanced', 'fast'"),
    ] = Field("balanced", description="Named set of defaults for the thresholds and budgets.")
    enabled: _Flag = Field(True, description="False runs the stock kernels only; the server stays as it is.")
    estimator: Annotated[
        Literal["auto", "vsindexer", "priced", "sampled"],
        BeforeValidator(_lower),
        _Allowed("one of 'auto', 'vsindexer', 'priced', 'sampled'"),
    ] = Field(
        "auto",
        description="How keys are chosen: columns and diagonals by a trained indexer, or by a few of the chunk's own "
        "query rows (sampled); a list of keys for every tile of queries, as long as it is worth its price (priced); or "
        "(auto) by the trained indexer where a checkpoint for the model is found, else priced.",
    )
    checkpoint: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        BeforeValidator(_optional),
        _Allowed("a folder or a Hugging Face id, or null to look for an installed one"),
    ] = Field(None, description="Trained indexer: a folder or a Hugging Face id.")
    price: _Price = Field(
        default_factory=_preset("price"),
        description="What the 'priced' estimator pays for attention: squared relative output error of a layer that "
        "computing all pairs of one KV head is worth. 0 computes everything.",
    )
    tau_columns: _Share = Field(
        default_factory=_preset("tau_columns"),
        description="Share of the predicted column mass to keep; 1 keeps every column.",
    )
    tau_diagonals: _Share = Field(
        default_factory=_preset("tau_diagonals"),
        description="Share of the predicted diagonal mass to keep; 1 keeps every diagonal.",
    )
    min_columns: _Count = Field(
        default_factory=_preset("min_columns"), description="Fewest columns per layer and KV head."
    )
    max_columns: _Cap = Field(
        default_factory=_preset("max_columns"), description="Most columns per layer and KV head; null: no cap."
    )
    min_diagonals: _Count = Field(
        default_factory=_preset("min_diagonals"), description="Fewest diagonals per layer and KV head."
    )
    max_diagonals: _Cap = Field(
        default_factory=_preset("max_diagonals"), description="Most diagonals per layer and KV head; null: no cap."
    )
    min_seq_len: _Count = Field(
        default_factory=_preset("min_seq_len"),
        description="Tokens of the sequence below which a request runs the stock kernel.",
    )
    min_pairs: Annotated[
        Annotated[int, Field(ge=0, le=2**62)] | None,
        BeforeValidator(_optional),
        _Allowed("an integer from 0, or null for what suits the platform"),
    ] = Field(
        None,
        description="Rows of a chunk times tokens of the sequence below which it runs the stock kernel. null: 0 on "
        "CPU, 62914560 on CUDA, more where a GPU has less than 32 heads of 128 channels.",
    )
    min_rows: Annotated[
        Annotated[int, Field(ge=0, le=2**31 - 1)] | None,
        BeforeValidator(_optional),
        _Allowed("an integer from 0, or null for what suits the platform"),
    ] = Field(
        None,
        description="Rows of a chunk below which it runs the stock kernel; 64 beside the dense last ones in any case. "
        "null: 0, and 960 on CUDA with the training-free estimator, which costs as much for few rows as for many.",
    )
    max_density: _Share = Field(
        0.5,
        description="A chunk runs the stock kernel in layers whose selection would compute more than this share of it; "
        "1 never does that. 1 on CPU with the 'priced' estimator, where it is not given: computing everything is "
        "faster there than the stock kernel.",
    )
    dense_layers: _Layers = Field((), description="Layers that always run the stock kernel.")
    window: _Count = Field(
        default_factory=_preset("window"),
        description="Local window, in positions: the nearest keys are always kept. 256 with the 'priced' estimator, "
        "where it is not given.",
    )
    sinks: _Rows = Field(64, description="First positions of the sequence that are always kept.")
    dense_last_rows: _Rows = Field(64, description="Last rows of a chunk that attend to everything.")
    block_q: _QueryTile = Field(
        None,
        description="Query tile, in positions; its rows share one list of keys. null: 128 on CPU, 16 on CUDA; with the "
        "'priced' estimator 64 on CPU, and on CUDA what fills a program, more for long sequences.",
    )
    block_k: _Granule = Field(
        None,
        description="Key granule of diagonals, window and sinks, in positions. null: 64 on CPU, 4 on CUDA; 16 with the "
        "'priced' estimator.",
    )
    tile_parts: _Parts = Field(
        None,
        description="Parts of a query tile, each of which ranks the keys by a mean query of its own, with the 'priced' "
        "estimator: 2 finds more of what a few rows look for, with twice the products of ranking. On CUDA 1 for more "
        "than 16 query heads a KV head or 128 channels. null: 2 on CPU, 1 on CUDA.",
    )
    tile_variance: _Optional_Flag = Field(
        None,
        description="Whether the 'priced' estimator adds half the variance of a key's logits over the queries of a "
        "tile, mean of all tiles, to the key's scores: keys that only some rows of a tile look for are found earlier. "
        "null: true on CPU, false on CUDA.",
    )
    sampled_rows: Annotated[
        int, BeforeValidator(_no_bool), Field(ge=1, le=4096), _Allowed("an integer from 1 to 4096")
    ] = Field(
        64,
        description="Query rows per chunk whose true attention the estimators 'sampled' and 'priced' compute. 32 on "
        "CPU with 'priced', where it is not given.",
    )


@dataclass(frozen=True)
class _Relation:
    """Something that must hold between two options."""

    fields: tuple[str, str]
    broken: Callable[[Any], bool]
    text: str


_RELATIONS = (
    _Relation(
        ("min_columns", "max_columns"),
        lambda o: o.max_columns is not None and o.min_columns > o.max_columns,
        "min_columns must not exceed max_columns",
    ),
    _Relation(
        ("min_diagonals", "max_diagonals"),
        lambda o: o.max_diagonals is not None and o.min_diagonals > o.max_diagonals,
        "min_diagonals must not exceed max_diagonals",
    ),
    _Relation(
        ("estimator", "checkpoint"),
        lambda o: o.estimator in ("sampled", "priced") and o.checkpoint is not None,
        "estimators 'sampled' and 'priced' use no checkpoint; leave one of the two out",
    ),
)


_OF_COLUMNS = frozenset(
    ("tau_columns", "tau_diagonals", "min_columns", "max_columns", "min_diagonals", "max_diagonals")
)
_OF_TILES = frozenset(("price", "tile_parts", "tile_variance"))
"""Options that say nothing where every tile has a list of its own, and where a chunk has columns and diagonals."""


class VSPrefillConfig(_Options):
    """Options of one server. Immutable; built by :meth:`from_sources`.

    Every field's meaning and range: its description above. ``model_fields_set`` holds the options that were given
    explicitly (not by the preset); they win over thresholds that a checkpoint was calibrated with.
    """

    @model_validator(mode="after")
    def _check_relations(self) -> VSPrefillConfig:
        broken = [relation.text for relation in _RELATIONS if relation.broken(self)]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def from_sources(cls, additional: object = None, env: Mapping[str, str] | None = None) -> VSPrefillConfig:
        """Read and check the options.

        Args:
            additional: value of vLLM's ``additional_config["vsprefill"]``: a mapping, or None where it is not given.
            env: environment to look for ``VSPREFILL_*`` variables in; None reads none. An empty variable counts as
                not set.

        Raises:
            ConfigError: unknown options, wrong types, values out of range, options that contradict each other: all of
                them in one message, each with its source, the value found and what is allowed.
        """
        problems: list[str] = []
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        known = tuple(_Options.model_fields)

        for name, text in sorted((env or {}).items()):
            if not name.upper().startswith(ENV_PREFIX) or name in RESERVED_ENV or not text.strip():
                continue
            if is_service_variable(name, text):
                continue
            option = name[len(ENV_PREFIX) :].lower()
            if option in known and name == env_name(option):
                values[option], sources[option] = text, f"environment variable {name}"
            else:
                problems.append(f"environment variable {name}: unknown option{_suggest(option, known, env_name)}")

        if isinstance(additional, Mapping):
            for key, value in additional.items():
                if isinstance(key, str) and key in known:
                    values[key], sources[key] = value, ADDITIONAL_CONFIG
                elif key == "vsprefill":
                    problems.append(
                        f"{ADDITIONAL_CONFIG}: unknown option {key!r}; it stands inside itself, write its options one "
                        "level higher"
                    )
                else:
                    problems.append(f"{ADDITIONAL_CONFIG}: unknown option {key!r}{_suggest(str(key), known)}")
        elif additional is not None:
            problems.append(
                f"{ADDITIONAL_CONFIG}: found {additional!r} ({type(additional).__name__}), expected an object such as "
                '{"preset": "balanced"}'
            )

        options, wrong = _validate_fields(values)
        for name, reason in wrong.items():
            problems.append(f"{name} ({sources[name]}): found {values[name]!r}, expected {_allowed(name)}{reason}")
        for relation in _RELATIONS:
            if not wrong.keys() & set(relation.fields) and relation.broken(options):
                found = ", ".join(
                    f"{name} = {getattr(options, name)!r} ({sources.get(name, f'preset {options.preset}')})"
                    for name in relation.fields
                )
                problems.append(f"{relation.text}: found {found}")
        if problems:
            count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
            raise ConfigError(f"VSPREFILL options: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))
        return cls.model_validate(values)

    def given(self) -> dict[str, Any]:
        """The options that were given explicitly, fit for JSON; :meth:`from_sources` makes the same options of them."""
        return self.model_dump(mode="json", include=set(self.model_fields_set))

    def resolved(self, tuning: PlatformTuning) -> VSPrefillConfig:
        """These options with a platform's tile sizes and crossover where none were given explicitly."""
        update: dict[str, int] = {}
        if self.block_q is None:
            update["block_q"] = tuning.block_q
        if self.block_k is None:
            update["block_k"] = tuning.block_k
        if self.min_pairs is None:
            update["min_pairs"] = tuning.min_pairs
        if "min_seq_len" not in self.model_fields_set and tuning.min_seq_len > self.min_seq_len:
            update["min_seq_len"] = tuning.min_seq_len
        given = self.model_fields_set - update.keys()  # null leaves the choice, too
        options = self.model_copy(update=update)
        options.__pydantic_fields_set__.intersection_update(given)  # a platform's choice is not the user's
        return options

    def lists_by_tile(self, trained: bool) -> bool:
        """Whether every tile of queries gets a list of its own; ``trained``: whether an indexer was found."""
        return not trained and self.estimator in ("auto", "priced")

    def without_effect(self, trained: bool) -> list[str]:
        """Options that were given and that the estimator which runs does not look at, in alphabetical order.

        ``trained``: whether an indexer was found.
        """
        by_tile = self.lists_by_tile(trained)
        idle = _OF_COLUMNS if by_tile else _OF_TILES
        if not by_tile and self.estimator != "sampled":
            idle = idle | {"sampled_rows"}
        usual = type(self).model_fields
        # Null where that is the default anyway says nothing.
        said = {name for name, value in self.given().items() if value is not None or usual[name].default is not None}
        return sorted(idle & said)

    def for_estimator(self, trained: bool, tuning: PlatformTuning) -> VSPrefillConfig:
        """These options with what a platform wants of the estimator, where nothing was given explicitly.

        Args:
            trained: whether an indexer was found.
            tuning: the platform's, as for :meth:`resolved`.
        """
        if not self.lists_by_tile(trained):
            return self
        wanted = {
            "sampled_rows": tuning.priced_rows,
            "max_density": tuning.tile_max_density,
            "min_seq_len": tuning.tile_min_seq_len,
        }
        given = set(self.model_fields_set)
        update = {name: value for name, value in wanted.items() if value is not None and name not in given}
        options = self.model_copy(update=update)
        options.__pydantic_fields_set__.intersection_update(given)
        return options

    def pattern(self) -> SparsePattern:
        """The part of the options that the kernels know (this imports torch).

        Raises:
            ValueError: tile sizes are still open; :meth:`resolved` fills them in.
        """
        from vllm_vsprefill.kernels.types import SparsePattern

        if self.block_q is None or self.block_k is None:
            raise ValueError("block_q and block_k are open; call resolved() first")
        return SparsePattern(
            block_q=self.block_q,
            block_k=self.block_k,
            window=self.window,
            sinks=self.sinks,
            dense_last=self.dense_last_rows,
        )

    def tile_pattern(self, tuning: PlatformTuning) -> SparsePattern:
        """``pattern`` where every tile has a list of its own: the platform's, but for what was given explicitly."""
        wanted = {"window": tuning.tile_window, "block_q": tuning.tile_q, "block_k": tuning.tile_k}
        update = {name: size for name, size in wanted.items() if size and name not in self.model_fields_set}
        pattern = self.model_copy(update=update).pattern()
        variance = tuning.tile_variance if self.tile_variance is None else self.tile_variance
        return dataclasses.replace(pattern, parts=self.tile_parts or tuning.tile_parts, variance=variance)

    def check_layers(self, num_layers: int) -> None:
        """ConfigError if ``dense_layers`` names a layer that a model of ``num_layers`` layers does not have."""
        missing = [layer for layer in self.dense_layers if layer >= num_layers]
        if missing:
            raise ConfigError(
                f"VSPREFILL options: dense_layers: found {missing}, expected indices from 0 to {num_layers - 1}: the "
                f"model has {num_layers} layers"
            )

    def for_tiles(self, tuning: PlatformTuning) -> VSPrefillConfig:
        """These options where every tile has a list of its own: with the window and tiles that a platform takes then,
        where none were given; ``block_q`` stays open where it follows from the sequence."""
        wanted = {"window": tuning.tile_window, "block_q": tuning.tile_q or None, "block_k": tuning.tile_k}
        given = self.model_fields_set
        return self.model_copy(update={name: size for name, size in wanted.items() if name not in given})

    def describe(self, by_tile: bool | None = None) -> str:
        """One line for the log: the preset, what differs from it, and the options that matter most.

        ``by_tile``: whether every tile has a list of its own, by which some options say nothing; None where it is open.
        """
        if not self.enabled:
            return "disabled (stock kernels only)"
        by_columns = [
            f"tau={self.tau_columns:g}/{self.tau_diagonals:g}",
            f"columns={_interval(self.min_columns, self.max_columns)}",
            f"diagonals={_interval(self.min_diagonals, self.max_diagonals)}",
        ]
        shown = [
            f"preset={self.preset}",
            f"estimator={self.estimator}",
            *([] if by_tile is False else [f"price={self.price:g}"]),
            *([] if by_tile else by_columns),
            f"min_seq_len={self.min_seq_len}",
            f"window={self.window}",
            f"sinks={self.sinks}",
            f"dense_last_rows={self.dense_last_rows}",
            f"blocks={_or_auto(self.block_q)}x{_or_auto(self.block_k)}",
        ]
        if self.checkpoint is not None:
            shown.append(f"checkpoint={self.checkpoint}")
        if by_tile is not False and self.tile_parts is not None:
            shown.append(f"tile_parts={self.tile_parts}")
        if by_tile is not False and self.tile_variance is not None:
            shown.append(f"tile_variance={str(self.tile_variance).lower()}")
        if self.dense_layers:
            shown.append("dense_layers=" + ",".join(map(str, self.dense_layers)))
        return " ".join(shown)


def env_name(option: str) -> str:
    """Environment variable that sets an option."""
    return ENV_PREFIX + option.upper()


def is_service_variable(name: str, text: str) -> bool:
    """Whether Kubernetes or Docker set a variable, for a service called ``vsprefill`` or ``vsprefill-...``."""
    return bool(
        _SERVICE_VARIABLE.fullmatch(name)
        or any(names.fullmatch(name) and texts.fullmatch(text) for names, texts in (_SERVICE_ADDRESS, _LINK_NAME))
    )


def _or_auto(value: int | None) -> str:
    return "auto" if value is None else str(value)


def _interval(minimum: int, maximum: int | None) -> str:
    return f"{minimum}..{'all' if maximum is None else maximum}"


def _suggest(name: str, known: tuple[str, ...], show: Callable[[str], str] = str) -> str:
    plain = name.strip().lower().replace("-", "_").removeprefix(ENV_PREFIX.lower())
    if plain in RENAMED:
        return f"; it is called {show(RENAMED[plain])} now"
    close = difflib.get_close_matches(plain, known, n=2, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(map(show, close))}?"
    return f"; known are {', '.join(map(show, known))}"


def _allowed(name: str) -> str:
    return next(item.text for item in _Options.model_fields[name].metadata if isinstance(item, _Allowed))


def _validate_fields(values: dict[str, Any]) -> tuple[_Options, dict[str, str]]:
    """The options with every wrong one left at its default, and why each of those is wrong."""
    try:
        return _Options.model_validate(values), {}
    except ValidationError as error:
        wrong: dict[str, str] = {}
        for detail in error.errors():
            name = str(detail["loc"][0])
            if name not in values:
                continue  # a default that was not worked out because an option before it is wrong
            # Only what a validator here found out adds to "expected ..."; pydantic's own texts repeat it.
            cause = detail.get("ctx", {}).get("error")
            wrong.setdefault(name, f" ({cause})" if cause is not None else "")
        good = {name: value for name, value in values.items() if name not in wrong}
        return _Options.model_validate(good), wrong
