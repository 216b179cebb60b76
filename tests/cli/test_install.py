"""Stagecast as somebody gets it who installs it: in a clean environment, with the source away.

What is installed is what the Dockerfile's build stage installs, carried out in a scratch folder. Where a Docker engine
runs, the image itself is built and run, too.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import packages_distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import httpx2
import pytest
import yaml

from api.settings import Settings
from support.deployment import free_port

ROOT: Final = Path(__file__).parent.parent.parent
SECRET: Final = "a secret of the container, over 32 bytes"
VENDOR: Final = ROOT / "src/api/web/static/vendor"

pytestmark = pytest.mark.timeout(600)


class Stage(NamedTuple):
    """One stage of the Dockerfile: its instructions, continuation lines joined."""

    instructions: list[tuple[str, str]]

    def all(self, keyword: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == keyword]

    def one(self, keyword: str) -> str:
        [rest] = self.all(keyword)
        return rest


def stages() -> dict[str, Stage]:
    """By name; the last one, which is the image, has none."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    found: dict[str, Stage] = {}
    for keyword, _, rest in (line.partition(" ") for line in text.splitlines()):
        if keyword == "FROM":
            stage = found[rest.partition(" AS ")[2]] = Stage([])
        elif keyword and not keyword.startswith("#"):
            stage.instructions.append((keyword, rest))
    return found


BUILD: Final = stages()["build"]
IMAGE: Final = stages()[""]


class Installation(NamedTuple):
    """What the build stage has installed, in a folder that stands for the image's file system."""

    root: Path

    def placed(self, text: str) -> str:
        """The text with the image's two paths in that folder."""
        return text.replace("/opt/stagecast", f"{self.root}/opt/stagecast").replace("/data", f"{self.root}/data")

    def environment(self, **more: str) -> dict[str, str]:
        """What the image starts its command with."""
        pairs = dict(pair.split("=", 1) for pair in shlex.split(self.placed(IMAGE.one("ENV"))))
        return pairs | {"PATH": pairs["PATH"].replace("$PATH", os.environ["PATH"])} | more

    def command(self, *arguments: str) -> list[str]:
        """What the image runs, by default or with these arguments."""
        return [*json.loads(IMAGE.one("ENTRYPOINT")), *(arguments or json.loads(IMAGE.one("CMD")))]


def run(*command: str, cwd: Path, env: dict[str, str], timeout: float = 570) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


@contextmanager
def built() -> Iterator[Installation]:
    """The build stage, carried out; what npm brings is what `make` has brought, if it has."""
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with TemporaryDirectory() as folder:
        installation = Installation(Path(folder))
        build = installation.root / "build"
        build.mkdir()
        (installation.root / "data").mkdir()
        for keyword, rest in BUILD.instructions:
            match keyword, rest.split():
                case "COPY", [str(source), _, target] if source == "--from=client":
                    if VENDOR.is_dir():
                        shutil.copytree(VENDOR, build / target)
                case "COPY", [*sources, target]:
                    copy_tracked(sources, build / target)
                case "RUN", _:
                    env = {**os.environ, "PATH": tools, "PIP_NO_COMPILE": "1", "PIP_QUIET": "1"}
                    run("sh", "-ec", installation.placed(rest), cwd=build, env=env)
        shutil.rmtree(build)
        yield installation


def copy_tracked(sources: list[str], target: Path) -> None:
    """As COPY does, of the files that a clone has: files into the folder, a folder as the folder."""
    tracked = subprocess.run(["git", "ls-files", "-z", *sources], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        place = target / name.removeprefix(f"{target.name}/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place)


def test_the_three_package_names_belong_to_this_distribution() -> None:
    owners = packages_distributions()
    for name in ("domain", "adapters", "api"):
        assert set(owners.get(name, ["stagecast"])) == {"stagecast"}


@pytest.mark.long
def test_the_installed_package_works_without_its_source_and_writes_only_to_its_volume(tmp_path: Path) -> None:
    with built() as installed:
        before = files_outside_the_volume(installed)
        only_the_three_packages_are_installed(installed)
        the_demo_runs(installed, tmp_path)
        the_service_does_not_start_without_a_key(installed)
        the_service_is_healthy_with_a_key(installed)
        assert files_outside_the_volume(installed) == before


def files_outside_the_volume(installed: Installation) -> set[Path]:
    return {file for file in installed.root.rglob("*") if not file.is_relative_to(installed.root / "data")}


def only_the_three_packages_are_installed(installed: Installation) -> None:
    code = "import importlib.metadata as m; print(*sorted({f.parts[0] for f in m.files('stagecast')}))"
    names = run("python", "-c", code, cwd=installed.root, env=installed.environment()).split()
    assert [name for name in names if not name.endswith(".dist-info")] == ["..", "adapters", "api", "domain"]
    code = "import importlib.metadata as m; print(*m.metadata('stagecast').get_all('Provides-Extra'))"
    assert {"all", "openai"} <= set(run("python", "-c", code, cwd=installed.root, env=installed.environment()).split())
    code = "import openai, importlib.resources as r; print(r.files('domain').joinpath('py.typed').is_file())"
    assert run("python", "-c", code, cwd=installed.root, env=installed.environment()) == "True\n"
    code = "import api, adapters, domain; print(api.__file__, adapters.__file__, domain.__file__)"
    where = run("python", "-c", code, cwd=installed.root, env=installed.environment())
    assert where.count(str(installed.root / "opt/stagecast")) == 3


def the_demo_runs(installed: Installation, folder: Path) -> None:
    env = installed.environment(
        STAGECAST_LOG="memory://", STAGECAST_IMAGES=str(folder / "images"), STAGECAST_HOST="127.0.0.1"
    )
    assert "run the service" in run(*installed.command("--help"), cwd=folder, env=env)
    assert "face-swapped.jpg" in run(*installed.command("demo", "--local-seconds", "0"), cwd=folder, env=env)


def the_service_does_not_start_without_a_key(installed: Installation) -> None:
    data, env = installed.root / "data", installed.environment()
    done = subprocess.run(installed.command(), cwd=data, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "STAGECAST_JWT_SECRET" in done.stderr


def the_service_is_healthy_with_a_key(installed: Installation) -> None:
    data, port = installed.root / "data", free_port()
    env = installed.environment(STAGECAST_JWT_SECRET=SECRET, STAGECAST_PORT=str(port), TMPDIR=str(data))
    with subprocess.Popen(installed.command(), cwd=data, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert str(port) in process.stdout.readline()
        _, _, check = IMAGE.one("HEALTHCHECK").partition(" CMD ")
        run(*json.loads(check), cwd=data, env=env, timeout=60)
        url = f"http://127.0.0.1:{port}"
        for path, kind in (("/", "text/html"), ("/static/app.js", "text/javascript"), ("/stages", "application/json")):
            answer = httpx2.get(url + path, timeout=60)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
        token = run(*installed.command("token", "123"), cwd=data, env=env).strip()
        me = httpx2.get(f"{url}/me", headers={"Authorization": f"Bearer {token}"}, timeout=60)
        assert me.json()["userId"] == "123"
        process.terminate()
    assert process.returncode == 0
    assert (data / "log.db").is_file()


def test_the_image_runs_as_any_user_and_compose_drops_all_capabilities() -> None:
    assert IMAGE.one("USER") == "10001"
    assert f"--uid {IMAGE.one('USER')} " in IMAGE.all("RUN")[0]
    compose: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    [service] = compose["services"].values()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["volumes"] == [f"{next(iter(compose['volumes']))}:{IMAGE.one('VOLUME')}"]
    assert service["ports"] == [f"127.0.0.1:3000:{IMAGE.one('EXPOSE')}"]
    known = {(field.validation_alias or f"STAGECAST_{name.upper()}") for name, field in Settings.model_fields.items()}
    assert set(service["environment"]) <= known
    drain: float = Settings.model_fields["drain"].default
    assert int(service["stop_grace_period"].removesuffix("s")) > drain


def docker(*arguments: str) -> str:
    return run("docker", *arguments, cwd=ROOT, env=dict(os.environ)).strip()


def engine_runs() -> bool:
    return (
        shutil.which("docker") is not None
        and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not engine_runs(), reason="no Docker engine runs here: the image is not built")
def test_the_image_is_built_and_runs_on_a_read_only_file_system() -> None:
    docker("build", "--quiet", "--tag", "stagecast-test", ".")
    limits = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
    container = docker("run", "--detach", "--rm", *limits, "--env", f"STAGECAST_JWT_SECRET={SECRET}", "stagecast-test")
    try:
        code = IMAGE.one("HEALTHCHECK").partition(" CMD ")[2]
        docker(
            "exec",
            container,
            "sh",
            "-c",
            f"for i in 1 2 3 4 5; do {shlex.join(json.loads(code))} && exit; sleep 1; done; exit 1",
        )
        assert docker("exec", container, "stagecast", "token", "123")
    finally:
        docker("stop", container)
