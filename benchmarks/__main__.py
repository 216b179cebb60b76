"""Runs the benchmarks and prints one table with ratios and goals.

python -m benchmarks [--quick] [--write] [NAME …]
"""

import argparse
import sys
import time
from importlib import import_module
from typing import Final

from benchmarks import peers
from benchmarks.measuring import FULL, QUICK, ROOT, SMOKE, BenchmarkError, Row, table

#: In the order in which they are run; each is a module with a function `run`.
NAMES: Final = ("fanout", "requests")
DOCUMENT: Final = ROOT / "docs" / "performance.md"
_BEGIN: Final = "<!-- written by `make bench` -->\n"
_END: Final = "<!-- end -->\n"


def write(rows: list[Row], command: str) -> None:
    """Replace the table in the document."""
    before, _, rest = DOCUMENT.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    made = f"Made by `{command}` on {time.strftime('%Y-%m-%d')}."
    DOCUMENT.write_text(f"{before}{_BEGIN}\n{made}\n\n{table(rows)}\n\n{_END}{after}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="size", const=QUICK, help="fewer repetitions")
    size.add_argument("--smoke", action="store_const", dest="size", const=SMOKE, help="only show that they work")
    parser.add_argument("--write", action="store_true", help=f"write the table into {DOCUMENT.relative_to(ROOT)}")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    given = parser.parse_args()
    unknown = set(given.names) - set(NAMES)
    if unknown:
        parser.error(f"there are {', '.join(NAMES)}")
    rows: list[Row] = []
    failed = False
    if peers.without_node():
        print(f"Without what runs on Node: {peers.without_node()}.")
    for name in given.names or NAMES:
        began = time.monotonic()
        try:
            rows += import_module(f"benchmarks.{name}").run(given.size or FULL)
            outcome = "done"
        except BenchmarkError as error:
            outcome, failed = f"not done. {error}", True
        print(f"{name}: {outcome} ({time.monotonic() - began:,.0f} s)", flush=True)
    if rows:
        print(table(rows))
    if given.write and not failed:
        write(rows, "make bench")
    goals = [row.met for row in rows if row.met is not None]
    print(f"{sum(goals)} of {len(goals)} goals are met.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
