"""Measures of pictures against closed forms and other libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from tiny import make_pipeline
from tiny_clip import write_clip
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from janusflow.errors import SettingsError
from janusflow.evaluation.features import (
    clip_scorer,
    feature_extractor,
    module_hash,
    tower_extractor,
)
from janusflow.evaluation.metrics import bootstrap, frechet_distance, mmd, psnr, ssim

RNG = np.random.default_rng(0)


def pictures(num: int = 3) -> tuple[np.ndarray, np.ndarray]:
    first = RNG.random((num, 24, 24, 3), np.float32)
    return first, np.clip(first + 0.1 * RNG.standard_normal(first.shape), 0, 1).astype(np.float32)


def test_psnr_is_that_of_scikit_image() -> None:
    first, second = pictures()
    expected = [
        peak_signal_noise_ratio(one, other, data_range=1.0)
        for one, other in zip(first, second, strict=True)
    ]
    np.testing.assert_allclose(psnr(first, second), expected, rtol=1e-5)
    assert psnr(first, first).min() == pytest.approx(120)


def test_ssim_has_the_gaussian_window_of_the_paper() -> None:
    first, second = pictures(1)
    expected = structural_similarity(
        first[0], second[0], channel_axis=-1, data_range=1.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, win_size=11,
    )  # fmt: skip
    assert ssim(first, second)[0] == pytest.approx(expected, abs=1e-6)
    assert ssim(first, first)[0] == pytest.approx(1)


def test_the_frechet_distance_is_that_of_the_formula_with_sqrtm() -> None:
    first = RNG.standard_normal((200, 6)) @ RNG.standard_normal((6, 6))
    second = RNG.standard_normal((150, 6)) + 0.5
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    gap = np.square(first.mean(0) - second.mean(0)).sum()
    expected = gap + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_shifted_features_is_the_squared_shift() -> None:
    features = RNG.standard_normal((50, 4))
    assert frechet_distance(features, features + np.array([3, 0, 4, 0])) == pytest.approx(25)


def test_mmd_is_the_kernel_s_means_over_all_pairs_and_over_pairs_of_two() -> None:
    first, second = RNG.standard_normal((7, 3)), RNG.standard_normal((5, 3)) + 1

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        gap = x / np.linalg.norm(x) - y / np.linalg.norm(y)
        return float(np.exp(-np.square(gap).sum() / (2 * 10**2)))

    def mean(xs: np.ndarray, ys: np.ndarray, *, of_two: bool = False) -> float:
        pairs = [(i, j) for i in range(len(xs)) for j in range(len(ys)) if not of_two or i != j]
        return float(np.mean([kernel(xs[i], ys[j]) for i, j in pairs]))

    cross = 2 * mean(first, second)
    unbiased = mean(first, first, of_two=True) + mean(second, second, of_two=True) - cross
    biased = mean(first, first) + mean(second, second) - cross
    expected = (1000 * unbiased, 1000 * biased)
    assert mmd(first, second) == pytest.approx(expected, rel=1e-6)
    assert mmd(first, 3 * first)[1] == pytest.approx(0, abs=1e-9)


def test_mmd_of_many_pictures_is_summed_in_pieces_and_the_unbiased_one_is_about_0() -> None:
    first, second = RNG.standard_normal((2, 1500, 4))
    unbiased, biased = mmd(first, second)
    assert abs(unbiased) < 0.3 < biased + 0.3
    assert 0 < biased < 0.1
    one, other = (
        features / np.linalg.norm(features, axis=1)[:, None] for features in (first, second)
    )
    means = [
        np.exp((a @ b.T - 1) / 100).mean() for a, b in ((one, one), (other, other), (one, other))
    ]
    assert biased == pytest.approx(1000 * (means[0] + means[1] - 2 * means[2]), rel=1e-6)


def test_the_bootstrap_covers_a_mean_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        values = np.random.default_rng(trial).random(60)
        value, low, high = bootstrap(60, lambda i, v=values: v[i].mean(), resamples=200, seed=trial)
        assert value == values.mean()
        assert low < value < high
        covered += low < 0.5 < high
    assert 0.88 < covered / 200 < 0.99


def test_the_basic_interval_is_the_percentiles_mirrored_at_the_value() -> None:
    features = RNG.standard_normal((60, 4))
    reference = RNG.standard_normal((60, 4))

    def distance(indices: np.ndarray) -> float:
        return frechet_distance(features[indices], reference)

    value, low, high = bootstrap(60, distance, resamples=100)
    again, basic_low, basic_high = bootstrap(60, distance, resamples=100, basic=True)
    assert again == value
    assert (basic_low, basic_high) == pytest.approx((2 * value - high, 2 * value - low))
    assert low + high > 2 * value  # resamples are further away


def test_the_bootstrap_comes_again_from_its_seed() -> None:
    values = RNG.random(30)

    def interval(seed: int) -> tuple[float, float, float]:
        return bootstrap(30, lambda i: values[i].mean(), resamples=50, seed=seed)

    assert interval(1) == interval(1)
    assert interval(1) != interval(2)


def test_pixel_features_are_mean_colours_of_a_grid() -> None:
    picture = torch.zeros(1, 3, 8, 8)
    picture[0, 1, 2:4, 6:8] = 1
    features = feature_extractor("pixels").extract(picture)
    expected = np.zeros((3, 4, 4))
    expected[1, 1, 3] = 1
    assert np.array_equal(features, expected.reshape(1, 48))


class Network(torch.nn.Module):
    """Called as clean-fid's Inception is: mean colours of what it is given."""

    def forward(self, x: torch.Tensor, return_features: bool = True) -> torch.Tensor:
        return x.mean(dim=(2, 3)) if return_features else x


def test_inception_features_are_of_resized_pictures_from_0_to_255(tmp_path: Path) -> None:
    torch.jit.script(Network()).save(str(tmp_path / "network.pt"))
    extractor = feature_extractor(f"inception:{tmp_path / 'network.pt'}")
    picture = torch.full((2, 3, 32, 32), 0.25)
    picture[1] = 1.0
    np.testing.assert_allclose(extractor.extract(picture), [[63.75] * 3, [255.0] * 3], rtol=1e-5)
    torch.jit.script(torch.nn.Sequential(Network())).save(str(tmp_path / "other.pt"))
    other = feature_extractor(f"inception:{tmp_path / 'other.pt'}")
    assert extractor.hash != other.hash


def test_clip_features_have_length_1_and_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    extractor = feature_extractor(f"clip:{write_clip(tmp_path, with_processors=False)}")
    pictures = torch.rand(33, 3, 48, 48)
    features = extractor.extract(pictures)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(extractor.extract(pictures[5:6])[0], features[5], atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 1e-4


@pytest.mark.parametrize("name", ["vgg", "inception", "clip:", "inception:/nowhere.pt"])
def test_features_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=r"expected 'pixels'|there is no"):
        feature_extractor(name)


def test_the_clip_score_is_the_cosine_that_transformers_own_processor_leads_to(
    tmp_path: Path,
) -> None:
    folder = write_clip(tmp_path)
    pictures = (255 * torch.rand(40, 3, 48, 48)).round() / 255
    texts = [
        ("a red circle", "two blue squares", "a cat that is far too long for it")[i % 3]
        for i in range(40)
    ]
    scorer = clip_scorer(str(folder))
    scores = scorer.score(pictures, texts)
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    )
    images = [
        Image.fromarray((255 * one).round().byte().permute(1, 2, 0).numpy()) for one in pictures
    ]
    inputs = processor(
        text=texts, images=images, return_tensors="pt", padding=True, truncation=True, max_length=20
    )
    with torch.no_grad():
        out = CLIPModel.from_pretrained(folder).eval()(**inputs)
    cosines = (out.image_embeds * out.text_embeds).sum(-1)
    assert (cosines < 0).any()
    assert (cosines > 0).any()
    np.testing.assert_allclose(scores, (100 * cosines).clamp(min=0), atol=1e-3)
    assert scores.dtype == np.float32
    assert scorer.hash == clip_scorer(str(folder)).hash
    (tmp_path / "other").mkdir()
    assert scorer.hash != clip_scorer(str(write_clip(tmp_path / "other", seed=1))).hash


def test_a_folder_without_a_whole_clip_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no"):
        clip_scorer(str(tmp_path / "none"))
    with pytest.raises(SettingsError, match="holds no CLIP model of transformers"):
        clip_scorer(str(tmp_path))
    with pytest.raises(SettingsError, match="holds no CLIP model of transformers"):
        feature_extractor(f"clip:{tmp_path}")
    write_clip(tmp_path, with_processors=False)
    with pytest.raises(SettingsError, match="holds no CLIP model of transformers"):
        clip_scorer(str(tmp_path))


def test_the_tower_s_features_are_the_means_of_what_the_aligner_is_given() -> None:
    pipe = make_pipeline()
    pictures = (255 * torch.rand(3, 3, 64, 64)).round() / 255
    images = [
        Image.fromarray((255 * one).round().byte().permute(1, 2, 0).numpy()) for one in pictures
    ]
    given = []
    pipe.model.aligner.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        pipe.model.get_image_features(pipe.processor.image_processor(images))
    extractor = tower_extractor(pipe)
    features = extractor.extract(pictures)
    np.testing.assert_allclose(features, given[0].mean(1), atol=1e-5)
    assert np.abs(features[0] - features[1]).max() > 1e-3
    pipe.model.to(torch.bfloat16)
    halved = tower_extractor(pipe).extract(pictures)
    assert halved.dtype == np.float32
    assert next(pipe.model.parameters()).dtype == torch.bfloat16
    np.testing.assert_allclose(halved, features, atol=0.1)


def test_a_module_s_hash_is_of_all_its_numbers_and_their_type() -> None:
    layer = torch.nn.BatchNorm1d(3)
    first = module_hash(layer)
    assert first == module_hash(torch.nn.BatchNorm1d(3))
    layer.running_mean[1] = 1e-3
    second = module_hash(layer)
    assert len({first, second, module_hash(layer.to(torch.bfloat16))}) == 3
