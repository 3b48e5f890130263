"""Which names are asked about: in training some that are in the picture, and at least one that is not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from counting_zoo.data.records import Record, Split, n_objects, present_names
from counting_zoo.errors import InputError


def drawn_names(record: Record, n: int, every: Sequence[str], rng: np.random.Generator) -> list[str]:
    """``n`` names to ask about in a picture: its target, others that it shows, and at least one that is absent.

    Args:
        record: the picture.
        n: how many; fewer where there are no more names.
        every: the names of the training data.
        rng: decides.

    Example:
        >>> drawn_names(Record("a", classes=["cat"]), 2, ["cat", "dog"], np.random.default_rng(0))
        ['cat', 'dog']
    """
    target = record.classes[:1]
    others = [name for name in present_names(record) if name not in target]
    present = [*target, *(others[i] for i in rng.permutation(len(others)))]
    absent = absent_names(present, max(1, n - len(present)), every, rng)[: n - 1]
    return present[: n - len(absent)] + absent


def absent_names(present: Sequence[str], n: int, every: Sequence[str], rng: np.random.Generator) -> list[str]:
    """``n`` names that are not in a picture; each is with even odds one that shares words with the first present one.

    Args:
        present: names in the picture, the target first.
        n: how many; fewer where there are no more names.
        every: the names of the training data.
        rng: decides.
    """
    pool = [name for name in every if name not in present]
    target = set(" ".join(present[:1]).split())
    near = [name for name in pool if target & set(name.split())]
    chosen: list[str] = []
    for _ in range(min(n, len(pool))):
        choices = [name for name in (near if rng.random() < 0.5 else pool) if name not in chosen]
        choices = choices or [name for name in pool if name not in chosen]
        chosen.append(choices[int(rng.integers(len(choices)))])
    return chosen


def names_of_all(records: Sequence[Record], split: Split, error: Exception) -> list[str]:
    """The one list that all pictures of a split share, for ``prompts: all`` without a training split.

    Args:
        records: the pictures.
        split: theirs.
        error: why the training split cannot be read.

    Raises:
        InputError: pictures have different names.
    """
    lists = {tuple(record.classes) for record in records}
    if len(lists) != 1:
        raise InputError(
            "data.prompts is 'all', but the training split, whose names it asks about, cannot be read, and the "
            f"pictures of {split} have different names; list the names in data.classes ({error})"
        ) from error
    return list(lists.pop())


def unasked_objects(records: Sequence[Record], asked: np.ndarray) -> tuple[float, float]:
    """How many objects have names that are not asked about, and how many objects there are.

    Args:
        records: the pictures.
        asked: ``(N,)`` objects of the names asked about, NaN without annotation.
    """
    present = np.array([n_objects(record) for record in records], np.float64)
    return float(np.nansum(present - asked)), float(np.nansum(present))


__all__ = ["absent_names", "drawn_names", "names_of_all", "unasked_objects"]
