"""The shapes world as a source: endless in kind, a fixed number of pictures for a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from janusflow.data.samples import Sample
from janusflow.data.shapes.batches import TRAINING_SHARES, picture_scene
from janusflow.data.shapes.language import ask, training_caption, training_scene
from janusflow.data.shapes.scene import draw
from janusflow.data.sources.base import Source, SourceSettings
from janusflow.errors import SettingsError

_CAPTION, _SCENE = 6, 7  # what random numbers are for; `shapes.batches` has the numbers below


@dataclass(frozen=True)
class ShapesSettings(SourceSettings):
    """Pictures of coloured shapes, with captions to draw from or questions about them."""

    kinds: ClassVar[tuple[str, ...]] = ("generation", "understanding")

    num_pictures: int = 60_000
    image_size: int = 64
    """Side in pixels."""
    seed: int = 0
    num_questions: int = 4
    """The most questions in a conversation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_pictures", "image_size", "num_questions"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}; expected 0 or more")


class ShapesSource(Source):
    """Pictures by number; nothing that is held out for evaluation is among them."""

    def __init__(self, name: str, settings: ShapesSettings) -> None:
        super().__init__(name, settings)
        self._settings = settings

    def __len__(self) -> int:
        return self._settings.num_pictures

    def label(self, index: int) -> str:
        """The seed and the number of the picture."""
        return f"shapes-{self._settings.seed}:{index}"

    def read(self, index: int) -> Sample:
        """See `Source`."""
        settings, name = self._settings, self.label(index)
        if self.kind == "generation":
            scene = picture_scene(settings.seed, index)
            rng = np.random.default_rng([settings.seed, _CAPTION, index])
            request = training_caption(scene, rng)
            image = draw(scene, settings.image_size)
            return Sample("generation", name, image=image, prompt=request.text, request=request)
        rng = np.random.default_rng([settings.seed, _SCENE, index])
        scene = training_scene(rng, TRAINING_SHARES)
        picture = {"type": "image", "image": draw(scene, settings.image_size)}
        messages: list[dict[str, Any]] = []
        for question in ask(scene, rng)[: settings.num_questions]:
            asked = {"type": "text", "text": question.text}
            parts = [asked] if messages else [picture, asked]
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": question.answer})
        return Sample("understanding", name, messages=tuple(messages))
