"""The order of an epoch without a list of it: a permutation that is computed number by number.

A Feistel network permutes a power of four; numbers outside 0 … n - 1 are sent through it again
until they fall inside ("cycle walking"; Black and Rogaway 2002), which keeps it a bijection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
_MASK_64 = (1 << 64) - 1


class Permutation:
    """A random order of 0 … n - 1, a function of `n` and `entropy` alone."""

    def __init__(self, n: int, entropy: Sequence[int]) -> None:
        self.n = n
        # The network's numbers are fewer than 4 n, but for the 16 that are the least.
        self._half_bits = max(2, ((n - 1).bit_length() + 1) // 2)
        state = np.random.SeedSequence(entropy).generate_state(_ROUNDS, np.uint64)
        self._keys: list[int] = state.tolist()

    def __getitem__(self, position: int) -> int:
        """The number that stands at `position`."""
        if not 0 <= position < self.n:
            raise IndexError(f"position {position} of {self.n}")
        number = self._feistel(position)
        while number >= self.n:
            number = self._feistel(number)
        return number

    def _feistel(self, number: int) -> int:
        bits = self._half_bits
        left, right = number >> bits, number & ((1 << bits) - 1)
        for key in self._keys:
            mixed = ((right ^ key) * 0xBF58476D1CE4E5B9) & _MASK_64  # splitmix64's finisher
            mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
            left, right = right, left ^ (mixed >> (64 - bits))
        return left << bits | right
