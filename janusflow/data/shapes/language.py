"""What is said and asked about scenes: captions of GenEval's six kinds, four kinds of questions.

A `Request` is a caption with its meaning, so that a picture can be judged against it. A fixed
share of all meanings is held out: no training caption has one of them, whatever its wording, and
evaluation uses them only. Questions are held out by the scene that they are asked about.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from janusflow.data.shapes.scene import COLORS, SHAPES, Scene, sample_scene

KINDS = ("single", "two", "counting", "colors", "position", "attribution")
QUESTION_KINDS = ("yes-no", "which", "how-many", "where")
HELD_OUT_SHARE = 0.15

_NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_KINDS_OF_LAYOUT = {
    "single": ("single", "colors"),
    "pair": ("two", "position", "attribution"),
    "group": ("counting",),
}
_OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


@dataclass(frozen=True)
class Item:
    """A noun phrase: how many of which shape, and in which colour when one is named."""

    shape: str
    color: str | None = None
    count: int = 1

    def phrase(self, *, article: str = "a", digits: bool = False) -> str:
        """Words for the item, such as "a red circle" or "three crosses"."""
        noun = self.shape if self.color is None else f"{self.color} {self.shape}"
        if self.count == 1:
            return f"{article} {noun}"
        number = str(self.count) if digits else _NUMBERS[self.count]
        return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


@dataclass(frozen=True)
class Request:
    """A caption and what a picture must show to fulfil it.

    Everything that is named must hold and nothing else may be in the picture. With a `relation`,
    the first item stands in it to the second.
    """

    kind: str
    text: str
    items: tuple[Item, ...]
    relation: str | None = None
    zone: str | None = None
    background: str | None = None

    @property
    def meaning(self) -> str:
        """The same for all wordings: order of mention and direction of a relation are free."""
        items, relation = self.items, self.relation
        if len(items) == 2 and (items[0].shape, items[0].color) > (items[1].shape, items[1].color):
            items = items[::-1]
            relation = _OPPOSITE[relation] if relation else None
        return f"{self.kind}|{items}|{relation}|{self.zone}|{self.background}"


@dataclass(frozen=True)
class Question:
    """A question about a scene with its one right answer."""

    kind: str
    text: str
    answer: str


def is_held_out(meaning: str) -> bool:
    """Whether a meaning belongs to evaluation; a fixed function of the text alone."""
    return zlib.crc32(meaning.encode()) % 1000 < 1000 * HELD_OUT_SHARE


def describe(scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Request:
    """Captions a scene truthfully, in one of the kinds that fit its layout.

    Raises:
        ValueError: If `kind` does not fit the scene's layout.
    """
    fitting = _KINDS_OF_LAYOUT[scene.layout]
    if kind is not None and kind not in fitting:
        raise ValueError(f"a {scene.layout} scene has captions of kinds {fitting}, not {kind!r}")
    kind = kind or str(rng.choice(fitting))
    background = scene.background if rng.random() < 0.3 else None
    objects, relation = scene.objects, scene.relation
    if len(objects) == 2 and rng.random() < 0.5:
        objects = objects[::-1]
        relation = _OPPOSITE[relation] if relation else None

    zone = None
    if kind in ("single", "colors"):
        zone = scene.zone if rng.random() < 0.4 else None
        color = objects[0].color if kind == "colors" else None
        items: tuple[Item, ...] = (Item(objects[0].shape, color),)
    elif kind == "counting":
        color = objects[0].color if rng.random() < 0.6 else None
        items = (Item(objects[0].shape, color, len(objects)),)
    else:
        colored = kind == "attribution" or (kind == "position" and rng.random() < 0.7)
        items = tuple(Item(o.shape, o.color if colored else None) for o in objects)
    relation = relation if kind == "position" else None
    text = _wording(items, relation, zone, background, rng)
    return Request(kind, text, items, relation, zone, background)


def _wording(
    items: tuple[Item, ...],
    relation: str | None,
    zone: str | None,
    background: str | None,
    rng: np.random.Generator,
) -> str:
    phrases = [item.phrase(digits=rng.random() < 0.15) for item in items]
    if relation is None:
        text = " and ".join(phrases)
    else:
        sideways = relation in ("left of", "right of")
        words = f"to the {relation}" if sideways and rng.random() < 0.5 else relation
        text = f"{phrases[0]} {words} {phrases[1]}"
    if zone is not None:
        text += f" {zone}"
    if background is not None:
        text += f" on a {background} background"
    if rng.random() < 0.4:
        medium = rng.choice(["a picture", "a drawing", "an image", "a photo"])
        text = f"{medium} of {text}"
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.1:
        text += "."
    return text


def training_caption(scene: Scene, rng: np.random.Generator) -> Request:
    """A caption of the scene whose meaning is not held out."""
    while True:
        request = describe(scene, rng)
        if not is_held_out(request.meaning):
            return request


def held_out_requests(num: int, seed: int = 0) -> list[Request]:
    """Evaluation prompts, the six kinds in turn, all of held-out meaning.

    Args:
        num: How many; kinds with few held-out meanings may repeat one in other words.
        seed: Chooses the prompts; the same seed gives the same list.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    requests: list[Request] = []
    seen: set[str] = set()
    while len(requests) < num:
        kind = KINDS[len(requests) % len(KINDS)]
        for attempt in range(2000):
            scene = sample_scene(rng)
            if kind not in _KINDS_OF_LAYOUT[scene.layout]:
                continue
            request = describe(scene, rng, kind)
            if is_held_out(request.meaning) and (request.text not in seen or attempt > 1000):
                break
        seen.add(request.text)
        requests.append(request)
    return requests


def scene_meaning(scene: Scene) -> str:
    """What a scene shows, without exact positions: the unit by which questions are held out."""
    objects = sorted((o.shape, o.color) for o in scene.objects)
    return f"scene|{objects}|{scene.zone}"


def ask(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All questions that the scene answers without ambiguity, in random order."""
    questions = [*_existence(scene, rng), *_counts(scene, rng)]
    if scene.layout == "single":
        questions += _about_single(scene)
    elif scene.layout == "pair":
        questions += _about_pair(scene, rng)
    else:
        questions += _about_group(scene, rng)
    return [questions[i] for i in rng.permutation(len(questions))]


def _yes_no(text: str, truth: bool) -> Question:
    return Question("yes-no", text, "yes" if truth else "no")


def _existence(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    present = {(o.shape, o.color) for o in scene.objects}
    shape, color = sorted(present)[rng.integers(len(present))]
    yield _yes_no(f"Is there {Item(shape, color).phrase()}?", True)
    # A wrong colour, a wrong shape, or a wrong binding of what is there.
    wrong = [(shape, c) for c in COLORS] + [(s, color) for s in SHAPES]
    wrong += [(s, c) for s, _ in present for _, c in present]
    absent = [pair for pair in wrong if pair not in present]
    shape, color = absent[rng.integers(len(absent))]
    yield _yes_no(f"Is there {Item(shape, color).phrase()}?", False)
    shape = str(rng.choice(list(SHAPES)))
    yield _yes_no(f"Is there {Item(shape).phrase()}?", shape in {s for s, _ in present})


def _counts(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    number = _NUMBERS[len(scene.objects)]
    yield Question("how-many", "How many shapes are there?", number)
    item = scene.objects[rng.integers(len(scene.objects))]
    same = sum(o.shape == item.shape for o in scene.objects)
    plural = Item(item.shape, count=2).phrase().removeprefix("two ")
    yield Question("how-many", f"How many {plural} are there?", _NUMBERS[same])


def _about_single(scene: Scene) -> list[Question]:
    item = scene.objects[0]
    return [
        Question("which", "What color is the shape?", item.color),
        Question("which", f"What color is the {item.shape}?", item.color),
        Question("which", "What shape is this?", item.shape),
        Question("where", f"Where is the {item.shape}?", str(scene.zone)),
        Question("which", "What color is the background?", scene.background),
    ]


def _about_pair(scene: Scene, rng: np.random.Generator) -> list[Question]:
    first, second = scene.objects
    relation = str(scene.relation)
    if rng.random() < 0.5:
        first, second, relation = second, first, _OPPOSITE[relation]
    asked = str(rng.choice([relation, _OPPOSITE[relation]]))
    side = {"left of": "on the left", "right of": "on the right"}.get(relation, relation)
    place = {"above": "at the top", "below": "at the bottom"}.get(relation, side)
    return [
        Question("which", f"What color is the {first.shape}?", first.color),
        Question("which", f"What shape is {second.color}?", second.shape),
        Question("which", f"What is {side}?", Item(first.shape, first.color).phrase()),
        Question(
            "which",
            f"What is {relation} the {second.shape}?",
            Item(first.shape, first.color).phrase(),
        ),
        Question("where", f"Where is the {first.shape}?", place),
        Question("where", f"Where is the {first.color} {first.shape}?", place),
        _yes_no(f"Is the {first.shape} {asked} the {second.shape}?", asked == relation),
    ]


def _about_group(scene: Scene, rng: np.random.Generator) -> list[Question]:
    item = scene.objects[0]
    plural = Item(item.shape, count=2).phrase().removeprefix("two ")
    asked = int(rng.integers(2, 5))
    return [
        Question("which", f"What color are the {plural}?", item.color),
        Question("which", "What shapes are these?", plural),
        _yes_no(f"Are there {_NUMBERS[asked]} {plural}?", asked == len(scene.objects)),
    ]


def training_scene(
    rng: np.random.Generator, shares: tuple[float, float, float] = (0.3, 0.4, 0.3)
) -> Scene:
    """A scene about which training may ask; `shares` as for `sample_scene`."""
    while True:
        scene = sample_scene(rng, shares)
        if not is_held_out(scene_meaning(scene)):
            return scene


def held_out_questions(num: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """Evaluation questions, the four kinds in turn, each about a scene held out of training."""
    rng = np.random.default_rng([seed, 0xA5C])
    chosen: list[tuple[Scene, Question]] = []
    while len(chosen) < num:
        kind = QUESTION_KINDS[len(chosen) % len(QUESTION_KINDS)]
        scene = sample_scene(rng)
        if not is_held_out(scene_meaning(scene)):
            continue
        fitting = [question for question in ask(scene, rng) if question.kind == kind]
        if fitting:
            chosen.append((scene, fitting[0]))
    return chosen
