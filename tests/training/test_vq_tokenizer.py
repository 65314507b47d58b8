"""Training of the VQ tokenizer at toy size: its losses, what it learns, its export."""

from __future__ import annotations

import pytest
import torch
from transformers.models.janus.modeling_janus import JanusVQVAE

from janusflow.models.vq_head import nearest_codes
from janusflow.settings import fill
from janusflow.training.loop import train
from janusflow.training.vq_tokenizer import VQTokenizerObjective, VQTokenizerSettings

SMALL = {
    "code_width": 5,
    "channel_multiplier": [1, 1, 1, 1],
    "latent_channels": 16,
    "batch_size": 4,
    "loop": {"steps": 40, "precision": "no", "log_every": 1, "optimizer": {"learning_rate": 3e-3}},
}


@pytest.fixture
def objective() -> VQTokenizerObjective:
    return VQTokenizerObjective(fill(VQTokenizerSettings, SMALL))


def test_codes_are_the_corners_of_a_cube_and_signs_find_the_nearest(objective):
    assert objective.codebook.unique(dim=0).shape == (32, 5)
    assert (objective.codebook.abs() == 1).all()
    features = objective.features(objective.batch(0)["pixels"]).movedim(1, -1)
    tokens = nearest_codes(features, objective.codebook)
    assert torch.equal(objective.codebook[tokens], features.sign())
    assert len(tokens.unique()) > 16  # from the start


def test_the_gradient_of_pixels_goes_straight_through_the_lookup(objective):
    losses = objective(**objective.batch(0))
    for name in ("absolute", "squared"):
        (reached,) = torch.autograd.grad(
            losses[name], objective.tokenizer.encoder.conv_in.weight, retain_graph=True
        )
        assert reached.any()


def test_training_learns_and_exports_what_the_head_loads(objective, tmp_path):
    with torch.no_grad():
        before = objective.preview(0, tmp_path)["psnr"]
    assert train(objective, objective.settings.loop, tmp_path)
    with torch.no_grad():
        after = objective.preview(40, tmp_path)
    assert after["psnr"] > before + 1
    assert 0 < after["codes_used"] <= 1
    loaded = JanusVQVAE.from_pretrained(tmp_path / "final")
    assert loaded.config.num_patches == 8
    tokens = torch.randint(0, 32, (1, 64))
    assert loaded.decode(tokens).shape == (1, 3, 64, 64)
