"""Training of the VQ tokenizer at toy size: its losses, what it learns, its export."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize
from transformers.models.janus.modeling_janus import JanusVQVAE

from janusflow.settings import fill
from janusflow.training.loop import train
from janusflow.training.vq_tokenizer import VQTokenizerObjective, VQTokenizerSettings

SMALL = {
    "num_codes": 32,
    "channel_multiplier": [1, 1, 1, 1],
    "latent_channels": 16,
    "batch_size": 4,
    "loop": {"steps": 40, "precision": "no", "log_every": 1, "optimizer": {"learning_rate": 3e-3}},
}


@pytest.fixture
def objective() -> VQTokenizerObjective:
    return VQTokenizerObjective(fill(VQTokenizerSettings, SMALL))


def test_losses_pull_codes_and_features_towards_each_other(objective):
    losses = objective(**objective.batch(0))
    features = objective.features(objective.batch(0)["pixels"]).movedim(1, -1)
    codes = normalize(objective.codebook, dim=-1)
    cosine = (features @ codes.T).amax(-1)
    expected = ((2 - 2 * cosine) / features.shape[-1]).mean()
    torch.testing.assert_close(losses["codes"], expected)
    torch.testing.assert_close(losses["commitment"], 0.25 * expected)
    of_codes = torch.autograd.grad(losses["codes"], objective.codebook, retain_graph=True)[0]
    of_features = torch.autograd.grad(
        losses["commitment"], objective.tokenizer.quant_conv.weight, retain_graph=True
    )[0]
    assert of_codes.any()
    assert of_features.any()
    (crossed,) = torch.autograd.grad(
        losses["commitment"], objective.codebook, allow_unused=True, retain_graph=True
    )
    assert crossed is None
    # The pixels' gradient goes straight through the lookup, to the encoder and not to the codes.
    reached = torch.autograd.grad(
        losses["absolute"], objective.tokenizer.encoder.conv_in.weight, retain_graph=True
    )[0]
    assert reached.any()
    (crossed,) = torch.autograd.grad(losses["absolute"], objective.codebook, allow_unused=True)
    assert crossed is None


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


def test_a_decoder_trains_on_with_the_encoder_and_its_tokens_as_they_were(tmp_path):
    few = {"steps": 3, "precision": "no"}
    first = fill(VQTokenizerSettings, {**SMALL, "loop": few})
    assert train(VQTokenizerObjective(first), first.loop, tmp_path / "first")
    kept = str(tmp_path / "first" / "final")
    # The sizes are those of what is taken over, whatever the settings say.
    settings = fill(VQTokenizerSettings, {"encoder": kept, "batch_size": 4, "loop": few})
    objective = VQTokenizerObjective(settings)
    assert objective.sources() == {"encoder": kept}
    assert train(objective, settings.loop, tmp_path / "second")
    before = JanusVQVAE.from_pretrained(kept)
    after = JanusVQVAE.from_pretrained(tmp_path / "second" / "final")
    assert torch.equal(after.quantize.embedding.weight, before.quantize.embedding.weight)
    pixels = objective.batch(0)["pixels"]
    with torch.no_grad():
        tokens = before.encode(pixels).image_tokens.view(4, 64)
        assert torch.equal(after.encode(pixels).image_tokens.view(4, 64), tokens)
        assert not torch.equal(after.decode(tokens), before.decode(tokens))
