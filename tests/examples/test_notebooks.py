"""Every notebook runs, and what is kept in it is what a run of it gives."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest

from examples import execute as script
from examples.execute import FOLDER, METADATA, NOTEBOOKS, execute, read

MOST_BYTES = 320_000
# Of one machine: folders of the system, addresses of objects, the version of an interpreter.
PRIVATE = re.compile(r"(?<![\w.])/(?:home|root|tmp|var|usr|work|opt|Users)/|at 0x[0-9a-f]{6,}")
MEASURED = re.compile(r"\d+\.\d+%?|\d+%")  # whole numbers count things, and are the same everywhere
SHARE_OF_VALUE, LAST_DIGITS = 0.1, 2


class Run(NamedTuple):
    kept: Any
    fresh: Any
    written: set[Path]


def files_of_the_repository() -> set[Path]:
    """Without those of tools: `.git`, caches, what Python compiles."""
    return {
        file
        for place in FOLDER.parent.iterdir()
        if place.name[0] != "." and place.suffix != ".egg-info"
        for file in (place, *place.rglob("*"))
        if "__pycache__" not in file.parts
    }


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda file: file.stem)
def run(request: pytest.FixtureRequest) -> Run:
    kept, before = read(request.param), files_of_the_repository()
    fresh = execute(copy.deepcopy(kept))
    return Run(kept, fresh, files_of_the_repository() - before)


def cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> dict[str, list[Any]]:
    """By cell: for each output its type, and the stream's name or the forms it has."""
    return {
        cell.id: [
            (output.output_type, output.get("name") or sorted(output.get("data", {})))
            for output in cell.outputs
        ]
        for cell in cells(notebook)
    }


def text(notebook: Any) -> str:
    """All that is printed."""
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for cell in cells(notebook)
        for output in cell.outputs
    )


def near(kept: str, fresh: str) -> bool:
    """Whether two measured numbers are as close as those of two machines are."""
    kept, fresh = kept.rstrip("%"), fresh.rstrip("%")
    last_digit = 10.0 ** -len(kept.partition(".")[2])
    return float(fresh) == pytest.approx(
        float(kept), rel=SHARE_OF_VALUE, abs=LAST_DIGITS * last_digit
    )


every = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def test_the_notebooks_are_those_that_the_readme_lists() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\)", readme, re.MULTILINE)
    assert listed == [file.stem for file in NOTEBOOKS]
    assert len(listed) == 6


def test_a_notebook_gives_outputs_of_the_kinds_that_it_keeps(run: Run) -> None:
    assert kinds(run.fresh) == kinds(run.kept)


def test_a_notebook_prints_what_it_keeps(run: Run) -> None:
    kept, fresh = text(run.kept), text(run.fresh)
    assert MEASURED.sub("#", fresh).split() == MEASURED.sub("#", kept).split()
    pairs = zip(MEASURED.findall(kept), MEASURED.findall(fresh), strict=True)
    assert [pair for pair in pairs if not near(*pair)] == []


def test_a_notebook_writes_nothing_into_the_repository(run: Run) -> None:
    assert run.written == set()


@every
def test_a_notebook_keeps_the_outputs_of_one_whole_run(file: Path) -> None:
    notebook = read(file)
    counts = [cell.execution_count for cell in cells(notebook)]
    assert counts == [*range(1, len(counts) + 1)]
    found = [output for outputs in kinds(notebook).values() for output in outputs]
    assert found
    assert not [output for output in found if output[0] == "error" or output[1] == "stderr"]


@every
def test_a_notebook_holds_nothing_of_the_machine_and_of_the_time_it_ran_on(file: Path) -> None:
    notebook = read(file)
    nbformat.validate(notebook)
    assert notebook.metadata == METADATA
    assert not any(cell.metadata for cell in notebook.cells)
    content = file.read_text(encoding="utf-8")
    assert PRIVATE.search(content) is None
    assert len(content) < MOST_BYTES
    assert content == nbformat.writes(notebook) + "\n"


def test_without_a_network_the_published_checkpoints_are_skipped_and_named() -> None:
    printed = text(read(FOLDER / "06_published_checkpoints.ipynb"))
    for name in ("JanusFlow-1.3B", "Janus-Pro-1B"):
        assert f"Skipped: deepseek-ai/{name} is no local folder" in printed


def test_where_the_checkpoints_are_at_hand_they_draw_and_answer() -> None:
    notebook = read(FOLDER / "06_published_checkpoints.ipynb")
    for cell in cells(notebook):
        cell.source = re.sub(r'"deepseek-ai/[\w.-]+"', '"tiny"', cell.source)
    found = kinds(execute(notebook))
    drawn = [("display_data", ["image/png", "text/plain"]), ("stream", "stdout")]
    assert [outputs for outputs in found.values() if outputs] == [drawn, drawn]


# --- the script --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two notebooks, of which the second fails."""
    files = []
    for name, source in (("01_sum", "1 + 1"), ("02_error", "1 / 0")):
        cell = nbformat.v4.new_code_cell(source, id="only")
        files.append(tmp_path / f"{name}.ipynb")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), files[-1])
    monkeypatch.setattr(script, "NOTEBOOKS", files)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(sys, "argv", ["execute.py", *names])
    script.main()


def test_the_script_writes_the_outputs_of_the_notebook_that_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(monkeypatch, "01_sum")
    (cell,) = cells(read(folder / "01_sum.ipynb"))
    assert (cell.execution_count, cell.outputs[0].data["text/plain"]) == (1, "2")


def test_an_error_in_a_cell_ends_the_script_and_leaves_the_notebook_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / "02_error.ipynb").read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        call(monkeypatch)
    assert (folder / "02_error.ipynb").read_bytes() == before


def test_an_unknown_name_is_refused_with_those_there_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(monkeypatch, "03_none")
    assert "unknown: 03_none; there are 01_sum, 02_error" in capsys.readouterr().err
