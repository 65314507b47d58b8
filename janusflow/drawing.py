"""What a call of the pipeline draws, batch by batch: latents along the flow, or tokens.

Axes: P prompts, B images of a batch, C latent channels. Knows the pipeline's parts and a checked
request; arguments, output types and how batches are joined are the pipeline's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from janusflow.errors import SettingsError
from janusflow.flow.edit_methods import EditRun
from janusflow.flow.guidance import Guidance
from janusflow.flow.solvers import Field, SolveStopped, solve
from janusflow.models.autoencoder import encode
from janusflow.models.guided_field import GuidedField
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.models.prefix import EncodedPrompts
from janusflow.models.token_sampling import draw_tokens, token_choice
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.requests import Prompts, Request

StepEndCallback = Callable[[Any, int, float, dict[str, Tensor]], "dict | None"]
"""`callback(pipe, step, t, {"latents": …})` after every step, t the time that was reached.

Of an inversion, t falls on the way back to the noise, and then rises; the steps count on.
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


def encode_pictures(pipe: Drawer, request: Request) -> Request:
    """The request with the latents of what it edits, each picture encoded once."""
    edit = request.edit
    if edit is None:
        return request
    return replace(request, edit=replace(edit, x_img=encode(pipe.vae, edit.pictures)))


def _prompts_of(
    pipe: Drawer, prompts: Prompts | EncodedPrompts, head: str, owners: Tensor, *, guided: bool
) -> EncodedPrompts:
    """The prompts of a batch, a row for each image, by the prompts that its images belong to."""
    if isinstance(prompts, Prompts):
        first, last = int(owners[0]), int(owners[-1]) + 1
        owners = owners - first
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
    """Latents of the images `start` to `stop` of a request; of edits, after `encode_pictures`."""
    assert request.times is not None
    device, edit = pipe._execution_device, request.edit
    owners = request.owners(start, stop)
    noise = None if request.noise is None else request.noise[start:stop].to(device)
    if edit is None:
        assert noise is not None
        reached = noise
    else:
        assert edit.x_img is not None
        x_img = _of_owners(edit.x_img, owners).to(device, None if noise is None else noise.dtype)
        reached = edit.method.start(x_img, noise, edit.strength)
    trajectory = [reached.cpu()]
    if pipe.interrupt:
        return Drawn(reached, 0, 0, trajectory)
    rests = request.times[min(request.guidance.zero_init_steps, len(request.times) - 1)]
    fields = []

    def field_of(prompts: Prompts | EncodedPrompts, guidance: Guidance) -> Field:
        own = _prompts_of(pipe, prompts, "flow", owners, guided=not guidance.off)
        velocity = GuidedField(pipe.model.velocity, own, guidance, rests_until=float(rests))
        fields.append(velocity)

        def unless_stopped(x: Tensor, t: Tensor) -> Tensor:
            # Some solvers take the whole path in one go; their evaluations are where to stop.
            if pipe.interrupt:
                raise SolveStopped
            return velocity(x, t)

        return unless_stopped

    def on_step(step: int, t: Tensor, x: Tensor) -> Tensor:
        nonlocal reached
        reached = x
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

    options: dict[str, Any] = {
        "solver": request.solver,
        "generators": None if request.generators is None else request.generators[start:stop],
        "rtol": request.rtol,
        "atol": request.atol,
    }
    target, source = field_of(request.prompts, request.guidance), None
    if edit is not None and edit.source_prompts is not None:
        scale = edit.method.source_guidance_scale
        source = field_of(edit.source_prompts, replace(request.guidance, scale=scale))
    with contextlib.suppress(SolveStopped):  # `reached` is what a whole run ends in, too
        if edit is None:
            solve(target, reached, request.times, on_step=on_step, **options)
        else:
            mask = None if edit.mask is None else _of_owners(edit.mask, owners).to(device)
            run = EditRun(
                x_img, target, request.times, edit.strength, source, noise, mask, **options
            )
            edit.method.run(run, on_step)
    return Drawn(
        reached,
        sum(velocity.nfe for velocity in fields),
        sum(velocity.num_forward_passes for velocity in fields),
        trajectory,
    )


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
        _prompts_of(
            pipe,
            request.prompts,
            "vq",
            request.owners(start, stop),
            guided=not request.guidance.off,
        ),
        num_tokens=request.num_steps,
        guidance_scale=request.guidance.scale_at(0.0),
        choose=token_choice(*sampling, request.generators[start:stop], stop - start),
        on_token=on_token,
    )
    drawn = tokens.shape[1]
    return Drawn(tokens, drawn, drawn * (1 if request.guidance.off else 2))


def _of_owners(rows: Tensor, owners: Tensor) -> Tensor:
    """The rows of a batch's prompts; a single row is that of all."""
    return rows[(owners % len(rows)).to(rows.device)]


def _fitting(latents: Any, like: Tensor) -> Tensor:
    """Latents that a callback gave, in the state's dtype and place."""
    if not isinstance(latents, Tensor) or latents.shape != like.shape:
        raise SettingsError(
            f"callback_on_step_end gave latents of another shape than {tuple(like.shape)}; return "
            "them as they came, or none"
        )
    return latents.to(like)
