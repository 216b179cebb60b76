"""The examples of deployments: what they set exists, and what they run is accepted by the tools that are here."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from api.cli.main import main
from api.settings import describe_settings, load_settings
from support.balancers import EXAMPLES
from support.node import ROOT

UNIT: Final = ROOT / "examples" / "systemd" / "stagecast.service"
GIVEN: Final = {
    "STAGECAST_JWT_SECRET": "s" * 32,
    "STORE_PASSWORD": "p",
    "OPENAI_API_KEY": "",
    "REPLICATE_API_TOKEN": "",
}
VARIABLES: Final = {setting.variable for setting in describe_settings()}


def composed(file: Path) -> Any:
    """The file with its variables as Compose would fill them in."""

    def fill(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        return GIVEN.get(name) or (default or "")

    text = re.sub(r"\$\{(\w+)(?::[-?]([^}]*))?\}", fill, file.read_text())
    return yaml.safe_load(text)


def settings_of(environment: dict[str, Any], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Any:
    monkeypatch.chdir(folder)
    own = {name: str(value or "") for name, value in environment.items() if name in VARIABLES}
    assert {name for name in environment if name.startswith("STAGECAST_")} <= own.keys()
    for name in list(os.environ):
        if name.startswith("STAGECAST_"):
            monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    return load_settings({})


def test_the_nodes_of_the_cluster_have_valid_settings_and_the_parts_that_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    services = composed(EXAMPLES / "compose.yaml")["services"]
    nodes = [services[f"node{number}"] for number in (1, 2, 3)]
    assert nodes[0] == nodes[1] == nodes[2]
    assert (EXAMPLES / nodes[0]["build"] / "Dockerfile").is_file()
    settings = settings_of(nodes[0]["environment"] | {"STAGECAST_HOST": "0.0.0.0"}, monkeypatch, tmp_path)
    assert settings.log == "postgresql://stagecast:p@postgres/stagecast"
    assert settings.images == "s3://stagecast/images"
    assert settings.metrics_port == 9090
    assert settings.drain < int(nodes[0]["stop_grace_period"].removesuffix("s"))
    assert (
        services["postgres"]["environment"]["POSTGRES_PASSWORD"]
        == services["minio"]["environment"]["MINIO_ROOT_PASSWORD"]
    )
    for service in services.values():
        assert set(service.get("depends_on", ())) <= services.keys()
    [subnet] = composed(EXAMPLES / "compose.yaml")["networks"]["default"]["ipam"]["config"]
    assert [str(network) for network in settings.trusted_proxies] == [subnet["subnet"]]


def test_the_balancer_of_the_cluster_finds_the_nodes(tmp_path: Path) -> None:
    shell, _, script = shlex.split(composed(EXAMPLES / "compose.yaml")["services"]["balancer"]["entrypoint"])
    rewrite, _, _ = script.replace("/etc/haproxy.cfg", str(EXAMPLES / "haproxy.cfg")).partition(">")
    done = subprocess.run([shell, "-c", rewrite], capture_output=True, text=True, check=True)
    assert re.findall(r"^ +server (\S+) (\S+)", done.stdout, re.MULTILINE) == [
        (f"node{n}", f"node{n}:3000") for n in (1, 2, 3) * 2
    ]
    assert re.findall(r"bind (\S+)", done.stdout) == [":8080"]
    haproxy = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if haproxy is None:
        pytest.skip("needs haproxy: install it")
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text(re.sub(r"node[123]:3000", "127.0.0.1:3000", done.stdout))
    checked = subprocess.run([haproxy, "-c", "-f", configuration], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_the_single_container_has_valid_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = composed(ROOT / "compose.yaml")["services"]["stagecast"]["environment"]
    assert settings_of(environment, monkeypatch, tmp_path).open_mode is False


def test_the_unit_is_accepted_by_systemd_and_has_valid_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [environment] = re.findall(r"^Environment=(.*)$", UNIT.read_text(), re.MULTILINE)
    settings = settings_of(dict(each.split("=", 1) for each in environment.split()), monkeypatch, tmp_path)
    assert settings.log == "sqlite:////var/lib/stagecast/log.db"
    [stop] = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert settings.drain < int(stop)
    assert main(["serve", "--port", "x"]) == 2, "what is not restarted"
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        pytest.skip("needs systemd-analyze: install systemd")
    unit = tmp_path / "stagecast.service"
    unit.write_text(UNIT.read_text().replace("/opt/stagecast/bin/stagecast", "/bin/true"))
    verified = subprocess.run([systemd, "verify", "--man=no", unit], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    exposed = subprocess.run(
        [systemd, "security", "--offline=yes", "--threshold=20", unit], capture_output=True, text=True
    )
    assert exposed.returncode == 0, exposed.stdout + exposed.stderr
