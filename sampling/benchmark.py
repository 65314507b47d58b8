"""Time per image token of the VQ head, beside transformers' Janus on the same weights.

`python sampling/benchmark.py --layers 4 --pictures 3` builds a model of Janus-Pro-1B's sizes with
random weights and so many layers; `--model tiny` takes the bundled model's VQ head instead, or any
other checkpoint's. Both draw the same greedy pictures in turn, in one process, so that what else
the machine does meets both alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import JanusForConditionalGeneration

from janusflow import JanusFlowConfig, JanusFlowForConditionalGeneration
from janusflow.models.checkpoints import convert

PROMPT = [2, *range(10, 22), 3]
"""Any ids will do: the first stands for the beginning of a sentence, the last for a picture's."""
PAD = 1


def random_model(layers: int, folder: Path) -> Path:
    """Writes a model of Janus-Pro-1B's sizes, its vision tower cut to one layer."""
    torch.manual_seed(0)
    config = JanusFlowConfig(
        text_config={"vocab_size": 512, "num_hidden_layers": layers},
        vision_config={"num_hidden_layers": 1, "depth": 2},
        vq_config={},
        learned_begin_embedding=False,
        pad_token_id=PAD,
        image_token_id=4,
    )
    JanusFlowForConditionalGeneration(config).save_pretrained(folder / "ours")
    return folder / "ours"


def vq_part(where: str, folder: Path) -> Path:
    """Writes a checkpoint without what transformers' Janus has no place for: the flow head."""
    whole = JanusFlowForConditionalGeneration.from_pretrained(where)
    whole.require_head("vq")
    config = copy.deepcopy(whole.config)
    config.flow_config, config.learned_begin_embedding = None, False
    part = JanusFlowForConditionalGeneration(config)
    missing, _ = part.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    part.save_pretrained(folder / "ours")
    return folder / "ours"


def timed(draw: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    tokens = draw().cpu()  # a GPU is waited for
    return tokens, (time.perf_counter() - began) / tokens.shape[1]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help='folder or hub id with a VQ head, or "tiny"')
    parser.add_argument("--layers", type=int, default=4, help="of the random model (4)")
    parser.add_argument("--pictures", type=int, default=3, help="that each of both draws (3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if arguments.model:
            source = vq_part(arguments.model, scratch)
        else:
            source = random_model(arguments.layers, scratch)
        theirs_folder = convert(source, scratch / "theirs", to="transformers")
        ours = JanusFlowForConditionalGeneration.from_pretrained(source, dtype=dtype)
        theirs = JanusForConditionalGeneration.from_pretrained(theirs_folder, dtype=dtype)
    ours.to(arguments.device)
    theirs.to(arguments.device).eval()
    config = theirs.generation_config
    config.pad_token_id, config.bos_token_id = PAD, PROMPT[0]
    config.generation_kwargs = {"boi_token_id": PROMPT[-1]}
    ids = torch.tensor([PROMPT], device=arguments.device)
    mask = torch.ones_like(ids)

    def draw_ours() -> torch.Tensor:
        return ours.generate_image_tokens(
            ids, attention_mask=mask, temperature=0, guidance_scale=5.0, pad_token_id=PAD
        )

    def draw_theirs() -> torch.Tensor:
        return theirs.generate(
            ids, attention_mask=mask, generation_mode="image", guidance_scale=5.0, do_sample=False
        )

    seconds: dict[str, list[float]] = {"janusflow": [], "transformers": []}
    for _ in range(arguments.pictures):
        own, own_time = timed(draw_ours)
        other, other_time = timed(draw_theirs)
        seconds["janusflow"].append(own_time)
        seconds["transformers"].append(other_time)
        same = (own == other).float().mean().item()
    print(f"tokens alike: {same:.3f}")
    for side, times in seconds.items():
        print(f"{side:<13} {1000 * statistics.median(times):8.2f} ms a token")
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    print(f"{'ratio':<13} {statistics.median(ratios):8.3f} (median of {len(ratios)} pairs)")


if __name__ == "__main__":
    main()
