"""The wheel in a clean environment, with the source away: what somebody gets who installs Stagecast."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx2
import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.timeout(600)


def run(*command: str | Path, cwd: Path, timeout: float = 570) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("STAGECAST_", "PYTHON"))}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


def test_the_wheel_has_the_three_packages_and_serves_the_page(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if name.startswith(("src/", "pyproject", "README", "LICENSE")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    [wheel] = tmp_path.glob("stagecast-*.whl")
    shutil.rmtree(source)
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in files} == {
        "domain",
        "adapters",
        "api",
        wheel.name.split("-py3")[0] + ".dist-info",
    }

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "clean", cwd=tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-compile")
    run(*install, "--constraint", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    where = run(
        python,
        "-c",
        "import api, adapters, domain; print(api.__file__, adapters.__file__, domain.__file__)",
        cwd=tmp_path,
    )
    assert where.count(str(tmp_path / "clean")) == 3

    stagecast = tmp_path / "clean" / "bin" / "stagecast"
    assert "run the service" in run(stagecast, "--help", cwd=tmp_path)
    assert "face-swapped.jpg" in run(stagecast, "demo", "--local-seconds", "0", cwd=tmp_path)
    command: list[str | Path] = [stagecast, "serve", "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].split()[0]
        for path, kind in (("/", "text/html"), ("/static/app.js", "text/javascript"), ("/stages", "application/json")):
            answer = httpx2.get(url + path, timeout=60)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
        process.terminate()
    assert process.returncode == 0


def test_the_three_names_belong_to_this_distribution_alone() -> None:
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    for name in ("domain", "adapters", "api"):
        assert set(owners.get(name, ["stagecast"])) == {"stagecast"}
