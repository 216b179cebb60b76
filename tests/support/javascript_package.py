"""The npm package ``stagecast-client``, built as a release is, and a project that has it installed."""

import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from support.node import ROOT

_SOURCE: Final = ROOT / "clients" / "javascript"
_MODULE: Final = "src/api/web/static/stagecast.js"


def pack(folder: Path) -> Path:
    """Build the package in a copy of what it is built from, and return the tarball."""
    package = folder / "clients" / "javascript"
    shutil.copytree(_SOURCE, package, ignore=shutil.ignore_patterns("node_modules", "dist", "*.tgz"))
    (folder / _MODULE).parent.mkdir(parents=True)
    shutil.copy(ROOT / _MODULE, folder / _MODULE)
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "node_modules").symlink_to(ROOT / "node_modules")
    run(["npm", "pack", "--silent"], package)
    [tarball] = package.glob("*.tgz")
    return tarball


def run(command: list[str], cwd: Path, timeout: float = 300) -> str:
    """What a program prints; it has to succeed."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def project() -> Iterator[Path]:
    """A project with the packed package, and the other packages of this repository."""
    with TemporaryDirectory() as folder:
        tarball = pack(Path(folder) / "release")
        modules = Path(folder) / "project" / "node_modules"
        modules.mkdir(parents=True)
        for installed in (ROOT / "node_modules").iterdir():
            (modules / installed.name).symlink_to(installed)
        with tarfile.open(tarball) as archive:
            archive.extractall(modules, filter="data")
        (modules / "package").rename(modules / "stagecast-client")
        (modules.parent / "package.json").write_text(json.dumps({"type": "module"}))
        yield modules.parent
