"""Noise that an image keeps wherever it is drawn: from a CPU generator of its own.

Axes: B images, C latent channels, h w latent cells.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from janusflow.errors import SettingsError

_LARGEST_SEED = 2**63 - 1


def image_noise(
    total: int,
    shape: tuple[int, int, int],
    *,
    seed: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    latents: Tensor | None = None,
) -> tuple[Tensor, tuple[int, ...] | None]:
    """The noise of all images, and the seeds that made it.

    Args:
        total: B.
        shape: (C, h, w).
        seed: Of the first image, the next has the next; drawn when nothing is given.
        generator: One for each image, or a single one that they draw from one after another.
        latents: The noise itself, (B, C, h, w).

    Returns:
        float32 (B, C, h, w), or float64 for float64 latents; and the seeds, None where no seed
        made it.

    Raises:
        SettingsError: If more than one source is given, or one does not fit.
    """
    sources = {"seed": seed, "generator": generator, "latents": latents}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise SettingsError(f"{' and '.join(given)} all say what the noise is; give one of them")
    if latents is not None:
        return _checked_latents(latents, (total, *shape)), None
    generators, seeds = image_generators(total, seed=seed, generator=generator)
    return torch.stack([torch.randn(shape, generator=one) for one in generators]), seeds


def image_generators(
    total: int,
    *,
    seed: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> tuple[list[torch.Generator], tuple[int, ...] | None]:
    """A CPU generator for each of `total` images, and their seeds; see `image_noise`.

    Raises:
        SettingsError: If both sources are given, or one does not fit.
    """
    if seed is not None and generator is not None:
        raise SettingsError("seed and generator both say what is random; give one of them")
    if generator is not None:
        return _checked_generators(generator, total), None
    first = first_seed(seed, total)
    seeds = tuple(range(first, first + total))
    return [torch.Generator().manual_seed(one) for one in seeds], seeds


def spawn_generators(generator: torch.Generator | None, total: int) -> list[torch.Generator]:
    """CPU generators, one for each image, with seeds drawn from one; None = torch's default."""
    seeds = torch.randint(_LARGEST_SEED, (total,), generator=generator).tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def first_seed(seed: int | None, total: int) -> int:
    """The first of `total` seeds in a row, drawn from the system when none is given.

    Raises:
        SettingsError: If it is no whole number, negative or too large.
    """
    if seed is None:
        return secrets.randbits(32)
    largest = _LARGEST_SEED - total
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= largest:
        raise SettingsError(f"seed must be a whole number from 0 to {largest}, got {seed!r}")
    return seed


def _checked_latents(latents: Tensor, expected: tuple[int, ...]) -> Tensor:
    if not isinstance(latents, Tensor) or tuple(latents.shape) != expected:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise SettingsError(
            f"latents are {got}; expected a tensor of shape {expected} for {expected[0]} images "
            "(pass height and width for other sizes than the trained one)"
        )
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def _checked_generators(
    generator: torch.Generator | Sequence[torch.Generator], total: int
) -> list[torch.Generator]:
    single = isinstance(generator, torch.Generator)
    generators: list = [generator] * total if single else list(generator)  # type: ignore[arg-type]
    if len(generators) != total:
        raise SettingsError(
            f"got {len(generators)} generators for {total} images; give one for each, or one"
        )
    for one in generators:
        if not isinstance(one, torch.Generator) or one.device.type != "cpu":
            raise SettingsError(
                "generator must be a torch.Generator() on the CPU, so that a seed means the same "
                f"everywhere; got {one!r}"
            )
    return generators
