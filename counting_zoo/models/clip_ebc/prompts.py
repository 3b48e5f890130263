"""Texts that describe bins of counts, which CLIP-EBC compares image features with."""

from __future__ import annotations

from typing import Literal

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.bins import Bins

Style = Literal["word", "number"]
Wording = Literal["corrected", "official"]

_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_word(number: int) -> str:
    """0 to 99, whole hundreds to 900, and 1000 in words, others in digits, as the reference has them.

    Example:
        >>> number_word(21), number_word(300), number_word(121)
        ('twenty-one', 'three hundred', '121')
    """
    if number < 20:
        return _ONES[number]
    if number < 100:
        ten = _TENS[number // 10 - 2]
        return f"{ten}-{_ONES[number % 10]}" if number % 10 else ten
    if number < 1000 and not number % 100:
        return f"{_ONES[number // 100]} hundred"
    return "one thousand" if number == 1000 else str(number)


def bin_prompts(
    bins: Bins, style: Style = "word", wording: Wording = "corrected", singular: str = "person", plural: str = "people"
) -> list[str]:
    """One sentence for each bin.

    Args:
        bins: the bins.
        style: numbers as a ``word`` or as digits (``number``).
        wording: ``official`` is the reference's, which says "There is no person." and "There is 0 person.", and "more
            than four" of a bin that four is in; ``corrected`` says what the bins mean.
        singular, plural: what is counted, such as ``cell`` and ``cells``.

    Raises:
        InputError: an unknown style or wording.

    Example:
        >>> bin_prompts(Bins.make("fine", 2), wording="official")
        ['There is no person.', 'There is one person.', 'There are more than two people.']
    """
    if style not in ("word", "number") or wording not in ("corrected", "official"):
        raise InputError(
            f"prompt_style is {style!r} and prompt_wording {wording!r}; expected 'word' or 'number', and 'corrected' "
            "or 'official'"
        )
    return [_describe(low, high, style, wording, singular, plural) for low, high in bins.edges]


def _describe(low: int, high: int | None, style: Style, wording: Wording, singular: str, plural: str) -> str:
    def said(number: int) -> str:
        return number_word(number) if style == "word" else str(number)

    if low == high == 0:
        if wording == "corrected":
            return f"There are no {plural}."
        return f"There is {'no' if style == 'word' else '0'} {singular}."
    if low == high:
        return f"There is {said(1)} {singular}." if low == 1 else f"There are {said(low)} {plural}."
    if high is not None:
        return f"There are between {said(low)} and {said(high)} {plural}."
    if wording == "official":
        return f"There are more than {said(low)} {plural}."
    return f"There are {said(low)} or more {plural}."


__all__ = ["Style", "Wording", "bin_prompts", "number_word"]
