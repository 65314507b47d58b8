"""Steps of Muon in each of several processes beside those of the library, which have to be alike.

`python muon_run.py`, in each process that a launcher starts, prints how often it made a matrix
orthogonal.
"""

from __future__ import annotations

import torch
from torch import nn

from janusflow.training import muon
from janusflow.training.processes import begin

SHAPES = [(8, 4), (4, 8), (6, 6), (2, 9), (16, 8), (5, 5), (3, 3), (4, 3, 3, 3)]


def compare() -> None:
    """Steps of weights by the library and by the project; they, and their momenta, are the same."""
    torch.manual_seed(0)
    for weight_decay in (0.0, 0.1):
        drawn = [torch.randn(shape) for shape in SHAPES]
        both = [[nn.Parameter(weight.clone()) for weight in drawn] for _ in range(2)]
        seen = [nn.Parameter(weight.detach().flatten(1)) for weight in both[0]]  # shares its memory
        options = {"lr": 0.1, "weight_decay": weight_decay}
        library = torch.optim.Muon(seen, adjust_lr_fn="match_rms_adamw", **options)
        ours = muon.Muon(both[1], **options)
        for step in range(3):
            for one, other in zip(seen, both[1], strict=True):
                other.grad = torch.randn(other.shape)
                one.grad = other.grad.flatten(1)
            seen[step].grad = both[1][step].grad = None
            library.step()
            ours.step()
        for flat, one, other in zip(seen, *both, strict=True):
            assert torch.equal(one, other), one.shape
            momenta = library.state[flat]["momentum_buffer"], ours.state[other]["momentum_buffer"]
            assert torch.equal(momenta[0], momenta[1].flatten(1)), one.shape


def main() -> None:
    state = begin()
    counts = []
    orthogonal = muon.orthogonal

    def counted(matrix):
        counts.append(1)
        return orthogonal(matrix)

    muon.orthogonal = counted
    compare()
    print(f"{len(counts)}\n", end="")  # in one piece, beside the other process
    state.destroy_process_group()  # else its threads may still be at work when Python ends


if __name__ == "__main__":
    main()
