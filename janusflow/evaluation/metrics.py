"""Measures of pictures, and how sure they are.

Axes: N pictures, d features. Knows arrays only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from janusflow.errors import SettingsError

Interval = tuple[float, float, float]
"""A value and the ends of its interval."""


def psnr(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in decibels, (N,), of pictures (N, H, W, 3) in [0, 1]."""
    squared = np.square(first.astype(np.float64) - second).mean(axis=(1, 2, 3))
    return -10 * np.log10(np.maximum(squared, 1e-12))


def ssim(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Structural similarity, (N,), of pictures (N, H, W, 3) in [0, 1].

    An 11 x 11 Gaussian window of deviation 1.5, as first described (Wang et al. 2004).

    Raises:
        SettingsError: If scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise SettingsError("SSIM needs scikit-image: pip install 'janusflow[eval]'") from error
    options = {
        "channel_axis": -1,
        "data_range": 1.0,
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
    }
    pairs = zip(first.astype(np.float64), second.astype(np.float64), strict=True)
    return np.array([structural_similarity(one, other, **options) for one, other in pairs])


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of two sets of features (N, d), fitted by Gaussians (arXiv 1706.08500).

    `|Δμ|² + tr(S₁ + S₂) - 2 tr((S₁^½ S₂ S₁^½)^½)`; biased upwards below about 10 d pictures.
    """
    means = [features.mean(0, dtype=np.float64) for features in (first, second)]
    one, other = (np.cov(features.astype(np.float64), rowvar=False) for features in (first, second))
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ other @ root)
    covariance = np.trace(one) + np.trace(other) - 2 * np.sqrt(np.clip(product, 0, None)).sum()
    return float(np.square(means[0] - means[1]).sum() + covariance)


def mmd(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Squared maximum mean discrepancy of two sets of features (N, d), as CMMD (arXiv 2401.09603).

    Features are brought to length 1; the kernel is `exp(-|x - y|² / (2 · 10²))`; times 1000.

    Returns:
        The unbiased estimate, which may fall below 0, and the biased one, which CMMD reports.
    """
    x, y = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in map(np.float64, (first, second)))
    num, other = len(x), len(y)
    within, without, between = _kernel_sum(x, x), _kernel_sum(y, y), _kernel_sum(x, y)
    cross = 2 * between / (num * other)
    # The kernel of a feature and itself is 1.
    unbiased = (within - num) / (num * (num - 1)) + (without - other) / (other * (other - 1))
    biased = within / num**2 + without / other**2
    return 1000 * (unbiased - cross), 1000 * (biased - cross)


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Sum of the kernel over all pairs of features of length 1, some rows at a time."""
    rows = range(0, len(x), 1024)
    return sum(float(np.exp((x[i : i + 1024] @ y.T - 1) / 100).sum()) for i in rows)


def bootstrap(
    num: int,
    statistic: Callable[[np.ndarray], float],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    basic: bool = False,
) -> Interval:
    """A statistic of N items and its bootstrap interval.

    Args:
        num: N.
        statistic: Of the items at given indices (N,), which may repeat.
        resamples: How often N items are drawn anew.
        seed: Of those draws.
        level: Share of the resamples inside the interval.
        basic: Give the basic interval, `2 v - q`, in place of the percentiles q: for a statistic
            such as a Fréchet distance, which is larger for resamples since these repeat items.
    """
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(num, size=num)) for _ in range(resamples)]
    value = statistic(np.arange(num))
    low, high = map(float, np.quantile(values, [(1 - level) / 2, (1 + level) / 2]))
    return (value, 2 * value - high, 2 * value - low) if basic else (value, low, high)
