"""The reliability cases that need real sockets, in their long form, as one table with their figures.

    python benchmarks/reliability.py [--quick] [--only 8,9]

Each case runs against a service in a process of its own. The exit code is 1 if a case failed. The long form takes about
a quarter of an hour; times and ratios are judged in it, and are worth something only on a machine that does nothing
else. `--quick` is the size that the test suite uses, in which they are printed and not judged.
"""

import argparse
import asyncio
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Final

# In the place of this folder, where a module has the name of one of the tests' folders.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from reliability.all_cases import CASES
from reliability.cases import Outcome, Size, attempt

#: The columns, and how wide they are.
_COLUMNS: Final = {"case": 4, "what was done": 36, "expected": 30, "figures": 46, "": 6}


def table_head() -> str:
    """The names of the columns."""
    return "\n".join([_line(list(_COLUMNS)), _line(["-" * width for width in _COLUMNS.values()])])


def row(outcome: Outcome) -> str:
    """One case, as many lines as it needs."""
    figures = [line for name, text in outcome.figures.items() for line in _wrap(f"{name}: {text}", "figures", "  ")]
    figures += [line for failure in outcome.failures for line in _wrap(f"! {failure}", "figures", "  ")]
    columns = [
        [str(outcome.case.number)],
        _wrap(outcome.does, "what was done"),
        _wrap(outcome.case.expects, "expected"),
        figures,
        ["FAILED" if outcome.failures else "ok"],
    ]
    return "\n".join(_line(cells) for cells in zip_longest(*columns, fillvalue=""))


def _wrap(text: str, column: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _COLUMNS[column], subsequent_indent=indent)


def _line(cells: Sequence[str]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, _COLUMNS.values(), strict=True)).rstrip()


async def run(numbers: Sequence[int], size: Size) -> int:
    """Try these cases one after the other and print them. Return how many failed."""
    failed = 0
    print(table_head(), flush=True)
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            outcome = await attempt(CASES[number], size, Path(folder))
        failed += bool(outcome.failures)
        print(f"{row(outcome)}\n", flush=True)
    return failed


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="the size that the test suite uses")
    parser.add_argument("--only", metavar="8,9", help="these cases")
    given = parser.parse_args()
    numbers = [int(number) for number in given.only.split(",")] if given.only else sorted(CASES)
    unknown = set(numbers) - set(CASES)
    if unknown:
        parser.error(f"there are cases {', '.join(map(str, sorted(CASES)))}")
    began = time.monotonic()
    failed = asyncio.run(run(numbers, "quick" if given.quick else "long"))
    print(f"{len(numbers)} cases in {time.monotonic() - began:,.0f} s, {failed or 'none'} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
