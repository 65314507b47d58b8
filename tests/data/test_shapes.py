"""The shapes world: scenes, captions, questions, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from janusflow.data.shapes import (
    KINDS,
    QUESTION_KINDS,
    ask,
    describe,
    draw,
    held_out_questions,
    held_out_requests,
    sample_scene,
)
from janusflow.data.shapes.batches import shuffled
from janusflow.data.shapes.language import (
    Item,
    Question,
    Request,
    is_held_out,
    scene_meaning,
    training_caption,
    training_scene,
)


def scenes(num: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(num)]


def test_the_same_seed_draws_the_same_pictures():
    first, second = ([draw(scene).tobytes() for scene in scenes(20, 3)] for _ in range(2))
    assert first == second
    assert first != [draw(scene).tobytes() for scene in scenes(20, 4)]


@pytest.mark.parametrize("size", [32, 64, 100])
def test_a_scene_is_drawn_at_any_size(size):
    assert draw(scenes(1)[0], size).size == (size, size)


def test_objects_stay_inside_and_never_touch():
    for scene in scenes(500):
        for item in scene.objects:
            reach = 1.1 * item.radius
            assert reach <= item.x <= 1 - reach
            assert reach <= item.y <= 1 - reach
        for i, a in enumerate(scene.objects):
            for b in scene.objects[:i]:
                gap = np.hypot(a.x - b.x, a.y - b.y)
                assert gap > a.radius + b.radius


def test_no_training_caption_has_a_held_out_meaning():
    rng = np.random.default_rng(0)
    trained = {training_caption(scene, rng).meaning for scene in scenes(3000)}
    evaluated = {request.meaning for request in held_out_requests(120)}
    assert trained
    assert evaluated
    assert not trained & evaluated


def test_no_training_question_is_about_a_held_out_scene():
    rng = np.random.default_rng(0)
    trained = {scene_meaning(training_scene(rng)) for _ in range(3000)}
    evaluated = {scene_meaning(scene) for scene, _ in held_out_questions(120)}
    assert trained
    assert evaluated
    assert not trained & evaluated


def test_evaluation_goes_through_the_kinds_in_turn_and_repeats_with_its_seed():
    requests = held_out_requests(60)
    assert [request.kind for request in requests[:6]] == list(KINDS)
    assert all(is_held_out(request.meaning) for request in requests)
    assert requests == held_out_requests(60)
    assert requests != held_out_requests(60, seed=1)
    kinds = [question.kind for _, question in held_out_questions(40)]
    assert kinds[:4] == list(QUESTION_KINDS)


def test_a_meaning_is_the_same_in_other_words():
    a, b = Item("circle", "red"), Item("square", "blue")
    one = Request("position", "a red circle above a blue square", (a, b), "above")
    other = Request("position", "A blue square below a red circle.", (b, a), "below")
    different = Request("position", "a red circle below a blue square", (a, b), "below")
    assert one.meaning == other.meaning != different.meaning


def test_a_caption_of_a_kind_that_does_not_fit_is_refused():
    group = next(scene for scene in scenes(50) if scene.layout == "group")
    with pytest.raises(ValueError, match="group scene has captions of kinds"):
        describe(group, np.random.default_rng(0), "position")


def test_the_phrases_are_english():
    assert Item("circle", "red").phrase() == "a red circle"
    assert Item("cross", "blue", 3).phrase() == "three blue crosses"
    assert Item("cross", None, 2).phrase(digits=True) == "2 crosses"


def test_yes_and_no_are_both_asked_for_and_answers_are_true():
    answers = {"yes": 0, "no": 0}
    rng = np.random.default_rng(1)
    for scene in scenes(300):
        present = {f"Is there a {o.color} {o.shape}?" for o in scene.objects}
        for question in ask(scene, rng):
            if question.kind == "yes-no":
                answers[question.answer] += 1
            if question.text in present:
                assert question.answer == "yes"
            if question.text == "How many shapes are there?":
                words = ["one", "two", "three", "four"]
                assert question.answer == words[len(scene.objects) - 1]
    assert 0.6 < answers["yes"] / answers["no"] < 1.6


def test_questions_of_a_weight_come_early_as_often_as_it_says():
    rng = np.random.default_rng(0)
    questions = [Question("where", "a", "b"), *[Question("which", "c", "d")] * 4]
    first = sum(shuffled(questions, rng, 4.0)[0].kind == "where" for _ in range(4000))
    assert abs(first / 4000 - 4 / (4 + 4)) < 0.03
    unlike = [Question("which", str(number), "b") for number in range(9)]
    assert shuffled(unlike, rng, 1.0) == unlike  # in the order that they were asked in
    assert sorted(q.text for q in shuffled(questions, rng, 4.0)) == ["a", "c", "c", "c", "c"]
