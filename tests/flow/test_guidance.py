"""Classifier-free guidance."""

from __future__ import annotations

import pytest
import torch

from janusflow.errors import SettingsError
from janusflow.flow.guidance import check_guidance_scale, classifier_free_guidance

CONDITIONAL, UNCONDITIONAL = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.0])


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
