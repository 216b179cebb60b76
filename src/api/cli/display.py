"""Show the progress of generations: lines that a terminal redraws in place, or plain lines where there is none."""

import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from threading import Lock
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

_REFRESH_RATE: Final = 10  # frames per second
_MIN_WIDTH: Final = 46
#: Rows of a generation with its stages.
_DETAIL_ROWS: Final = 17
_TERMINAL: Final = ("completed", "failed")

_JSON = Mapping[str, Any]


def event_line(event: _JSON, label: str = "") -> str:
    """One event, or the snapshot of a generation, as plain text after `label`; an error is a second line."""
    line = f"{label}{event['progress']:3} %  {event['status']:<26} {_place(event) or _printable(event['message'])}"
    if "error" in event:
        line += f"\n{'':{len(label) + 8}}{_printable(event['error'])} ({event['code']})"
    return line


class Display:
    """Prints a line for each event. It is open within its context."""

    def __init__(self, *, detailed: bool = False) -> None:
        self.detailed = detailed

    def __enter__(self) -> Self:
        """Begin to show."""
        return self

    def __exit__(self, *_: object) -> None:
        """Show the last state, and leave it on the screen."""

    def show(self, event: _JSON) -> None:
        """Show the progress that an event, or the snapshot of a generation, reports."""
        print(event_line(event, "" if self.detailed else f"{event['generationId']}  "), flush=True)

    def show_position(self, generation_id: str, position: int) -> None:
        """Show the place in line of a generation that has only been started."""
        self.show({"generationId": generation_id, "status": "started", "progress": 0, "queuePosition": position})

    def remove(self, generation_id: str) -> None:
        """Show a generation no longer."""


def create_display(stages: Mapping[str, Sequence[_JSON]], *, detailed: bool = False) -> Display:
    """Return the display that suits standard output.

    Args:
        stages: the stages of each kind, as ``GET /stages`` returns them.
        detailed: only one generation is shown, with its stages where the terminal is large enough. Otherwise each
            unfinished generation is a line, and finished ones move up.
    """
    # Given explicitly, because rich takes a pipe for a terminal if the environment says so.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False)
    capable = console.is_terminal and not console.is_dumb_terminal and not console.legacy_windows
    if not capable or not console.encoding.startswith("utf") or console.width < _MIN_WIDTH:
        return Display(detailed=detailed)
    return _LiveDisplay(stages, console, detailed=detailed and console.height > _DETAIL_ROWS)


class _LiveDisplay(Display):
    """Redraws the lines at the end of the terminal from a thread."""

    def __init__(self, stages: Mapping[str, Sequence[_JSON]], console: Console, *, detailed: bool) -> None:
        super().__init__(detailed=detailed)
        self._stages = {kind: [row["status"] for row in rows if "progress" in row] for kind, rows in stages.items()}
        self._console = console
        self._lock = Lock()
        self._generations: dict[str, _Generation] = {}
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=_REFRESH_RATE)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, event: _JSON) -> None:
        with self._lock:
            generation = self._generations.setdefault(event["generationId"], _Generation())
            generation.update(event)
            if self.detailed or event["status"] not in _TERMINAL:
                return
            del self._generations[event["generationId"]]
        self._console.print(generation.line())

    def show_position(self, generation_id: str, position: int) -> None:
        with self._lock:
            if generation := self._generations.get(generation_id):
                generation.event = {**generation.event, "queuePosition": position}

    def remove(self, generation_id: str) -> None:
        with self._lock:
            self._generations.pop(generation_id, None)

    def _render(self) -> RenderableType:
        with self._lock:
            if self.detailed:
                return Group(*(each.details(self._stages[each.event["kind"]]) for each in self._generations.values()))
            lines = [generation.line() for generation in self._generations.values()]
            return Group(*lines) if lines else Text("Waiting for a generation to start…", "dim")


class _Generation:
    """What is shown of one generation."""

    def __init__(self) -> None:
        self.event: _JSON = {}
        self._drawn = 0.0  # The progress of the bar, which moves smoothly to that of the event.
        self._entered: dict[str, datetime] = {}
        self._spinner = Spinner("dots", style="cyan")

    def update(self, event: _JSON) -> None:
        """Take an event or a snapshot."""
        self.event = event
        self._entered.setdefault(event["status"], datetime.fromisoformat(event.get("occurredAt") or event["updatedAt"]))

    def line(self) -> RenderableType:
        """One line: the id, the bar and the message."""
        name, text = Column(no_wrap=True), Column(ratio=2, no_wrap=True, style="dim")
        grid = _grid(Column(width=1), name, *_bar_columns(), text)
        generation_id, message = Text(self.event["generationId"]), Text(self._message())
        grid.add_row(self._sign(self.event["status"]), generation_id, *self._bar(), message)
        return grid

    def details(self, stages: Sequence[str]) -> RenderableType:
        """The stages with the seconds at which they were entered, the message and the bar."""
        grid = _grid(Column(width=1), Column(ratio=1), Column(justify="right", style="dim"))
        current, started = self.event["status"], min(self._entered.values())
        for status in stages if current != "failed" else [*stages, "failed"]:
            entered = self._entered.get(status)
            style = "dim" if entered is None else "bold" if status == current != "completed" else ""
            seconds = f"{(entered - started).total_seconds():.1f} s" if entered else ""
            grid.add_row(self._sign(status), Text(status, style), seconds)
        bar = _grid(*_bar_columns())
        bar.add_row(*self._bar())
        return Group(grid, Text(f"\n{self._message()}", "dim", no_wrap=True, overflow="ellipsis"), bar)

    def _sign(self, status: str) -> RenderableType:
        current = self.event["status"]
        if status == "failed":
            return Text("✘", "red")
        if status == current and status != "completed":
            return self._spinner
        if status in self._entered:
            return Text("✔", "green")
        return Text("–" if current in _TERMINAL else "○", "dim")

    def _bar(self) -> tuple[RenderableType, str]:
        progress = self.event["progress"]
        shown = progress if self.event["status"] in _TERMINAL else self._drawn
        self._drawn += (progress - self._drawn) * 0.4
        return ProgressBar(completed=shown, complete_style="cyan", finished_style="green"), f"{shown:.0f} %"

    def _message(self) -> str:
        return _place(self.event) or _printable(self.event.get("error") or self.event["message"])


def _grid(*columns: Column) -> Table:
    return Table.grid(*columns, padding=(0, 1), expand=True)


def _bar_columns() -> tuple[Column, Column]:
    return Column(ratio=1), Column(width=5, justify="right")


def _place(event: _JSON) -> str:
    """The place in line in words; empty if it does not wait."""
    position = event.get("queuePosition")
    return f"Waiting: {'next' if position == 1 else f'number {position}'} in line" if position else ""


def _printable(text: str) -> str:
    """The text without the control characters that could steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
