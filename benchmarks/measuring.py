"""What every benchmark uses: processes pinned to cores, their CPU time and memory, and rows with ratios and goals."""

import contextlib
import functools
import json
import os
import select
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, TypeVarTuple

ROOT: Final = Path(__file__).resolve().parent.parent
SERVERS: Final = ROOT / "benchmarks" / "servers"

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


class BenchmarkError(Exception):
    """A benchmark cannot be run or has failed; the message says why."""


@dataclass(frozen=True)
class Size:
    """How long a benchmark runs."""

    repetitions: int
    #: Multiplies the seconds and counts of one repetition.
    scale: float = 1.0
    #: Divides the numbers of sockets, users and generations.
    smaller: int = 1

    def seconds(self, full: float) -> float:
        """The seconds of one measurement."""
        return full * self.scale

    def count(self, full: int) -> int:
        """The number of repeated operations."""
        return max(int(full * self.scale), 10)

    def many(self, full: int) -> int:
        """The number of things that exist at the same time."""
        return max(full // self.smaller, 1)


FULL: Final = Size(5)
QUICK: Final = Size(2, 0.7)
#: Shows that a benchmark works; its figures mean nothing.
SMOKE: Final = Size(1, 0.05, 100)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of Stagecast, beside a peer's of the same repetition."""

    figure: str
    unit: str
    #: One value per repetition.
    values: Sequence[float]
    #: What it is compared with. Empty: the goal is a value and no ratio.
    peer: str = ""
    peer_values: Sequence[float] = ()
    at_most: float | None = None
    at_least: float | None = None

    @property
    def judged(self) -> Sequence[float]:
        """The ratio to the peer per repetition, or the values where there is no peer. Empty if the peer is missing."""
        if not self.peer:
            return self.values
        if not self.peer_values:
            return ()
        return [ours / theirs for ours, theirs in zip(self.values, self.peer_values, strict=True)]

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; ``None`` without a goal or without values."""
        if not self.judged or (self.at_most is None and self.at_least is None):
            return None
        median = statistics.median(self.judged)
        return (self.at_most is None or median <= self.at_most) and (self.at_least is None or median >= self.at_least)


def alternating(names: Sequence[_Result], size: Size) -> Iterator[tuple[int, Sequence[_Result]]]:
    """Each repetition with the order in which its peers take turns: forwards, then backwards."""
    for repetition in range(size.repetitions):
        yield repetition, names if repetition % 2 == 0 else names[::-1]


@functools.cache
def cores() -> tuple[int, int]:
    """The core of the server and the core of the client. This process runs on the client's from now on.

    Raises:
        BenchmarkError: there is only one.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise BenchmarkError("The benchmarks need Linux: they pin processes to cores and read /proc.")
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise BenchmarkError("The benchmarks need two cores: one for the server and one for the client.")
    os.sched_setaffinity(0, {usable[1]})
    return usable[0], usable[1]


class Process:
    """A process that answers each line on its stdin with one line of JSON, and prints one first when it is ready."""

    def __init__(
        self, command: Sequence[str | Path], on: Iterable[int], *, env: Mapping[str, str] | None = None
    ) -> None:
        """`on`: the cores that it may use. Its working directory is empty and removed at the end."""
        self._folder = tempfile.TemporaryDirectory()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in `close`
        self._process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            bufsize=1,
            cwd=self._folder.name,
            env=_environment() | {"PYTHONPATH": str(ROOT)} | dict(env or {}),
            preexec_fn=functools.partial(os.sched_setaffinity, 0, set(on)),
        )
        self.pid = self._process.pid

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, command: str, seconds: float) -> dict[str, Any]:
        """Send the command and return the answer. Raises `BenchmarkError`."""
        self.tell(command)
        return self.answer(seconds)

    def tell(self, command: str) -> None:
        """Send the command. Raises `BenchmarkError`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n")
        except BrokenPipeError:
            raise self.failed(f"it ended before {command!r}") from None

    def end(self, seconds: float) -> None:
        """End its stdin, and wait so long for it to end by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.stdin = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def answer(self, seconds: float) -> dict[str, Any]:
        """Its next line. Raises `BenchmarkError`."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise self.failed(f"it did not answer within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise self.failed("it ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self.failed(answer["error"])
        return answer

    def cpu(self) -> float:
        """The CPU time of all its threads so far, in µs."""
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0])
        return total / 1e3

    def memory(self) -> float:
        """Its resident memory in kB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    def close(self) -> None:
        """End it. Its standard error is kept for a message about its failure."""
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()
        self._errors.close()

    def failed(self, why: str) -> BenchmarkError:
        """An error of this process, with the end of its standard error."""
        self._errors.seek(0)
        last = "\n".join(self._errors.read().splitlines()[-5:])
        name = " ".join(Path(str(part)).name for part in self._process.args[:3])  # type: ignore[index]
        return BenchmarkError(f"{name}: {why}. {last}".strip())


def _environment() -> dict[str, str]:
    """This process's environment without settings of the service."""
    return {name: value for name, value in os.environ.items() if not name.startswith("STAGECAST_")}


def attempt(measure: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
    """Make one measurement, a second time if the first one fails. Raises `BenchmarkError`."""
    try:
        return measure(*arguments)
    except BenchmarkError:
        return measure(*arguments)
