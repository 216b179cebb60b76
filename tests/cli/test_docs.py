"""The generated documents are what the code would write now."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

import pytest

from domain.stages import FLOWS, Stage

ROOT = Path(__file__).resolve().parent.parent.parent


class Generator(Protocol):
    DOCUMENTS: Mapping[str, Callable[[], str]]

    def stale(self, root: Path) -> list[str]: ...
    def write(self, root: Path) -> list[str]: ...
    def main(self, arguments: list[str], root: Path) -> int: ...


@pytest.fixture
def generator() -> Generator:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return cast(Generator, module)


def change(monkeypatch: pytest.MonkeyPatch, status: str, stage: Stage) -> None:
    monkeypatch.setitem(cast(dict[str, Stage], FLOWS["edit"]), status, stage)


def test_the_committed_documents_are_up_to_date() -> None:
    check = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (check.returncode, check.stderr) == (0, "")


def test_a_changed_table_makes_only_its_own_document_stale(
    generator: Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generator.write(tmp_path)
    assert generator.main(["--check"], tmp_path) == 0
    change(monkeypatch, "composition", replace(FLOWS["edit"]["composition"], message="Laying out..."))

    assert generator.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.splitlines() == ["stale: docs/state-diagrams/edit.md (run: python docs/generate.py)"]


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param(replace(FLOWS["edit"]["composition"], progress=21), id="percentage"),
        pytest.param(replace(FLOWS["edit"]["composition"], provider="editor"), id="provider"),
        pytest.param(
            replace(FLOWS["edit"]["composition"], next=FLOWS["edit"]["openai_editing_completed"].next), id="successors"
        ),
        pytest.param(replace(FLOWS["edit"]["composition"], next={}), id="terminal"),
    ],
)
def test_every_column_of_a_row_appears_in_the_document(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: Stage
) -> None:
    generator.write(tmp_path)
    change(monkeypatch, "composition", stage)
    assert generator.stale(tmp_path) == ["docs/state-diagrams/edit.md"]


def test_a_missing_or_edited_document_is_stale_until_it_is_written_again(generator: Generator, tmp_path: Path) -> None:
    every = list(generator.DOCUMENTS)
    assert generator.stale(tmp_path) == every
    assert generator.write(tmp_path) == every
    assert generator.stale(tmp_path) == []
    with (tmp_path / every[0]).open("a", encoding="utf-8") as document:
        document.write("a word by hand\n")
    assert generator.stale(tmp_path) == [every[0]]
    assert generator.write(tmp_path) == [every[0]]
    assert generator.stale(tmp_path) == []


def test_checking_writes_nothing(generator: Generator, tmp_path: Path) -> None:
    assert generator.main(["--check"], tmp_path) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_diagram_shows_conditions_in_words_and_marks_terminal_stages(generator: Generator) -> None:
    diagram = generator.DOCUMENTS["docs/state-diagrams/edit.md"]()
    assert "    [*] --> started\n" in diagram
    assert "    openai_editing_completed --> face_swap: a face swap was asked for\n" in diagram
    assert "    face_swap --> completed: the face swap failed, the edit is kept\n" in diagram
    assert "    openai_editing --> openai_editing: a provider reports higher progress\n" in diagram
    assert "    composition --> failed\n" in diagram
    assert "    completed --> [*]\n" in diagram
    assert "    failed --> [*]\n" in diagram
    assert "| `started` | 0 % | Image editing started... | `generation_started` |" in diagram
    assert "do not edit" in diagram
