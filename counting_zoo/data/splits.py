"""Dealing images to splits: by ranges of the sorted names, by a file, or drawn by seed and sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.io import read_json, read_table

SPLITS = ("train", "val", "test")

Item = TypeVar("Item")


def draw(items: Sequence[Item], sizes: Mapping[str, float], seed: int) -> dict[str, list[Item]]:
    """Draw disjoint splits by seed; the order of the items is kept within each.

    Args:
        items: names or records of images.
        sizes: for each split a number of images, or below 1 a fraction of them (rounded down, at least one).
        seed: the same seed draws the same images.

    Raises:
        InputError: a size is not positive, or more images are asked for than there are.

    Example:
        >>> drawn = draw([f"{i}.png" for i in range(10)], {"train": 6, "val": 0.2}, seed=0)
        >>> len(drawn["train"]), len(drawn["val"])
        (6, 2)
    """
    numbers = {}
    for split, size in sizes.items():
        if split not in SPLITS or not size > 0 or (size > 1 and size != int(size)):
            raise InputError(
                f"data.sizes has {split}: {size}; expected train, val or test with a number of images, "
                "or a fraction between 0 and 1"
            )
        numbers[split] = int(size) if size >= 1 else max(1, int(size * len(items) + 1e-9))
    if sum(numbers.values()) > len(items):
        raise InputError(f"data.sizes asks for {numbers}, {sum(numbers.values())} images, of only {len(items)}")
    order = np.random.default_rng(seed).permutation(len(items))
    ends = np.cumsum([0, *numbers.values()])
    return {
        split: [items[i] for i in sorted(order[start:end])]
        for split, start, end in zip(numbers, ends, ends[1:], strict=False)
    }


def draw_split(items: Sequence[Item], sizes: Mapping[str, float], seed: int, split: str) -> list[Item]:
    """Draw as :func:`draw` does, and take one split; one without a size keeps what is left over.

    Example:
        >>> names = [f"{i}.png" for i in range(10)]
        >>> [len(draw_split(names, {"val": 0.2}, 0, split)) for split in ("train", "val")]
        [8, 2]
    """
    drawn = draw(range(len(items)), sizes, seed)
    rest = sorted(set(range(len(items))).difference(*drawn.values()))
    return [items[i] for i in drawn.get(split, rest)]


def take_ranges(names: Sequence[str], ranges: Mapping[str, Sequence[int | None]]) -> dict[str, list[str]]:
    """Take images ``start`` (counted from 0) to before ``stop`` of each split; ``null`` is an open end.

    Raises:
        InputError: a range is no pair, reaches beyond the images, is empty, or shares images with another.

    Example:
        >>> take_ranges(["a", "b", "c"], {"train": [0, 2], "test": [2, None]})
        {'train': ['a', 'b'], 'test': ['c']}
    """
    taken: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for split, pair in ranges.items():
        start, stop = [*pair, None, None][:2]
        start, stop = start or 0, len(names) if stop is None else stop
        if split not in SPLITS or len(pair) != 2 or not 0 <= start < stop <= len(names):
            raise InputError(
                f"data.splits has {split}: {list(pair)}; expected train, val or test with [start, stop] "
                f"within the {len(names)} images, 0 <= start < stop"
            )
        taken[split] = list(names[start:stop])
        for name in taken[split]:
            if owner.setdefault(name, split) != split:
                raise InputError(f"data.splits gives {name} to both {owner[name]} and {split}; ranges must not overlap")
    return taken


def read_splits(path: Path) -> dict[str, list[str]]:
    """Read splits from a file: JSON ``{"train": ["a.png", ...], ...}`` or CSV with the columns ``image,split``.

    Raises:
        InputError: the file cannot be read, has another structure, or names an image in two splits.
    """
    if path.suffix.lower() == ".json":
        found = read_json(path)
        if not isinstance(found, dict) or not all(
            isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values()
        ):
            raise InputError(f'{path}: expected {{"train": ["a.png", ...], "val": [...], "test": [...]}}')
        splits: dict[str, list[str]] = found
    else:
        table = read_table(path)
        splits = {}
        for name, split in zip(table.column("image"), table.column("split"), strict=True):
            splits.setdefault(split, []).append(name)
    owner: dict[str, str] = {}
    for split in SPLITS:
        for name in splits.get(split, []):
            if owner.setdefault(name, split) != split:
                raise InputError(f"{path}: {name} is in both {owner[name]} and {split}; each image has one split")
    return splits
