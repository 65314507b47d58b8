"""The command, called in this process, and a random model on disk to call it with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny import make_pipeline
from transformers.utils import logging as transformers_logging

from janusflow.cli import main


class Done(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline; not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    transformers_logging.disable_progress_bar()
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def quiet_libraries() -> Iterator[None]:
    """In a process of its own, the command sees to this before it imports them."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Return a function that runs the command in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Done(status, *capsys.readouterr())

    return call


@pytest.fixture
def fails(run: Callable[..., Done], tmp_path: Path) -> Callable[..., str]:
    """Return a function that runs a mistake and gives its line; nothing else may come of it."""

    def call(*arguments: object) -> str:
        before = tree(tmp_path)
        done = run(*arguments)
        assert done.status == 2
        assert done.out == ""
        assert tree(tmp_path) == before
        (line,) = done.err.splitlines()
        assert line.startswith("janusflow: error: ")
        return line

    return call


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder, with what is in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }
