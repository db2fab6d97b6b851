from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.data.feed.permute import Permutation

PINNED_1000 = [215, 97, 984, 969, 63, 916, 894, 82]
PINNED_LARGE = [533759811113, 314433072142, 183624704482, 485582135037]


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**62), epoch=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    image = Permutation(n, seed, epoch)(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 2**16 - 1, 2**16, 2**16 + 1])
def test_is_a_bijection_around_powers_of_two(n: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, 7, 0)(np.arange(n))), np.arange(n))


@given(n=st.integers(1, 2**61), data=st.data())
@settings(max_examples=30, deadline=None)
def test_scalar_and_array_agree(n: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    order = Permutation(n, 3, 5)
    image = order(np.array(indices))
    assert image.tolist() == [order(i) for i in indices]
    assert all(0 <= i < n for i in image.tolist())


def test_keeps_the_shape() -> None:
    order = Permutation(100, 0, 0)
    image = order(np.arange(12).reshape(3, 4))
    assert image.shape == (3, 4)
    assert image.reshape(-1).tolist() == order(np.arange(12)).tolist()


def test_values_are_the_same_on_every_machine() -> None:
    # Measured once; a change would give every run that resumes other data.
    assert Permutation(1000, 0, 0)(np.arange(8)).tolist() == PINNED_1000
    assert Permutation(10**12, 1234, 7)(np.arange(4)).tolist() == PINNED_LARGE


def test_depends_on_seed_and_epoch() -> None:
    one = Permutation(500, 0, 0)(np.arange(500))
    for other in (Permutation(500, 1, 0), Permutation(500, 0, 1)):
        # Two unrelated permutations agree in one place on average.
        assert (other(np.arange(500)) == one).sum() < 10


@pytest.mark.parametrize(("n", "orders"), [(2, 2), (3, 6), (4, 24)])
def test_small_ranges_come_in_every_order(n: int, orders: int) -> None:
    assert len({tuple(Permutation(n, 0, epoch)(np.arange(n)).tolist()) for epoch in range(400)}) == orders


def test_looks_shuffled() -> None:
    n = 4096
    image = Permutation(n, 0, 0)(np.arange(n))
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.06  # 4 standard deviations are 0.0625
    assert (np.abs(np.diff(image)) == 1).sum() < 12  # expected: 2


def test_an_index_outside_is_refused() -> None:
    for index in (-1, 5):
        with pytest.raises(AssertionError):
            Permutation(5, 0, 0)(index)
