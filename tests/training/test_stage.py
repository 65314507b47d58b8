"""A stage: what it trains, what it learns from, that its losses are those of the formulas."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import make_pipeline
from torch import Tensor, nn

from janusflow import JanusFlowPipeline, SettingsError
from janusflow.data.packing import Packer, Span
from janusflow.data.samples import BrokenSample, Sample
from janusflow.models.checkpoints import convert
from janusflow.processing.processor import IGNORED
from janusflow.settings import fill, read_yaml
from janusflow.training.alignment import alignment_loss
from janusflow.training.assemble import AssembleSettings
from janusflow.training.cached import Cached
from janusflow.training.pairs import PairsRunSettings
from janusflow.training.run import run
from janusflow.training.stage import TRAINABLE, StageObjective, StageSettings, answer_loss
from janusflow.training.throughput import bfloat16_slowdown

CONFIGS = Path(__file__).parents[2] / "configs" / "train"
SHAPES = {"format": "shapes", "num_pictures": 50}
DRAWING = {**SHAPES, "kind": "generation"}
LOOKING = {**SHAPES, "kind": "understanding", "num_questions": 2}


def settings_of(folder: Path, **changes: Any) -> StageSettings:
    values = {
        "output_dir": str(folder),
        "trained": list(TRAINABLE),
        "data": {"sources": {"drawing": DRAWING, "looking": LOOKING}, "threads": 0},
        "packing": {"length": 320},
        "drawing": {"heads": ["flow", "vq"], "noises_per_picture": 2},
        "alignment": {"layer": 3, "width": 32},
        "loop": {"precision": "no"},
    }
    return fill(StageSettings, {**values, **changes})


@pytest.fixture(scope="module")
def objective(tmp_path_factory: pytest.TempPathFactory) -> StageObjective:
    return StageObjective(settings_of(tmp_path_factory.mktemp("stage"))).eval()


def spans_of(objective: StageObjective, num: int, kind: str) -> list[Span]:
    make = objective._span_maker()
    source = next(source for source in objective._sources if source.kind == kind)
    return [make(replace(source[index], entropy=(index,))) for index in range(num)]


def packed(spans: list[Span], length: int, rows: int = 1) -> dict[str, Tensor]:
    packer = Packer(rows, length)
    for span in spans:
        assert packer.add(span)
    return packer.rows(0)


@torch.no_grad()
def test_packing_changes_no_loss(objective: StageObjective) -> None:
    spans = spans_of(objective, 2, "generation") + spans_of(objective, 2, "understanding")
    together = objective(**packed(spans, sum(map(len, spans))))
    apart = objective(**packed(spans, max(map(len, spans)), rows=len(spans)))
    assert together.keys() == {"answer", "flow", "alignment", "vq"}
    for name, loss in together.items():
        assert abs(loss - apart[name]) < 1e-5


@torch.no_grad()
def test_losses_are_those_of_the_parts_alone(objective: StageObjective) -> None:
    drawn = [spans_of(objective, 3, "generation")[index] for index in (0, 2)]
    losses = [objective(**packed([span], len(span))) for span in drawn]
    both = objective(**packed(drawn, sum(map(len, drawn))))
    for name in ("flow", "alignment", "vq"):
        assert both[name] == pytest.approx(float(sum(loss[name] for loss in losses)) / 2, abs=1e-5)
    assert both["answer"] == 0


def test_alignment_leaves_the_encoder_that_it_aims_at_alone(objective: StageObjective) -> None:
    objective.zero_grad(set_to_none=True)
    rows = packed(spans_of(objective, 1, "generation"), 200)
    objective(**rows)["alignment"].backward()
    seen = [weight.grad for weight in objective.model.vision_model.parameters()]
    assert seen
    assert all(grad is None or not grad.any() for grad in seen)
    assert objective.alignment is not None
    assert objective.alignment[0].weight.grad.abs().max() > 0
    layers = objective.model.language_model.model.layers
    assert layers[2].mlp.up_proj.weight.grad.abs().max() > 0
    assert layers[3].mlp.up_proj.weight.grad is None, "it reads the states after three layers"


def test_answers_teach_the_tower_and_the_learned_begin_embedding(
    objective: StageObjective,
) -> None:
    objective.zero_grad(set_to_none=True)
    objective(**packed(spans_of(objective, 1, "understanding"), 200))["answer"].backward()
    for weight in (
        objective.model.begin_embedding,
        objective.model.aligner.fc1.weight,
        objective.model.vision_model.encoder.layers[0].mlp.fc1.weight,
    ):
        assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["generation", "understanding"])
def test_every_weight_takes_part_whatever_a_row_holds(objective: StageObjective, kind: str) -> None:
    objective = copy.deepcopy(objective)
    with torch.no_grad():  # the bundled model is so sure of its answers that their loss is 0
        objective.model.language_model.lm_head.weight.mul_(0.1)
    objective.zero_grad(set_to_none=True)
    losses = objective(**packed(spans_of(objective, 1, kind), 200))
    sum(losses.values()).backward()
    without = [n for n, w in objective.named_parameters() if w.requires_grad and w.grad is None]
    assert not without
    idle = {"generation": ["answer"], "understanding": ["flow", "alignment", "vq"]}[kind]
    assert [name for name, loss in losses.items() if loss == 0] == idle


@pytest.mark.parametrize("trained", [list(TRAINABLE), ["aligner"], ["flow_head"], ["vq_head"]])
def test_layers_are_called_in_one_order_whatever_a_row_holds(
    tmp_path: Path, trained: list[str]
) -> None:
    """Processes that have other rows gather the shards of a layer at the same time."""
    objective = StageObjective(settings_of(tmp_path, trained=trained))
    make, calls = objective._span_maker(), []
    for name, module in objective.named_modules():
        if type(module).__name__ in ("LlamaDecoderLayer", "JanusVisionEncoderLayer"):
            module.register_forward_pre_hook(partial(lambda n, *_: calls.append(n), name))
            module.register_full_backward_pre_hook(partial(lambda n, *_: calls.append(n), name))
    said = {"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}
    text = [make(Sample("text", "colors", messages=said))]
    drawing, looking = (spans_of(objective, 1, kind) for kind in ("generation", "understanding"))
    orders = []
    for spans in (drawing + looking + text, drawing, looking, text):
        calls.clear()
        sum(objective(**packed(spans, 320)).values()).backward()
        orders.append(list(calls))
    assert len(orders[0]) == 4 + 6 + 4 + 6 + (4 if "vision_model" in trained else 0)
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize(
    ("trained", "frozen"),
    [
        (["aligner", "flow_head"], ("language_model.", "vision_model.", "vq_head.")),
        (["language_model", "aligner", "flow_head"], ("vision_model.", "vq_head.")),
        (list(TRAINABLE), ("vq_head.tokenizer.",)),
    ],
)
def test_a_stage_trains_what_it_names(
    tmp_path: Path, trained: list[str], frozen: tuple[str, ...]
) -> None:
    objective = StageObjective(settings_of(tmp_path, trained=trained))
    found = {name for name, weight in objective.model.named_parameters() if weight.requires_grad}
    rest = {name for name, _ in objective.model.named_parameters()} - found
    assert all(name.startswith(frozen) for name in rest)
    assert not any(name.startswith(frozen) for name in found)
    assert {"begin_embedding", "aligner.fc1.weight"} <= found


def test_a_run_goes_on_with_the_very_next_sample(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, loop={"microbatches": 2, "precision": "no"})
    whole = StageObjective(settings)
    batches = [[whole.batch(step, part) for part in (0, 1)] for step in range(4)]
    first = StageObjective(settings)
    for step in range(2):
        for part in (0, 1):
            first.batch(step, part)
    second = StageObjective(settings)
    second.load_data_state(first.data_state())
    for step in (2, 3):
        for part in (1, 0):
            again = second.batch(step, part)
            assert again.keys() == batches[step][part].keys()
            for name, held in again.items():
                assert torch.equal(held, batches[step][part][name]), name
    assert not torch.equal(batches[0][0]["ids"], batches[0][1]["ids"])


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    plain = settings_of(tmp_path)
    threads = settings_of(tmp_path, data={"sources": plain.data.sources, "threads": 2, "ahead": 5})
    one, two = StageObjective(plain), StageObjective(threads)
    for step in range(3):
        left, right = one.batch(step), two.batch(step)
        assert all(torch.equal(held, right[name]) for name, held in left.items())


def test_validation_tells_the_loss_of_the_flow_by_time(tmp_path: Path) -> None:
    validation = {
        "parts": 1,
        "buckets": 4,
        "data": {"sources": {"drawing": {**DRAWING, "seed": 3}}, "threads": 0},
    }
    objective = StageObjective(settings_of(tmp_path, validation=validation)).eval()
    found = objective.validate()
    times = [f"valid_flow_t{t}" for t in ("0.12", "0.38", "0.62", "0.88")]
    assert [name for name in found if "_t" in name] == times
    assert sum(found[name] for name in times) / 4 == pytest.approx(found["valid_flow"], rel=1e-3)
    assert found["valid_flow_t0.12"] > 2 * found["valid_flow_t0.62"], "noise tells little"
    assert objective.validate() == found


def test_the_smoke_run_goes_through_every_part_and_goes_on(tmp_path: Path) -> None:
    options = [
        f"output_dir={tmp_path}",
        "packing.length=320",
        "loop.log_every=1",
        "loop.validate_every=2",
        "loop.preview_every=2",
        "preview.shapes=6",
        "preview.num_inference_steps=2",
    ]
    if bfloat16_slowdown(torch.device("cpu")) > 2:
        options.append("loop.precision=no")  # else it takes minutes
    for steps in (2, 3):
        assert run(CONFIGS / "tiny" / "smoke.yaml", [*options, f"loop.steps={steps}"])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "grad_norm" in line] == [1, 2, 3]
    measured = next(line for line in lines if "valid_flow" in line)
    assert {"shapes_flow", "shapes_vq", "valid_answer", "valid_vq"} <= measured.keys()
    for name in ("preview-flow.png", "preview-vq.png", "final/model", "settings.json"):
        assert (tmp_path / name).exists()
    pipe = JanusFlowPipeline.from_pretrained(tmp_path / "final")
    assert pipe.model.generation_heads == ("flow", "vq")
    written = (tmp_path / "final" / "vae" / "config.json").read_text()
    assert "assets" not in written, "where the model was loaded from is nobody else's business"


def test_a_published_model_goes_on_with_ones_own_pictures(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "saved")
    published, pictures = tmp_path / "published", tmp_path / "pictures"
    convert(tmp_path / "saved", published, to="published")
    pictures.mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (80, 70 + number), color).save(pictures / f"{color}.jpg")
        (pictures / f"{color}.txt").write_text(f"all of it is {color}")
    config = tmp_path / "own.yaml"
    config.write_text(
        f"""task: stage
output_dir: {tmp_path / "run"}
model: {published}
vae: {tmp_path / "saved" / "vae"}
trained: [flow_head]
data: {{sources: {{mine: {{format: folder, kind: generation, path: {pictures}}}}}}}
packing: {{length: 256}}
alignment: {{layer: 1, width: 16}}
loop: {{steps: 2, precision: "no", optimizer: {{learning_rate: 1.0e-3}}}}
"""
    )
    assert run(config)
    final = tmp_path / "run" / "final"
    convert(final, tmp_path / "again", to="published")
    before, after = (
        JanusFlowPipeline.from_pretrained(
            folder, vae=final / "vae", torch_dtype=torch.bfloat16
        ).model.state_dict()
        for folder in (published, tmp_path / "again")
    )
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.startswith("flow_head.") for name in changed)


def test_answer_loss_is_the_mean_over_what_is_to_be_said() -> None:
    head = nn.Linear(4, 7)
    states = torch.randn(2, 5, 4)
    labels = torch.tensor([[IGNORED, IGNORED, 3, 5, 6], [IGNORED] * 5])
    logits = head(states).log_softmax(-1)
    expected = -(logits[0, 1, 3] + logits[0, 2, 5] + logits[0, 3, 6]) / 3
    torch.testing.assert_close(answer_loss(head, states, labels), expected)
    assert answer_loss(head, states, torch.full((2, 5), IGNORED)) == 0


def test_alignment_is_minus_the_cosine_on_the_drawn_grid() -> None:
    features = torch.randn(2, 16, 6, requires_grad=True)
    assert not alignment_loss(features.detach(), features).requires_grad
    features = features.detach()
    assert alignment_loss(3 * features, features) == pytest.approx(-1)
    assert alignment_loss(-features, features) == pytest.approx(1)
    coarse = features.view(2, 2, 2, 2, 2, 6).mean((2, 4)).reshape(2, 4, 6)
    assert alignment_loss(coarse, features) == pytest.approx(-1)


def test_what_a_frozen_network_made_is_read_again(tmp_path: Path) -> None:
    calls = []

    def encode(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return pixels.mean((2, 3))

    cached = Cached(encode, tmp_path, "one")
    pixels = torch.randn(1, 3, 8, 8)
    first = cached(pixels)
    assert torch.equal(cached(pixels.clone()), first)
    assert len(calls) == 1
    cached(pixels + 1)
    Cached(encode, tmp_path, "another network")(pixels)
    assert len(calls) == 3
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(b"torn")
    assert torch.equal(cached(pixels), first)
    assert len(calls) == 4


def test_a_cache_changes_no_row(tmp_path: Path) -> None:
    plain, cached = settings_of(tmp_path), settings_of(tmp_path, cache=str(tmp_path / "cache"))
    rows = StageObjective(plain).batch(0)
    for _ in range(2):
        again = StageObjective(cached).batch(0)
        assert all(torch.equal(held, again[name]) for name, held in rows.items())
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"latents", "image-tokens"}


def test_a_sample_that_fits_into_no_row_is_broken(objective: StageObjective) -> None:
    make = objective._span_maker()
    said = {"role": "user", "content": "red " * 400}, {"role": "assistant", "content": "blue"}
    with pytest.raises(BrokenSample, match=r"too long: .* 320 fit"):
        make(Sample("text", "long", messages=said))
    with pytest.raises(BrokenSample, match="unfit text"):
        make(Sample("text", "unanswered", messages=said[:1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": ["head"]}, "it names one or more of language_model"),
        ({"trained": []}, "it names one or more"),
        ({"drawing": {"heads": ["diffusion"]}}, "names 'flow', 'vq' or both"),
        ({"drawing": {"timesteps": "cosine"}}, "'logit-normal' or 'uniform'"),
        ({"drawing": {"noises_per_picture": 0}}, "at least 1"),
        ({"drawing": {"condition_dropout_prob": 1.0}}, r"in \[0, 1\)"),
        ({"packing": {"rows": 0}}, "packing.rows at least 1"),
        ({"alignment": {"layer": 0}}, "at least 1"),
        ({"alignment": {"layer": 7}}, "the language model has 6"),
        ({"data": {}}, "there is no source"),
        ({"vae": "nowhere"}, "nowhere"),
        ({"train": ["aligner"]}, "did you mean 'trained'"),
    ],
)
def test_a_bad_stage_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((SettingsError, ValueError), match=message):
        StageObjective(settings_of(tmp_path, **changes))


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.stem)
def test_the_shipped_configs_fit_their_settings_and_say_why(file: Path) -> None:
    values = read_yaml(file)
    kinds: dict[str, Any] = {
        "stage": StageSettings,
        "assemble": AssembleSettings,
        "pairs": PairsRunSettings,
    }
    if values["task"] in kinds:
        fill(kinds[values["task"]], values)
    assert file.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(
    ("number", "rate", "warmup", "steps", "batch", "trained", "mixture"),
    [
        (1, 1e-4, 2000, 10_000, 512, "aligner flow_head", {0: (50, 50, 0)}),
        (
            2,
            1e-4,
            2000,
            390_000,
            512,
            "language_model aligner flow_head",
            {0: (30, 50, 20), 10_000: (14, 80, 6)},
        ),
        (
            3,
            2e-5,
            1000,
            26_000,
            256,
            "language_model vision_model aligner flow_head",
            {0: (21, 70, 9)},
        ),
    ],
)
def test_the_published_stages_are_those_of_the_paper(
    number: int,
    rate: float,
    warmup: int,
    steps: int,
    batch: int,
    trained: str,
    mixture: dict[int, tuple[int, int, int]],
) -> None:
    stage = fill(StageSettings, read_yaml(CONFIGS / "janusflow-1.3b" / f"stage{number}.yaml"))
    loop, optimizer = stage.loop, stage.loop.optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps, loop.steps) == (rate, warmup, steps)
    assert (loop.microbatches, stage.packing.rows, stage.packing.length) == (batch, 1, 4096)
    assert (optimizer.name, optimizer.betas, optimizer.max_grad_norm) == ("adamw", [0.9, 0.95], 1)
    assert (optimizer.weight_decay, optimizer.decay_fraction, loop.ema_decay) == (0, 0, 0.99)
    assert (stage.drawing.condition_dropout_prob, stage.drawing.timesteps) == (0.1, "logit-normal")
    assert (stage.alignment.layer, stage.alignment.weight, stage.alignment.width) == (6, 1, 2048)
    assert stage.trained == trained.split()
    kinds = ("understanding", "generation", "text")
    found = {
        step: tuple(shares.get(kind, 0) for kind in kinds)
        for step, shares in stage.data.mixture.items()
    }
    assert found == mixture
