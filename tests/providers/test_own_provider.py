"""Editors and face swaps of the operator: the service starts or explains why not, and every generation ends."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest
import pytest_asyncio
from PIL import Image

from api.settings import SettingsError, load_settings
from api.wiring import wire
from domain.ports.images import Picture
from support.command_line import STAGECAST, stagecast
from support.deployment import free_port, parts
from support.doubles import FACE_URL
from support.harness import JSON, PHOTO, Running, running
from support.pictures import GREEN, solid

#: Part of every message that an implementation raises; must not appear anywhere else.
SECRET: Final = "sk-proj-hunter2"
MODULE: Final = "own_providers"
SOURCE: Final = f"""
import asyncio
import sys
import threading
from io import BytesIO

from PIL import Image

from domain.errors import Conflict, Failure, LogUnavailable
from domain.ports.images import Picture

SECRET = {SECRET!r}
_tasks = set()


def picture(format="PNG", size=(40, 30)):
    file = BytesIO()
    Image.new("RGB", size, "red").save(file, format)
    return Picture(file.getvalue(), "image/png")


class Stopped(BaseException):
    pass


def _raise(error):
    raise error


async def _concurrent(report):
    await asyncio.gather(*(report(fraction / 10, "Working...", None) for fraction in range(1, 10)))
    task = asyncio.create_task(report(0.95, "Late.", None))
    _tasks.add(task)
    await asyncio.sleep(0)
    return picture()


async def _later(report):
    async def late():
        await asyncio.sleep(0.05)
        await report(0.99, "Too late.", None)
    _tasks.add(asyncio.create_task(late()))
    return picture()


async def _reports(report, *arguments):
    await report(*arguments)
    return picture()


async def _hides(report):
    try:
        await report(0.5, "x" * 10, "no picture")
    except Exception:
        pass
    return picture()


async def _gives(value):
    return value


class _Unraisable:
    def __del__(self):
        raise ValueError(SECRET)


async def _leaves_errors(report):
    async def stray():
        raise ValueError(SECRET)

    asyncio.create_task(stray())
    asyncio.get_running_loop().call_soon(_raise, ValueError(SECRET))
    thread = threading.Thread(target=_raise, args=[ValueError(SECRET)])
    thread.start()
    thread.join()
    _Unraisable()
    return picture()


async def _cancels_itself(report):
    asyncio.current_task().cancel()
    await asyncio.sleep(1)

ACTS = {{
    "picture": lambda report: _gives(picture()),
    "webp": lambda report: _gives(picture("WEBP")),
    "bmp": lambda report: _gives(picture("BMP")),
    "concurrent": _concurrent,
    "later": _later,
    "errors": _leaves_errors,
    "hides": _hides,
    "rejects": lambda report: _raise(Failure("provider_rejected", "No hat.")),
    "busy": lambda report: _raise(Failure("provider_rate_limited")),
    "value": lambda report: _raise(ValueError(SECRET)),
    "timeout": lambda report: _raise(TimeoutError(SECRET)),
    "group": lambda report: _raise(ExceptionGroup(SECRET, [ValueError(SECRET)])),
    "exit": lambda report: sys.exit(SECRET),
    "interrupt": lambda report: _raise(KeyboardInterrupt(SECRET)),
    "base": lambda report: _raise(Stopped(SECRET)),
    "stop": lambda report: _raise(StopAsyncIteration(SECRET)),
    "conflict": lambda report: _raise(Conflict()),
    "log": lambda report: _raise(LogUnavailable()),
    "cancelled": _cancels_itself,
    "own code": lambda report: _raise(Failure("cancelled")),
    "no code": lambda report: _raise(Failure("teapot")),
    "long": lambda report: _raise(Failure("provider_rejected", "x" * 501)),
    "surrogate": lambda report: _raise(Failure("provider_rejected", "\\ud800")),
    "object": lambda report: _raise(Failure("provider_rejected", object())),
    "retryable": lambda report: _raise(Failure("provider_rejected", retryable="maybe")),
    "nothing": lambda report: _gives(None),
    "bytes": lambda report: _gives(b"PNG"),
    "no bytes": lambda report: _gives(Picture("text", "image/png")),
    "html": lambda report: _gives(Picture(b"<html>", "image/png")),
    "empty": lambda report: _gives(Picture(b"", "image/png")),
    "tuple": lambda report: _gives((picture().data, "image/png")),
    "no number": lambda report: _reports(report, "half", "Working...", None),
    "no message": lambda report: _reports(report, 0.5, None, None),
    "bad message": lambda report: _reports(report, 0.5, "\\ud800", None),
    "bad preview": lambda report: _reports(report, 0.5, "Working...", b"PNG"),
    "few arguments": lambda report: _reports(report),
    "nan": lambda report: _reports(report, float("nan"), "Working...", None),
}}


class Provider:
    free = False

    async def edit(self, sheet, prompt, options, report):
        return await ACTS[prompt](report)

    async def generate(self, sheet, prompt, options, report):
        return await ACTS[prompt](report)


class Swapper:
    free = True

    async def swap(self, picture, face, report):
        return await ACTS["value"](report)


class Blocking(Provider):
    def edit(self, sheet, prompt, options, report):
        return picture()


class Short(Provider):
    async def generate(self, sheet, prompt, report):
        return picture()


class Undecided(Provider):
    free = "no"


class Silent:
    edit = generate = Provider.edit


class Shy(Provider):
    @property
    def free(self):
        raise ValueError(SECRET)


def none(): pass
def takes(settings): return Provider()
def fails(): raise KeyError(SECRET)
def leaves(): sys.exit(SECRET)
def stops(): raise Stopped(SECRET)
def interrupts(): raise KeyboardInterrupt
async def later(): return Provider()
def a_class(): return Provider
def text(): return SECRET
number = 7
"""


@pytest.fixture(scope="module", autouse=True)
def module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("modules")
    (folder / f"{MODULE}.py").write_text(SOURCE)
    (folder / "broken_provider.py").write_text("\n\ndef make(:\n")
    (folder / "failing_provider.py").write_text(f"\nraise RuntimeError({SECRET!r})\n")
    (folder / "needing_provider.py").write_text("import there_is_no_such_module\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


NEEDS: Final = r"; it needs free \(True or False\) and, with 4 arguments, async edit and generate"


# --- at the start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("there_is.none:make", "there_is.none:make failed with ModuleNotFoundError"),
        ("broken_provider:make", "failed with SyntaxError in line 3 of broken_provider"),
        ("failing_provider:make", "failed with RuntimeError in line 2 of failing_provider"),
        ("needing_provider:make", "failed with ModuleNotFoundError in line 1 of needing_provider"),
        (f"{MODULE}:missing", f"{MODULE}:missing failed with AttributeError"),
        (f"{MODULE}:Provider.missing", f"{MODULE}:Provider.missing failed with AttributeError"),
        (f"{MODULE}:number", f"{MODULE}:number failed with TypeError"),
        (f"{MODULE}:takes", f"{MODULE}:takes failed with TypeError"),
        (f"{MODULE}:fails", rf"{MODULE}:fails failed with KeyError in line \d+ of {MODULE}"),
        (f"{MODULE}:leaves", rf"{MODULE}:leaves failed with SystemExit in line \d+ of {MODULE}"),
        (f"{MODULE}:interrupts", rf"{MODULE}:interrupts failed with KeyboardInterrupt in line \d+ of {MODULE}"),
        (f"{MODULE}:stops", rf"{MODULE}:stops failed with Stopped in line \d+ of {MODULE}"),
        (f"{MODULE}:Shy", rf"{MODULE}:Shy failed with ValueError in line \d+ of {MODULE}"),
        (f"{MODULE}:none", f"NoneType{NEEDS}"),
        (f"{MODULE}:text", f"str{NEEDS}"),
        (f"{MODULE}:Silent", f"Silent{NEEDS}"),
        (f"{MODULE}:Undecided", f"Undecided{NEEDS}"),
        (f"{MODULE}:a_class", f"type{NEEDS}"),
        (f"{MODULE}:Blocking", f"Blocking{NEEDS}"),
        (f"{MODULE}:Short", f"Short{NEEDS}"),
        (f"{MODULE}:Swapper", f"Swapper{NEEDS}"),
    ],
)
async def test_factory_without_a_valid_editor_is_a_settings_error(tmp_path: Path, name: str, reason: str) -> None:
    log = tmp_path / "log.db"
    settings = load_settings({"editor": name, "images": tmp_path / "images", "log": f"sqlite:///{log}"})
    with pytest.raises(SettingsError) as caught:
        await wire(settings)
    sentence = str(caught.value)
    assert re.fullmatch(rf"STAGECAST_EDITOR must name a factory of an editor; [^\n]*{reason}\.", sentence), sentence
    assert SECRET not in sentence
    assert caught.value.__suppress_context__
    assert not log.exists()


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_factory_without_a_valid_face_swap_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"^STAGECAST_FACE_SWAP must name .* with 3 arguments, async swap\.$"):
        await wire(load_settings({"face_swap": f"{MODULE}:Provider"}))


@pytest.mark.parametrize(
    "name",
    [
        "mine",
        "mine:",
        ":make",
        "my-editor:make",
        "mine:make()",
        "mine:make:more",
        "../mine:make",
        "mine.:make",
        "1:2",
        "a:b\n",
    ],
)
def test_setting_that_names_no_factory_is_rejected(name: str) -> None:
    with pytest.raises(SettingsError, match=r'^STAGECAST_EDITOR must be "local", "openai" or a factory of '):
        load_settings({"editor": name})
    with pytest.raises(SettingsError, match=r'^STAGECAST_FACE_SWAP must be "local", "replicate" or a factory of a '):
        load_settings({"face_swap": name})


@pytest.mark.parametrize(
    ("factory", "reason"),
    [("leaves", "own_providers:leaves failed"), ("later", "own_providers:later returned")],
    ids=["leaves", "async"],
)
async def test_serve_exits_2_if_the_factory_exits_or_is_async(module: Path, factory: str, reason: str) -> None:
    done = await stagecast(
        *("serve", "--port", "0", "--editor", f"{MODULE}:{factory}", "--images", str(module / "images")), folder=module
    )
    sentence = done.sentence(2)
    assert sentence.startswith(f"stagecast: STAGECAST_EDITOR must name a factory of an editor; {reason}")
    assert SECRET not in sentence
    assert str(module) not in sentence


async def test_module_in_the_current_folder_is_found_and_its_errors_are_logged_by_type(
    module: Path,
) -> None:
    port = free_port()
    arguments = ("--port", f"{port}", "--editor", f"{MODULE}:Provider", "--face-swap", f"{MODULE}:Swapper")
    process = await asyncio.create_subprocess_exec(
        *(*STAGECAST, "serve", *arguments), cwd=module, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), 60)
        assert line.decode().endswith(f"editor: {MODULE}:Provider; face swap: {MODULE}:Swapper)\n")
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            place = (await http.post("/generations/edit", files=parts("errors", PHOTO))).headers["location"]
            while (await http.get(place)).json()["status"] != "completed":
                await asyncio.sleep(0.02)
    finally:
        process.terminate()
        _, errors = await process.communicate()
    assert process.returncode == 0
    logged = [line.partition(" ERROR ")[2] for line in errors.decode().splitlines() if " ERROR " in line]
    assert sorted(logged) == [
        "api.logs: Unhandled exception: ValueError",
        "api.logs: Unhandled exception: ValueError repeats=1",
        "asyncio: Exception in callback _raise error=ValueError",
        "asyncio: Task exception was never retrieved error=ValueError",
    ]


class Face:
    """`domain.ports.images.ImageFetcher`: returns a picture for every URL."""

    async def fetch(self, url: str) -> Picture:
        return solid(GREEN)


# --- at work ---------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(
        tmp_path_factory.mktemp("images"),
        editor=f"{MODULE}:Provider",
        face_swap=f"{MODULE}:Swapper",
        overrides={"fetcher": Face()},
        max_per_user=100,
    ) as service:
        yield service


async def outcome(service: Running, prompt: str, kind: str = "edit", **fields: Any) -> list[JSON]:
    """All events of a finished generation with this prompt."""
    generation_id = await service.start(kind=kind, prompt=prompt, **fields)
    await service.service.leases.drain()
    events = await service.events(generation_id)
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert SECRET not in json.dumps(events)
    return events


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("prompt", "format"),
    [("picture", "PNG"), ("webp", "WEBP"), ("bmp", "PNG"), ("later", "PNG"), ("hides", "PNG"), ("nan", "PNG")],
)
@pytest.mark.parametrize("kind", ["edit", "generate"])
async def test_picture_of_an_own_editor_has_its_detected_type(
    service: Running, prompt: str, format: str, kind: str
) -> None:
    end = (await outcome(service, prompt, kind))[-1]
    assert end["status"] == "completed"
    url = end["editedImageUrl" if kind == "edit" else "generatedImageUrl"]
    answer = await service.http.get(f"/images/{url.rpartition('/')[2]}")
    assert Image.open(BytesIO(answer.content)).format == format
    assert answer.headers["content-type"] == f"image/{format.lower()}"


@pytest.mark.asyncio(loop_scope="module")
async def test_concurrent_reports_are_serialised(service: Running) -> None:
    events = await outcome(service, "concurrent")
    values = [event["progress"] for event in events if event["status"] == "openai_editing"]
    assert values == [60, *range(62, 80, 2), 79]
    assert events[-1]["status"] == "completed"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("prompts", "code"),
    [
        (("rejects",), "provider_rejected"),
        (("busy",), "provider_rate_limited"),
        (("nothing", "bytes", "no bytes", "html", "empty", "tuple"), "provider_unavailable"),
        (
            ("value", "timeout", "group", "exit", "interrupt", "base", "stop", "conflict", "log", "cancelled"),
            "internal",
        ),
        (("own code", "no code", "long", "surrogate", "object", "retryable"), "internal"),
        (("no number", "no message", "bad message", "bad preview", "few arguments"), "internal"),
    ],
)
async def test_every_exception_or_return_value_ends_with_a_documented_code(
    service: Running, caplog: pytest.LogCaptureFixture, prompts: tuple[str, ...], code: str
) -> None:
    before = (await service.get("/me"))["credit"]
    for prompt in prompts:
        events = await outcome(service, prompt)
        end = events[-1]
        assert (end["status"], end.get("code"), end["failedStage"]) == ("failed", code, "openai_editing"), prompt
        assert end["error"] == "No hat." if prompt == "rejects" else end["error"]
    assert (await service.get("/me"))["credit"] == before
    assert SECRET not in caplog.text
    assert "Traceback" not in caplog.text
    assert str(Path(__file__).parent) not in caplog.text
    warnings = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    if prompts in (("rejects",), ("busy",)):
        assert warnings == [f"{MODULE}:Provider: edit failed with {code}"]
    if "value" in prompts:
        assert re.search(rf"{MODULE}:Provider: ValueError in line \d+ of {MODULE}$", caplog.text, re.MULTILINE)


@pytest.mark.asyncio(loop_scope="module")
async def test_failed_own_face_swap_keeps_the_edit(service: Running) -> None:
    end = (await outcome(service, "picture", imageUrls=FACE_URL))[-1]
    assert (end["status"], end["faceSwapError"]["code"]) == ("completed", "internal")


@pytest.mark.asyncio(loop_scope="module")
async def test_service_still_works_after_faulty_providers(service: Running) -> None:
    assert (await service.http.get("/health/ready")).status_code == 200
    assert (await outcome(service, "picture"))[-1]["status"] == "completed"
