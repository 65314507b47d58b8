"""Batches of the shapes world: captions for drawing, conversations for looking.

Every batch is a function of (seed, step), of fixed shape. Axes: B rows, L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from janusflow.data.shapes.language import Question, ask, training_caption, training_scene
from janusflow.data.shapes.scene import COLORS, SHAPES, Scene, draw, sample_scene
from janusflow.processing.processor import IGNORED, JanusFlowProcessor

TRAINING_SHARES = (0.2, 0.55, 0.25)
"""Shares of single objects, pairs and groups: pairs take longest to learn."""


def picture_scene(seed: int, index: int) -> Scene:
    """The scene of the picture `index` of a data set."""
    return sample_scene(np.random.default_rng([seed, 1, index]), TRAINING_SHARES)


@dataclass(frozen=True)
class Conversations:
    """Pictures with questions and answers, right-padded.

    Attributes:
        input_ids: (B, L).
        labels: Ids of the answers and their ends, `IGNORED` elsewhere, (B, L).
        blocks: 0 for what all later tokens see; 1, 2, … for questions and answers that stand by
            themselves, (B, L).
        position_ids: A question that stands by itself follows the picture, (B, L).
        pixel_values: (B, 3, H, W) in [-1, 1].
    """

    input_ids: Tensor
    labels: Tensor
    blocks: Tensor
    position_ids: Tensor
    pixel_values: Tensor


def shuffled(
    questions: list[Question], rng: np.random.Generator, where_weight: float
) -> list[Question]:
    """Questions in random order, drawn by weights: that of "where", and 1 for all others.

    A weighted shuffle (Efraimidis and Spirakis 2006): the first is drawn by its weight, and so on.
    """
    if where_weight == 1:
        return questions  # `ask` has shuffled them
    weights = [where_weight if question.kind == "where" else 1.0 for question in questions]
    keys = rng.random(len(questions)) ** (1 / np.array(weights))
    return [questions[index] for index in np.argsort(-keys)]


def patch_labels(scene: Scene, patches: int) -> np.ndarray:
    """What covers each patch of a picture: numbers of a shape and of a colour, 0 for none.

    Returns:
        int64 (2, patches, patches): shapes 1 … 6 and colours 1 … 6 in the order of their names.
    """
    centers = (np.arange(patches) + 0.5) / patches
    labels = np.zeros((2, patches, patches), np.int64)
    for item in scene.objects:
        distance = np.hypot(centers[None, :] - item.x, centers[:, None] - item.y)
        covered = distance < item.radius + 0.25 / patches
        labels[0][covered] = 1 + list(SHAPES).index(item.shape)
        labels[1][covered] = 1 + list(COLORS).index(item.color)
    return labels


class ShapesBatches:
    """Makes the batches with a model's processor."""

    def __init__(self, processor: JanusFlowProcessor, seed: int) -> None:
        self.processor = processor
        self.seed = seed
        self._ids = lru_cache(maxsize=65536)(self._tokenize)
        self._scene = lru_cache(maxsize=65536)(partial(picture_scene, seed))

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.tokenizer.encode(text, add_special_tokens=False))

    def captions(
        self,
        indices: np.ndarray,
        step: int,
        length: int,
        dropout: float,
        tag: Literal["flow", "vq"] = "flow",
    ) -> tuple[Tensor, Tensor]:
        """Prompts of the pictures `indices`, ending in the tag of a head, left-padded.

        A share `dropout` of the prompts is dropped as sampling drops them: every token but the
        first becomes padding and is masked.

        Returns:
            input_ids and attention_mask, (B, length).
        """
        rng = np.random.default_rng([self.seed, 2, step])
        processor = self.processor
        tags = {"flow": processor.image_gen_id, "vq": processor.begin_of_image_id}
        ids = np.full((len(indices), length), processor.pad_token_id, np.int64)
        mask = np.zeros_like(ids)
        for row, index in enumerate(indices):
            caption = training_caption(self._scene(int(index)), rng).text
            tokens = [processor.bos_token_id, *self._ids(f"User: {caption}\n\nAssistant:")]
            start = length - len(tokens) - 1
            if start < 0:
                raise ValueError(f"a prompt of {len(tokens) + 1} tokens exceeds {length}")
            mask[row, start:] = 1
            if rng.random() < dropout:
                tokens[1:] = [processor.pad_token_id] * (len(tokens) - 1)
                mask[row, start + 1 :] = 0
            ids[row, start:] = [*tokens, tags[tag]]
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def conversations(
        self,
        num: int,
        step: int,
        length: int,
        separate: float = 0.0,
        where_weight: float = 1.0,
    ) -> Conversations:
        """Fresh pictures, each with as many questions and answers as `length` tokens hold.

        In a share `separate` of the rows each question stands alone after the picture, blind to
        the others, whose answers would give its own away; in the rest they are turns of one
        conversation. `where_weight`: see `shuffled`.
        """
        rng = np.random.default_rng([self.seed, 3, step])
        processor = self.processor
        ids = np.full((num, length), processor.pad_token_id, np.int64)
        labels = np.full_like(ids, IGNORED)
        blocks = np.zeros_like(ids)
        positions = np.tile(np.arange(length), (num, 1))
        scenes = [training_scene(rng, TRAINING_SHARES) for _ in range(num)]
        begin = [processor.bos_token_id, *self._ids("User: "), processor.begin_of_image_id]
        begin += [processor.image_token_id] * processor.num_image_tokens
        begin += [processor.end_of_image_id]
        for row, scene in enumerate(scenes):
            at = len(begin)
            ids[row, :at] = begin
            alone = rng.random() < separate
            for turn, question in enumerate(shuffled(ask(scene, rng), rng, where_weight)):
                start = "\n" if alone or turn == 0 else "User: "
                asked = self._ids(f"{start}{question.text}\n\nAssistant:")
                answer = (*self._ids(f" {question.answer}"), processor.eos_token_id)
                end = at + len(asked) + len(answer)
                if end > length:
                    break
                ids[row, at:end] = asked + answer
                labels[row, at + len(asked) : end] = answer
                if alone:
                    blocks[row, at:end] = turn + 1
                    positions[row, at:end] = len(begin) + np.arange(end - at)
                at = end
        return Conversations(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(blocks),
            torch.from_numpy(positions),
            self._pixels(scenes),
        )

    def labelled_patches(self, num: int, step: int, patches: int) -> tuple[Tensor, Tensor]:
        """Fresh pictures and what covers their patches.

        Returns:
            Pixels (num, 3, H, W) in [-1, 1] and labels (num, 2, patches, patches), see
            `patch_labels`.
        """
        rng = np.random.default_rng([self.seed, 5, step])
        scenes = [training_scene(rng, TRAINING_SHARES) for _ in range(num)]
        return self._pixels(scenes), self._labels(scenes, patches)

    def pictures(self, indices: np.ndarray) -> Tensor:
        """The pictures `indices`, (num, 3, H, W) in [-1, 1]."""
        return self._pixels([self._scene(int(i)) for i in indices])

    def picture_labels(self, indices: np.ndarray, patches: int) -> Tensor:
        """What covers the patches of the pictures `indices`, (num, 2, patches, patches)."""
        return self._labels([self._scene(int(i)) for i in indices], patches)

    def _labels(self, scenes: list[Scene], patches: int) -> Tensor:
        return torch.from_numpy(np.stack([patch_labels(scene, patches) for scene in scenes]))

    def _pixels(self, scenes: list[Scene]) -> Tensor:
        size = self.processor.image_processor.image_size
        return self.processor.image_processor([draw(scene, size) for scene in scenes])
