"""Low-rank adapters: they change nothing at first, alone are trained, and are saved merged in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from janusflow import JanusFlowPipeline, SettingsError
from janusflow.settings import fill
from janusflow.training.lora import LoraSettings, add_adapters, merged_weights
from janusflow.training.run import run
from janusflow.training.stage import StageObjective, StageSettings


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"one": nn.Linear(6, 5), "two": nn.Linear(5, 4, bias=False)})


def through(net: Any, x: torch.Tensor) -> torch.Tensor:
    return net["two"](net["one"](x).relu())


def test_adapters_change_nothing_until_they_are_trained() -> None:
    net, x = network(), torch.randn(3, 6)
    before, names = through(net, x), list(net.state_dict())
    net["two"].requires_grad_(False)
    adapters = add_adapters(net, LoraSettings(rank=2, layers=["one"]))
    assert torch.equal(through(net, x), before)
    assert len(adapters) == 2
    trained = {name for name, weight in net.named_parameters() if weight.requires_grad}
    lora = {f"one.lora_{side}.default.weight" for side in "AB"}
    assert trained == lora | {"one.base_layer.weight", "one.base_layer.bias"}
    assert list(merged_weights(net)) == names


def test_merged_weights_compute_what_layers_and_adapters_compute() -> None:
    net, x = network(), torch.randn(3, 6)
    for weight in add_adapters(net, LoraSettings(rank=2, alpha=3, layers=["o*", "two"])):
        nn.init.normal_(weight)
    plain = network()
    plain.load_state_dict(merged_weights(net))
    torch.testing.assert_close(through(plain, x), through(net, x))
    assert not torch.allclose(through(network(), x), through(net, x), atol=0.1)


def settings_of(folder: Path) -> dict[str, Any]:
    drawing = {"format": "shapes", "kind": "generation", "num_pictures": 20}
    return {
        "task": "stage",
        "output_dir": str(folder),
        "trained": [],
        "lora": {"rank": 2, "layers": ["language_model.*.q_proj", "flow_head.*_aligner"]},
        "data": {"threads": 0, "sources": {"drawing": drawing}},
        "packing": {"length": 256},
        "alignment": {"weight": 0},
        "loop": {"steps": 2, "precision": "no", "optimizer": {"learning_rate": 0.1}},
    }


def test_a_stage_with_adapters_leaves_an_ordinary_model(tmp_path: Path) -> None:
    import yaml

    config = tmp_path / "stage.yaml"
    config.write_text(yaml.safe_dump(settings_of(tmp_path / "run")))
    assert run(config)
    pipes = [JanusFlowPipeline.from_pretrained(f) for f in ("tiny", tmp_path / "run" / "final")]
    before, after = (pipe.model.state_dict() for pipe in pipes)
    assert before.keys() == after.keys()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[-2] for name in changed} == {
        "q_proj",
        "encoder_aligner",
        "decoder_aligner",
    }


def test_adapters_alone_are_trained(tmp_path: Path) -> None:
    objective = StageObjective(fill(StageSettings, settings_of(tmp_path)))
    trained = [name for name, weight in objective.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * (6 + 2)
    assert all(".lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, "lora.rank is 0 or more"),
        ({"alpha": 0}, "lora.alpha above 0"),
        ({"rank": 2, "layers": ["three"]}, "no linear layer's name"),
    ],
)
def test_bad_adapters_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        add_adapters(network(), LoraSettings(**changes))
