"""The package as it is installed: cheap to import, and whole in its wheel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import janusflow

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "janusflow" / "assets" / "tiny"
HEAVY = {"accelerate", "diffusers", "matplotlib", "numpy", "PIL", "torch", "transformers"}


def run(
    *command: str | Path, cwd: Path, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, `path` first among the places that Python imports from."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )


def python(code: str, *, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Run code in a fresh interpreter and return what it wrote; it must end well, and quietly."""
    done = run(sys.executable, "-c", code, cwd=cwd, path=path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# --- importing ---------------------------------------------------------------------------------


def test_importing_the_package_prints_nothing_and_loads_no_heavy_library() -> None:
    assert python("import janusflow") == ""
    loaded = python("import sys, janusflow; print(*{m.split('.')[0] for m in sys.modules})")
    assert "janusflow" in loaded.split()
    assert not HEAVY & set(loaded.split())


def test_help_loads_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from janusflow.cli import main\n"
        "sys.argv = ['janusflow', '--help']\n"
        "try:\n"
        "    status = main()\n"
        "except SystemExit as stop:\n"
        "    status = stop.code\n"
        "print('status', status or 0)\n"
        "print(*{m.split('.')[0] for m in sys.modules})\n"
    )
    *text, status, loaded = python(code).splitlines()
    assert "generate" in "\n".join(text)
    assert status == "status 0"
    assert not HEAVY & set(loaded.split())


@pytest.mark.parametrize("name", janusflow.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(janusflow, name) is not None


def test_public_names_are_listed_before_they_are_imported() -> None:
    listed = python("import janusflow; print(*dir(janusflow))").split()
    assert set(janusflow.__all__) <= set(listed)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="JanusFlowPipline"):
        _ = janusflow.JanusFlowPipline


def test_every_mistake_of_a_user_is_a_value_error() -> None:
    for name in ("CheckpointError", "ImageError", "PromptError", "SettingsError"):
        assert issubclass(getattr(janusflow, name), janusflow.JanusFlowError)
    assert issubclass(janusflow.JanusFlowError, ValueError)


# --- pins --------------------------------------------------------------------------------------


def test_every_requirement_of_the_package_is_pinned_except_those_of_unused_extras() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {re.split(r"[=;]", line)[0] for line in text.splitlines() if line[:1] not in ("#", "")}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert core is not None
    lines = re.findall(
        r"^(?:train|deepspeed|eval|notebooks|test|dev) = \[(.*)\]$", project, re.MULTILINE
    )
    assert len(lines) == 6
    wanted = re.findall(r'"([a-z][\w.-]*)[>\[]', "\n".join([core[1], *lines]))
    wanted = {name.replace("_", "-") for name in wanted} - {"janusflow"}
    assert len(wanted) > 15
    assert wanted - pinned == set()


# --- the wheel ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "janusflow", source / "janusflow", ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "neighbour").mkdir()
    (source / "neighbour" / "__init__.py").touch()  # a package that must stay out
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = run(*pip, "--wheel-dir", folder, source, cwd=folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("janusflow-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """Unpack the wheel into a folder of its own, as pip does, console script included."""
    target = wheel.parent / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    done = run(*pip, "--target", target, wheel, cwd=wheel.parent)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.wheel
def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"janusflow-{janusflow.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"janusflow", info}
    assert "janusflow/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.wheel
def test_the_wheel_holds_every_file_of_the_bundled_model_in_25_megabytes(wheel: Path) -> None:
    held = {
        entry.filename: entry.compress_size
        for entry in zipfile.ZipFile(wheel).infolist()
        if entry.filename.startswith("janusflow/assets/")
    }
    files = {f.relative_to(ROOT).as_posix() for f in MODEL.rglob("*") if f.is_file()}
    assert any(name.endswith(".safetensors") for name in files)
    assert files <= held.keys()
    assert sum(held.values()) <= 25_000_000


@pytest.mark.wheel
def test_the_wheel_is_imported_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = "import janusflow; print(janusflow.__file__, janusflow.__version__)"
    where, version = python(code, cwd=tmp_path, path=installed).split()
    assert Path(where) == installed / "janusflow" / "__init__.py"
    assert version == janusflow.__version__


@pytest.mark.wheel
def test_the_installed_command_answers_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    script = installed / "bin" / "janusflow"
    for command in ([script], [sys.executable, "-m", "janusflow.cli"]):
        done = run(*command, "--help", cwd=tmp_path, path=installed)
        assert done.returncode == 0, done.stderr
        assert "generate" in done.stdout


@pytest.mark.wheel
def test_the_installed_command_draws_a_picture_outside_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    from PIL import Image

    script = installed / "bin" / "janusflow"
    prompt = "a red circle above a blue square"
    done = run(
        script, "generate", prompt, "--steps", "4", "-o", "out.png", cwd=tmp_path, path=installed
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (64, 64)
        low, high = picture.convert("L").getextrema()
    assert high - low > 32, "the picture is one flat colour"
