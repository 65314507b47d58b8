"""What a call of the pipeline draws, batch by batch: latents along the flow, or tokens.

Axes: P prompts, B images of a batch, C latent channels. Knows the pipeline's parts and a checked
request; arguments, output types and how batches are joined are the pipeline's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.editing import Inpainting, start_of_edit
from janusflow.flow.solvers import SolveStopped, solve
from janusflow.models.autoencoder import encode
from janusflow.models.guided_field import GuidedField
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.models.prefix import EncodedPrompts
from janusflow.models.token_sampling import draw_tokens, token_choice
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.requests import Prompts, Request

StepEndCallback = Callable[[Any, int, float, dict[str, Tensor]], "dict | None"]
"""`callback(pipe, step, t, {"latents": …})` after every step, t the time that was reached.

For the VQ head `callback(pipe, index, share, {"tokens": …})` after every token, share the part of
all tokens that is drawn.
"""


class Drawer(Protocol):
    """What of a pipeline draws."""

    model: JanusFlowForConditionalGeneration
    processor: JanusFlowProcessor
    vae: Any

    @property
    def interrupt(self) -> bool:
        """Whether to end before the next step."""

    @property
    def _execution_device(self) -> torch.device: ...


@dataclass(frozen=True)
class Drawn:
    """What one batch gives: latents or tokens, their cost, and the states on the way."""

    states: Tensor
    nfe: int
    num_forward_passes: int
    trajectory: list[Tensor] = field(default_factory=list)


def encode_prompts(pipe: Drawer, prompts: Prompts, head: str, *, guided: bool) -> EncodedPrompts:
    """The prompts as the pipeline's language model runs them for a head."""
    return pipe.model.encode_prompts(
        head,
        guided=guided,
        pad_token_id=pipe.processor.pad_token_id,
        **prompts.to(pipe._execution_device),
    )


def _prompts_of(pipe: Drawer, request: Request, head: str, start: int, stop: int) -> EncodedPrompts:
    """The prompts of images `start` to `stop`, a row for each image."""
    owners = torch.arange(start, stop) // request.images_per_prompt
    prompts = request.prompts
    if isinstance(prompts, Prompts):
        first, last = int(owners[0]), int(owners[-1]) + 1
        owners = owners - first
        guided = not request.guidance.off
        prompts = encode_prompts(pipe, prompts.rows(first, last), head, guided=guided)
    return prompts.select(owners.to(pipe._execution_device))


def draw_latents(
    pipe: Drawer,
    request: Request,
    start: int,
    stop: int,
    callback: StepEndCallback | None,
    tick: Callable[[], object],
) -> Drawn:
    """Latents of the images `start` to `stop` of a request."""
    assert request.noise is not None
    assert request.times is not None
    device = pipe._execution_device
    x_0 = request.noise[start:stop].to(device)
    known: Inpainting | None = None
    if request.pictures is not None:
        x_img = encode(pipe.vae, request.pictures[start:stop]).to(x_0)
        if request.mask is not None:
            known = Inpainting(x_img, x_0, request.mask[start:stop].to(device))
        x_0, _ = start_of_edit(x_img, x_0, request.strength)
    reached = x_0
    trajectory = [x_0.cpu()]
    if pipe.interrupt:
        return Drawn(x_0, 0, 0, trajectory)
    guidance = request.guidance
    rests = request.times[min(guidance.zero_init_steps, len(request.times) - 1)]
    velocity = GuidedField(
        pipe.model.velocity,
        _prompts_of(pipe, request, "flow", start, stop),
        guidance,
        rests_until=float(rests),
    )

    def unless_stopped(x: Tensor, t: Tensor) -> Tensor:
        # Some solvers take the whole path in one go; their evaluations are where to stop.
        if pipe.interrupt:
            raise SolveStopped
        return velocity(x, t)

    def on_step(step: int, t: Tensor, x: Tensor) -> Tensor:
        nonlocal reached
        reached = x if known is None else known(step, t, x)
        if callback is not None:
            held = dict.fromkeys(request.callback_inputs, reached)
            changed = callback(pipe, step, float(t), held) or {}
            reached = _fitting(changed.get("latents", reached), x)
        if request.return_trajectory:
            trajectory.append(reached.cpu())
        tick()
        if pipe.interrupt:
            raise SolveStopped
        return reached

    generators = None if request.generators is None else request.generators[start:stop]
    with contextlib.suppress(SolveStopped):  # `reached` is what a whole run ends in, too
        solve(
            unless_stopped,
            x_0,
            request.times,
            solver=request.solver,
            generators=generators,
            on_step=on_step,
            rtol=request.rtol,
            atol=request.atol,
        )
    return Drawn(reached, velocity.nfe, velocity.num_forward_passes, trajectory)


def draw_picture_tokens(
    pipe: Drawer,
    request: Request,
    start: int,
    stop: int,
    callback: StepEndCallback | None,
    tick: Callable[[], object],
) -> Drawn:
    """Tokens of the images `start` to `stop` of a request."""
    assert request.generators is not None
    if pipe.interrupt:
        return Drawn(torch.zeros(stop - start, 0, dtype=torch.long), 0, 0)

    def on_token(index: int, tokens: Tensor) -> bool:
        if callback is not None:
            held = dict.fromkeys(request.callback_inputs, tokens)
            if callback(pipe, index, (index + 1) / request.num_steps, held):
                raise SettingsError(
                    "callback_on_step_end gave tokens back; those of the VQ head cannot be "
                    "exchanged: return None"
                )
        tick()
        return pipe.interrupt

    sampling = request.temperature, request.top_k, request.top_p
    tokens = draw_tokens(
        pipe.model,
        _prompts_of(pipe, request, "vq", start, stop),
        num_tokens=request.num_steps,
        guidance_scale=request.guidance.scale_at(0.0),
        choose=token_choice(*sampling, request.generators[start:stop], stop - start),
        on_token=on_token,
    )
    drawn = tokens.shape[1]
    return Drawn(tokens, drawn, drawn * (1 if request.guidance.off else 2))


def _fitting(latents: Any, like: Tensor) -> Tensor:
    """Latents that a callback gave, in the state's dtype and place."""
    if not isinstance(latents, Tensor) or latents.shape != like.shape:
        raise SettingsError(
            f"callback_on_step_end gave latents of another shape than {tuple(like.shape)}; return "
            "them as they came, or none"
        )
    return latents.to(like)
