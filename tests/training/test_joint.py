"""Joint training of drawing and looking, at toy size: what goes in and what it learns from."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from janusflow import JanusFlowPipeline
from janusflow.data.shapes import COLORS, SHAPES, Scene, ShapeObject, draw
from janusflow.data.shapes.batches import IGNORED, patch_labels, picture_scene
from janusflow.errors import CheckpointError, SettingsError
from janusflow.models.prefix import shared_prefix_mask
from janusflow.settings import fill, read_yaml
from janusflow.training import joint_parts
from janusflow.training.autoencoder import AutoencoderObjective, AutoencoderSettings, to_pixels
from janusflow.training.distillation import DistillationSettings
from janusflow.training.joint import (
    PATCH_CLASSES,
    JointObjective,
    JointSettings,
    patches_loss,
)
from janusflow.training.joint_parts import encoded_pictures, latents_of
from janusflow.training.loop import train
from janusflow.training.losses import patch_loss
from janusflow.training.pairs import PairsRunSettings
from janusflow.training.run import run
from janusflow.training.vq_tokenizer import VQTokenizerObjective, VQTokenizerSettings

CONFIGS = Path(__file__).parents[2] / "configs" / "train" / "tiny"
SMALL = {
    "model": {
        "language_width": 32,
        "language_layers": 2,
        "language_heads": 2,
        "language_mlp": 64,
        "vision_width": 16,
        "vision_layers": 1,
        "vision_heads": 2,
        "adapter_width": 16,
        "adapter_kernel": 3,
    },
    "drawing": {"num_pictures": 64, "batch_size": 4, "noises_per_picture": 2},
    "looking": {"batch_size": 2},
    "patches": {"batch_size": 4},
    "loop": {"steps": 3, "precision": "no", "log_every": 1, "save_every": 10},
}
CODES = {"num_codes": 32, "channel_multiplier": [1, 1, 1, 1], "batch_size": 2}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> JointSettings:
    folder = tmp_path_factory.mktemp("joint")
    values = {"block_out_channels": [8, 8, 8, 8], "batch_size": 2, "loop": {"steps": 2}}
    vae = AutoencoderObjective(fill(AutoencoderSettings, values))
    vae.export(folder / "autoencoder")
    VQTokenizerObjective(fill(VQTokenizerSettings, CODES)).export(folder / "vq_tokenizer")
    places = {
        "autoencoder": str(folder / "autoencoder"),
        "vq_tokenizer": str(folder / "vq_tokenizer"),
        "output_dir": str(folder / "run"),
    }
    return fill(JointSettings, {**SMALL, **places})


@pytest.fixture(scope="module")
def objective(settings) -> JointObjective:
    return JointObjective(settings)


def test_a_batch_is_a_function_of_its_step(objective):
    one, again, other = objective.batch(3), objective.batch(3), objective.batch(4)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["x_0"], other["x_0"])
    assert not torch.equal(one["prompt_ids"], other["prompt_ids"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_validation_is_on_pictures_that_training_never_draws(objective, monkeypatch):
    seen = []
    pictures = objective.batches.pictures

    def noted(indices):
        seen.extend(indices)
        return pictures(indices)

    monkeypatch.setattr(objective.batches, "pictures", noted)
    with torch.no_grad():
        found, again = objective.validate(), objective.validate()
    assert found == again
    first = objective.settings.drawing.num_pictures
    assert seen == [*range(first, first + objective.settings.validation.num)] * 2
    times = [f"valid_flow_t{t}" for t in ("0.10", "0.30", "0.50", "0.70", "0.90")]
    losses = [f"valid_{name}" for name in objective(**objective.batch(0))]
    assert set(found) == {*times, *losses}
    assert found["valid_flow"] == pytest.approx(np.mean([found[t] for t in times]), abs=2e-5)


def test_validation_looks_at_its_times_alone(objective, monkeypatch):
    seen = []
    forward = objective.forward

    def noted(**batch):
        seen.append(batch["t"].unique().tolist())
        return forward(**batch)

    monkeypatch.setattr(objective, "forward", noted)
    with torch.no_grad():
        objective.validate()
    assert [pytest.approx(t) for (t,) in seen] == [0.1, 0.3, 0.5, 0.7, 0.9]


@pytest.mark.parametrize("values", [{"num": 0}, {"buckets": 0}])
def test_an_empty_validation_is_refused(values):
    with pytest.raises(SettingsError, match="at least 1"):
        fill(JointSettings, {"validation": values})


def test_prompts_are_those_of_sampling(objective):
    processor = objective.processor
    ids, mask = objective.batches.captions(np.arange(6), 0, 28, dropout=0.0)
    for row, row_mask in zip(ids, mask, strict=True):
        tokens = row[row_mask.bool()].tolist()
        text = processor.decode(tokens[:-1])
        caption = text.removeprefix("User: ").removesuffix("\n\nAssistant:")
        again, _ = processor.generation_prompts([caption])
        assert again[0].tolist() == tokens


def test_a_dropped_condition_is_masked_as_in_sampling(objective):
    processor = objective.processor
    _, kept_mask = objective.batches.captions(np.arange(6), 0, 28, dropout=0.0)
    ids, mask = objective.batches.captions(np.arange(6), 0, 28, dropout=1.0)
    first = kept_mask.argmax(1)
    for row in range(6):
        start = int(first[row])
        assert ids[row, start] == processor.bos_token_id
        assert ids[row, -1] == processor.image_gen_id
        assert (ids[row, start + 1 : -1] == processor.pad_token_id).all()
        assert mask[row].nonzero().flatten().tolist() == [start]


def test_a_prompt_that_does_not_fit_is_an_error(objective):
    with pytest.raises(ValueError, match="exceeds 8"):
        objective.batches.captions(np.arange(6), 0, 8, dropout=0.0)


def test_losses_are_taken_of_answers_only(objective):
    processor = objective.processor
    batch = objective.batches.conversations(4, 0, 160)
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        taken = labels != IGNORED
        assert torch.equal(labels[taken], ids[taken])
        text = processor.decode(ids[ids != processor.pad_token_id], skip_special_tokens=False)
        eos = processor.prompt_format.eos_token
        answers = [turn.split("\n\nAssistant: ")[1] for turn in text.split(eos)[:-1]]
        assert len(answers) >= 3
        spoken = processor.decode(labels[taken], skip_special_tokens=False)
        assert spoken == "".join(f" {answer}{eos}" for answer in answers)


@pytest.mark.parametrize(
    ("part", "weight", "loss"),
    [
        ("drawing", "loss_weight", "flow"),
        ("drawing", "vq_weight", "vq"),
        ("looking", "loss_weight", "answer"),
        ("patches", "vision_weight", "vision_patches"),
        ("patches", "drawing_weight", "drawn_patches"),
    ],
)
def test_a_weight_is_of_its_loss_alone(objective, monkeypatch, part, weight, loss):
    batch = objective.batch(0)
    with torch.no_grad():
        before = objective(**batch)
        tripled = 3 * getattr(getattr(objective.settings, part), weight)
        settings = altered(objective.settings, **{part: {weight: tripled}})
        monkeypatch.setattr(objective, "settings", settings)
        after = objective(**batch)
    factors = {name: float(after[name] / before[name]) for name in before}
    assert factors == pytest.approx({name: 3.0 if name == loss else 1.0 for name in before})


def test_a_question_begins_as_the_processor_asks_it(objective):
    processor = objective.processor
    batch = objective.batches.conversations(1, 0, 160)
    ids = batch.input_ids[0]
    text = processor.decode(ids, skip_special_tokens=False)
    question = text.split("\n\nAssistant:")[0].rsplit("\n", 1)[1]
    image = torch.zeros(64, 64, 3, dtype=torch.uint8).numpy()
    from PIL import Image

    content = [
        {"type": "image", "image": Image.fromarray(image)},
        {"type": "text", "text": question},
    ]
    asked = processor([[{"role": "user", "content": content}]])["input_ids"][0]
    assert ids[: len(asked)].tolist() == asked.tolist()


def test_every_part_of_the_model_receives_a_gradient(objective):
    objective.zero_grad()
    sum(objective(**objective.batch(0)).values()).backward()
    without = {
        name
        for name, parameter in objective.model.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    }
    # Ids that no sentence of the batch has leave no whole tensor without one.
    frozen = {name for name in without if name.startswith("vq_head.tokenizer.")}
    assert len(frozen) > 50
    assert without == frozen
    assert not any(p.requires_grad for p in objective.vae.parameters())


def test_patches_are_labelled_with_what_covers_them():
    objects = (
        ShapeObject("square", "blue", 0.25, 0.25, 0.18),
        ShapeObject("ring", "cyan", 0.75, 0.75, 0.18),
    )
    shapes, colors = patch_labels(Scene("pair", "white", objects), 8)
    assert shapes[1, 1] == 1 + list(SHAPES).index("square")
    assert colors[1, 1] == 1 + list(COLORS).index("blue")
    assert shapes[5, 6] == 1 + list(SHAPES).index("ring")
    assert colors[5, 6] == 1 + list(COLORS).index("cyan")
    assert shapes[1, 6] == shapes[4, 4] == colors[6, 1] == 0


def test_labelled_patches_fit_their_pictures(objective):
    pixels, labels = objective.batches.labelled_patches(8, 0, 8)
    inside = torch.nn.functional.max_pool2d(
        (pixels - pixels[:, :, :1, :1]).abs().amax(1, keepdim=True), 8
    )[:, 0]
    assert labels.shape == (8, 2, 8, 8)
    assert (inside[labels[:, 0] > 0] > 0.1).float().mean() > 0.98
    assert torch.equal(labels[:, 0] > 0, labels[:, 1] > 0)


def test_drawn_labels_are_those_of_the_latents_pictures(objective, settings):
    batch = objective.batch(0)
    noises = settings.drawing.noises_per_picture
    assert batch["drawn_labels"].shape == (len(batch["x_1"]), 2, 8, 8)
    indices = np.random.default_rng([settings.loop.seed, 4, 0]).integers(
        settings.drawing.num_pictures, size=settings.drawing.batch_size
    )
    for row, index in enumerate(indices.repeat(noises)):
        expected = patch_labels(picture_scene(settings.loop.seed, int(index)), 8)
        assert torch.equal(batch["drawn_labels"][row], torch.from_numpy(expected))


@pytest.mark.parametrize("patches_per_token", [1, 4])
def test_a_token_names_the_patches_that_it_covers(patches_per_token):
    labels = torch.randint(0, 7, (3, 2, 8, 8), generator=torch.Generator().manual_seed(0))
    p = math.isqrt(patches_per_token)
    logits = torch.zeros(3, 8 // p, 8 // p, p, p, PATCH_CLASSES)
    for row, y, x in np.ndindex(3, 8, 8):
        place = logits[row, y // p, x // p, y % p, x % p]
        place[labels[row, 0, y, x]] = place[7 + labels[row, 1, y, x]] = 30.0
    logits = logits.reshape(3, 64 // patches_per_token, patches_per_token * PATCH_CLASSES)
    assert patches_loss(logits, labels).item() < 1e-6
    assert patches_loss(logits.flip(1), labels).item() > 5


def test_a_separate_question_is_answered_as_if_it_were_asked_alone(objective):
    batch = objective.batches.conversations(4, 0, 160, separate=1.0)
    ids, blocks = batch.input_ids, batch.blocks
    mask = shared_prefix_mask(blocks, torch.ones_like(blocks), torch.float32)
    model = objective.model.eval()
    together = model(
        input_ids=ids,
        pixel_values=batch.pixel_values,
        attention_mask=mask,
        position_ids=batch.position_ids,
    ).logits
    prefix = int((blocks[0] != 0).int().argmax())
    for row, number in ((0, 1), (1, 3), (3, 2)):
        own = torch.nonzero(blocks[row] == number).flatten()
        asked = torch.cat([ids[row, :prefix], ids[row, own]])[None]
        alone = model(input_ids=asked, pixel_values=batch.pixel_values[row : row + 1]).logits
        torch.testing.assert_close(together[row, own], alone[0, prefix:], atol=1e-5, rtol=0)
    objective.model.train()


def test_a_share_of_conversations_has_separate_questions(objective):
    batch = objective.batches.conversations(64, 0, 160, separate=0.75)
    share = (batch.blocks.amax(1) > 0).float().mean().item()
    assert 0.6 < share < 0.9
    assert objective.batches.conversations(8, 0, 160).blocks.max() == 0


def test_the_patch_loss_is_a_weighted_cross_entropy():
    logits = torch.zeros(1, 2, 3)
    logits[0, 0, 0], logits[0, 1, 2] = math.log(2), math.log(6)
    labels = torch.tensor([[0, 2]])
    expected = (0.2 * -math.log(2 / 4) + 1.0 * -math.log(6 / 8)) / 1.2
    assert patch_loss(logits, labels).item() == pytest.approx(expected)


def test_a_run_leaves_a_checkpoint_and_a_log(objective, settings, tmp_path):
    objective.export = lambda folder: None
    assert train(objective, settings.loop, tmp_path)
    assert (tmp_path / "step-0000003" / "ema.safetensors").is_file()
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_the_exported_pipeline_loads_and_names_no_folder(objective, settings, tmp_path):
    JointObjective.export(objective, tmp_path / "final")
    pipe = JanusFlowPipeline.from_pretrained(tmp_path / "final")
    assert pipe.model.generation_heads == ("flow", "vq")
    record = json.loads((tmp_path / "final" / "model" / "training.json").read_text())
    assert (record["steps"], record["heads"]) == (settings.loop.steps, ["flow", "vq"])
    written = (tmp_path / "final" / "vae" / "config.json").read_text()
    assert settings.autoencoder not in written


def test_a_missing_tokenizer_is_named_with_the_command_that_makes_it(settings):
    with pytest.raises(SettingsError, match=r"no tokenizer of pictures in nowhere; train it first"):
        JointObjective(replace(settings, vq_tokenizer="nowhere"))


def test_latents_have_unit_deviation(objective):
    assert objective.latents.float().std().item() == pytest.approx(1.0, abs=0.15)


def test_image_tokens_are_those_of_the_pictures(objective, settings):
    indices = np.random.default_rng([settings.loop.seed, 4, 0]).integers(
        settings.drawing.num_pictures, size=settings.drawing.batch_size
    )
    scenes = [picture_scene(settings.loop.seed, int(index)) for index in indices]
    pixels = to_pixels([draw(scene, settings.model.image_size) for scene in scenes])
    tokens = objective.batch(0)["image_tokens"]
    assert (tokens == objective.model.vq_head.encode(pixels)).float().mean() > 0.98  # codes may tie


def test_prompts_of_the_vq_head_end_in_its_tag(objective):
    batch = objective.batch(0)
    assert (batch["prompt_ids"][:, -1] == objective.processor.begin_of_image_id).all()


def test_a_run_without_a_tokenizer_has_the_flow_head_alone(settings):
    alone = JointObjective(replace(settings, vq_tokenizer=None))
    assert alone.model.generation_heads == ("flow",)
    batch = alone.batch(0)
    assert "image_tokens" not in batch
    assert "vq" not in alone(**batch)
    assert (batch["prompt_ids"][:, -1] == alone.processor.image_gen_id).all()


def test_a_missing_autoencoder_is_named_with_the_command_that_makes_it(tmp_path):
    config = tmp_path / "joint.yaml"
    config.write_text(f"task: joint\noutput_dir: {tmp_path}\nautoencoder: {tmp_path}/none\n")
    with pytest.raises(SettingsError, match=r"no autoencoder in .*none; train it first"):
        run(config)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("autoencoder", AutoencoderSettings),
        ("decoder", AutoencoderSettings),
        ("vq_tokenizer", VQTokenizerSettings),
        ("joint", JointSettings),
        ("further", JointSettings),
        ("distillation_pairs", PairsRunSettings),
        ("missed_pairs", PairsRunSettings),
        ("distillation", DistillationSettings),
    ],
)
def test_the_shipped_configs_fit_their_settings(name, kind):
    settings = fill(kind, read_yaml(CONFIGS / f"{name}.yaml"))
    assert settings.task == kind().task


@pytest.mark.parametrize(
    ("name", "setting", "before"),
    [
        ("decoder", "encoder", "autoencoder"),
        ("joint", "autoencoder", "decoder"),
        ("joint", "vq_tokenizer", "vq_tokenizer"),
        ("further", "autoencoder", "decoder"),
        ("further", "vq_tokenizer", "vq_tokenizer"),
        ("further", "initial_model", "joint"),
        ("distillation_pairs", "model", "further"),
        ("missed_pairs", "model", "further"),
        ("distillation", "model", "further"),
    ],
)
def test_each_shipped_run_takes_what_the_one_before_leaves(name, setting, before):
    taken = read_yaml(CONFIGS / f"{name}.yaml")[setting]
    assert taken == read_yaml(CONFIGS / f"{before}.yaml")["output_dir"] + "/final"


def test_an_unknown_density_of_times_is_refused():
    with pytest.raises(SettingsError, match="logit-normal"):
        fill(JointSettings, {"drawing": {"timesteps": "normal"}})


def altered(settings: JointSettings, **changes: dict) -> JointSettings:
    """Settings with changes by section."""
    return replace(
        settings,
        **{name: replace(getattr(settings, name), **values) for name, values in changes.items()},
    )


def test_a_run_without_the_flow_head_has_the_vq_head_alone(settings):
    alone = JointObjective(altered(settings, drawing={"flow": False}))
    assert alone.model.generation_heads == ("vq",)
    batch = alone.batch(0)
    assert not {"x_0", "x_1", "t", "drawn_labels"} & set(batch)
    losses = alone(**batch)
    assert set(losses) == {"answer", "vq", "vision_patches"}
    both = JointObjective(settings)
    assert torch.equal(both.batch(0)["image_tokens"], batch["image_tokens"])
    work, more = alone.work(batch), both.work(both.batch(0))
    assert work["images"] == 2 + 4 + 4  # looked at twice over, drawn
    assert more["tokens"] - work["tokens"] == 4 * 2 * 17


def test_no_head_at_all_is_refused(settings):
    with pytest.raises(SettingsError, match="no head draws"):
        replace(altered(settings, drawing={"flow": False}), vq_tokenizer=None)


def test_alignment_teaches_the_language_model_and_not_the_tower(settings):
    aligned = JointObjective(
        altered(
            settings,
            patches={"vision_weight": 0.0, "drawing_weight": 0.0},
            alignment={"weight": 0.5, "layer": 1, "width": 8},
        )
    )
    batch = aligned.batch(0)
    assert batch["clean_pixels"].shape == (4, 3, 64, 64)
    indices = np.random.default_rng([0, 4, 0]).integers(64, size=4)
    expected = to_pixels([draw(picture_scene(0, int(i)), 64) for i in indices])
    assert torch.equal(batch["clean_pixels"], expected)
    loss = aligned(**batch)["alignment"]
    loss.backward()
    assert -0.5 <= loss.item() <= 0.5
    model = aligned.model
    assert all(p.grad is None for p in model.vision_model.parameters())
    layers = model.language_model.model.layers
    assert layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert layers[1].mlp.up_proj.weight.grad is None  # it comes after the aligned states
    assert all(p.grad.abs().max() > 0 for p in aligned.alignment.parameters())


def test_alignment_after_a_layer_that_there_is_not_is_refused(settings):
    with pytest.raises(SettingsError, match=r"alignment.layer is 3, .* has 2"):
        altered(settings, alignment={"weight": 1.0})


@pytest.fixture(scope="module")
def shared(settings) -> JointObjective:
    no_patches = {"vision_weight": 0.0, "drawing_weight": 0.0}
    return JointObjective(altered(settings, looking={"encoder": "drawing"}, patches=no_patches))


def test_a_shared_encoder_sees_what_drawing_sees_at_the_end_of_the_path(shared):
    pixels = shared.batch(0)["pixel_values"]
    latents = shared.vae.encode(pixels).latent_dist.mean * shared.vae.config.scaling_factor
    drawn = shared.model.flow_head.tokens(latents.half().float(), torch.ones(len(pixels)))
    seen = shared.model.get_image_features(pixels)
    torch.testing.assert_close(seen, drawn.embeddings[:, 1:], atol=1e-5, rtol=0)


def test_a_shared_encoder_learns_from_answers_and_the_tower_from_nothing(shared):
    batch = shared.batch(0)
    places = (batch["conversation_ids"] == shared.processor.image_token_id).sum(1)
    assert places.tolist() == [16, 16]
    shared(**batch)["answer"].backward()
    assert shared.model.flow_head.encoder_aligner.weight.grad.abs().max() > 0
    assert not any(p.requires_grad for p in shared.model.vision_model.parameters())
    assert shared.model.aligner.fc1.weight.requires_grad is False
    shared.zero_grad()


def test_a_shared_encoder_answers_and_draws_through_the_pipeline(shared, tmp_path):
    pipe = shared._pipeline()
    image = draw(picture_scene(0, 0), 64)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    assert isinstance(pipe.chat([{"role": "user", "content": content}], max_new_tokens=2), str)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (64, 64)
    shared.export(tmp_path)
    assert json.loads((tmp_path / "training.json").read_text())["encoders"] == "shared"
    with pytest.raises(CheckpointError, match="no layout"):
        shared.model.save_pretrained(tmp_path)


def test_a_shared_encoder_needs_the_flow_head_and_no_patches_of_the_tower(settings):
    with pytest.raises(SettingsError, match="needs the flow head"):
        altered(settings, looking={"encoder": "drawing"}, drawing={"flow": False})
    with pytest.raises(SettingsError, match=r"set patches.vision_weight to 0"):
        altered(settings, looking={"encoder": "drawing"})
    with pytest.raises(SettingsError, match="'vision' or 'drawing', not 'siglip'"):
        altered(settings, looking={"encoder": "siglip"})


def test_parts_of_the_bundled_model_can_be_taken(settings, tmp_path):
    taken = fill(
        JointSettings,
        {
            "output_dir": str(tmp_path),
            "autoencoder": "tiny",
            "vq_tokenizer": "tiny",
            "vision_model": "tiny",
            "drawing": {"num_pictures": 2},
        },
    )
    objective = JointObjective(taken)
    bundled = JanusFlowPipeline.from_pretrained("tiny", torch_dtype=torch.float32)
    for part in ("vision_model", "vq_head.tokenizer"):
        ours = objective.model.get_submodule(part).state_dict()
        theirs = bundled.model.get_submodule(part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    language = "language_model.model.layers.0.mlp.up_proj"
    assert not torch.equal(
        objective.model.get_submodule(language).weight, bundled.model.get_submodule(language).weight
    )
    assert objective.sources()["vision tower"] == "tiny"
    with pytest.raises(SettingsError, match=r"vision tower of tiny has other sizes"):
        JointObjective(replace(settings, vision_model="tiny"))
    with pytest.raises(SettingsError, match=r"no tokenizer of pictures in .*none; train it first"):
        JointObjective(replace(settings, vq_tokenizer=str(tmp_path / "none")))


def test_a_run_goes_on_from_another_ones_model(objective, settings, tmp_path):
    JointObjective.export(objective, tmp_path / "first")
    where = str(tmp_path / "first")
    further = replace(settings, initial_model=where, output_dir=str(tmp_path / "further"))
    further = JointObjective(altered(further, loop={"seed": 1, "steps": 5}))
    first = JanusFlowPipeline.from_pretrained(where, torch_dtype=torch.float32)
    ours, theirs = further.model.state_dict(), first.model.state_dict()
    learned = [name for name in theirs if not name.startswith("vq_head.tokenizer")]
    assert len(learned) > 50
    assert all(torch.equal(ours[name], theirs[name]) for name in learned)
    text = "a red circle above a blue square"
    assert further.processor.tokenizer.encode(text) == first.processor.tokenizer.encode(text)
    assert not (tmp_path / "further" / "tokenizer").exists()
    assert not torch.equal(further.batch(0)["x_1"], objective.batch(0)["x_1"])
    assert further.sources()["initial model"] == where
    record = further._record()
    assert record["steps"] == settings.loop.steps + 5
    assert record["initial_model"]["seed"] == 0


def test_an_initial_model_gives_no_frozen_parts(objective, settings, tmp_path):
    JointObjective.export(objective, tmp_path / "first")
    other = VQTokenizerObjective(fill(VQTokenizerSettings, CODES))
    torch.nn.init.normal_(other.tokenizer.quantize.embedding.weight)
    other.export(tmp_path / "other")
    own = replace(
        settings, initial_model=str(tmp_path / "first"), vq_tokenizer=str(tmp_path / "other")
    )
    further = JointObjective(replace(own, output_dir=str(tmp_path / "further")))
    codes = further.model.vq_head.tokenizer.quantize.embedding.weight
    assert torch.equal(codes, other.tokenizer.quantize.embedding.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"language_width": 16}}, r"is \[32\], and of this run's model \[16\]; set"),
        ({"model": {"language_layers": 3}}, r"layers\.2\..* is absent, and of this run's model \["),
        ({"drawing": {"flow": False}}, r"flow_head\..* and of this run's model absent"),
    ],
)
def test_an_initial_model_of_another_kind_is_refused(
    objective, settings, tmp_path, changes, message
):
    JointObjective.export(objective, tmp_path / "first")
    own = replace(settings, initial_model=str(tmp_path / "first"))
    with pytest.raises(SettingsError, match=message):
        JointObjective(altered(own, **changes))


def test_runs_may_share_what_is_encoded_once(settings, tmp_path):
    first = JointObjective(replace(settings, cache=str(tmp_path)))
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(files) == 2
    again = JointObjective(replace(settings, cache=str(tmp_path), output_dir=str(tmp_path / "b")))
    assert torch.equal(first.latents, again.latents)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")} == files
    JointObjective(altered(replace(settings, cache=str(tmp_path)), loop={"seed": 1}))
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_pictures_that_workers_drew_are_encoded_to_the_same_file(settings, tmp_path, monkeypatch):
    settings = altered(settings, drawing={"num_pictures": 70})
    network = torch.nn.Conv2d(3, 4, 8, stride=8)
    drawn = []  # in this process

    def noted(scene, size):
        drawn.append(scene)
        return draw(scene, size)

    monkeypatch.setattr(joint_parts, "draw", noted)
    files = []
    for workers, here in ((0, 70), (2, 0)):
        run = altered(settings, loop={"workers": workers})
        run = replace(run, output_dir=str(tmp_path / str(workers)))
        encoded = encoded_pictures("latents", run, network, network)
        assert len(drawn) == here
        drawn.clear()
        files.append((tmp_path / str(workers) / "latents.safetensors").read_bytes())
    assert files[0] == files[1]
    pictures = [draw(picture_scene(settings.loop.seed, i), 64) for i in range(70)]
    torch.testing.assert_close(encoded, network(to_pixels(pictures)).detach())  # in float32


def test_what_is_encoded_in_bfloat16_is_kept_apart_from_float32(settings, tmp_path):
    network = torch.nn.Conv2d(3, 4, 8, stride=8)
    shared = replace(settings, cache=str(tmp_path))
    found = [
        encoded_pictures("latents", altered(shared, loop={"precision": p}), network, network)
        for p in ("no", "bf16")
    ]
    assert [one.dtype for one in found] == [torch.float32, torch.bfloat16]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_the_record_counts_the_captions_of_a_whole_step(settings):
    assert JointObjective(settings)._record()["captions_a_step"] == 4
    halves = JointObjective(altered(settings, loop={"microbatches": 2}))
    assert halves._record()["captions_a_step"] == 8


def test_latents_are_shifted_and_scaled_as_decoding_undoes_it(objective):
    vae = copy.deepcopy(objective.vae)
    pixels = objective.batch(0)["pixel_values"]
    plain = latents_of(vae)(pixels).float()
    vae.register_to_config(shift_factor=0.5)
    shifted = latents_of(vae)(pixels).float()
    expected = torch.full_like(plain, 0.5 * vae.config.scaling_factor)
    torch.testing.assert_close(plain - shifted, expected, atol=1e-2, rtol=0)
