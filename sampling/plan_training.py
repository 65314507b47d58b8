"""What the published stages take: operations, memory, and days on a number of GPUs.

`python sampling/plan_training.py` builds JanusFlow-1.3B without weights, counts the operations of a
packed row and the bytes that are kept for going backward, and prints a table in Markdown. What a
GPU does a second is an option, by default what was measured on one H200. Attention is counted as
dense; a row of a stage holds samples in the ratio of its last mixture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from janusflow import JanusFlowConfig, JanusFlowForConditionalGeneration
from janusflow.settings import fill, read_yaml
from janusflow.training.alignment import AlignmentHead
from janusflow.training.stage import TRAINABLE, StageSettings

CONFIGS = Path(__file__).parents[1] / "configs" / "train" / "janusflow-1.3b"
ROW = 4096
TEXT_TOKENS = {"understanding": 200, "generation": 60, "text": 500}
"""Besides those of pictures, on average; an assumption."""


@dataclass(frozen=True)
class Cost:
    """Of a run, forward and backward.

    Attributes:
        flops: Operations.
        saved: Bytes that are kept for going backward.
    """

    flops: float = 0.0
    saved: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.saved + other.saved)

    def __mul__(self, number: float) -> Cost:
        return Cost(self.flops * number, self.saved * number)


def cost_of(module: nn.Module, run: Callable[[], Tensor], *, backward: bool = True) -> Cost:
    """Counts a run of a module on the meta device."""
    weights = {weight.untyped_storage()._cdata for weight in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.set_grad_enabled(backward),
    ):
        result = run().sum()
        if backward:
            result.backward()
    return Cost(counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values()))


class Parts:
    """Costs of the model's parts, in bfloat16, for a row or a picture."""

    def __init__(self) -> None:
        with torch.device("meta"):
            config = JanusFlowConfig(vision_config={"image_size": 384}, flow_config={})
            self.model = JanusFlowForConditionalGeneration(config).to(torch.bfloat16)
            text, vision = config.text_config, config.vision_config
            self.alignment = AlignmentHead(text.hidden_size, vision.hidden_size, 2048)
            self.alignment.to(torch.bfloat16)
        self.model.set_attn_implementation("eager")
        head = self.model.flow_head
        self.width, self.layers = text.hidden_size, text.num_hidden_layers
        self.image_tokens = config.flow_config.num_image_tokens
        layer = self.model.language_model.model.layers[0]
        states = self._input(1, ROW, self.width)
        turns = self.model.language_model.model.rotary_emb(states, self._positions())
        self.layer = cost_of(layer, lambda: layer(states, position_embeddings=turns))
        words = self.model.language_model.lm_head
        self.logits = cost_of(words, lambda: words(self._input(1, self.width)).float())
        pixels = self._input(1, 3, vision.image_size, vision.image_size)
        look = self.model.get_image_features
        self.look = cost_of(self.model, lambda: look(pixels))
        self.look_only = cost_of(self.model, lambda: look(pixels), backward=False)
        side, channels = head.config.latent_size, head.config.latent_channels
        latents = self._input(1, channels, side, side)
        t = torch.zeros(1, device="meta")

        def draw() -> Tensor:
            tokens = head.tokens(latents, t)
            return head.velocity(tokens.embeddings, tokens)

        self.draw = cost_of(head, draw)
        inner = self._input(1, self.image_tokens, self.width)
        self.align = cost_of(self.alignment, lambda: self.alignment(inner))

    @staticmethod
    def _input(*shape: int) -> Tensor:
        return torch.zeros(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)

    @staticmethod
    def _positions() -> Tensor:
        return torch.arange(ROW, device="meta")[None]

    def row(self, mixture: dict[str, float], *, trains_vision: bool) -> tuple[Cost, Cost]:
        """A row of `ROW` tokens: all of it kept, and with layers computed again going backward."""
        total = sum(mixture.values())
        lengths = {
            kind: TEXT_TOKENS[kind] + (0 if kind == "text" else self.image_tokens + 2)
            for kind in mixture
        }
        samples = ROW / sum(mixture[kind] / total * lengths[kind] for kind in mixture)
        drawn, looked, spoken = (
            samples * mixture.get(kind, 0) / total
            for kind in ("generation", "understanding", "text")
        )
        words = looked * TEXT_TOKENS["understanding"] + spoken * TEXT_TOKENS["text"]
        look = self.look if trains_vision else self.look_only
        others = (
            self.logits * words
            + self.draw * drawn
            + (self.align + self.look_only) * drawn
            + look * looked
        )
        layer_input = 2 * ROW * self.width
        again = Cost(
            self.layers * self.layer.flops * 4 / 3,  # forward once more: a third of both
            self.layers * layer_input + self.layer.saved,
        )
        return self.layer * self.layers + others, again + others


def plan(parts: Parts, gpus: list[int], tflops: float, share: float) -> Iterator[list[str]]:
    """A line for each stage and number of GPUs."""
    for number in (1, 2, 3):
        stage = fill(StageSettings, read_yaml(CONFIGS / f"stage{number}.yaml"))
        mixture = stage.data.mixture[max(stage.data.mixture)]
        trains_vision = "vision_model" in stage.trained
        kept, again = parts.row(mixture, trains_vision=trains_vision)
        trained = sum(
            weight.numel()
            for name in stage.trained
            for key, weight in parts.model.named_parameters()
            if key.startswith(TRAINABLE[name])
        ) + sum(weight.numel() for weight in parts.alignment.parameters())
        frozen = sum(weight.numel() for weight in parts.model.parameters()) - trained
        # float32: weights; of those that are trained gradients, two moments and averages, too.
        whole = 4 * frozen + 20 * trained
        for count in gpus:
            rows = stage.loop.microbatches * stage.loop.steps
            days = rows * again.flops / (count * tflops * 1e12 * share) / 86_400
            yield [
                str(number),
                f"{trained / 1e6:,.0f}",
                f"{kept.flops / 1e12:,.1f}",
                f"{again.flops / 1e12:,.1f}",
                str(count),
                f"{days:,.2f}",
                f"{whole / 2**30:,.1f}",
                f"{whole / count / 2**30:,.1f}",
                f"{kept.saved / 2**30:,.1f}",
                f"{again.saved / 2**30:,.1f}",
            ]


def main(argv: list[str] | None = None) -> int:
    """Reads the options and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 256])
    parser.add_argument("--tflops", type=float, default=989.0, help="bfloat16, of a GPU (H100 SXM)")
    parser.add_argument("--share", type=float, default=0.35, help="of it that is reached")
    given = parser.parse_args(argv)
    heads = [
        "stage",
        "M trained",
        "TFLOP a row",
        "with checkpointing",
        "GPUs",
        "days",
        "GiB of weights and kin, DDP",
        "FSDP",
        "GiB of activations a row",
        "with checkpointing",
    ]
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    for line in plan(Parts(), given.gpus, given.tflops, given.share):
        print(f"| {' | '.join(line)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
