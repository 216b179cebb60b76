"""The benchmarks can be run, and their table says what was measured."""

import subprocess
import sys

import pytest

from benchmarks import report
from benchmarks.measuring import FULL, ROOT, BenchmarkError, Process, Row, alternating

PEERS = ROOT / ".benchmarks" / "python" / "installed"


def row(values: list[float], peers: list[float], **goal: float) -> Row:
    return Row(figure="a figure", unit="µs", values=values, peer="a peer", peer_values=peers, **goal)


def test_a_goal_is_judged_by_the_median_of_the_paired_ratios() -> None:
    # By the medians of both sides it would be 2 / 10.
    paired = row([1, 2, 30], [1, 10, 20], at_most=1.0)
    assert list(paired.judged) == [1, 0.2, 1.5]
    assert paired.met is True
    assert row([1, 2, 30], [1, 10, 20], at_most=0.9).met is False
    assert row([1, 2, 30], [1, 10, 20], at_least=1.1).met is False
    assert row([1, 2, 30], [1, 10, 20]).met is None


def test_a_figure_without_its_peer_is_shown_as_not_measured() -> None:
    missing = row([120], [], at_most=1.0)
    assert missing.met is None
    assert report.table([missing]).splitlines()[-1].split("|")[1:-1] == [
        " a figure ", " 120 µs    ", " a peer ", "                 ", " ≤ 1  ", " not measured ",
    ]  # fmt: skip


def test_the_document_gets_the_tables_between_its_markers() -> None:
    memory = Row(figure="memory per idle socket, of 3,000", unit="kB", values=[40, 50, 60])
    document = f"before\n{report.BEGIN}old\n{report.END}after\n"
    written = report.written(document, [memory], "Made today.")
    assert written.startswith(f"before\n{report.BEGIN}\nMade today.\n")
    assert written.endswith(f"{report.END}after\n")
    assert "50.0 kB" in written
    assert "| a GB: sockets              | 20,000  |" in written
    assert "old" not in written
    assert report.written(written, [memory], "Made today.") == written


def test_the_document_has_the_markers_once() -> None:
    document = (ROOT / "docs" / "performance.md").read_text()
    assert document.count(report.BEGIN) == document.count(report.END) == 1


def test_peers_take_turns_in_alternating_order() -> None:
    turns = list(alternating("ab", FULL))
    assert [number for number, _ in turns] == [0, 1, 2, 3, 4]
    assert [order for _, order in turns] == ["ab", "ba", "ab", "ba", "ab"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('no luck')", "it ended. no luck"),
        ('print(\'{"error": "no luck"}\')', "no luck"),
        ("input()", "it did not answer within 0 s"),
    ],
)
def test_a_server_that_fails_is_named_with_its_reason(program: str, message: str) -> None:
    with (
        Process([sys.executable, "-c", program], {0, 1}) as process,
        pytest.raises(BenchmarkError, match=message),
    ):
        process.answer(0.3 if "input" in program else 30)


@pytest.mark.long
@pytest.mark.skipif(not PEERS.exists(), reason="`make bench-quick` has not installed the peers")
@pytest.mark.timeout(600)
def test_every_benchmark_runs() -> None:
    command = [sys.executable, "-m", "benchmarks", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not done" not in done.stdout
    for figure in (
        "append → sockets",
        "memory per idle socket",
        "start without images",
        "SQLite log",
        "PostgreSQL log",
        "overloaded",
    ):
        assert figure in done.stdout
