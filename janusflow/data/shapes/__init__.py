"""The shapes world: small pictures of coloured shapes, what can be said of them and asked.

`scene` holds the vocabulary and draws, `language` captions scenes and asks about them, `dataset`
makes endless deterministic streams of samples. Judging pictures is `janusflow.evaluation.shapes`.
"""

from janusflow.data.shapes.language import (
    KINDS,
    QUESTION_KINDS,
    Question,
    Request,
    ask,
    describe,
    held_out_questions,
    held_out_requests,
)
from janusflow.data.shapes.scene import (
    BACKGROUNDS,
    COLORS,
    RELATIONS,
    SHAPES,
    ZONES,
    Scene,
    ShapeObject,
    draw,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "KINDS",
    "QUESTION_KINDS",
    "RELATIONS",
    "SHAPES",
    "ZONES",
    "Question",
    "Request",
    "Scene",
    "ShapeObject",
    "ask",
    "describe",
    "draw",
    "held_out_questions",
    "held_out_requests",
    "sample_scene",
]
