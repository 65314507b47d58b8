"""`janusflow generate`: pictures of prompts, each with the settings that make it again."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janusflow.commands.common import (
    check_writable,
    drawing_options,
    load_pipeline,
    resolved_settings,
)
from janusflow.errors import SettingsError

if TYPE_CHECKING:
    from PIL import Image


def run(arguments: argparse.Namespace) -> None:
    """Draws, then writes PNG files and prints their names.

    Every file holds prompt, seed, settings, versions and the hash of the weights as JSON in its
    text chunk "janusflow": `json.loads(PIL.Image.open(file).text["janusflow"])`.
    """
    output: Path = arguments.output
    if output.suffix.lower() != ".png":
        raise SettingsError(f"pictures are written as PNG; end {str(output)!r} in .png")
    total = len(arguments.prompts) * arguments.num_images
    files = _names(output, total)
    for file in {*files, output}:
        check_writable(file)

    from janusflow.flow.edit_methods import make_edit
    from janusflow.flow.solvers import make_solver

    if arguments.solver is not None:
        make_solver(arguments.solver)
    if arguments.edit is not None:
        make_edit(arguments.edit)
    pipe = load_pipeline(arguments)
    result = pipe(
        arguments.prompts,
        negative_prompt=arguments.negative,
        num_images_per_prompt=arguments.num_images,
        seed=arguments.seed,
        image=arguments.image,
        edit=arguments.edit,
        source_prompt=arguments.source_prompt,
        strength=arguments.strength,
        mask_image=arguments.mask_image,
        **drawing_options(arguments, pipe),
    )
    settings = resolved_settings(
        arguments,
        pipe,
        **_edit_settings(arguments),
        nfe=result.nfe,
        num_forward_passes=result.num_forward_passes,
    )
    written = []
    assert result.seeds is not None
    for index, (picture, seed, file) in enumerate(
        zip(result.images, result.seeds, files, strict=True)
    ):
        prompt = arguments.prompts[index // arguments.num_images]
        _save(picture, file, {"prompt": prompt, **settings, "seed": seed})
        written.append(file)
    if arguments.grid and total > 1:
        columns = arguments.num_images if arguments.num_images > 1 else math.ceil(total**0.5)
        sheet = contact_sheet(result.images, columns)
        _save(sheet, output, {"prompts": arguments.prompts, **settings})
        written.append(output)
    print(*written, sep="\n")


def _edit_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """How a picture was edited, settings that were not given included."""
    if arguments.image is None:
        return {}
    from janusflow.flow.edit_methods import make_edit

    method = make_edit(arguments.edit or "sdedit")
    settings: dict[str, Any] = {"edit": arguments.edit or "sdedit", "edit_settings": vars(method)}
    if arguments.strength is None:
        settings["strength"] = method.default_strength
    if method.takes_source:
        settings["source_prompt"] = arguments.source_prompt or ""
    return settings


def contact_sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row by row, on white with a narrow gap."""
    from PIL import Image

    width, height = pictures[0].size
    gap = max(2, width // 32)
    rows = math.ceil(len(pictures) / columns)
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (column * (width + gap), row * (height + gap)))
    return sheet


def _names(output: Path, total: int) -> list[Path]:
    if total == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(total)]


def _save(picture: Image.Image, file: Path, settings: dict[str, Any]) -> None:
    from PIL.PngImagePlugin import PngInfo

    from janusflow.files import atomic_path

    info = PngInfo()
    info.add_itxt("janusflow", json.dumps(settings, ensure_ascii=False))
    with atomic_path(file) as path:
        picture.save(path, format="PNG", pnginfo=info)
