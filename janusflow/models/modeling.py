"""The model: a Llama language model, a SigLIP understanding path, and generation heads over both.

Axes: B batch, L prompt tokens (left-padded), N image tokens, E language width, C latent channels.
This module knows ids and tensors; text, pictures and checkpoints on disk are others' work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.janus.modeling_janus import JanusVisionAlignerMLP, JanusVisionModel

from janusflow.errors import PromptError, SettingsError
from janusflow.flow.guidance import Guidance, check_guidance_scale
from janusflow.flow.solvers import StepCallback, solve
from janusflow.flow.timesteps import time_grid
from janusflow.models.configuration import FlowHeadConfig, JanusFlowConfig
from janusflow.models.flow_head import FlowHead, FlowTokens
from janusflow.models.guided_field import GuidedField
from janusflow.models.placeholders import begin_tags, find_placeholders
from janusflow.models.prefix import EncodedPrompts, PromptPrefix, positions, shared_prefix_mask
from janusflow.models.token_sampling import TokenCallback, draw_tokens, token_choice
from janusflow.models.vq_head import VQHead


class PictureStates(NamedTuple):
    """States of the language model in training, n points of a picture's path for each prompt.

    Attributes:
        flow: The last layer's at the flow head's tokens, (B · n, 1 + N, E); empty without them.
        vq: The last layer's that predict the VQ head's tokens, (B, N, E); empty without them.
        inner: As `flow`, after an inner layer; None when not asked for.
    """

    flow: Tensor
    vq: Tensor
    inner: Tensor | None


class JanusFlowForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Looks at pictures autoregressively and draws them by rectified flow.

    Text comes from `generate`, pictures' latents from `generate_latents` with the flow head and
    pictures' tokens from `generate_image_tokens` with the VQ head; `encode_prompt` and `velocity`
    are the parts of the first for one's own loops.
    """

    config_class = JanusFlowConfig
    config: JanusFlowConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar = ["LlamaDecoderLayer", "JanusVisionEncoderLayer", "ConvNextBlock"]
    _tied_weights_keys: ClassVar = {
        "language_model.lm_head.weight": "language_model.model.embed_tokens.weight"
    }

    def __init__(self, config: JanusFlowConfig) -> None:
        super().__init__(config)
        width = config.text_config.hidden_size
        self.language_model = LlamaForCausalLM._from_config(config.text_config)
        self.vision_model = JanusVisionModel._from_config(config.vision_config)
        self.aligner = JanusVisionAlignerMLP(config.vision_config)
        if config.learned_begin_embedding:
            self.begin_embedding = nn.Parameter(torch.empty(1, width))
        if config.flow_config is not None:
            self.flow_head = FlowHead(config.flow_config, width)
        if config.vq_config is not None:
            self.vq_head = VQHead(config.vq_config)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> JanusFlowForConditionalGeneration:
        """Loads a model from a folder or hub id in any known layout, strictly.

        Args:
            pretrained_model_name_or_path: A folder, a hub id, or "tiny" for the bundled model.
            **kwargs: As for `transformers.PreTrainedModel.from_pretrained`; `dtype` (as stored when
                not given), `device_map`, `revision`, ….

        Raises:
            CheckpointError: If the folder is no model, or a weight is missing, unexpected or of
                the wrong shape.
        """
        from janusflow.models.checkpoints import load_model

        return load_model(cls, pretrained_model_name_or_path, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and self.config.learned_begin_embedding:
            nn.init.normal_(self.begin_embedding, std=self.config.text_config.initializer_range)

    @property
    def generation_heads(self) -> tuple[str, ...]:
        """Names of the generation heads that the model holds."""
        return self.config.generation_heads

    def require_head(self, head: str) -> None:
        """Refuses a head that the model does not hold.

        Raises:
            SettingsError: Naming the heads that it holds.
        """
        if head not in self.generation_heads:
            held = ", ".join(self.generation_heads) or "none"
            raise SettingsError(f"this model has no generation head {head!r}; it holds: {held}")

    @property
    def flow_config(self) -> FlowHeadConfig:
        """Sizes of the flow head.

        Raises:
            SettingsError: If the model holds none.
        """
        self.require_head("flow")
        return self.config.flow_config

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head over the vocabulary."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's head over the vocabulary."""
        self.language_model.set_output_embeddings(value)

    # Understanding

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Language-model embeddings of pictures.

        Args:
            pixel_values: (images, 3, H, W) in [-1, 1]. Sides other than the trained one are taken
                when the patch size divides them; the position embeddings are interpolated.

        Returns:
            (images, N, E).
        """
        config = self.config
        if config.pixel_mean is not None:
            mean, std = (
                torch.tensor(v, device=pixel_values.device).reshape(-1, 1, 1)
                for v in (config.pixel_mean, config.pixel_std)
            )
            pixel_values = (pixel_values.float() - mean) / std
        patch, sides = config.vision_config.patch_size, pixel_values.shape[-2:]
        if any(side % patch for side in sides):
            raise SettingsError(
                f"pixel_values of {sides[0]} x {sides[1]} px: sides must be multiples of {patch}"
            )
        trained = config.vision_config.image_size
        features = self.vision_model(
            pixel_values, interpolate_pos_encoding=tuple(sides) != (trained, trained)
        ).last_hidden_state
        return self.aligner(features)

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Embeddings (B, L, E) of ids (B, L), image features in the place of placeholders.

        Args:
            input_ids: Each picture is a run of N placeholders after its begin tag.
            pixel_values: All pictures in the order of their placeholders, (images, 3, H, W), or by
                row, (B, images, 3, H, W), where rows with fewer pictures are padded at the end.

        Raises:
            PromptError: If placeholders and pictures do not match in number.
        """
        embeddings = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return embeddings
        placeholder, num_tokens = self._placeholders(input_ids, pixel_values)
        if pixel_values.ndim == 5:
            used = placeholder.sum(1) // num_tokens
            pixel_values = torch.cat(
                [row[:n] for row, n in zip(pixel_values, used.tolist(), strict=True)]
            )
        # Reading a tensor's value would break a compiled graph in two.
        compiling = torch.compiler.is_compiling()
        if not compiling and int(placeholder.sum()) != len(pixel_values) * num_tokens:
            raise PromptError(
                f"{len(pixel_values)} images need {len(pixel_values) * num_tokens} placeholders "
                f"({num_tokens} each), but input_ids hold {int(placeholder.sum())}"
            )
        features = self.get_image_features(pixel_values).to(embeddings.dtype)
        embeddings = embeddings.masked_scatter(placeholder[..., None], features)
        if self.config.learned_begin_embedding:
            begin = self.begin_embedding.to(embeddings.dtype)
            at_begin = begin_tags(placeholder, num_tokens)[..., None]
            embeddings = torch.where(at_begin, begin, embeddings)
        return embeddings

    def _placeholders(self, input_ids: Tensor, pixel_values: Tensor) -> tuple[Tensor, int]:
        """Where placeholders stand, (B, L) bool, and how many tokens a picture of this size has."""
        patch = self.config.vision_config.patch_size
        num_tokens = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
        placeholder = find_placeholders(input_ids, num_tokens, self.config.image_token_id)
        return placeholder, num_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Next-token logits of a conversation with pictures.

        Args:
            input_ids: (B, L), left-padded.
            pixel_values: See `embed`.
            attention_mask: 1 for tokens, 0 for padding, (B, L).
            position_ids: (B, L); by default counted over the attention mask.
            past_key_values: Cache of what came before.
            inputs_embeds: (B, L, E), instead of ids.
            labels: Ids to predict, -100 where no loss is taken, (B, L).
            use_cache: Whether to return the cache.
            logits_to_keep: Compute logits of the last so many positions only; 0 = all.
            **kwargs: Passed to the language model.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise PromptError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, pixel_values)
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = positions(attention_mask)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats rows for beams and several answers; a row's pictures stay together."""
        pixel_values = kwargs.get("pixel_values")
        if expand_size > 1 and input_ids is not None and pixel_values is not None:
            kwargs["pixel_values"] = self._by_row(input_ids, pixel_values)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **kwargs,
        )

    def _by_row(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        """Pictures (images, 3, H, W) as (B, most images of a row, 3, H, W), zeros at the end."""
        if pixel_values.ndim == 5:
            return pixel_values
        placeholder, num_tokens = self._placeholders(input_ids, pixel_values)
        counts = (placeholder.sum(1) // num_tokens).tolist()
        if sum(counts) != len(pixel_values):
            return pixel_values  # `embed` says what is wrong
        return nn.utils.rnn.pad_sequence(list(pixel_values.split(counts)), batch_first=True)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hands pictures to the first step only; the cache holds them afterwards."""
        inputs = super().prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs

    # Generation of pictures

    def encode_prompts(
        self,
        head: str,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        guided: bool = True,
        pad_token_id: int | None = None,
        negative_ids: Tensor | None = None,
        negative_mask: Tensor | None = None,
    ) -> EncodedPrompts:
        """Runs prompts once for a head, with what they are to be guided away from.

        Args:
            head: "flow" or "vq".
            input_ids: (P, L), left-padded, ending in the head's tag.
            attention_mask: 1 for tokens, 0 for padding, (P, L).
            guided: Whether to run unconditional rows, too.
            pad_token_id: Fills those of the VQ head.
            negative_ids: Prompts that stand in for the unconditional rows, (P, L').
            negative_mask: Of them, (P, L').

        Raises:
            PromptError: See `encode_prompt`.
        """
        if head == "flow":
            prefix = self.encode_prompt(input_ids, attention_mask)
            free = None
            if guided and negative_ids is not None:
                free = self.encode_prompt(negative_ids, negative_mask)
            elif guided:
                free = prefix.unconditional(self.encode_unconditional(input_ids, attention_mask))
            return EncodedPrompts(head, prefix, free)
        if guided and negative_ids is None:
            both, states = self.encode_token_prompt(input_ids, attention_mask, pad_token_id)
            rows = torch.arange(len(both), device=states.device).chunk(2)
            prefix, free = (both.select(half) for half in rows)
            return EncodedPrompts(head, prefix, free, *states.chunk(2))
        prefix, hidden = self.encode_token_prompt(input_ids, attention_mask)
        if not guided:
            return EncodedPrompts(head, prefix, hidden=hidden)
        assert negative_ids is not None
        free, free_hidden = self.encode_token_prompt(negative_ids, negative_mask)
        return EncodedPrompts(head, prefix, free, hidden, free_hidden)

    # Flow head

    def encode_prompt(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> PromptPrefix:
        """Runs prompts once and keeps their keys and values.

        Args:
            input_ids: (B, L), left-padded, ending in the generation tag, which the flow head
                drops: the time token takes its place.
            attention_mask: 1 for tokens, 0 for padding, (B, L).

        Raises:
            PromptError: If a prompt has no token before the tag or padding on the right, or if
                prompt and picture together exceed the context.
        """
        self.require_head("flow")
        mask = self._check_prompt(input_ids, attention_mask, self.flow_config.num_image_tokens)
        mask = mask[:, :-1]
        output = self.language_model.model(
            input_ids=input_ids[:, :-1],
            attention_mask=mask,
            position_ids=positions(mask),
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        return PromptPrefix(output.past_key_values, mask, mask.sum(1))

    def encode_unconditional(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> PromptPrefix:
        """The prefix of guidance, one row: the prompts' first token alone.

        Raises:
            PromptError: If the prompts do not begin with one and the same token.
        """
        mask = self._check_prompt(input_ids, attention_mask, self.flow_config.num_image_tokens)
        first = input_ids.gather(1, mask.argmax(1, keepdim=True))
        if len(first.unique()) != 1:
            raise PromptError(
                "guidance needs prompts that begin with the same token (begin of sentence), got "
                f"first ids {first.flatten().tolist()}"
            )
        # A second token stands for the tag that encode_prompt drops.
        return self.encode_prompt(first[:1].repeat(1, 2))

    def _check_prompt(
        self, input_ids: Tensor, attention_mask: Tensor | None, image_tokens: int
    ) -> Tensor:
        if input_ids.ndim != 2 or input_ids.shape[0] == 0:
            raise PromptError(
                f"input_ids have shape {tuple(input_ids.shape)}; expected (batch, length)"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        if mask.shape != input_ids.shape:
            raise PromptError(
                f"attention_mask {tuple(mask.shape)} must have the shape of input_ids "
                f"{tuple(input_ids.shape)}"
            )
        if bool((mask.diff(dim=1) < 0).any()) or bool((mask.sum(1) < 2).any()):
            raise PromptError(
                "each prompt needs at least one token before the generation tag, and padding "
                "stands on the left only"
            )
        limit = self.config.text_config.max_position_embeddings
        longest = int(mask.sum(1).max())
        if longest + image_tokens > limit:
            raise PromptError(
                f"a prompt of {longest} tokens and {image_tokens} image tokens exceed the context "
                f"of {limit}; shorten the prompt"
            )
        return mask

    def velocity(self, latents: Tensor, t: Tensor | float, prefix: PromptPrefix) -> Tensor:
        """Velocity of latents at time t, given prompts.

        Args:
            latents: (B, C, H/8, W/8).
            t: In [0, 1], 0 = noise, 1 = image; a scalar or (B,).
            prefix: Prompts of `encode_prompt`, B rows; unchanged afterwards.

        Returns:
            float32 (B, C, H/8, W/8).
        """
        self.require_head("flow")
        self.flow_head.check_latents(latents)
        if len(latents) != len(prefix):
            raise SettingsError(f"{len(latents)} latents do not fit {len(prefix)} prompts")
        times = torch.as_tensor(t, dtype=torch.float32, device=latents.device).expand(len(latents))
        tokens = self.flow_head.tokens(latents, times)
        length = tokens.embeddings.shape[1]
        mask = nn.functional.pad(prefix.attention_mask, (0, length), value=1)
        steps = torch.arange(length, device=latents.device)
        output = self.language_model.model(
            inputs_embeds=tokens.embeddings,
            attention_mask=mask,
            position_ids=prefix.next_position[:, None] + steps,
            past_key_values=prefix.cache,
            use_cache=True,
        )
        prefix.cache.crop(-length)
        return self.flow_head.velocity(output.last_hidden_state, tokens)

    def flow_forward(
        self, input_ids: Tensor, attention_mask: Tensor, latents: Tensor, t: Tensor
    ) -> Tensor:
        """The same velocity without a cache, in one pass that gradients flow through.

        Several latents of one prompt share a row of the language model: prompt, time and image
        tokens of the first, of the second, …; each sees the prompt and itself only.

        Args:
            input_ids: (B, L), left-padded, ending in the generation tag, which is dropped.
            attention_mask: (B, L); masked tokens still count as positions when they stand
                after the first token (a dropped condition), not when they stand before it.
            latents: n for each prompt, prompt by prompt, (B · n, C, H/8, W/8).
            t: (B · n,).

        Returns:
            float32 (B · n, C, H/8, W/8).
        """
        self.require_head("flow")
        tokens = self.flow_head.tokens(latents, t)
        states = self.picture_states(input_ids, attention_mask, flow=tokens)
        return self.flow_head.velocity(states.flow, tokens)

    def picture_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        flow: FlowTokens | None = None,
        image_tokens: Tensor | None = None,
        inner_layer: int | None = None,
    ) -> PictureStates:
        """The language model's part of training either head, or both in one pass.

        A row holds a prompt, its pictures for the flow head (time and image tokens each) and its
        picture for the VQ head (the tag that starts it, then tokens); each of them sees the prompt
        and itself only.

        Args:
            input_ids: (B, L), left-padded, ending in a tag, which stands before the VQ head's
                picture only.
            attention_mask: (B, L); see `flow_forward`. What is masked after the first token, a
                dropped condition, the VQ head sees all the same, as in sampling.
            flow: Of `flow_head.tokens`, n latents for each prompt.
            image_tokens: (B, N).
            inner_layer: After how many layers states of the flow head's tokens are wanted, too.
        """
        table = self.get_input_embeddings()
        prompt = table(input_ids[:, :-1])
        kept = attention_mask[:, :-1].bool()
        begun = kept.cumsum(1) > 0
        length, device = prompt.shape[1], prompt.device
        inputs = [prompt]
        numbers = [torch.zeros(length, dtype=torch.long, device=device)]
        steps = [positions(begun)]
        after = begun.sum(1, keepdim=True)
        images = flow_length = vq_length = 0
        if flow is not None:
            images, flow_length = len(flow.embeddings) // len(input_ids), flow.embeddings.shape[1]
            inputs.append(rearrange(flow.embeddings, "(b n) l e -> b (n l) e", n=images))
            numbers.append(
                torch.arange(1, images + 1, device=device).repeat_interleave(flow_length)
            )
            steps.append(after + torch.arange(flow_length, device=device).repeat(images))
        if image_tokens is not None:
            vq_length = image_tokens.shape[1]
            drawn = self.vq_head.embed(image_tokens[:, :-1])
            inputs += [table(input_ids[:, -1:]), drawn]
            numbers.append(torch.full((vq_length,), images + 1, device=device))
            steps.append(after + torch.arange(vq_length, device=device))
        blocks = torch.cat(numbers)
        of_flow = (blocks > 0) & (blocks <= images)
        visible = torch.where(of_flow[:, None], kept[:, None], begun[:, None])
        visible = nn.functional.pad(visible, (0, len(blocks) - length), value=True)
        output = self.language_model.model(
            inputs_embeds=torch.cat([part.to(prompt.dtype) for part in inputs], dim=1),
            attention_mask=shared_prefix_mask(
                blocks.expand(len(prompt), -1), visible, prompt.dtype
            ),
            position_ids=torch.cat(steps, dim=1),
            use_cache=False,
            output_hidden_states=inner_layer is not None,
        )

        def of_flow_head(states: Tensor) -> Tensor:
            taken = states[:, length : length + images * flow_length]
            return taken.reshape(len(states) * images, flow_length, states.shape[-1])

        last = output.last_hidden_state
        return PictureStates(
            flow=of_flow_head(last),
            vq=last[:, last.shape[1] - vq_length :],
            inner=None if inner_layer is None else of_flow_head(output.hidden_states[inner_layer]),
        )

    @torch.no_grad()
    def generate_latents(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        latents: Tensor | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 2.0,
        solver: str = "euler",
        generator: torch.Generator | None = None,
        pad_token_id: int | None = None,
        on_step: StepCallback | None = None,
    ) -> Tensor:
        """Draws latents of pictures by solving the flow's ODE.

        Args:
            input_ids: (B, L), left-padded, ending in the generation tag.
            attention_mask: (B, L); by default padding is what equals `pad_token_id` on the left.
            latents: Noise `x_0`, (B · n, C, H/8, W/8), n images a prompt, prompt by prompt; drawn
                from `generator` when not given. Not modified.
            num_inference_steps: Intervals of the time grid.
            guidance_scale: 1.0 = off.
            solver: A name in `janusflow.flow.solvers.SOLVERS`.
            generator: CPU generator of the noise.
            pad_token_id: Id of the padding; the config's when not given.
            on_step: See `janusflow.flow.solvers.StepCallback`.

        Returns:
            Latents, scaled as the autoencoder's `scaling_factor` has it, float32 (or float64 for
            float64 noise), shaped like the noise.
        """
        config = self.flow_config
        times = time_grid(num_inference_steps)
        scale = check_guidance_scale(guidance_scale)
        if attention_mask is None:
            attention_mask = self._mask_of_padding(input_ids, pad_token_id)
        if latents is None:
            side = config.latent_size
            shape = (len(input_ids), config.latent_channels, side, side)
            latents = torch.randn(shape, generator=generator)
        self.flow_head.check_latents(latents)
        images, rest = divmod(len(latents), len(input_ids))
        if rest or not images:
            raise SettingsError(
                f"{len(latents)} latents do not divide among {len(input_ids)} prompts"
            )
        x_0 = latents.to(self.device, torch.promote_types(latents.dtype, torch.float32))
        guidance = Guidance(scale)
        encoded = self.encode_prompts("flow", input_ids, attention_mask, guided=not guidance.off)
        rows = torch.arange(len(input_ids), device=self.device).repeat_interleave(images)
        field = GuidedField(self.velocity, encoded.select(rows), guidance)
        return solve(field, x_0, times, solver=solver, on_step=on_step).latents

    def _mask_of_padding(self, input_ids: Tensor, pad_token_id: int | None) -> Tensor:
        """1 from the first token on that is no padding, (B, L)."""
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        if pad is None:
            return torch.ones_like(input_ids)
        return ((input_ids != pad).cumsum(1) > 0).long()

    # VQ head

    def encode_token_prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
    ) -> tuple[PromptPrefix, Tensor]:
        """Runs prompts once for the VQ head, with their unconditional rows when it is to be guided.

        An unconditional row is its prompt with every token but the first and the last, the tag
        that starts a picture, turned into padding that stays attended, as published.

        Args:
            input_ids: (B, L), left-padded, ending in the tag.
            attention_mask: 1 for tokens, 0 for padding, (B, L).
            pad_token_id: Fills the unconditional rows; None leaves them out.

        Returns:
            The prefix and the last hidden state of each row, (B, E) or, the unconditional rows
            after the others, (2 B, E).

        Raises:
            PromptError: See `encode_prompt`.
        """
        self.require_head("vq")
        mask = self._check_prompt(input_ids, attention_mask, self.vq_head.num_image_tokens)
        if pad_token_id is not None:
            kept = mask.cumsum(1) == 1
            kept[:, -1] = True
            input_ids = torch.cat([input_ids, input_ids.where(kept, pad_token_id)])
            mask = mask.repeat(2, 1)
        output = self.language_model.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions(mask),
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        prefix = PromptPrefix(output.past_key_values, mask, mask.sum(1))
        return prefix, output.last_hidden_state[:, -1]

    @torch.no_grad()
    def generate_image_tokens(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 5.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        pad_token_id: int | None = None,
        max_new_tokens: int | None = None,
        on_token: TokenCallback | None = None,
    ) -> Tensor:
        """Draws the tokens of pictures one after another.

        Args:
            input_ids: (B, L), left-padded, ending in the tag that starts a picture.
            attention_mask: (B, L); by default padding is what equals `pad_token_id` on the left.
            num_images_per_prompt: n; a prompt's images share its prefix.
            guidance_scale: Weight of guidance, `l_u + w (l_c - l_u)` on logits; 1.0 = off.
            temperature: Divides the guided logits; 0 takes the likeliest token.
            top_k: Keeps so many tokens.
            top_p: Keeps the likeliest tokens up to this probability.
            generator: CPU generators, one for each image, or a single one that gives each its seed;
                torch's default when not given.
            pad_token_id: Fills the unconditional prompts; the config's when not given.
            max_new_tokens: Tokens of an image; a whole picture when not given.
            on_token: See `janusflow.models.token_sampling.TokenCallback`.

        Returns:
            Tokens, int64 (B · n, N) prompt by prompt, row by row of the picture; fewer than N when
            `max_new_tokens` or the callback ends before.

        Raises:
            PromptError: See `encode_prompt`.
            SettingsError: If a setting is out of range or the model holds no VQ head.
        """
        self.require_head("vq")
        total = self.vq_head.num_image_tokens
        num_tokens = total if max_new_tokens is None else max_new_tokens
        if not 1 <= num_tokens <= total:
            raise SettingsError(
                f"max_new_tokens must be from 1 to {total}, the tokens of a picture; got "
                f"{max_new_tokens}"
            )
        scale = check_guidance_scale(guidance_scale)
        choose = token_choice(
            temperature, top_k, top_p, generator, len(input_ids) * num_images_per_prompt
        )
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        if scale != 1.0 and pad is None:
            raise SettingsError("guidance needs pad_token_id, and the model's config has none")
        if attention_mask is None:
            attention_mask = self._mask_of_padding(input_ids, pad)
        encoded = self.encode_prompts(
            "vq", input_ids, attention_mask, guided=scale != 1.0, pad_token_id=pad
        )
        rows = torch.arange(len(input_ids), device=self.device)
        return draw_tokens(
            self,
            encoded.select(rows.repeat_interleave(num_images_per_prompt)),
            num_tokens=num_tokens,
            guidance_scale=scale,
            choose=choose,
            on_token=on_token,
        )
