"""How much of a machine training reaches at the layer sizes of JanusFlow-1.3B.

`python sampling/benchmark_training.py` runs forward and backward of a few of its layers in bfloat16
autocast over a row of tokens, and sets the operations a second against the fastest that
`torch.nn.functional.linear` runs at the sizes of their largest product, in the same minute.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor, nn
from transformers import LlamaModel

from janusflow import JanusFlowConfig
from janusflow.training.throughput import count_arithmetic, matmul_peak


class Layers(nn.Module):
    """Layers of the language model, and a loss of their states."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        config = JanusFlowConfig().text_config
        config.num_hidden_layers, config.vocab_size = num_layers, 8
        self.model = LlamaModel._from_config(config)
        self.model.embed_tokens.requires_grad_(False)

    def forward(self, *, states: Tensor) -> dict[str, Tensor]:
        with torch.autocast(states.device.type, torch.bfloat16):
            out = self.model(inputs_embeds=states, use_cache=False).last_hidden_state
        return {"loss": out.float().square().mean()}


def main(argv: list[str] | None = None) -> int:
    """Reads the options, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device(given.device)
    layers = Layers(given.layers).to(device)
    batch = {"states": torch.randn(1, given.tokens, 2048, device=device)}
    arithmetic = count_arithmetic(layers, batch)
    assert arithmetic.matrix is not None
    run = torch.compile(layers) if given.compile else layers
    fastest = peak = 0.0
    for _ in range(given.repeats):  # in turns, so that both see the same machine
        peak = max(peak, matmul_peak(arithmetic.matrix, torch.bfloat16, device))
        begin = time.perf_counter()
        sum(run(**batch).values()).backward()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        fastest = max(fastest, arithmetic.flops / (time.perf_counter() - begin))
        layers.zero_grad(set_to_none=True)
    rows, width_in, width_out = arithmetic.matrix
    print(
        f"{given.layers} layers, {given.tokens} tokens: {fastest / 1e12:.3f} TFLOP/s forward and "
        f"backward, {fastest / peak:.1%} of linear at {rows} x {width_in} x {width_out} "
        f"({peak / 1e12:.3f} TFLOP/s), {torch.get_num_threads()} threads"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
