"""Text to pictures with either head, and answers about pictures, in one object.

Axes: P prompts, n images a prompt, B = P · n images in all (prompt by prompt), C latent channels.
The pipeline joins the model, the autoencoder and the processor; how checkpoints lie on disk, how
prompts are written and how an ODE is solved is known elsewhere.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig

from janusflow import drawing
from janusflow.drawing import StepEndCallback
from janusflow.errors import CheckpointError, SettingsError
from janusflow.flow.edit_methods import EditMethod, Inversion
from janusflow.flow.editing import reconstruction_error
from janusflow.flow.guidance import Guidance
from janusflow.flow.noise import first_seed
from janusflow.models.answers import SAMPLING_OPTIONS, sampling_processors, stream_text
from janusflow.models.autoencoder import (
    SDXL_VAE,
    AutoencoderKL,
    check_fit,
    decode,
    load_autoencoder,
    without_float16,
)
from janusflow.models.modeling import JanusFlowForConditionalGeneration
from janusflow.models.prefix import EncodedPrompts
from janusflow.processing.processor import JanusFlowProcessor
from janusflow.requests import (
    DrawOptions,
    check_count,
    check_request,
    tokenize,
)

OutputType = Literal["pil", "pt", "np", "latent"]

# Of `GenerationConfig`, but said otherwise here, or changing what `generate` returns.
_NOT_OF_CHAT = {"max_length", "num_return_sequences", "return_dict_in_generate"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JanusFlowOutput:
    """What a call of the pipeline gives.

    Attributes:
        images: By `output_type`: PIL images; "pt" float32 (B, 3, H, W) in [0, 1] on the CPU; "np"
            float32 (B, H, W, 3) in [0, 1]; "latent" the latents or tokens.
        latents: Of the flow head: scaled latents, float32 (B, C, H/8, W/8), on the pipeline's
            device.
        nfe: Evaluations that follow each other: of the guided velocity, or of tokens' logits.
        num_forward_passes: Rows that the network computed for each image; guidance doubles them.
        seeds: Seed of each image, or None where `generator` or `latents` was given: an image comes
            again from its prompt, its seed and the settings alone.
        tokens: Of the VQ head: int64 (B, N), on the pipeline's device. Of a call that was
            interrupted, as many as were drawn; its images show token 0 in all other places.
        trajectory: Of the flow head, when asked for: the states at all times, on the CPU,
            (steps + 1, B, C, H/8, W/8).
    """

    images: Any
    latents: Tensor | None
    nfe: int
    num_forward_passes: int
    seeds: tuple[int, ...] | None
    tokens: Tensor | None = None
    trajectory: Tensor | None = None


@dataclass(frozen=True)
class InversionOutput:
    """The noises that pictures come from, and what is drawn from them; see `invert`.

    Attributes:
        latents: The noises, float32 (B, C, H/8, W/8), on the pipeline's device: what a call takes
            as `latents`. Of an inversion that was interrupted, as far as it came.
        reconstruction: The pictures that are drawn from them, by `output_type` as of a call.
        reconstruction_error: `|x - x_img|/|x_img|` of the latents that are drawn from the noises,
            float64 (B,).
        nfe: Evaluations that follow each other, there and back.
        num_forward_passes: Rows that the network computed for each picture.
        seeds: As of a call.
    """

    latents: Tensor
    reconstruction: Any
    reconstruction_error: Tensor
    nfe: int
    num_forward_passes: int
    seeds: tuple[int, ...] | None


class JanusFlowPipeline(DiffusionPipeline):
    """Draws pictures of prompts and answers questions about pictures.

    A diffusers pipeline: `.to()`, `save_pretrained`, `enable_model_cpu_offload`,
    `set_progress_bar_config` work as they do there.

    Args:
        model: The language model with its vision tower and heads.
        processor: Text and pictures to model inputs.
        vae: Latents to pixels; None leaves `output_type="latent"` only.

    Raises:
        CheckpointError: If the autoencoder makes other latents than the model's head, or the
            processor other inputs than the model takes.
    """

    model_cpu_offload_seq = "model->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - diffusers declares it a list
    _callback_tensor_inputs = ("latents", "tokens")

    model: JanusFlowForConditionalGeneration
    processor: JanusFlowProcessor
    vae: AutoencoderKL | None

    def __init__(
        self,
        model: JanusFlowForConditionalGeneration,
        processor: JanusFlowProcessor,
        vae: AutoencoderKL | None = None,
    ) -> None:
        super().__init__()
        _check_processor(processor, model)
        if vae is not None and "flow" in model.generation_heads:
            check_fit(vae, model.flow_config)
        self.register_modules(
            model=model, processor=processor, vae=None if vae is None else without_float16(vae)
        )
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        where: str | os.PathLike[str],
        *,
        vae: str | os.PathLike[str] | AutoencoderKL | None = "default",
        torch_dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **hub: Any,
    ) -> JanusFlowPipeline:
        """Loads a pipeline, and logs one line of what it found (logger `janusflow.pipeline`).

        Args:
            where: A folder or hub id in any known layout, or "tiny" for the bundled model.
            vae: A folder, a hub id or an `AutoencoderKL`; None for latents without pictures;
                "default" for the folder's own, or `stabilityai/sdxl-vae` from the hub for the
                published layouts, which bring none.
            torch_dtype: Of the weights, float32 when not given. The autoencoder stays in float32
                where this is float16, with a warning.
            device: Where to put it; the CPU when not given.
            **hub: `revision`, `cache_dir`, `token`, `local_files_only`, of the model's repository.

        Raises:
            CheckpointError: If something is missing, damaged, of another layout or out of reach.
            TypeError: If an argument is unknown.
        """
        from janusflow.models.checkpoints import identify_layout, resolve_model_folder

        unknown = set(hub) - {"revision", "cache_dir", "token", "local_files_only"}
        if unknown:
            raise TypeError(f"from_pretrained() got unexpected arguments: {', '.join(unknown)}")
        dtype = torch.float32 if torch_dtype is None else torch_dtype
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise SettingsError(f"torch_dtype must be such as torch.bfloat16, got {torch_dtype!r}")
        folder = resolve_model_folder(where, **hub)
        layout = identify_layout(folder)
        model = JanusFlowForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        inner = folder / "processor"
        processor = JanusFlowProcessor.from_pretrained(inner if inner.is_dir() else folder)
        source = vae
        if isinstance(vae, str) and vae == "default":
            hub.pop("revision", None)  # that of another repository
            if (folder / "vae").is_dir():
                source = folder / "vae"
            elif (folder / cls.config_name).is_file() or "flow" not in model.generation_heads:
                source = None  # saved without one, or nothing to decode
            else:
                source = SDXL_VAE
        if isinstance(source, str | os.PathLike):
            found: AutoencoderKL | None = load_autoencoder(source, dtype=dtype, **hub)
        else:
            found = source
        pipe = cls(model, processor, found)
        if device is not None:
            pipe.to(device)
        logger.info(
            "pipeline of %s (%s layout): heads %s, %s on %s, autoencoder %s",
            where,
            layout,
            ", ".join(model.generation_heads) or "none",
            str(dtype).removeprefix("torch."),
            pipe.device,
            "as given" if isinstance(source, AutoencoderKL) else source,
        )
        return pipe

    @property
    def interrupt(self) -> bool:
        """Whether a call is to end; a callback or another thread sets it.

        The call ends before its next step and returns what it has: latents as far as they came,
        decoded as they are. Every call begins by setting it to False.
        """
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @property
    def _context(self) -> int:
        """The most tokens of a sequence."""
        text_config: Any = self.model.config.text_config
        return text_config.max_position_embeddings

    # Pictures

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | EncodedPrompts,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        head: str | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float | None = None,
        guidance: Guidance | None = None,
        solver: str | SchedulerMixin = "euler",
        shift: float = 1.0,
        times: Tensor | Sequence[float] | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        image: Any = None,
        edit: str | EditMethod | None = None,
        source_prompt: str | Sequence[str] | None = None,
        strength: float | None = None,
        mask_image: Any = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_trajectory: bool = False,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> JanusFlowOutput:
        """Draws pictures.

        An image depends on its prompt, its random numbers and the settings, and on nothing else.
        Image i of all images, prompt by prompt, has those of seed `seed + i`, from a CPU generator
        of its own: the noise of the flow head, the draws of the VQ head.

        Args:
            prompt: One text or several, "" draws without a condition; or what `encode_prompts`
                gave, so that many calls share it.
            negative_prompt: What to be guided away from, instead of no condition; one text, or one
                for each prompt.
            head: "flow" or "vq", one of `model.generation_heads`; their first when not given, and
                that is "flow" where there are both.
            num_inference_steps: Intervals of the time grid, for the flow head.
            guidance_scale: Weight of classifier-free guidance; 1.0 = off, at half the cost. When
                not given, this and the three of the VQ head are `model.config.drawing_defaults_of`
                the head: the published 2.0 (flow) or 5.0 (VQ), where the model says nothing else.
            guidance: Instead of the scale, for the flow head: interval, schedule, CFG-Zero*, APG,
                rescaling.
            solver: For the flow head, a name of `janusflow.flow.solvers.solver_names()` or a
                diffusers flow scheduler, of which a copy is used. Adaptive ones take image by
                image.
            shift: Of the time grid, for the flow head; see `janusflow.flow.timesteps.time_grid`.
            times: Instead of `num_inference_steps` and `shift`: increasing times from 0 to 1.
            rtol: Relative tolerance of an adaptive solver.
            atol: Its absolute tolerance.
            temperature: Divides the logits, for the VQ head; 0 takes the likeliest tokens.
            top_k: Keeps so many tokens, for the VQ head.
            top_p: Keeps the likeliest tokens up to this probability, for the VQ head.
            image: Picture to edit, for the flow head: anything that
                `janusflow.processing.images.load_image` reads, one, or one for each prompt; cropped
                to the size that is drawn. The published model was not trained for editing.
            edit: How: "sdedit" (when not given) draws on from the picture under noise (arXiv
                2108.01073), "flowedit" goes from its prompt's flow to the new one's (arXiv
                2412.08629), "inversion" goes back to its noise and draws from there (arXiv
                2410.10792); or one with settings, of `janusflow.flow.edit_methods`.
            source_prompt: What the picture shows, for "flowedit" and "inversion": one text, or one
                for each prompt; no condition when not given. Of FlowEdit it is guided by
                `FlowEdit.source_guidance_scale`, which is off when not given; of an inversion it
                is not guided. Negative prompts are the new prompt's alone.
            strength: Of an edit, in (0, 1]: 1 starts from noise alone, near 0 leaves the picture.
                `num_inference_steps` counts the steps of a whole path, of which this share is
                taken. When not given, 0.6 (SDEdit), 0.85 (FlowEdit) or 1 (inversion).
            mask_image: Of an edit: white where to draw, black where to keep the picture.
            num_images_per_prompt: n.
            height: In pixels, a multiple of latent cell times patch; the trained size when not
                given, which is the only one of the VQ head.
            width: As `height`.
            seed: Of the first image; drawn when not given. `seeds` of the output has them all.
            generator: Instead of a seed: CPU generators, one for each image, or a single one that
                the images' noise, or the seeds of their draws, come from one after another.
            latents: Instead of both, for the flow head: the noise `x_0` of all images,
                (P · n, C, H/8, W/8); float64 noise is integrated in float64, all other in float32.
            output_type: "pil", "pt", "np" or "latent" (latents or tokens).
            return_trajectory: Keep the flow head's state after every step, on the CPU: as many
                times the memory of the latents as there are steps, and one more. Of an inversion
                from the picture to its noise, and on to the new one.
            callback_on_step_end: See `StepEndCallback`; latents in the dict that it returns replace
                those of the step. With `batch_size` it sees one batch after the other.
            callback_on_step_end_tensor_inputs: What its dict holds: there is "latents" for the flow
                head and "tokens" for the VQ head.
            batch_size: Images that the model computes at once, all when not given. A prompt is run
                through the language model once for each batch that it has images in.

        Raises:
            PromptError: If there is no prompt, one is no text, or one exceeds the context.
            SettingsError: If a setting is unknown or out of range.
        """
        head = self.pick_head(head)
        options = DrawOptions(
            head=head,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            guidance=guidance,
            solver=solver,
            shift=shift,
            times=times,
            rtol=rtol,
            atol=atol,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            image=image,
            edit=edit,
            source_prompt=source_prompt,
            strength=strength,
            mask_image=mask_image,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            seed=seed,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_trajectory=return_trajectory,
            callback_inputs=callback_on_step_end_tensor_inputs,
            batch_size=batch_size,
        )
        request = check_request(
            options, prompt, self.model, self.processor, has_vae=self.vae is not None
        )
        self._interrupt = False
        request = drawing.encode_pictures(self, request)
        _load_to_accelerator(self.model)  # last: when offloaded, the autoencoder sends it away
        draw = drawing.draw_latents if head == "flow" else drawing.draw_picture_tokens
        parts = []
        batches = range(0, request.num_images, request.batch_size)
        with self.progress_bar(total=len(batches) * request.num_steps) as bar:
            for start in batches:
                stop = min(start + request.batch_size, request.num_images)
                parts.append(draw(self, request, start, stop, callback_on_step_end, bar.update))
        images: Any
        latents = tokens = trajectory = None
        if head == "flow":
            images = latents = torch.cat([part.states for part in parts])
            if request.return_trajectory:
                # As long as all have come, of a call that was interrupted.
                states = zip(*(part.trajectory for part in parts), strict=False)
                trajectory = torch.stack([torch.cat(batch) for batch in states])
            if output_type != "latent":
                images = _as_images(decode(without_float16(self.vae), latents), output_type)
        else:
            rows = [row for part in parts for row in part.states]
            images = tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            if output_type != "latent":
                missing = self.model.vq_head.num_image_tokens - tokens.shape[1]
                whole = nn.functional.pad(tokens, (0, missing))
                images = _as_images(self.model.vq_head.decode(whole), output_type)
        self.maybe_free_model_hooks()
        return JanusFlowOutput(
            images=images,
            latents=latents,
            nfe=max(part.nfe for part in parts),
            num_forward_passes=max(part.num_forward_passes for part in parts),
            seeds=request.seeds,
            tokens=tokens,
            trajectory=trajectory,
        )

    def invert(
        self,
        image: Any,
        prompt: str | Sequence[str] = "",
        *,
        gamma: float = 0.0,
        num_inference_steps: int = 30,
        solver: str = "euler",
        shift: float = 1.0,
        rtol: float | None = None,
        atol: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: OutputType = "pil",
        batch_size: int | None = None,
    ) -> InversionOutput:
        """Finds the noises that pictures come from, and draws from them again.

        The way there and back is not guided: `pipe(prompt, latents=out.latents,
        guidance_scale=1.0)` at the same steps and solver gives `reconstruction` again, and the
        error says how far that missed the pictures. The published model was not trained for it.

        Args:
            image: One or several, as of a call.
            prompt: What they show: one text, or one for each; "" is no condition.
            gamma: In [0, 1]: how much the way back is drawn to typical noise (arXiv 2410.10792).
                At 0 it is the flow alone, of which drawing is the reverse; above 0 the noise is
                more like noise, and the pictures are missed by more.
            num_inference_steps: As of a call.
            solver: By name, as of a call; none that draws noise. With gamma above 0 none that
                evaluates at t = 0, as heun does.
            shift: As of a call.
            rtol: As of a call.
            atol: As of a call.
            height: As of a call.
            width: As of a call.
            seed: Of the first picture's typical noise, as of a call; of no effect where gamma is 0.
            generator: As of a call.
            output_type: As of a call.
            batch_size: As of a call.

        Raises:
            ImageError: If a picture cannot be read.
            PromptError: As a call.
            SettingsError: As a call.
        """
        num_pictures = len(image) if isinstance(image, list | tuple) else 1
        texts = [prompt] * num_pictures if isinstance(prompt, str) else prompt
        output = self(
            texts,
            head="flow",
            num_inference_steps=num_inference_steps,
            guidance_scale=1.0,
            solver=solver,
            shift=shift,
            rtol=rtol,
            atol=atol,
            image=image,
            edit=Inversion(gamma, eta=0.0),
            source_prompt=texts,
            height=height,
            width=width,
            seed=seed,
            generator=generator,
            output_type=output_type,
            return_trajectory=True,
            batch_size=batch_size,
        )
        assert output.latents is not None
        assert output.trajectory is not None
        pictures, noises = output.trajectory[0], output.trajectory[: num_inference_steps + 1][-1]
        return InversionOutput(
            latents=noises.to(output.latents.device),
            reconstruction=output.images,
            reconstruction_error=reconstruction_error(pictures, output.latents.cpu()),
            nfe=output.nfe,
            num_forward_passes=output.num_forward_passes,
            seeds=output.seeds,
        )

    @torch.no_grad()
    def encode_prompts(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        head: str | None = None,
        guided: bool = True,
    ) -> EncodedPrompts:
        """Runs prompts through the language model, to be drawn again and again.

        Args:
            prompt: As of a call.
            negative_prompt: As of a call.
            head: As of a call.
            guided: Whether they can be guided; without, they take half the memory.

        Returns:
            What a call takes as `prompt`.

        Raises:
            PromptError: As a call.
            SettingsError: As a call.
        """
        head = self.pick_head(head)
        prompts = tokenize(prompt, negative_prompt, head, self.model, self.processor)
        _load_to_accelerator(self.model)
        return drawing.encode_prompts(self, prompts, head, guided=guided)

    def pick_head(self, head: str | None = None) -> str:
        """The head to draw with: the given one, or else the first that the model holds.

        Raises:
            SettingsError: If the model does not hold it.
        """
        if head is None:
            held = self.model.generation_heads
            head = held[0] if held else "flow"
        self.model.require_head(head)
        return head

    # Answers

    @torch.no_grad()
    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        images: Any = None,
        system_prompt: str | None = None,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stream: bool = False,
        **generate_options: Any,
    ) -> Any:
        """Answers the last message of one conversation, or of each of several.

        Args:
            messages: HF style or published style (see `janusflow.processing.conversations`).
            images: Pictures beside the conversations instead of in them.
            system_prompt: For conversations without one; None takes the model's, "" takes none.
            max_new_tokens: The most tokens of an answer; fewer where the context ends before.
            do_sample: Draw tokens instead of taking the likeliest.
            temperature: Divides the logits, for do_sample.
            top_p: Keeps the likeliest tokens up to this probability, for do_sample.
            top_k: Keeps so many tokens, for do_sample.
            seed: Of the first conversation's draws, the next one's is one higher; drawn when not
                given. No global random state is read or changed, and an answer does not depend on
                its neighbours.
            stream: Give an iterator over pieces of the answer, for one conversation. Leaving it
                stops the generation.
            **generate_options: Others of transformers' `GenerationConfig`, such as
                `repetition_penalty` or `num_beams`.

        Returns:
            A text, a list of texts, or an iterator of text.

        Raises:
            PromptError: If a conversation is not understood or exceeds the context.
            ImageError: If a picture cannot be read.
            SettingsError: If an option is unknown or out of range.
        """
        check_count("max_new_tokens", max_new_tokens)
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        for name in set(generate_options) & set(SAMPLING_OPTIONS):
            sampling[name] = generate_options.pop(name)
        _check_generate_options(generate_options)
        limit = self._context
        inputs = self.processor(messages, images, system_prompt, max_length=limit - 1)
        num_rows, length = inputs["input_ids"].shape
        single = isinstance(messages[0], Mapping)
        if stream and num_rows != 1:
            raise SettingsError(f"stream=True takes one conversation, got {num_rows}")
        processors = None
        if do_sample:
            if generate_options.get("num_beams", 1) != 1:
                raise SettingsError("num_beams and do_sample=True do not go together; drop one")
            first = first_seed(seed, num_rows)
            generators = [torch.Generator().manual_seed(first + i) for i in range(num_rows)]
            processors = sampling_processors(sampling, generators)
        elif idle := [name for name, value in sampling.items() if value is not None]:
            logger.warning("without do_sample=True, %s has no effect", ", ".join(sorted(idle)))
        ids_by_name = {
            name: getattr(self.processor, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }

        def generate(**extra: Any) -> Tensor:
            _load_to_accelerator(self.model)
            on_device = {name: v.to(self._execution_device) for name, v in inputs.items()}
            try:
                config = GenerationConfig(
                    max_new_tokens=min(max_new_tokens, limit - length),
                    do_sample=False,
                    **{**ids_by_name, **generate_options},
                )
                return self.model.generate(
                    **on_device, generation_config=config, logits_processor=processors, **extra
                )
            except ValueError as error:
                if not generate_options:
                    raise
                raise SettingsError(f"{generate_options} cannot be had: {error}") from error
            finally:
                self.maybe_free_model_hooks()

        if stream:
            return stream_text(generate, self.processor.tokenizer)
        ids = generate()[:, length:].cpu()
        answers = [text.strip() for text in self.processor.batch_decode(ids)]
        return answers[0] if single else answers


def _check_processor(
    processor: JanusFlowProcessor, model: JanusFlowForConditionalGeneration
) -> None:
    config: Any = model.config
    size = processor.image_processor.image_size
    expected = config.understanding_tokens_at(size)
    if processor.num_image_tokens != expected:
        raise CheckpointError(
            f"the processor gives a picture {processor.num_image_tokens} tokens, but the model "
            f"makes {expected} of {size} px; they do not belong together"
        )
    if config.image_token_id not in (None, processor.image_token_id):
        raise CheckpointError(
            f"image_token_id is {config.image_token_id} in the model and "
            f"{processor.image_token_id} in the processor; they do not belong together"
        )


def _load_to_accelerator(module: torch.nn.Module) -> None:
    """Wakes a module that `enable_model_cpu_offload` sent away.

    Its hook waits for `forward`, but a picture is drawn through the module's other methods.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)


def _check_generate_options(options: Mapping[str, Any]) -> None:
    known = set(vars(GenerationConfig())) - _NOT_OF_CHAT
    for name in options:
        if name not in known or name.startswith("_"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SettingsError(f"unknown option {name!r} of chat(){hint}")


def _as_images(pixels: Tensor, output_type: str) -> Any:
    """Pixels (B, 3, H, W) in [-1, 1] as the type that was asked for."""
    pixels = pixels / 2 + 0.5
    if output_type == "pt":
        return pixels
    channels_last = pixels.permute(0, 2, 3, 1)
    if output_type == "np":
        return channels_last.numpy()
    return [Image.fromarray(one) for one in (255 * channels_last).round().byte().numpy()]
