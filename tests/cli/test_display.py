"""The display of several generations; `test_demo` shows one with its stages."""

import io
from contextlib import redirect_stdout

import pytest

from api.cli.display import create_display, event_line
from domain.stages import FLOWS
from support.harness import JSON


def event(generation_id: str, status: str, **further: object) -> JSON:
    row = FLOWS["edit"][status]
    return {
        "generationId": generation_id, "kind": "edit", "status": status, "progress": row.progress or 0,
        "message": row.message, "occurredAt": "2026-11-22T17:30:00.123Z", **further,
    }  # fmt: skip


class Screen(io.TextIOWrapper):
    """A terminal whose output is kept."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def written(self) -> str:
        assert isinstance(self.buffer, io.BytesIO)
        return self.buffer.getvalue().decode()


def test_a_terminal_shows_a_line_per_generation_and_keeps_the_finished_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    with redirect_stdout(Screen()) as screen, create_display() as display:
        display.show(event("edit_1", "composition"))
        display.show(event("edit_2", "started", message="[bold]as it is[/] \x1b[2J"))
        display.show(event("edit_3", "started"))
        display.show(event("edit_1", "completed"))
        display.remove("edit_3")
    lines = screen.written.splitlines()
    [finished] = (line for line in lines if "100 %" in line)
    assert "edit_1" in finished
    assert "Image editing completed successfully!" in finished
    assert "edit_2" in lines[-2]
    assert "[bold]as it is[/]  [2J" in lines[-2]
    assert "edit_3" not in lines[-2]
    assert screen.written.endswith("\x1b[?25h")


def test_a_pipe_gets_a_line_per_event_with_the_generation(capsys: pytest.CaptureFixture[str]) -> None:
    with create_display() as display:
        display.show(event("edit_1", "composition"))
        display.show(event("edit_2", "started"))
    assert capsys.readouterr().out.splitlines() == [
        "edit_1   20 %  composition                Composing images...",
        "edit_2    0 %  started                    Image editing started...",
    ]


def test_an_error_is_a_line_of_its_own_below_the_status() -> None:
    failed = event("edit_1", "failed", error="It\nfailed.", code="internal")
    assert event_line(failed, "edit_1  ").splitlines() == [
        "edit_1    0 %  failed                     Image editing failed!",
        "                It failed. (internal)",
    ]
