"""The texts that describe bins."""

from __future__ import annotations

import math

import pytest
import torch
from places import GOLDEN

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.bins import Bins, bin_prompts, number_word

GOLDEN_FILE = GOLDEN / "clip_ebc_vectors.pt"


def test_official_wording_is_the_references() -> None:
    stored = torch.load(GOLDEN_FILE, weights_only=True)["prompts"]
    assert len(stored) == 26
    for (style, (low, high)), (text, _) in stored.items():
        edges = [(k, k) for k in range(int(low))] + [(int(low), None if math.isinf(high) else int(high))]
        if len(edges) == 1:
            edges.append((1, None))
        assert bin_prompts(Bins(tuple(edges)), style, "official")[int(low)] == text


def test_finite_ranges_which_crash_the_reference() -> None:
    bins = Bins.of([[0, 0], [1, 20], [21, 100], [101, None]])
    assert bin_prompts(bins, "word", "official") == [
        "There is no person.",
        "There are between one and twenty people.",
        "There are between twenty-one and one hundred people.",
        "There are more than 101 people.",
    ]
    assert bin_prompts(bins, "number")[1] == "There are between 1 and 20 people."


def test_corrected_wording_says_what_the_bins_mean() -> None:
    assert bin_prompts(Bins.make("fine", 3), "word", singular="cell", plural="cells") == [
        "There are no cells.",
        "There is one cell.",
        "There are two cells.",
        "There are three or more cells.",
    ]
    assert bin_prompts(Bins.make("fine", 2), "number") == [
        "There are no people.",
        "There is 1 person.",
        "There are 2 or more people.",
    ]


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (20, "twenty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (900, "nine hundred"),
        (1000, "one thousand"),
        (101, "101"),
        (2000, "2000"),
    ],
)
def test_number_words(number: int, word: str) -> None:
    assert number_word(number) == word


def test_unknown_styles_are_named() -> None:
    with pytest.raises(InputError, match="prompt_style"):
        bin_prompts(Bins.make("fine", 2), "roman")  # type: ignore[arg-type]
