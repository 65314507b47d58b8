"""How velocities with and without a condition become one."""

from __future__ import annotations

import math

import pytest
import torch

from janusflow.errors import SettingsError
from janusflow.flow.guidance import (
    Guidance,
    Guider,
    cfg_zero_star,
    check_guidance_scale,
    classifier_free_guidance,
    rescale,
)

CONDITIONAL, UNCONDITIONAL = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])
HALF = torch.tensor(0.5, dtype=torch.float64)


def velocities(seed=0, rows=3):
    x, conditional, unconditional = torch.randn(
        3, rows, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return x, conditional, unconditional


def test_a_scale_of_one_is_the_conditional_velocity():
    found = classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, 1.0)
    torch.testing.assert_close(found, CONDITIONAL)


def test_larger_scales_go_further_from_the_unconditional_velocity():
    found = classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, 3.0)
    torch.testing.assert_close(found, torch.tensor([2.0, 8.0]))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None, True])
def test_a_scale_that_is_no_finite_number_is_refused(scale):
    with pytest.raises(SettingsError, match="guidance_scale"):
        check_guidance_scale(scale)


def test_cfg_zero_guides_from_the_unconditional_velocitys_nearest_multiple():
    conditional = torch.tensor([[3.0, 4.0]])
    unconditional = torch.tensor([[10.0, 0.0]])
    # The nearest multiple of (10, 0) to (3, 4) is (3, 0).
    found = cfg_zero_star(conditional, unconditional, 2.0)
    torch.testing.assert_close(found, torch.tensor([[3.0, 8.0]]))


def test_cfg_zero_takes_each_sample_by_itself():
    _, conditional, unconditional = velocities()
    together = cfg_zero_star(conditional, unconditional, 3.0)
    alone = [
        cfg_zero_star(c[None], u[None], 3.0)
        for c, u in zip(conditional, unconditional, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_rescaling_wholly_gives_the_deviation_of_the_conditional_velocity():
    _, conditional, unconditional = velocities()
    guided = classifier_free_guidance(conditional, unconditional, 7.0)
    wholly = rescale(guided, conditional, 1.0)
    torch.testing.assert_close(wholly.std((1, 2, 3)), conditional.std((1, 2, 3)))
    assert torch.equal(rescale(guided, conditional, 0.0), guided)
    torch.testing.assert_close(rescale(guided, conditional, 0.25), 0.75 * guided + 0.25 * wholly)


def test_apg_that_keeps_everything_is_classifier_free_guidance():
    x, conditional, unconditional = velocities()
    guider = Guider(Guidance(method="apg", apg_parallel=1.0, apg_momentum=0.0))
    for t in (0.0, 0.5, 1.0):
        found = guider(x, torch.tensor(t), conditional, unconditional, 4.0)
        torch.testing.assert_close(found, classifier_free_guidance(conditional, unconditional, 4.0))


def test_apg_moves_the_predicted_image_at_right_angles_to_itself():
    x, conditional, unconditional = velocities()
    found = Guider(Guidance(method="apg"))(x, HALF, conditional, unconditional, 4.0)
    predicted = x + 0.5 * conditional
    moved = 0.5 * (found - conditional)
    assert moved.norm() > 1
    torch.testing.assert_close(
        (moved * predicted).sum((1, 2, 3)), torch.zeros(3, dtype=torch.float64)
    )


def test_apg_shortens_differences_beyond_its_norm_and_no_others():
    x, conditional, unconditional = velocities()
    difference = 0.5 * (conditional - unconditional)
    norms = difference.flatten(1).norm(dim=1)
    limit = float(norms.median())
    guidance = Guidance(method="apg", apg_parallel=1.0, apg_momentum=0.0, apg_norm=limit)
    moved = 0.5 * (Guider(guidance)(x, HALF, conditional, unconditional, 2.0) - conditional)
    torch.testing.assert_close(moved.flatten(1).norm(dim=1), norms.clamp(max=limit))


def test_apg_adds_the_difference_of_the_evaluation_before_by_its_momentum():
    x, conditional, unconditional = velocities()
    guidance = Guidance(method="apg", apg_parallel=1.0, apg_momentum=-0.5)
    guider = Guider(guidance)
    guider(x, HALF, conditional, unconditional, 2.0)
    again = guider(x, HALF, conditional, unconditional, 2.0)
    expected = conditional + 0.5 * (conditional - unconditional)
    torch.testing.assert_close(again, expected)


def test_a_new_guider_remembers_nothing():
    x, *pair = velocities()
    guidance = Guidance(method="apg")
    first = Guider(guidance)(x, HALF, *pair, 2.0)
    assert torch.equal(first, Guider(guidance)(x, HALF, *pair, 2.0))


def test_the_scale_is_one_outside_the_interval():
    guidance = Guidance(scale=3.0, interval=(0.25, 0.75))
    assert [guidance.scale_at(t) for t in (0.0, 0.25, 0.5, 0.75, 0.8)] == [1.0, 3.0, 3.0, 3.0, 1.0]


def test_a_schedule_gives_the_scale_of_each_time():
    guidance = Guidance(scale=lambda t: 1 + 4 * t)
    assert [guidance.scale_at(t) for t in (0.0, 0.5, 1.0)] == [1.0, 3.0, 5.0]
    assert not guidance.off
    with pytest.raises(SettingsError, match="finite"):
        Guidance(scale=lambda t: math.nan).scale_at(0.5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"scale": math.inf}, "guidance_scale"),
        ({"interval": (0.6, 0.3)}, "interval"),
        ({"interval": (0.0, 1.5)}, "interval"),
        ({"interval": 0.5}, "interval"),
        ({"method": "cgf"}, "unknown guidance method 'cgf'; known: cfg"),
        ({"zero_init_steps": -1}, "zero_init_steps"),
        ({"rescale": 1.5}, "rescale"),
        ({"apg_norm": 0.0}, "apg_norm"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(options, named):
    with pytest.raises(SettingsError, match=named):
        Guidance(**options)
