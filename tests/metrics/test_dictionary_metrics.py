"""Use of the dictionary and agreement of its two sides, against counting by hand."""
import itertools
import math
import random

import pytest

from unimo2_paddle.errors import DataError
from unimo2_paddle.metrics.dictionary import dictionary_health


def test_codes_that_are_all_as_frequent_have_the_perplexity_of_their_number():
    told = dictionary_health([[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [2, 3]], codes=8)
    assert told == pytest.approx({"used": 4, "perplexity": 4, "overlap_true": 100, "overlap_random": 0, "overlap_gain": 100})


def test_a_dictionary_of_one_choice_agrees_always_and_gains_nothing():
    told = dictionary_health([[1, 5]] * 3, [[1, 5]] * 3, [[5, 1]] * 3, codes=9)
    assert told == pytest.approx({"used": 2, "perplexity": 2, "overlap_true": 100, "overlap_random": 100, "overlap_gain": 0})


def test_the_figures_are_those_of_counting():
    rng = random.Random(3)
    joint, image, text = ([rng.sample(range(20), 4) for _ in range(9)] for _ in range(3))
    told = dictionary_health(joint, image, text, codes=20)
    shared = {(i, j): len(set(image[i]) & set(text[j])) / 4 * 100 for i, j in itertools.product(range(9), repeat=2)}
    assert told["overlap_true"] == pytest.approx(sum(shared[i, i] for i in range(9)) / 9, abs=1e-4)
    assert told["overlap_random"] == pytest.approx(sum(value for (i, j), value in shared.items() if i != j) / 72, abs=1e-4)
    drawn = [code for row in joint for code in row]
    shares = [drawn.count(code) / len(drawn) for code in set(drawn)]
    assert told["used"] == len(shares) and told["perplexity"] == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))


@pytest.mark.parametrize("joint, image, text, message", [
    ([[0]], [[0]], [[0]], "at least two pairs"), ([[0], [1]], [[0], [1]], [[0, 1], [1, 2]], "one shape"),
    ([[0], [9]], [[0], [1]], [[0], [1]], "outside of the dictionary of 4"), ([[0], [1]], [[0], [-1]], [[0], [1]], "outside"),
])
def test_what_cannot_be_compared_is_an_error(joint, image, text, message):
    with pytest.raises(DataError, match=message):
        dictionary_health(joint, image, text, codes=4)
