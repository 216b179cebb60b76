"""Programs that use the Python package: its doctests, the example, an interruption, and the installed wheel."""

import asyncio
import doctest
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, chdir
from pathlib import Path

import pytest
import pytest_asyncio

import stagecast_client
from support.client_services import GatedEditor
from support.doubles import ScriptedComposer
from support.harness import PHOTO, TIMEOUT, Running, running
from support.node import ROOT

pytestmark = pytest.mark.asyncio(loop_scope="module")

PACKAGE = ROOT / "clients" / "python"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    overrides = {"editor": GatedEditor(), "composer": ScriptedComposer()}
    async with running(tmp_path_factory.mktemp("images"), overrides=overrides) as service:
        yield service


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a photograph."""
    (tmp_path / "photo.jpg").write_bytes(PHOTO)
    return tmp_path


@asynccontextmanager
async def program(service: Running, folder: Path, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE / "src"), "STAGECAST_URL": service.url}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_the_doctests_show_what_happens(tmp_path: Path, folder: Path) -> None:
    """On the offline editor, as `make run` has it."""
    async with running(tmp_path / "images") as service:
        for name, text in {"package": stagecast_client.__doc__, "class": stagecast_client.Stagecast.__doc__}.items():
            code = (text or "").replace("http://localhost:3000", service.url)
            test = doctest.DocTestParser().get_doctest(code, vars(stagecast_client).copy(), name, None, 0)
            assert test.examples
            report = list[str]()
            runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
            with chdir(folder):
                result = await asyncio.to_thread(runner.run, test, out=report.append)
            assert result.failed == 0, "".join(report)


async def test_the_example_shows_a_bar_and_saves_the_picture(service: Running, folder: Path) -> None:
    example = str(ROOT / "examples/python/edit.py")
    async with program(service, folder, example, "photo.jpg", "a red hat") as process:
        output, errors = await asyncio.wait_for(process.communicate(), TIMEOUT)
    assert (process.returncode, errors) == (0, b"")
    lines = output.decode().replace("\r", "\n").splitlines()
    assert "100 % Image editing completed successfully!" in lines[-2]
    assert lines[-1] == "photo-edited.jpg"
    assert (folder / "photo-edited.jpg").stat().st_size
    async with program(service, folder, example, "photo.jpg", "") as process:
        _, errors = await asyncio.wait_for(process.communicate(), TIMEOUT)
    assert process.returncode == 1
    assert b"(invalid_request)" in errors
    async with program(service, folder, example, "photo.jpg") as process:
        _, errors = await asyncio.wait_for(process.communicate(), TIMEOUT)
    assert (process.returncode, errors) == (1, b'usage: python edit.py photo.jpg "Make the hat red"\n')


async def test_an_interrupted_program_ends_and_the_generation_goes_on(service: Running, folder: Path) -> None:
    code = """
import os, sys
from stagecast_client import Stagecast
show = lambda generation: print(generation.generation_id, generation.progress, flush=True)
with Stagecast(os.environ["STAGECAST_URL"]) as stagecast:
    stagecast.run("edit", prompt="wait for interruption", images=["photo.jpg"], on_progress=show)
"""
    async with program(service, folder, "-c", code) as process:
        assert process.stdout is not None
        while b" 70" not in (line := await asyncio.wait_for(process.stdout.readline(), TIMEOUT)):
            assert line
        process.send_signal(2)
        _, errors = await asyncio.wait_for(process.communicate(), TIMEOUT)
    assert process.returncode != 0
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    await service.until(lambda: not service.service.streams.open)
    [generation, *_] = (await service.get("/generations", "demo"))["generations"]
    assert generation["progress"] == 70
    await service.start("gatekeeper", "generate", prompt="let go interruption")


async def test_a_cancelled_task_leaves_no_stream(service: Running) -> None:
    async with stagecast_client.AsyncStagecast(service.url, user_id="cancelled") as stagecast:
        reached = asyncio.Event()

        async def wait(generation: stagecast_client.Generation) -> None:
            if generation.progress == 70:
                reached.set()

        run = stagecast.run("edit", prompt="wait for cancellation", images=[PHOTO], on_progress=wait)
        task = asyncio.create_task(run)
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await service.until(lambda: not service.service.streams.open)
        assert [each.finished for each in await stagecast.list()] == [False]
    await service.start("gatekeeper", "generate", prompt="let go cancellation")


async def test_the_version_is_that_of_the_service() -> None:
    versions = {
        tomllib.loads((folder / "pyproject.toml").read_text())["project"]["version"] for folder in (ROOT, PACKAGE)
    }
    assert len(versions) == 1


def build(folder: Path) -> Path:
    """The wheel, built in this folder."""
    shutil.copytree(PACKAGE, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True)
    [wheel] = folder.glob("*.whl")
    return wheel


@pytest.mark.long
async def test_the_installed_wheel_is_typed_and_needs_httpx2_only(service: Running, folder: Path) -> None:
    wheel = await asyncio.to_thread(build, folder)
    assert {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()} == {
        "stagecast_client",
        wheel.name.replace("-py3-none-any.whl", ".dist-info"),
    }
    await asyncio.to_thread(venv.create, folder / "venv", with_pip=True)
    python = str(folder / "venv/bin/python")
    await asyncio.to_thread(subprocess.run, [python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    code = """
import importlib.metadata, importlib.resources, sys
from stagecast_client import Stagecast
assert importlib.metadata.requires("stagecast-client") == ["httpx2<3,>=2.16"]
assert importlib.resources.files("stagecast_client").joinpath("py.typed").is_file()
print(Stagecast(sys.argv[1]).run("generate", prompt="x", images=["photo.jpg"]).status)
"""
    done = await asyncio.to_thread(
        subprocess.run, [python, "-c", code, service.url], cwd=folder, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("completed\n", "")
