"""Show the progress of generations: bars that a terminal redraws in place, or plain lines where there is none."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

#: Rows of a generation with its stages.
_DETAIL_ROWS: Final = 11
#: By the status of an event that ends a generation.
_SIGNS: Final = {"completed": Text("✔", "green"), "failed": Text("✘", "red")}

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


def create_display(*, detailed: bool = False) -> Display:
    """Return the display that suits standard output.

    `detailed`: only one generation is shown, with its stages where the terminal is large enough. Otherwise each
    unfinished generation is a bar, and finished ones move up.
    """
    # Given explicitly, because rich takes a pipe for a terminal if the environment says so.
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False)
    if not console.is_terminal or console.is_dumb_terminal or not console.encoding.startswith("utf"):
        return Display(detailed=detailed)
    return _LiveDisplay(console, detailed=detailed and console.height > _DETAIL_ROWS)


class _SignColumn(SpinnerColumn):
    def render(self, task: Task) -> RenderableType:
        return task.fields["sign"] or super().render(task)


class _Bars(Progress):
    """A bar for each task, below lines that stay."""

    above: Sequence[RenderableType] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from self.above
        yield from super().get_renderables() if self.tasks else [Text("Waiting for a generation to start…", "dim")]


class _LiveDisplay(Display):
    """Bars at the end of the terminal, which a thread redraws."""

    def __init__(self, console: Console, *, detailed: bool) -> None:
        super().__init__(detailed=detailed)
        self._bars = _Bars(
            _SignColumn(style="cyan"),
            TimeElapsedColumn() if detailed else TextColumn("{task.description}", markup=False),
            BarColumn(None, complete_style="cyan", finished_style="green", table_column=Column(ratio=1)),
            TextColumn("{task.completed:3.0f} %"),
            TextColumn("{task.fields[message]}", style="dim", markup=False, table_column=Column(ratio=2, no_wrap=True)),
            console=console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._stages: dict[str, RenderableType] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, event: _JSON) -> None:
        generation_id, sign = event["generationId"], _SIGNS.get(event["status"])
        state: dict[str, Any] = {"sign": sign, "message": _message(event)}
        if generation_id not in self._tasks:
            self._tasks[generation_id] = self._bars.add_task(generation_id, **state)
        if sign and not self.detailed:
            ended = next(task for task in self._bars.tasks if task.id == self._tasks[generation_id])
            self.remove(generation_id)
            ended.completed, ended.fields = event["progress"], state
            self._bars.console.print(self._bars.make_tasks_table([ended]))
            return
        self._bars.update(self._tasks[generation_id], completed=event["progress"], **state)
        if self.detailed:
            line = f" {event['status']:<26} {_message(event)}"
            self._stages[event["status"]] = Text.assemble(sign or _SIGNS["completed"], line, no_wrap=True)
            stages = list(self._stages.values())
            self._bars.above = stages if sign else stages[:-1]

    def show_position(self, generation_id: str, position: int) -> None:
        if generation_id in self._tasks:
            self._bars.update(self._tasks[generation_id], message=_place({"queuePosition": position}))

    def remove(self, generation_id: str) -> None:
        if generation_id in self._tasks:
            self._bars.remove_task(self._tasks.pop(generation_id))


def _message(event: _JSON) -> str:
    return _place(event) or _printable(event.get("error") or event["message"])


def _place(event: _JSON) -> str:
    """The place in line in words; empty if it does not wait."""
    position = event.get("queuePosition")
    return f"Waiting: {'next' if position == 1 else f'number {position}'} in line" if position else ""


def _printable(text: str) -> str:
    """The text without the control characters that could steer the terminal."""
    return "".join(character if character.isprintable() else " " for character in text)
