"""Runs the benchmarks and prints one table with ratios and goals.

python -m benchmarks [--quick] [--write] [NAME …]
"""

import argparse
import sys
import time
from importlib import import_module
from typing import Final

from benchmarks import peers, report
from benchmarks.measuring import FULL, QUICK, ROOT, SMOKE, BenchmarkError, Row, cores

#: In the order in which they are run; each is a module with a function `run`.
NAMES: Final = ("fanout", "connections", "requests", "composing", "storage", "nodes", "overload")
DOCUMENT: Final = ROOT / "docs" / "performance.md"


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
    if given.write and given.names:
        parser.error("--write needs all benchmarks")
    rows: list[Row] = []
    failed = False
    try:
        cores()
        peers.python()
    except BenchmarkError as error:
        print(error)
        return 1
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
        print(report.table(rows), report.sizing(rows), sep="\n\n")
    if given.write and not failed:
        command = " ".join(["python -m benchmarks", *sys.argv[1:]])
        document = DOCUMENT.read_text()
        DOCUMENT.write_text(report.written(document, rows, f"Made by `{command}` on {time.strftime('%Y-%m-%d')}."))
    goals = [row.met for row in rows if row.met is not None]
    print(f"{sum(goals)} of {len(goals)} goals are met.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
