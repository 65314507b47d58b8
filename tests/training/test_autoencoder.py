"""Training of the small autoencoder: its losses against closed forms, its export."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from janusflow.errors import SettingsError
from janusflow.settings import fill
from janusflow.training.autoencoder import (
    AutoencoderObjective,
    AutoencoderSettings,
    object_weights,
)
from janusflow.training.loop import train

SMALL = {
    "block_out_channels": [8, 8, 8, 8],
    "batch_size": 4,
    "loop": {"steps": 60, "precision": "no", "log_every": 1, "optimizer": {"learning_rate": 3e-3}},
}


@pytest.fixture
def objective() -> AutoencoderObjective:
    torch.manual_seed(0)
    return AutoencoderObjective(fill(AutoencoderSettings, SMALL))


def test_the_kl_loss_is_that_of_diffusers_for_each_latent_value(objective):
    batch = objective.batch(0)
    posterior = objective.vae.encode(batch["pixels"]).latent_dist
    expected = posterior.kl().mean() / posterior.mean[0].numel()
    found = objective(**batch)["kl"] / objective.settings.kl_weight
    torch.testing.assert_close(found, expected)


def test_objects_count_more_than_the_background(objective):
    batch = objective.batch(0)
    pixels = batch["pixels"]
    decoded = torch.zeros_like(pixels)
    objective.vae.decode = lambda latents: type("Output", (), {"sample": decoded})
    on_object = (pixels != pixels[:, :, :1, :1]).any(1, keepdim=True)
    error = pixels.abs()
    expected = (error * torch.where(on_object, 4.0, 1.0)).mean()
    found = objective(**batch)["absolute"]
    # Antialiased edges that are nearly background count as background.
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0)
    assert found > 1.05 * error.mean()


def test_a_margin_counts_pixels_around_objects_as_theirs():
    pixels = torch.zeros(1, 3, 8, 8)
    pixels[..., 3, 4] = 1
    assert (object_weights(pixels, 4.0) == 4).sum() == 1
    weights = object_weights(pixels, 4.0, margin=1)
    expected = torch.ones(1, 1, 8, 8)
    expected[..., 2:5, 3:6] = 4
    assert torch.equal(weights, expected)
    with pytest.raises(SettingsError, match="object_margin is at least 0, not -1"):
        object_weights(pixels, 4.0, margin=-1)


def test_a_decoder_trains_on_with_the_encoder_and_its_latents_as_they_were(tmp_path):
    few = {"steps": 3, "precision": "no"}
    sizes = {"block_out_channels": [8, 8, 8], "latent_channels": 2}
    first = fill(AutoencoderSettings, {**SMALL, **sizes, "loop": few})
    assert train(AutoencoderObjective(first), first.loop, tmp_path / "first")
    kept = str(tmp_path / "kept")
    vae = AutoencoderKL.from_pretrained(tmp_path / "first" / "final")
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(kept)
    # The sizes are those of what is taken over, whatever the settings say.
    settings = fill(AutoencoderSettings, {"encoder": kept, "batch_size": 4, "loop": few})
    assert train(AutoencoderObjective(settings), settings.loop, tmp_path / "second")
    before = AutoencoderKL.from_pretrained(kept)
    after = AutoencoderKL.from_pretrained(tmp_path / "second" / "final")
    assert after.config.scaling_factor == 0.5
    assert kept not in (tmp_path / "second" / "final" / "config.json").read_text()
    objective = AutoencoderObjective(settings)
    assert objective.sources() == {"encoder": kept}
    pixels = objective.batch(0)["pixels"]
    with torch.no_grad():
        latents = before.encode(pixels).latent_dist.mean
        assert torch.equal(after.encode(pixels).latent_dist.mean, latents)
        assert not torch.equal(after.decode(latents).sample, before.decode(latents).sample)


def test_the_decoder_sees_latents_with_noise_in_their_own_deviations(objective):
    seen = []
    decode = objective.vae.decode
    objective.vae.decode = lambda latents: seen.append(latents) or decode(latents)
    batch = objective.batch(0)
    posterior = objective.vae.encode(batch["pixels"]).latent_dist
    objective(**batch)
    added = 0.1 * posterior.mean.std()  # the default
    torch.testing.assert_close(seen[0], posterior.mean + (posterior.std + added) * batch["noise"])


def test_training_learns_and_exports_latents_of_unit_deviation(objective, tmp_path):
    with torch.no_grad():
        before = objective.preview(0, tmp_path)["psnr"]
    assert train(objective, objective.settings.loop, tmp_path)
    with torch.no_grad():
        assert objective.preview(60, tmp_path)["psnr"] > before + 1.5
    vae = AutoencoderKL.from_pretrained(tmp_path / "final")
    with torch.no_grad():
        latents = vae.encode(objective.batch(99)["pixels"]).latent_dist.mean
    deviation = (latents * vae.config.scaling_factor).std().item()
    assert deviation == pytest.approx(1.0, abs=0.2)


def test_the_preview_reports_a_psnr_and_draws_a_sheet(objective, tmp_path):
    with torch.no_grad():
        figures = objective.preview(1, tmp_path)
    assert 0 < figures["psnr"] < 30
    assert (tmp_path / "preview.png").is_file()
