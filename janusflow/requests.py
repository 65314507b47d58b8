"""What a call of the pipeline asks for: every check of its arguments, before anything is computed.

Axes: P prompts, L tokens of a prompt, B images in all (prompt by prompt), C latent channels. Knows
the model's sizes and the processor's prompts; draws nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.edit_methods import EditMethod, make_edit
from janusflow.flow.editing import edit_times, latent_mask
from janusflow.flow.guidance import Guidance
from janusflow.flow.noise import image_generators, image_noise, spawn_generators
from janusflow.flow.solvers import Solver, make_solver
from janusflow.flow.timesteps import check_times, time_grid
from janusflow.flow.torchdiffeq_bridge import TorchdiffeqSolver
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.models.prefix import EncodedPrompts
from janusflow.models.token_sampling import token_choice
from janusflow.processing.images import load_image
from janusflow.processing.processor import JanusFlowProcessor

OUTPUT_TYPES = ("pil", "pt", "np", "latent")
_STATES = {"flow": "latents", "vq": "tokens"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DrawOptions:
    """Arguments of `JanusFlowPipeline.__call__`, where they are described, head resolved."""

    head: str
    negative_prompt: str | Sequence[str] | None
    num_inference_steps: int
    guidance_scale: float | None
    guidance: Guidance | None
    solver: Any
    shift: float
    times: Tensor | Sequence[float] | None
    rtol: float | None
    atol: float | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    image: Any
    edit: str | EditMethod | None
    source_prompt: str | Sequence[str] | None
    strength: float | None
    mask_image: Any
    num_images_per_prompt: int
    height: int | None
    width: int | None
    seed: int | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    latents: Tensor | None
    output_type: str
    return_trajectory: bool
    callback_inputs: Sequence[str] | None
    batch_size: int | None


@dataclass(frozen=True)
class Prompts:
    """Texts as ids, not yet run.

    Attributes:
        input_ids: (P, L).
        attention_mask: (P, L).
        negative_ids: Of negative prompts, (P, L').
        negative_mask: (P, L').
    """

    input_ids: Tensor
    attention_mask: Tensor
    negative_ids: Tensor | None = None
    negative_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, start: int, stop: int) -> Prompts:
        """Those from `start` to `stop`, without the padding that all of them have."""
        part = _trimmed(self.input_ids[start:stop], self.attention_mask[start:stop])
        if self.negative_ids is None or self.negative_mask is None:
            return Prompts(*part)
        return Prompts(
            *part, *_trimmed(self.negative_ids[start:stop], self.negative_mask[start:stop])
        )

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """All that there is, by name, on a device."""
        return {name: held.to(device) for name, held in vars(self).items() if held is not None}


@dataclass(frozen=True)
class PictureEdit:
    """What is edited, and how.

    Attributes:
        method: With its settings.
        strength: In (0, 1].
        pictures: One for all images or one for each prompt, (1 or P, 3, H, W) in [-1, 1].
        mask: The cells to draw, bool (1 or P, 1, h, w); None = all.
        source_prompts: What the pictures show, P of them, for methods that ask.
        x_img: Their latents, (1 or P, C, h, w), once they are encoded.
    """

    method: EditMethod
    strength: float
    pictures: Tensor
    mask: Tensor | None
    source_prompts: Prompts | None
    x_img: Tensor | None = None


@dataclass(frozen=True)
class Request:
    """A call that was found to be in order.

    Attributes:
        prompts: P of them, as ids or as the language model ran them.
        images_per_prompt: Images of each prompt.
        num_images: B.
        batch_size: Images to compute at once.
        num_steps: Steps that follow each other: intervals of time, or tokens.
        guidance: How they are guided; for the VQ head its scale alone counts.
        seeds: By image, where seeds make its random numbers.
        callback_inputs: Names of what a callback's dict holds.
        noise: Of the flow head, (B, C, h, w); None for edits that draw it step by step.
        times: Of the flow head, (steps + 1,).
        solver: Of the flow head.
        rtol: Of the flow head's solver, where it is adaptive; None = its own.
        atol: As `rtol`.
        return_trajectory: Of the flow head, whether all states are kept.
        edit: Of the flow head, where pictures are edited.
        generators: By image, of the VQ head's tokens or of steps that draw noise.
        temperature: Of the VQ head.
        top_k: Of the VQ head.
        top_p: Of the VQ head.
    """

    prompts: Prompts | EncodedPrompts
    images_per_prompt: int
    num_images: int
    batch_size: int
    num_steps: int
    guidance: Guidance
    seeds: tuple[int, ...] | None
    callback_inputs: tuple[str, ...]
    noise: Tensor | None = None
    times: Tensor | None = None
    solver: Any = "euler"
    rtol: float | None = None
    atol: float | None = None
    return_trajectory: bool = False
    edit: PictureEdit | None = None
    generators: tuple[torch.Generator, ...] | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def owners(self, start: int, stop: int) -> Tensor:
        """The prompts that the images from `start` to `stop` belong to, int64."""
        return torch.arange(start, stop) // self.images_per_prompt


def check_request(
    options: DrawOptions,
    prompt: str | Sequence[str] | EncodedPrompts,
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
    common: dict[str, Any] = {
        "guidance": _guidance(options, model),
        "images_per_prompt": options.num_images_per_prompt,
        "callback_inputs": tuple(callback_inputs),
    }
    options = _with_defaults(options, model)
    if head == "flow":
        return _flow_request(options, prompt, model, processor, common, has_vae=has_vae)
    return _token_request(options, prompt, model, processor, common)


def _guidance(options: DrawOptions, model: JanusFlowForConditionalGeneration) -> Guidance:
    scale, guidance = options.guidance_scale, options.guidance
    if guidance is None:
        defaults = model.config.drawing_defaults_of(options.head)
        return Guidance(defaults["guidance_scale"] if scale is None else scale)
    if scale is not None:
        raise SettingsError("guidance_scale and guidance both say the weight; give one of them")
    if not isinstance(guidance, Guidance):
        raise SettingsError(
            f"guidance must be a janusflow.flow.guidance.Guidance, got {guidance!r}; a number is "
            "guidance_scale"
        )
    return guidance


def _with_defaults(options: DrawOptions, model: JanusFlowForConditionalGeneration) -> DrawOptions:
    defaults = model.config.drawing_defaults_of(options.head)
    missing = {name: value for name, value in defaults.items() if getattr(options, name) is None}
    return replace(options, **missing)


def _flow_request(
    options: DrawOptions,
    prompt: str | Sequence[str] | EncodedPrompts,
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    common: dict[str, Any],
    *,
    has_vae: bool,
) -> Request:
    config = model.flow_config
    method, strength = _edit_method(options)
    times = _times(options, None if method is None else strength)
    solver = make_solver(options.solver)
    if method is not None:
        method.check(times, solver=options.solver, rtol=options.rtol, atol=options.atol)
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
    num_tokens = rows * columns // config.patch_size**2
    prompts = _prompts(prompt, options, model, processor, num_tokens)
    total = len(prompts) * options.num_images_per_prompt
    drawing_steps = f"solver {options.solver!r}" if solver.draws_noise else None
    noise_first = method is None or not method.draws_noise
    noise, generators, seeds = _random_numbers(
        options,
        total,
        (config.latent_channels, rows, columns),
        drawing_steps if noise_first else type(method).__name__,
        noise_first=noise_first,
    )
    edit = None
    if method is not None:
        if not has_vae:
            raise SettingsError("image= needs an autoencoder; load one with vae=FOLDER")
        num, factor = len(prompts), config.vae_scale_factor
        size = (columns * factor, rows * factor)
        edit = PictureEdit(
            method,
            strength,
            _pictures(options.image, "image", num, size),
            _mask(options, solver, num, size, (rows, columns)),
            _source_prompts(options, num, model, processor, num_tokens)
            if method.takes_source
            else None,
        )
    return Request(
        prompts=prompts,
        num_images=total,
        # Adaptive solvers control the error over a whole batch.
        batch_size=1 if solver.adaptive else min(options.batch_size or total, total),
        num_steps=(len(solver.grid(times)) - 1) * (1 if method is None else method.rounds),
        seeds=seeds,
        noise=noise,
        times=times,
        solver=options.solver,
        rtol=options.rtol,
        atol=options.atol,
        return_trajectory=options.return_trajectory,
        edit=edit,
        generators=generators,
        **common,
    )


def _edit_method(options: DrawOptions) -> tuple[EditMethod | None, float]:
    """How a picture is edited and how strongly; None and 1 where there is none."""
    if options.image is None:
        for name in ("edit", "source_prompt", "strength", "mask_image"):
            if getattr(options, name) is not None:
                raise SettingsError(f"{name}= is of editing a picture; give image=, too")
        return None, 1.0
    method = make_edit("sdedit" if options.edit is None else options.edit)
    if options.source_prompt is not None and not method.takes_source:
        raise SettingsError(
            f"{type(method).__name__} does not ask what the picture shows; leave source_prompt "
            'out, or take edit="flowedit" or edit="inversion"'
        )
    return method, method.default_strength if options.strength is None else options.strength


def _times(options: DrawOptions, strength: float | None) -> Tensor:
    """The grid of a run; of an edit, what its strength leaves of it."""
    if options.times is None:
        if strength is None:
            return time_grid(options.num_inference_steps, shift=options.shift)
        return edit_times(options.num_inference_steps, strength, shift=options.shift)
    if options.image is not None or options.shift != 1.0:
        raise SettingsError("times= are a whole grid; they leave no room for shift= or image=")
    times = check_times(options.times)
    if times[0] != 0 or times[-1] != 1:
        raise SettingsError(
            f"times= go from 0 (noise) to 1 (image); got {times[0]:g} to {times[-1]:g}"
        )
    return times


def _random_numbers(
    options: DrawOptions,
    total: int,
    shape: tuple[int, int, int],
    drawing_steps: str | None,
    *,
    noise_first: bool,
) -> tuple[Tensor | None, tuple[torch.Generator, ...] | None, tuple[int, ...] | None]:
    """The first noise (B, C, h, w), the generators of later draws, and the seeds.

    Args:
        options: With their seed, generator or latents.
        total: B.
        shape: (C, h, w).
        drawing_steps: What draws noise in every step; None = nothing does.
        noise_first: Whether there is a noise to begin with.
    """
    sources: dict[str, Any] = {"seed": options.seed, "generator": options.generator}
    if options.latents is not None:
        if drawing_steps is not None:
            raise SettingsError(
                f"{drawing_steps} draws noise in every step: give seed= or generator=, from which "
                "all noise comes, and not latents="
            )
        return image_noise(total, shape, latents=options.latents, **sources)[0], None, None
    generators, seeds = image_generators(total, **sources)
    noise = image_noise(total, shape, generator=generators)[0] if noise_first else None
    if drawing_steps is None:
        return noise, None, seeds
    if isinstance(options.generator, torch.Generator):
        # So far they drew from it one after another; in the steps they would draw in turns.
        generators = spawn_generators(options.generator, total)
    return noise, tuple(generators), seeds


def _pictures(given: Any, name: str, num_prompts: int, size: tuple[int, int]) -> Tensor:
    """Pictures (1 or P, 3, H, W) in [-1, 1], cropped to (width, height) about their middle."""
    sources = list(given) if isinstance(given, list | tuple) else [given]
    if len(sources) not in (1, num_prompts):
        raise SettingsError(
            f"got {len(sources)} {name}s for {num_prompts} prompts; give one, or one for each"
        )
    shown = [ImageOps.fit(load_image(source), size, Image.Resampling.LANCZOS) for source in sources]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in shown]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _mask(
    options: DrawOptions,
    solver: Solver,
    num_prompts: int,
    size: tuple[int, int],
    latent_size: tuple[int, int],
) -> Tensor | None:
    """The cells to draw, bool (1 or P, 1, h, w); None = all."""
    if options.mask_image is None:
        return None
    if isinstance(solver, TorchdiffeqSolver):
        raise SettingsError(
            f"mask_image puts the picture back after every step, and solver {options.solver!r} "
            "runs as a whole; take one that steps, such as euler or heun"
        )
    shades = _pictures(options.mask_image, "mask_image", num_prompts, size)
    return latent_mask(shades.mean(1, keepdim=True) / 2 + 0.5, latent_size)


def _source_prompts(
    options: DrawOptions,
    num_prompts: int,
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    num_tokens: int,
) -> Prompts:
    """What the pictures show, a text for each prompt; "" where nothing is said."""
    given = "" if options.source_prompt is None else options.source_prompt
    texts = [given] if isinstance(given, str) else list(given)
    if len(texts) not in (1, num_prompts):
        raise SettingsError(
            f"got {len(texts)} source prompts for {num_prompts} prompts; give one, or one for each"
        )
    texts *= num_prompts // len(texts)
    return tokenize(texts, None, "flow", model, processor, num_tokens)


def _token_request(
    options: DrawOptions,
    prompt: str | Sequence[str] | EncodedPrompts,
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    common: dict[str, Any],
) -> Request:
    vq_head = model.vq_head
    if options.latents is not None:
        raise SettingsError('latents are the noise of the flow head; draw with head="flow"')
    _refuse_flow_only(options, common["guidance"])
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
    prompts = _prompts(prompt, options, model, processor, vq_head.num_image_tokens)
    total = len(prompts) * options.num_images_per_prompt
    generators, seeds = image_generators(total, seed=options.seed, generator=options.generator)
    if isinstance(options.generator, torch.Generator):
        generators = spawn_generators(options.generator, total)
    return Request(
        prompts=prompts,
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


def _refuse_flow_only(options: DrawOptions, guidance: Guidance) -> None:
    if guidance != Guidance(guidance.scale) or callable(guidance.scale):
        raise SettingsError("the VQ head is guided by a scale alone; give guidance_scale=")
    edits = (options.image, options.edit, options.source_prompt, options.strength)
    if any(given is not None for given in (*edits, options.mask_image)):
        raise SettingsError('pictures are edited along the flow; draw with head="flow"')
    if options.return_trajectory:
        raise SettingsError('return_trajectory keeps states of the flow; draw with head="flow"')


def tokenize(
    prompt: str | Sequence[str],
    negative_prompt: str | Sequence[str] | None,
    head: Any,
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    num_tokens: int | None = None,
) -> Prompts:
    """Texts as ids.

    Raises:
        PromptError: If there is no prompt, one is no text, or one exceeds the context.
        SettingsError: If there are not one or as many negative prompts as prompts, or a picture of
            so many tokens leaves no room for a prompt.
    """
    if num_tokens is None:
        config = model.flow_config if head == "flow" else model.vq_head
        num_tokens = config.num_image_tokens
    text_config: Any = model.config.text_config
    room = text_config.max_position_embeddings - num_tokens
    if room < 2:
        raise SettingsError(
            f"a picture of {num_tokens} tokens leaves no room for a prompt in the context of "
            f"{room + num_tokens}; draw a smaller one"
        )
    texts = [prompt] if isinstance(prompt, str) else prompt
    ids, mask = processor.generation_prompts(texts, tag=head, max_length=room)
    if negative_prompt is None:
        return Prompts(ids, mask)
    negatives = [negative_prompt] if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(negatives) not in (1, len(ids)):
        raise SettingsError(
            f"got {len(negatives)} negative prompts for {len(ids)} prompts; give one, or one for "
            "each"
        )
    negative = processor.generation_prompts(negatives, tag=head, max_length=room)
    return Prompts(ids, mask, *(part.expand(len(ids), -1) for part in negative))


def _prompts(
    prompt: str | Sequence[str] | EncodedPrompts,
    options: DrawOptions,
    model: JanusFlowForConditionalGeneration,
    processor: JanusFlowProcessor,
    num_tokens: int,
) -> Prompts | EncodedPrompts:
    if not isinstance(prompt, EncodedPrompts):
        return tokenize(prompt, options.negative_prompt, options.head, model, processor, num_tokens)
    if prompt.head != options.head:
        raise SettingsError(
            f"these prompts were encoded for the {prompt.head} head, not for {options.head}"
        )
    if options.negative_prompt is not None:
        raise SettingsError("negative prompts are encoded with the prompts: see encode_prompts")
    return prompt


def _warn_of_idle(options: DrawOptions, head: str, names: Sequence[str]) -> None:
    idle = [name for name in names if getattr(options, name) is not None]
    if idle:
        logger.warning("%s drawing makes no use of %s", head, ", ".join(idle))


def _trimmed(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    longest = int(mask.sum(1).max())
    return input_ids[:, -longest:], mask[:, -longest:]


def check_count(name: str, value: Any) -> None:
    """Refuses what is no whole number of at least 1.

    Raises:
        SettingsError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SettingsError(f"{name} must be a whole number of at least 1, got {value!r}")
