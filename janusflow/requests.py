"""What a call of the pipeline asks for: every check of its arguments, before anything is computed.

Axes: P prompts, L tokens of a prompt, B images in all (prompt by prompt), C latent channels. Knows
the model's sizes and the processor's prompts; draws nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.guidance import check_guidance_scale
from janusflow.flow.noise import image_generators, image_noise, spawn_generators
from janusflow.flow.solvers import make_solver
from janusflow.flow.timesteps import time_grid
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.models.token_sampling import token_choice
from janusflow.processing.processor import JanusFlowProcessor

OUTPUT_TYPES = ("pil", "pt", "np", "latent")
_STATES = {"flow": "latents", "vq": "tokens"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawOptions:
    """Arguments of `JanusFlowPipeline.__call__`, where they are described, head resolved."""

    head: str
    num_inference_steps: int
    guidance_scale: float | None
    solver: str
    temperature: float | None
    top_k: int | None
    top_p: float | None
    num_images_per_prompt: int
    height: int | None
    width: int | None
    seed: int | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    output_type: str
    callback_inputs: Sequence[str] | None
    batch_size: int | None


@dataclass(frozen=True)
class Request:
    """A call that was found to be in order.

    Attributes:
        input_ids: (P, L).
        attention_mask: (P, L).
        images_per_prompt: Images of each prompt.
        num_images: B.
        batch_size: Images to compute at once.
        num_steps: Steps that follow each other: intervals of time, or tokens.
        guidance_scale: 1.0 = off.
        seeds: By image, where seeds make its random numbers.
        callback_inputs: Names of what a callback's dict holds.
        noise: Of the flow head, (B, C, h, w).
        times: Of the flow head, (steps + 1,).
        solver: Of the flow head.
        generators: Of the VQ head, by image.
        temperature: Of the VQ head.
        top_k: Of the VQ head.
        top_p: Of the VQ head.
    """

    input_ids: Tensor
    attention_mask: Tensor
    images_per_prompt: int
    num_images: int
    batch_size: int
    num_steps: int
    guidance_scale: float
    seeds: tuple[int, ...] | None
    callback_inputs: tuple[str, ...]
    noise: Tensor | None = None
    times: Tensor | None = None
    solver: str = "euler"
    generators: tuple[torch.Generator, ...] | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


def check_request(
    options: DrawOptions,
    prompt: str | Sequence[str],
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    *,
    has_vae: bool,
) -> Request:
    """All checks of a call.

    Raises:
        PromptError: If there is no prompt, one is no text, or one exceeds the context.
        SettingsError: If a setting is unknown, out of range or of the other head.
    """
    head = options.head
    check_count("num_images_per_prompt", options.num_images_per_prompt)
    if options.batch_size is not None:
        check_count("batch_size", options.batch_size)
    if options.output_type not in OUTPUT_TYPES:
        raise SettingsError(
            f"output_type is {options.output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}"
        )
    state = _STATES[head]
    callback_inputs = (state,) if options.callback_inputs is None else options.callback_inputs
    unknown = set(callback_inputs) - {state}
    if unknown:
        raise SettingsError(
            f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; the {head} head knows: "
            f"{state}"
        )
    options = _with_defaults(options, model)
    common: dict[str, Any] = {
        "guidance_scale": check_guidance_scale(options.guidance_scale),  # type: ignore[arg-type]
        "images_per_prompt": options.num_images_per_prompt,
        "callback_inputs": tuple(callback_inputs),
    }
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if head == "flow":
        return _flow_request(options, prompts, model, processor, common, has_vae=has_vae)
    return _token_request(options, prompts, model, processor, common)


def _with_defaults(options: DrawOptions, model: JanusFlowForConditionalGeneration) -> DrawOptions:
    defaults = model.config.drawing_defaults_of(options.head)
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing)


def _flow_request(
    options: DrawOptions,
    prompts: Sequence[str],
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    common: dict[str, Any],
    *,
    has_vae: bool,
) -> Request:
    config = model.flow_config
    times = time_grid(options.num_inference_steps)
    make_solver(options.solver)
    _warn_of_idle(options, "flow", ("temperature", "top_k", "top_p"))
    if not has_vae and options.output_type != "latent":
        raise SettingsError(
            f"output_type {options.output_type!r} needs an autoencoder and this pipeline has none: "
            'pass output_type="latent", or load it with vae=FOLDER'
        )
    cell = config.vae_scale_factor * config.patch_size
    for name, side in (("height", options.height), ("width", options.width)):
        if side is not None:
            check_count(name, side)
            if side % cell:
                raise SettingsError(f"{name} must be a multiple of {cell} pixels, got {side}")
    rows = (options.height or config.image_size) // config.vae_scale_factor
    columns = (options.width or config.image_size) // config.vae_scale_factor
    input_ids, mask = _tokenize(
        prompts, "flow", model, processor, rows * columns // config.patch_size**2
    )
    total = len(input_ids) * options.num_images_per_prompt
    noise, seeds = image_noise(
        total,
        (config.latent_channels, rows, columns),
        seed=options.seed,
        generator=options.generator,
        latents=options.latents,
    )
    return Request(
        input_ids=input_ids,
        attention_mask=mask,
        num_images=total,
        batch_size=min(options.batch_size or total, total),
        num_steps=len(times) - 1,
        seeds=seeds,
        noise=noise,
        times=times,
        solver=options.solver,
        **common,
    )


def _token_request(
    options: DrawOptions,
    prompts: Sequence[str],
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    common: dict[str, Any],
) -> Request:
    vq_head = model.vq_head
    if options.latents is not None:
        raise SettingsError('latents are the noise of the flow head; draw with head="flow"')
    for name, side in (("height", options.height), ("width", options.width)):
        if side not in (None, vq_head.image_size):
            raise SettingsError(
                f"{name} is {side!r}; the VQ head draws {vq_head.image_size} x "
                f"{vq_head.image_size} px only"
            )
    temperature = options.temperature
    assert temperature is not None
    token_choice(temperature, options.top_k, options.top_p, torch.Generator(), 1)
    if temperature == 0:
        _warn_of_idle(options, "greedy VQ", ("top_k", "top_p"))
    input_ids, mask = _tokenize(prompts, "vq", model, processor, vq_head.num_image_tokens)
    total = len(input_ids) * options.num_images_per_prompt
    generators, seeds = image_generators(total, seed=options.seed, generator=options.generator)
    if isinstance(options.generator, torch.Generator):
        generators = spawn_generators(options.generator, total)
    return Request(
        input_ids=input_ids,
        attention_mask=mask,
        num_images=total,
        batch_size=min(options.batch_size or total, total),
        num_steps=vq_head.num_image_tokens,
        seeds=seeds,
        generators=tuple(generators),
        temperature=temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        **common,
    )


def _tokenize(
    prompts: Sequence[str],
    head: Any,
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    text_config: Any = model.config.text_config
    room = text_config.max_position_embeddings - num_tokens
    if room < 2:
        raise SettingsError(
            f"a picture of {num_tokens} tokens leaves no room for a prompt in the context of "
            f"{room + num_tokens}; draw a smaller one"
        )
    return processor.generation_prompts(prompts, tag=head, max_length=room)


def _warn_of_idle(options: DrawOptions, head: str, names: Sequence[str]) -> None:
    idle = [name for name in names if getattr(options, name) is not None]
    if idle:
        logger.warning("%s drawing makes no use of %s", head, ", ".join(idle))


def check_count(name: str, value: Any) -> None:
    """Refuses what is no whole number of at least 1.

    Raises:
        SettingsError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{name} must be a whole number of at least 1, got {value!r}")
