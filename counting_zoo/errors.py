"""The zoo's own errors: each message names what was found, what was expected and the cure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any


class InputError(ValueError):
    """A setting, annotation or argument that cannot be used as it is."""


class ImageError(InputError):
    """An image that cannot be read: missing, truncated, not an image, or too large to decode."""


class SupervisionError(InputError):
    """A model is asked to train on data that lacks the supervision it needs."""


class NamesError(InputError):
    """Data that asks a model with a fixed list of names for none of them."""


class QueryError(InputError):
    """A model is asked without a part of the query that it cannot do without, or with one that it cannot use."""


class CheckpointError(InputError):
    """A checkpoint that is not what it is loaded as, or that misses part of its recipe."""


class WeightsError(InputError):
    """Pretrained weights that are missing, offline, or do not fit."""


class OutputError(InputError):
    """A file that cannot be written: the disk is full, or does not let it."""


def plain_message(error: Exception) -> str:
    """Extract the message alone; data loader workers wrap a whole traceback around it."""
    text = str(error)
    if not re.match(r"Caught \w+ in ", text):
        return text
    return text.rsplit(f"{type(error).__name__}: ", 1)[-1].strip()


def listed(names: Iterable[str], n: int = 12) -> str:
    """Name the first few for a message, and say how many more there are.

    Example:
        >>> listed(["figs", "dates", "plums"], 2), listed([])
        ('figs, dates and 1 more', '')
    """
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def check(
    name: str,
    value: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    one_of: Collection[Any] | None = None,
) -> None:
    """Refuse a setting that is out of range, NaN, or none of its choices.

    Raises:
        InputError: names the setting, its value and what is expected.

    Example:
        >>> check("data.missing", "warn", one_of=("error", "skip"))
        Traceback (most recent call last):
        counting_zoo.errors.InputError: data.missing is 'warn'; expected one of 'error', 'skip'
    """
    if one_of is not None and value not in one_of:
        raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(repr, one_of))}")
    bounds = {"at least": at_least, "at most": at_most}
    below = at_least is not None and not value >= at_least  # true of NaN too
    if below or (at_most is not None and not value <= at_most):
        expected = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        raise InputError(f"{name} is {value!r}; expected {expected}")
