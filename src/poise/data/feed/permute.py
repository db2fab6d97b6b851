"""A shuffle without an index: any position of a pseudo-random permutation, computed on its own.

A Feistel network with widths a + b = ceil(log2 n) permutes the smallest power of two that holds n; an
image outside range(n) goes through the network again (cycle-walking), which leaves a permutation of
range(n). It takes no memory, whatever n is, and "sample 12,345 of epoch 3" needs no earlier sample.

Source: M. Luby, C. Rackoff, "How to construct pseudorandom permutations from pseudorandom functions",
SIAM J. Comput. 17(2), 1988; J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
The round function is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Not for secrets.
"""

from __future__ import annotations

from typing import Final, overload

import numpy as np
from numpy.typing import NDArray

from poise.core.rng import derive
from poise.data.bits import mix

_ROUNDS: Final = 8  # even, so that the two halves end with the widths they started with


class Permutation:
    """A permutation of range(n) that depends on nothing but (n, seed, epoch), equal on every machine.

    >>> order = Permutation(5, seed=0, epoch=0)
    >>> sorted(order(i) for i in range(5))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        assert 0 < n < 2**62, n
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._left, self._right = bits // 2, bits - bits // 2
        self._keys = [np.uint64(derive(seed, "permutation", epoch, i)) for i in range(_ROUNDS)]

    @overload
    def __call__(self, index: int) -> int: ...
    @overload
    def __call__(self, index: NDArray[np.int64]) -> NDArray[np.int64]: ...
    def __call__(self, index: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
        """Return the image of ``index`` (a number or an array of numbers in range(n))."""
        given = np.asarray(index, dtype=np.int64)
        assert given.size == 0 or (given.min() >= 0 and given.max() < self.n), (self.n, index)
        if self.n == 1:
            image = np.zeros(given.size, dtype=np.uint64)
        else:
            image = self._network(given.reshape(-1).astype(np.uint64))
            while (outside := image >= self.n).any():
                image[outside] = self._network(image[outside])
        out = image.astype(np.int64).reshape(given.shape)
        return int(out) if isinstance(index, int) else out

    def _network(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Permute range(2 ** bits): eight rounds of (left, right) -> (right, left xor F(right))."""
        wide_left, wide_right = self._left, self._right
        left, right = x >> np.uint64(wide_right), x & _mask(wide_right)
        for key in self._keys:
            left, right = right, left ^ (mix(right + key) & _mask(wide_left))
            wide_left, wide_right = wide_right, wide_left
        return (left << np.uint64(wide_right)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)
