"""The frozen autoencoder between pixels and latents: loaded strictly, decoded picture by picture.

Axes: B batch, C latent channels, H W pixels. Knows tensors and diffusers' `AutoencoderKL`; nothing
of prompts, language models or picture files.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from janusflow.errors import CheckpointError
from janusflow.models.configuration import FlowHeadConfig

SDXL_VAE = "stabilityai/sdxl-vae"
"""The autoencoder that the published models were trained with; they do not bring it along."""

_DECODED_AT_ONCE = 8

logger = logging.getLogger(__name__)


def load_autoencoder(
    where: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, **hub: Any
) -> AutoencoderKL:
    """Loads an autoencoder from a folder or hub id, in float32 where float16 is asked for.

    Args:
        where: A folder that diffusers saved, one with such a folder `vae` in it, or a hub id.
        dtype: Of the weights.
        **hub: `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CheckpointError: If there is none, it cannot be read or reached, or weights are missing,
            unexpected or of the wrong shape.
    """
    folder, name = Path(where), os.fspath(where)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
            folder = folder / "vae"
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} has no config.json of an autoencoder")
        name = str(folder)
    if dtype == torch.float16:
        dtype = torch.float32
        _warn_of_float16()
    try:
        vae, report = AutoencoderKL.from_pretrained(
            name, torch_dtype=dtype, output_loading_info=True, **hub
        )
    except Exception as error:  # the libraries below raise a dozen kinds, many of them OSError
        if folder.exists():
            raise CheckpointError(
                f"the autoencoder in {name} is damaged: {_line(error)}"
            ) from error
        raise CheckpointError(
            f"the autoencoder {name!r} is no folder and the hub did not give it ({_line(error)}); "
            "pass vae=FOLDER, or vae=None for latents without pictures"
        ) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            names = ", ".join(str(key) for key in list(report[problem])[:3])
            raise CheckpointError(
                f"the autoencoder in {name} has {problem.replace('_', ' ')}: {names}; its weights "
                "and its config.json do not belong together"
            )
    return vae.eval()


def scale_factor(vae: AutoencoderKL) -> int:
    """Pixels per latent cell and side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_fit(vae: AutoencoderKL, config: FlowHeadConfig) -> None:
    """Refuses an autoencoder that makes other latents than the flow head's.

    Raises:
        CheckpointError: Naming what differs.
    """
    found = (vae.config.latent_channels, scale_factor(vae))
    expected = (config.latent_channels, config.vae_scale_factor)
    if found != expected:
        raise CheckpointError(
            f"this autoencoder has {found[0]} latent channels at 1/{found[1]} of the side, but the "
            f"flow head was made for {expected[0]} at 1/{expected[1]}; pass the vae that it was "
            "trained with"
        )


def without_float16(vae: AutoencoderKL) -> AutoencoderKL:
    """Brings an autoencoder in float16 to float32, with a warning: SDXL's overflows in float16."""
    if vae.dtype == torch.float16:
        _warn_of_float16()
        vae.to(torch.float32)
    return vae


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels in [-1, 1], float32 on the CPU, (B, 3, H, W), of scaled latents (B, C, H/8, W/8)."""
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    unscaled = (latents / vae.config.scaling_factor + shift).to(vae.dtype)
    parts = [vae.decode(part).sample for part in unscaled.split(_DECODED_AT_ONCE)]
    return torch.cat([part.float().clamp(-1, 1).cpu() for part in parts])


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor, at_once: int = _DECODED_AT_ONCE) -> Tensor:
    """Scaled latents, float32 (B, C, H/8, W/8), of pixels (B, 3, H, W) in [-1, 1]: their means.

    The network takes `at_once` pictures in a call.
    """
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = [
        vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode()
        for part in pixels.split(at_once)
    ]
    return (torch.cat(parts).float() - shift) * vae.config.scaling_factor


def _warn_of_float16() -> None:
    logger.warning(
        "the autoencoder is kept in float32: in float16 it overflows and pictures turn black"
    )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
