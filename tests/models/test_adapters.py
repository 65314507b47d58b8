"""The layers of the adapters between latents and the language model."""

from __future__ import annotations

import pytest
import torch

from janusflow.models.adapters import GlobalResponseNorm


def norm_of_random_weights(num_channels: int) -> GlobalResponseNorm:
    torch.manual_seed(0)
    norm = GlobalResponseNorm(num_channels)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight)
    return norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_response_is_a_channels_length_over_the_picture_among_the_channels(dtype):
    norm = norm_of_random_weights(6).to(dtype)
    x = (300 * torch.randn(2, 3, 4, 6)).to(dtype)  # whose squares float16 could not hold
    exact = norm_of_random_weights(6).double()
    length = torch.linalg.vector_norm(x.double(), dim=(1, 2), keepdim=True)
    response = length / (length.mean(-1, keepdim=True) + 1e-6)
    expected = exact.bias + (exact.weight * response + 1) * x.double()
    found = norm(x)
    assert found.dtype == dtype
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=8 * precision, atol=1500 * precision)


def test_a_channel_that_is_silent_leaves_gradients_finite():
    norm = norm_of_random_weights(3)
    x = torch.randn(2, 4, 4, 3)
    x[..., 1] = 0
    x.requires_grad_()
    norm(x).square().sum().backward()
    for gradient in (x.grad, norm.weight.grad, norm.bias.grad):
        assert torch.isfinite(gradient).all()
