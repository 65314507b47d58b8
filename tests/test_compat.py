"""Scripts in the style of the published ones, on folders in the published layouts."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_pipeline
from transformers import AutoModelForCausalLM

from janusflow import JanusFlowPipeline, SettingsError
from janusflow.compat import MultiModalityCausalLM, VLChatProcessor, load_pil_images
from janusflow.models.checkpoints import convert

PROMPT = "a red circle above a blue square"


def published_folder(pipe: JanusFlowPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder / "ours")
    return convert(folder / "ours", folder / "published", to="published")


@pytest.fixture(scope="module")
def flow_pipe() -> JanusFlowPipeline:
    return make_pipeline()


@pytest.fixture(scope="module")
def vq_pipe() -> JanusFlowPipeline:
    pipe = make_pipeline(("vq",))
    config = pipe.model.config
    # Janus has no learned begin vector.
    config.learned_begin_embedding = False
    del pipe.model.begin_embedding
    return pipe


@pytest.fixture(scope="module")
def flow_folder(flow_pipe: JanusFlowPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(flow_pipe, tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="module")
def vq_folder(vq_pipe: JanusFlowPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published_folder(vq_pipe, tmp_path_factory.mktemp("vq"))


def generation_ids(processor: VLChatProcessor) -> torch.Tensor:
    conversation = [{"role": "User", "content": PROMPT}, {"role": "Assistant", "content": ""}]
    text = processor.apply_sft_template_for_multi_turn_prompts(
        conversations=conversation, sft_format=processor.sft_format, system_prompt=""
    )
    return torch.LongTensor(processor.tokenizer.encode(text + processor.image_start_tag))


@torch.inference_mode()
def test_a_published_ode_loop_draws_what_the_pipeline_draws(
    flow_folder: Path, flow_pipe: JanusFlowPipeline
) -> None:
    processor = VLChatProcessor.from_pretrained(str(flow_folder))
    model = MultiModalityCausalLM.from_pretrained(str(flow_folder), trust_remote_code=True)
    model = model.to(torch.float32).eval()
    batch, steps, weight, image_tokens = 3, 4, 2.0, 16
    ids = generation_ids(processor)
    tokens = torch.stack([ids] * 2 * batch)
    tokens[batch:, 1:] = processor.pad_id
    embeddings = model.language_model.get_input_embeddings()(tokens)[:, :-1]
    length = embeddings.shape[1]
    mask = torch.ones(2 * batch, length + 1 + image_tokens, dtype=torch.int)
    mask[batch:, 1:length] = 0
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z = noise.clone()
    past: Any = None
    for step in range(steps):
        doubled = torch.cat([z, z])
        timesteps = torch.tensor([step / steps * 1000.0] * len(doubled))
        encoded, time_embedding, skips = model.vision_gen_enc_model(doubled, timesteps)
        flat = encoded.view(encoded.shape[0], encoded.shape[1], -1)
        image = model.vision_gen_enc_aligner(flat.permute(0, 2, 1))
        inputs = torch.cat([embeddings, time_embedding.unsqueeze(1), image], dim=1)
        outputs = model.language_model.model(
            inputs_embeds=inputs, use_cache=True, attention_mask=mask, past_key_values=past
        )
        past = ()  # what the published loop's emptied list becomes
        hidden = outputs.last_hidden_state[:, -image_tokens:]
        hidden = model.vision_gen_dec_aligner(model.vision_gen_dec_aligner_norm(hidden))
        hidden = hidden.reshape(len(doubled), 4, 4, -1).permute(0, 3, 1, 2)
        velocity = model.vision_gen_dec_model(hidden, skips, time_embedding)
        conditional, unconditional = velocity.chunk(2)
        z = z + (weight * conditional - (weight - 1.0) * unconditional) / steps
    expected = flow_pipe(
        PROMPT,
        num_images_per_prompt=batch,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=weight,
        output_type="latent",
    )
    torch.testing.assert_close(z, expected.latents, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_published_token_loop_draws_what_the_pipeline_draws(
    vq_folder: Path, vq_pipe: JanusFlowPipeline
) -> None:
    processor = VLChatProcessor.from_pretrained(vq_folder)
    model = AutoModelForCausalLM.from_pretrained(vq_folder, trust_remote_code=True)
    assert isinstance(model, MultiModalityCausalLM)
    model = model.to(torch.float32).eval()
    images, count, weight = 2, 16, 5.0
    ids = generation_ids(processor)
    rows = torch.zeros(2 * images, len(ids), dtype=torch.int)
    rows[:] = ids
    rows[1::2, 1:-1] = processor.pad_id
    inputs = model.language_model.get_input_embeddings()(rows)
    drawn = torch.zeros(images, count, dtype=torch.int)
    outputs: Any = None
    for index in range(count):
        outputs = model.language_model.model(
            inputs_embeds=inputs,
            use_cache=True,
            past_key_values=outputs.past_key_values if index else None,
        )
        logits = model.gen_head(outputs.last_hidden_state[:, -1])
        conditional, unconditional = logits[0::2], logits[1::2]
        token = (unconditional + weight * (conditional - unconditional)).argmax(-1)
        drawn[:, index] = token
        both = torch.stack([token, token], dim=1).flatten()
        inputs = model.prepare_gen_img_embeds(both).unsqueeze(1)
    expected = vq_pipe(PROMPT, temperature=0, guidance_scale=weight, output_type="pt")
    assert torch.equal(drawn, expected.tokens.int().repeat(images, 1))
    pixels = model.gen_vision_model.decode_code(drawn, shape=[images, 4, 4, 4])
    shown = (pixels.clamp(-1, 1) / 2 + 0.5)[:1]
    torch.testing.assert_close(shown, expected.images, atol=1e-5, rtol=0)
    last = model.gen_vision_model.decode_code(drawn, [images, 4, 4, 4], channel_first=False)
    assert torch.equal(last, pixels)
    assert torch.equal(model.gen_vision_model.decode_code(drawn), pixels)


@pytest.fixture
def picture_file(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize("kind", ["flow", "vq"])
@torch.inference_mode()
def test_a_published_question_gets_the_pipelines_answer(
    kind: str, picture_file: Path, request: pytest.FixtureRequest
) -> None:
    folder, pipe = (request.getfixturevalue(f"{kind}_{part}") for part in ("folder", "pipe"))
    processor = VLChatProcessor.from_pretrained(folder)
    model = MultiModalityCausalLM.from_pretrained(folder).to(torch.float32).eval()
    tokenizer = processor.tokenizer
    conversation = [
        {
            "role": "User",
            "content": "<image_placeholder>\nWhat is above?",
            "images": [str(picture_file)],
        },
        {"role": "Assistant", "content": ""},
    ]
    pictures = load_pil_images(conversation)
    inputs = processor(conversations=conversation, images=pictures, force_batchify=True)
    inputs = inputs.to(model.device)
    assert inputs.images_seq_mask.sum() == inputs.images_emb_mask.sum() == 16
    assert inputs["sft_format"][0].endswith("What is above?\n\nAssistant:")
    answer = model.language_model.generate(
        inputs_embeds=model.prepare_inputs_embeds(**inputs),
        attention_mask=inputs.attention_mask,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=12,
        do_sample=False,
        use_cache=True,
    )
    text = tokenizer.decode(answer[0].cpu().tolist(), skip_special_tokens=True)
    assert text.strip() == pipe.chat(conversation, max_new_tokens=12)


@torch.inference_mode()
def test_conversations_batch_as_they_would_stand_alone(
    flow_folder: Path, picture_file: Path
) -> None:
    processor = VLChatProcessor.from_pretrained(flow_folder)
    model = MultiModalityCausalLM.from_pretrained(flow_folder).float().eval()
    plain = [{"role": "User", "content": "Hello"}, {"role": "Assistant", "content": ""}]
    asked = [
        {"role": "User", "content": "<image_placeholder> and <image_placeholder>: the same?"},
        {"role": "Assistant", "content": ""},
    ]
    picture = Image.open(picture_file)
    alone = [
        processor(conversations=plain, force_batchify=False),
        processor(conversations=asked, images=[picture, picture], force_batchify=False),
    ]
    batch = processor.batchify(alone)
    embeddings = model.prepare_inputs_embeds(**batch)
    for row, one in enumerate(alone):
        expected = model.prepare_inputs_embeds(**processor.batchify([one]))[0]
        torch.testing.assert_close(embeddings[row, -len(one) :], expected, atol=1e-5, rtol=0)
    assert batch.attention_mask.sum(1).tolist() == [len(one) for one in alone]


def test_a_whole_prompt_is_taken_as_text(flow_folder: Path) -> None:
    processor = VLChatProcessor.from_pretrained(flow_folder)
    conversation = [{"role": "User", "content": "Hello"}, {"role": "Assistant", "content": ""}]
    by_conversation = processor(conversations=conversation, force_batchify=False)
    by_text = processor(prompt=by_conversation.sft_format, force_batchify=False)
    assert torch.equal(by_text.input_ids, by_conversation.input_ids)
    with pytest.raises(SettingsError, match="either prompt or conversations"):
        processor(prompt="a", conversations=conversation)
    with pytest.raises(SettingsError, match="'deepseek' only"):
        processor.apply_sft_template_for_multi_turn_prompts(conversation, sft_format="plain")


def test_pictures_come_as_paths_and_as_base64(picture_file: Path) -> None:
    data = base64.b64encode(picture_file.read_bytes()).decode()
    first, second = load_pil_images(
        [
            {"role": "User", "content": "", "images": [str(picture_file)]},
            {"role": "Assistant", "content": ""},
            {"role": "User", "content": "", "images": [f"data:image/png;base64,{data}"]},
        ]
    )
    buffers = [io.BytesIO(), io.BytesIO()]
    first.save(buffers[0], "PNG")
    second.save(buffers[1], "PNG")
    assert buffers[0].getvalue() == buffers[1].getvalue()


def test_pixels_are_brought_to_the_type_that_is_asked_for(
    flow_folder: Path, picture_file: Path
) -> None:
    processor = VLChatProcessor.from_pretrained(flow_folder)
    conversation = [
        {"role": "User", "content": "<image_placeholder>\nWhat?"},
        {"role": "Assistant", "content": ""},
    ]
    inputs = processor(conversations=conversation, images=[Image.open(picture_file)])
    moved = inputs.to("cpu", dtype=torch.bfloat16)
    assert moved.pixel_values.dtype == torch.bfloat16
    assert moved.input_ids.dtype == torch.int64


def test_parts_of_a_head_that_is_not_there_are_named(flow_folder: Path, vq_folder: Path) -> None:
    flow = MultiModalityCausalLM.from_pretrained(flow_folder)
    vq = MultiModalityCausalLM.from_pretrained(vq_folder)
    for name in ("gen_head", "gen_embed", "gen_aligner", "gen_vision_model"):
        assert getattr(vq, name) is not None
        with pytest.raises(SettingsError, match="it holds: flow"):
            getattr(flow, name)
    for name in ("vision_gen_enc_aligner", "vision_gen_dec_aligner", "vision_gen_dec_aligner_norm"):
        assert getattr(flow, name) is not None
        with pytest.raises(SettingsError, match="it holds: vq"):
            getattr(vq, name)
    with pytest.raises(SettingsError, match="does not fit"):
        vq.gen_vision_model.decode_code(torch.zeros(1, 16), [1, 8, 4, 4])


def test_pictures_become_tokens(vq_folder: Path, vq_pipe: JanusFlowPipeline) -> None:
    model = MultiModalityCausalLM.from_pretrained(vq_folder)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vectors, _, (_, _, tokens) = model.gen_vision_model.encode(pixels)
    assert torch.equal(tokens, vq_pipe.model.vq_head.encode(pixels).flatten())
    assert vectors.shape == (2, 4, 4, 4)
