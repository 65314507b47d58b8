"""Noise by optimal transport: the cheapest sharing out, and still standard normal."""

from functools import partial
from itertools import permutations

import pytest
import torch

from janusflow.flow.coupling import transported_noise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(num):
    return 1 + torch.randn(num, 2, 3, 3, generator=generator(1))


def test_the_first_picture_gets_its_noise_of_the_cheapest_sharing_out():
    x_1 = pictures(4)
    noises = torch.randn((6, *x_1.shape), generator=generator())

    def cost(order, draw):
        return float((draw[list(order)] - x_1).square().sum())

    cheapest = [min(permutations(range(4)), key=partial(cost, draw=draw)) for draw in noises]
    assert len({order[0] for order in cheapest}) > 1
    expected = torch.stack([draw[order[0]] for draw, order in zip(noises, cheapest, strict=True)])
    assert torch.equal(transported_noise(x_1, 6, generator=generator()), expected)


def test_one_picture_takes_what_is_drawn():
    x_1 = pictures(1)
    noise = transported_noise(x_1, 5, generator=generator())
    assert torch.equal(noise, torch.randn(5, *x_1.shape[1:], generator=generator()))


@pytest.mark.parametrize("num", [4, 16])
def test_noise_of_all_pictures_together_is_standard_normal(num):
    x_1 = pictures(num)
    draws = 4000 // num
    noise = torch.cat(
        [
            transported_noise(torch.roll(x_1, -first, 0), draws, generator=generator(first))
            for first in range(num)
        ]
    ).flatten(1)
    error = len(noise) ** -0.5
    assert noise.mean(0).abs().max() < 4 * error
    assert (noise.T.cov() - torch.eye(18)).abs().max() < 5.5 * error
    # Of one picture it is not: it leans to the picture.
    own = transported_noise(x_1, draws, generator=generator()).flatten(1)
    assert (own.mean(0) * (x_1[0] - x_1.mean(0)).flatten()).sum() > 1


def test_more_pictures_bring_noise_and_pictures_nearer():
    products = []
    for num in (1, 4, 16):
        x_1, found = pictures(num), []
        for first in range(num):
            noise = transported_noise(
                torch.roll(x_1, -first, 0), 800 // num, generator=generator(first)
            )
            found.append((noise * x_1[first]).flatten(1).sum(1).mean())
        products.append(float(torch.stack(found).mean()))
    assert abs(products[0]) < 1
    assert products[0] + 2 < products[1] < products[2] - 1
