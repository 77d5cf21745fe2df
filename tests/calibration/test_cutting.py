import itertools

import pytest

from loki_attention.calibration.cutting import spread_order


@pytest.mark.parametrize("count", [1, 7, 100])
def test_every_beginning_of_the_spread_order_is_even(count):
    order = spread_order(count, 0.3)
    assert sorted(order) == list(range(count))
    for taken in range(2, count + 1):
        places = sorted(order[:taken])
        gaps = [b - a for a, b in itertools.pairwise(places)]
        assert max(gaps) <= 3 * count / taken + 1
