"""The rows of the benchmarks as tables for people: the figures, and what follows from them for sizing."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from benchmarks.measuring import Row

BEGIN: Final = "<!-- written by `make bench` -->\n"
END: Final = "<!-- end -->\n"


class _Capacity(NamedTuple):
    """What one core or one GB suffices for, by a figure."""

    what: str
    figure: str
    #: The µs, seconds, kB or bytes that there are, divided by those of one.
    amount: float


_CAPACITIES: Final = (
    _Capacity("a core: deliveries/s to users with one socket", "decision → sockets, 1,000 × 1", 1e6),
    _Capacity("a core: deliveries/s to users with three sockets", "decision → sockets, 300 × 3", 1e6),
    _Capacity("a core: deliveries/s to one user's 1,000 sockets", "decision → sockets, 1 × 1,000", 1e6),
    _Capacity("a core: connects/s", "connect with authentication, 3,000 sockets", 1e6),
    _Capacity("a core: starts/s", "start without images", 1e6),
    _Capacity("a core: histories/s", "GET …/events of eight events", 1e6),
    _Capacity("a core: composed sheets/s", "compose three 12-megapixel JPEGs to a JPEG", 1),
    _Capacity("a GB: sockets", "memory per idle socket, of 3,000", 1e6),
    _Capacity("a GB: events in the log in memory", "memory per logged event", 1e9),
)


def table(rows: Iterable[Row]) -> str:
    """The figures as a Markdown table, with ratios and goals."""
    return _aligned([("figure", "Stagecast", "beside", "ratio (from–to)", "goal", ""), *map(_cells, rows)])


def sizing(rows: Iterable[Row]) -> str:
    """What one core and one GB suffice for, as a Markdown table."""
    medians = {row.figure: statistics.median(row.values) for row in rows if row.values}
    lines = [(what, _figure(amount / medians[figure])) for what, figure, amount in _CAPACITIES if figure in medians]
    return _aligned([("what suffices for how much", "at most"), *lines])


def written(document: str, rows: Sequence[Row], origin: str) -> str:
    """The document with these tables between its markers, below a sentence on where they come from."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{origin}\n\n{table(rows)}\n\n{sizing(rows)}\n\n{END}{after}"


def _cells(row: Row) -> Sequence[str]:
    goal = ""
    if row.at_most is not None:
        goal = f"≤ {row.at_most:g}"
    elif row.at_least is not None:
        goal = f"≥ {row.at_least:g}"
    ours = f"{_median(row.values)} {row.unit}" if row.values else ""
    if not row.judged:
        return row.figure, ours, row.peer, "", goal, "not measured"
    peer = f"{row.peer}: {_median(row.peer_values)}" if row.peer else ""
    ratio = f"**{_median(row.judged)}** ({_span(row.judged)})" if row.peer else f"({_span(row.values)})"
    return row.figure, ours, peer, ratio, goal, {True: "met", False: "**not met**", None: ""}[row.met]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in ruled
    )


def _median(values: Sequence[float]) -> str:
    return _figure(statistics.median(values))


def _span(values: Sequence[float]) -> str:
    return f"{_figure(min(values))}–{_figure(max(values))}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
