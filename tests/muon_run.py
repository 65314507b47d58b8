"""Steps of Muon in each of several processes, by itself and shared, which have to be the same.

`python muon_run.py`, in each process that a launcher starts, prints how often it made a matrix
orthogonal for the shared ones.
"""

from __future__ import annotations

import torch
from torch import nn

from janusflow.training import shared_muon
from janusflow.training.optimizers import OptimizerSettings, build_optimizers
from janusflow.training.processes import begin

SHAPES = [(8, 4), (4, 8), (6, 6), (2, 9), (16, 8), (5, 5), (3, 3)]
OPTIONS = [
    {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.1},
    {"adjust_lr_fn": "original", "nesterov": False},
]


def main() -> None:
    state = begin()
    counts = []
    orthogonal = shared_muon.orthogonal

    def counted(matrix, settings):
        counts.append(1)
        return orthogonal(matrix, settings)

    shared_muon.orthogonal = counted
    torch.manual_seed(0)
    for options in OPTIONS:
        drawn = [torch.randn(shape) for shape in SHAPES]
        both = [[nn.Parameter(matrix.clone()) for matrix in drawn] for _ in range(2)]
        alone = torch.optim.Muon(both[0], lr=0.1, **options)
        shared = shared_muon.SharedMuon(both[1], lr=0.1, **options)
        for step in range(3):
            for one, other in zip(*both, strict=True):
                one.grad = torch.randn(one.shape)
                other.grad = one.grad.clone()
            both[0][step].grad = both[1][step].grad = None
            alone.step()
            shared.step()
        for one, other in zip(*both, strict=True):
            assert torch.equal(one, other), one.shape
            momenta = alone.state[one]["momentum_buffer"], shared.state[other]["momentum_buffer"]
            assert torch.equal(*momenta), one.shape
    (built,) = build_optimizers(nn.Linear(2, 2, bias=False), OptimizerSettings(name="muon"))
    assert isinstance(built, shared_muon.SharedMuon)
    print(f"{len(counts)}\n", end="")  # in one piece, beside the other process
    state.destroy_process_group()  # else its threads may still be at work when Python ends


if __name__ == "__main__":
    main()
