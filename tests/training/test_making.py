"""What is made ahead is the same in the same order, and leaves the caller as it was."""

from __future__ import annotations

import os
import time

import pytest
import torch

from janusflow.errors import SettingsError
from janusflow.training.making import made


def test_workers_make_the_same_in_the_same_order():
    def make(number):
        time.sleep(0.5 * (number == 7))  # the first is the last to be there
        return {"x": torch.arange(3) * number, "process": torch.tensor(os.getpid())}

    numbers = [7, 1, 5, 2, 3]
    here, ahead = ([*made(make, numbers, workers)] for workers in (0, 2))
    for products in (here, ahead):
        assert [one["x"].tolist() for one in products] == [[0, n, 2 * n] for n in numbers]
    makers = [{one["process"].item() for one in products} for products in (here, ahead)]
    assert makers[0] == {os.getpid()}
    assert len(makers[1] - makers[0]) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_worker_reaches_the_caller(workers):
    def make(number):
        if number == 2:
            raise SettingsError(f"there is no picture {number}")
        return torch.tensor(number)

    products = made(make, range(5), workers)
    assert [next(products).item(), next(products).item()] == [0, 1]
    with pytest.raises(SettingsError, match="there is no picture 2"):
        next(products)


def test_workers_leave_the_random_state_as_it_was():
    before = torch.get_rng_state()
    assert len([*made(torch.tensor, range(3), 2)]) == 3
    assert torch.equal(torch.get_rng_state(), before)


def test_without_workers_nothing_is_made_before_its_turn():
    asked = []

    def make(number):
        asked.append(number)
        return torch.tensor(number)

    products = made(make, range(3))
    assert asked == []
    for number in range(3):
        assert next(products).item() == number
        assert asked == [*range(number + 1)]
