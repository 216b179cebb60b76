"""The npm package ``stagecast-client``: what is in it, its types, and its React entry."""

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from support.client_services import services_for_node
from support.javascript_package import project, run
from support.node import ROOT, TESTS, needs_node, node_test

pytestmark = needs_node

#: The current and the previous major version.
COMPILERS: Final = ("typescript", "typescript-6")


@pytest.fixture(scope="module")
def installed() -> Iterator[Path]:
    """A project that has the package."""
    with project() as folder:
        yield folder


def test_the_package_has_the_version_of_the_service_and_one_copy_of_its_module(installed: Path) -> None:
    package = installed / "node_modules" / "stagecast-client"
    files = {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()}
    modules = {f"dist/{name}{suffix}" for name in ("stagecast", "react") for suffix in (".js", ".d.ts")}
    assert files == {"package.json", "README.md", "LICENSE", *modules}
    module = (ROOT / "src/api/web/static/stagecast.js").read_text()
    assert (package / "dist/stagecast.js").read_text() == module
    released = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert json.loads((package / "package.json").read_text())["version"] == released
    example = json.loads((ROOT / "examples/react/package.json").read_text())
    assert example["dependencies"]["stagecast-client"].endswith(f"/stagecast-client-{released}.tgz")


def test_no_type_is_any(installed: Path) -> None:
    for name in ("stagecast", "react"):
        declarations = (installed / f"node_modules/stagecast-client/dist/{name}.d.ts").read_text()
        assert not re.search(r"\bany\b", re.sub(r"/\*.*?\*/", "", declarations, flags=re.DOTALL))


@pytest.mark.parametrize(
    ("module", "resolution"),
    [("esnext", "bundler"), pytest.param("nodenext", "nodenext", marks=pytest.mark.long)],
)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_types_are_right_in_strict_projects(installed: Path, compiler: str, module: str, resolution: str) -> None:
    shutil.copy(TESTS / "usage.tsx", installed)
    options = "--noEmit --strict --noUncheckedIndexedAccess --jsx react-jsx --target es2022 --lib es2022,dom"
    options += f" --types react --module {module} --moduleResolution {resolution}"
    run(["node", f"node_modules/{compiler}/bin/tsc", *options.split(), "usage.tsx"], installed)


@pytest.mark.long
async def test_the_react_entry_works_on_a_server_in_strict_mode_and_with_a_real_service(
    installed: Path, tmp_path: Path
) -> None:
    package = str(installed / "node_modules/stagecast-client")
    async with services_for_node(tmp_path) as services:
        await node_test("client_react.mjs", services=services, STAGECAST_PACKAGE=package)
