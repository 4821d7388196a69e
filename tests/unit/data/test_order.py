"""The shuffle that is computed: a permutation for every count and key, and a good one."""

import numpy as np
import pytest

from student_trainer.data.order import key_of, shuffled


@pytest.mark.parametrize("count", [*range(1, 70), 100, 255, 256, 257, 1023, 4096, 5000])
def test_every_position_goes_to_a_place_of_its_own(count: int) -> None:
    for seed in range(3):
        order_N = shuffled(np.arange(count), count, key_of(seed))
        assert np.array_equal(np.sort(order_N), np.arange(count))


def test_a_part_is_the_same_as_that_part_of_the_whole() -> None:
    whole_N = shuffled(np.arange(3000), 3000, key_of("k"))
    assert np.array_equal(shuffled(np.arange(1234, 1300), 3000, key_of("k")), whole_N[1234:1300])


def test_ten_billion_documents_need_no_memory() -> None:
    count = 10_000_000_000
    places_N = shuffled(np.arange(count - 10_000, count), count, key_of("large"))
    assert len(np.unique(places_N)) == 10_000 and places_N.min() >= 0 and places_N.max() < count
    # Uniform: the mean of 10,000 draws lies within 5 standard errors of the middle.
    assert abs(places_N.mean() / count - 0.5) < 5 * (1 / 12) ** 0.5 / 100


def test_the_order_depends_on_every_part_of_the_key() -> None:
    keys = [key_of(0, "a", 0), key_of(1, "a", 0), key_of(0, "b", 0), key_of(0, "a", 1)]
    orders = [shuffled(np.arange(1000), 1000, key) for key in keys]
    for i, a in enumerate(orders):
        for b in orders[i + 1 :]:
            # A random pair of permutations agrees in one place on average; 10 is beyond chance.
            assert (a == b).sum() <= 10


def test_neighbours_are_torn_apart() -> None:
    count = 100_000
    order_N = shuffled(np.arange(count), count, key_of("n"))
    distance = np.abs(np.diff(order_N)).mean()
    assert distance == pytest.approx(count / 3, rel=0.02)  # the mean distance of two independent draws
    assert abs(np.corrcoef(np.arange(count), order_N)[0, 1]) < 0.02
