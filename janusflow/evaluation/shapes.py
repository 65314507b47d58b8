"""Benchmarks of the shapes world: pictures drawn from held-out prompts, answers about pictures.

Both use meanings that training never saw (`janusflow.data.shapes.language`) and score exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm.auto import tqdm

from janusflow.data.shapes.language import (
    KINDS,
    QUESTION_KINDS,
    held_out_questions,
    held_out_requests,
)
from janusflow.data.shapes.scene import draw
from janusflow.errors import SettingsError
from janusflow.evaluation.shapes_scorer import fulfils
from janusflow.files import atomic_path

if TYPE_CHECKING:
    from janusflow.pipeline import JanusFlowPipeline


def score_pictures(
    pipe: JanusFlowPipeline,
    *,
    num: int = 300,
    seed: int = 0,
    batch_size: int = 50,
    sheet: str | Path | None = None,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Draws held-out prompts, the six kinds in turn, and judges the pictures exactly.

    Args:
        pipe: The pipeline that draws.
        num: Number of prompts, one picture each.
        seed: Chooses the prompts and the noise: picture i is drawn with seed + i.
        batch_size: Prompts a call; the pictures do not depend on it.
        sheet: Where to write a contact sheet of the first pictures, misses framed in red.
        progress: Show a progress bar.
        **settings: Passed to the pipeline (`head`, `num_inference_steps`, `guidance_scale`, …).

    Returns:
        Shares of fulfilled prompts: "overall" (the mean over the kinds) and one entry a kind;
        "num_prompts".
    """
    _check_num(num, len(KINDS))
    requests = held_out_requests(num, seed)
    images: list[Image.Image] = []
    with _quiet(pipe), tqdm(total=num, disable=not progress, unit="picture") as bar:
        for start in range(0, num, batch_size):
            chunk = requests[start : start + batch_size]
            out = pipe([request.text for request in chunk], seed=seed + start, **settings)
            images += out.images
            bar.update(len(chunk))
    hits = [fulfils(image, request) for image, request in zip(images, requests, strict=True)]
    if sheet is not None:
        write_sheet(Path(sheet), images[:64], hits)
    return _shares([request.kind for request in requests], hits, KINDS)


def score_answers(
    pipe: JanusFlowPipeline,
    *,
    num: int = 300,
    seed: int = 0,
    batch_size: int = 50,
    progress: bool = False,
) -> dict[str, Any]:
    """Asks held-out questions about drawn pictures; an answer counts when it is the right one.

    Case, surrounding blanks and a final full stop are ignored.

    Returns:
        As `score_pictures`, by kind of question.
    """
    _check_num(num, len(QUESTION_KINDS))
    asked = held_out_questions(num, seed)
    size = pipe.model.config.vision_config.image_size
    answers: list[str] = []
    with tqdm(total=num, disable=not progress, unit="question") as bar:
        for start in range(0, num, batch_size):
            chunk = asked[start : start + batch_size]
            answers += pipe.chat(
                [_message(draw(scene, size), question.text) for scene, question in chunk],
                max_new_tokens=12,
                do_sample=False,
            )
            bar.update(len(chunk))
    questions = [question for _, question in asked]
    hits = [_plain(a) == _plain(q.answer) for a, q in zip(answers, questions, strict=True)]
    return _shares([question.kind for question in questions], hits, QUESTION_KINDS)


def _message(image: Image.Image, text: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _plain(answer: str) -> str:
    return answer.strip().rstrip(".").lower()


def _check_num(num: int, num_kinds: int) -> None:
    if num < num_kinds:
        raise SettingsError(f"num is {num}; at least one prompt for each of {num_kinds} kinds")


def _shares(kinds: Sequence[str], hits: Sequence[bool], names: Sequence[str]) -> dict[str, Any]:
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for kind, hit in zip(kinds, hits, strict=True):
        by_kind[kind].append(hit)
    shares = {name: sum(by_kind[name]) / len(by_kind[name]) for name in names}
    overall = sum(shares.values()) / len(shares)
    rounded = {name: round(share, 4) for name, share in shares.items()}
    return {"overall": round(overall, 4), **rounded, "num_prompts": len(hits)}


class _quiet:
    """Silences the pipeline's own progress bar, and gives its settings back."""

    def __init__(self, pipe: JanusFlowPipeline) -> None:
        self.pipe = pipe

    def __enter__(self) -> None:
        self.kept = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(**{**self.kept, "disable": True})

    def __exit__(self, *_: object) -> None:
        self.pipe.set_progress_bar_config(**self.kept)


def write_sheet(
    path: Path, images: Sequence[Image.Image], hits: Sequence[bool] | None = None
) -> None:
    """Writes pictures of one size side by side, misses framed in red, as a PNG."""
    columns, gap = min(8, len(images)), 3
    hits = [True] * len(images) if hits is None else hits
    side = images[0].width + 2 * gap
    sheet = Image.new("RGB", (columns * side, -(-len(images) // columns) * side), "white")
    for index, (image, hit) in enumerate(zip(images, hits, strict=False)):
        framed = Image.new("RGB", (side, side), "white" if hit else "red")
        framed.paste(image, (gap, gap))
        sheet.paste(framed, (index % columns * side, index // columns * side))
    with atomic_path(path) as scratch:
        sheet.save(scratch, format="PNG")
