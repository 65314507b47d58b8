"""Which noise a picture of a training step has: by optimal transport in place of chance.

Noises drawn for several pictures are shared out so that their squared distances add up to least
(arXiv 2302.00482, 2304.14772): paths cross less, and bend less for it. The pictures must be of one
condition. All noise of a condition together stays standard normal then, as it is when pictures are
drawn; shared out between conditions it would tell of them (arXiv 2503.10636).
Axes: K pictures of one condition, n draws; all else is free.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def transported_noise(x_1: Tensor, num: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Noises for the first of K pictures: in each of n draws, that which it gets of K noises.

    Args:
        x_1: Latents of the pictures, float32 (K, …), on the CPU.
        num: n.
        generator: Of the noises.

    Returns:
        float32 (n, …).
    """
    noises = torch.randn((num, *x_1.shape), generator=generator)
    # Of |x_1 - x_0|² only the product depends on which picture gets which noise.
    products = torch.einsum("jd,nkd->njk", x_1.flatten(1), noises.flatten(2)).numpy()
    own = [linear_sum_assignment(draw, maximize=True)[1][0] for draw in products]
    return noises[torch.arange(num), torch.tensor(own, dtype=torch.int64)]
