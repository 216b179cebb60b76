"""Brings what Stagecast is compared with into ``.benchmarks/``, by the machine's own pip and npm."""

import functools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.measuring import ROOT, BenchmarkError

FOLDER: Final = ROOT / ".benchmarks"
#: The versions of packages that Stagecast uses too are those of constraints.txt.
PYTHON_PEERS: Final = ("fastapi", "picows", "python-multipart", "python-socketio", "uvicorn[standard]")
NODE_PEERS: Final = ("sharp@0.35", "socket.io@4.8")
#: Seconds in which the packages of one kind are installed.
_TIMEOUT: Final = 300


@functools.cache
def python() -> Path:
    """The interpreter with the Python peers and the load client's library. Raises `BenchmarkError`."""
    folder = FOLDER / "python"
    interpreter = folder / "bin" / "python"
    if not _installed(folder, PYTHON_PEERS):
        constraints = ("--constraint", str(ROOT / "constraints.txt"))
        _run("The Python peers", sys.executable, "-m", "venv", "--clear", str(folder))
        _run("The Python peers", str(interpreter), "-m", "pip", "install", "--quiet", *constraints, *PYTHON_PEERS)
        _mark(folder, PYTHON_PEERS)
    return interpreter


@functools.cache
def node_modules() -> Path:
    """The folder with the Node peers. Raises `BenchmarkError`."""
    folder = FOLDER / "node"
    if shutil.which("node") is None or shutil.which("npm") is None:
        raise BenchmarkError("Node and npm are not installed")
    if not _installed(folder, NODE_PEERS):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}\n')
        options = ("--silent", "--no-audit", "--no-fund", "--no-package-lock", "--no-save")
        _run("The Node peers", "npm", "install", "--prefix", str(folder), *options, *NODE_PEERS)
        _mark(folder, NODE_PEERS)
    return folder / "node_modules"


@functools.cache
def without_node() -> str:
    """Why the Node peers cannot be compared with; empty if they can."""
    try:
        node_modules()
    except BenchmarkError as error:
        return str(error)
    return ""


def _installed(folder: Path, peers: Sequence[str]) -> bool:
    stamp = folder / "installed"
    return stamp.exists() and stamp.read_text() == "\n".join(peers)


def _mark(folder: Path, peers: Sequence[str]) -> None:
    (folder / "installed").write_text("\n".join(peers))


def _run(what: str, *command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, cwd=ROOT)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{what} were not installed within {_TIMEOUT} s") from None
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise BenchmarkError(f"{what} cannot be installed: {' '.join(last) or 'no reason given'}")
