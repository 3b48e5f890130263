"""Bins of counts, their texts, and the tables that the reference ships."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from counting_zoo.errors import InputError, WeightsError

Granularity = Literal["fine", "dynamic", "coarse"]


Windows = Literal["sliding", "aligned"]


@dataclass(frozen=True)
class Bins:
    """Consecutive ranges of counts, from zero up (paper, section 3.1).

    Args:
        edges: lowest and highest count of each bin, both inside it; ``None`` for a last bin without an upper end.

    Raises:
        InputError: a gap, an overlap, an empty range, or a first bin that does not begin at 0.

    Example:
        >>> Bins.make("dynamic", 8).to_list()
        [[0, 0], [1, 1], [2, 2], [3, 3], [4, 5], [6, 7], [8, None]]
    """

    edges: tuple[tuple[int, int | None], ...]

    def __post_init__(self) -> None:
        if len(self.edges) < 2:
            raise InputError(f"bins has {len(self.edges)} bins; expected at least 2, such as [[0, 0], [1, inf]]")
        expected: int | None = 0
        for i, (low, high) in enumerate(self.edges):
            if not isinstance(low, int) or not isinstance(high, int | None):
                raise InputError(f"bins: bin {i} {[low, high]} has ends that are not int; Bins.of reads plain data")
            if expected is None:
                raise InputError(f"bin {i} {[low, high]} follows one without an upper end; only the last may have none")
            if low != expected:
                what = "begins" if not i else "leaves a gap" if low > expected else "overlaps"
                raise InputError(
                    f"bins: bin {i} {[low, high]} {what} at {low}; every count falls into exactly one bin, so it must "
                    f"begin at {expected}"
                )
            if high is not None and high < low:
                raise InputError(f"bins: bin {i} {[low, high]} ends before it begins; give [lowest, highest]")
            expected = None if high is None else high + 1

    @classmethod
    def of(cls, value: Bins | Sequence[Any]) -> Bins:
        """Build bins from plain data: ``[[0, 0], [1, 1], [2, inf]]``; the end may be ``inf``, ``"inf"`` or ``None``.

        Raises:
            InputError: not a list of pairs of whole numbers, or what the class itself refuses.
        """
        if isinstance(value, cls):
            return value
        try:
            edges = tuple((_whole(low), None if _open(high) else _whole(high)) for low, high in value)  # type: ignore[union-attr]
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"bins is {value!r}; expected pairs of whole numbers such as [[0, 0], [1, 1], [2, inf]] ({error})"
            ) from error
        return cls(edges)

    @classmethod
    def make(cls, granularity: Granularity, maximum: int) -> Bins:
        """Build bins up to a maximum count, which the last bin, without an upper end, holds.

        Args:
            granularity: ``fine`` has a bin for each count, ``coarse`` pairs from 1 on, ``dynamic`` single counts
                below half the maximum and pairs from there on.
            maximum: at least 1.

        Raises:
            InputError: another granularity, or a maximum below 1.
        """
        if maximum < 1:
            raise InputError(f"the maximum count of the bins is {maximum}; expected at least 1")
        if granularity not in ("fine", "dynamic", "coarse"):
            raise InputError(f"granularity is {granularity!r}; expected 'fine', 'dynamic' or 'coarse'")
        first_pair = {"fine": maximum + 1, "dynamic": -(-maximum // 2), "coarse": 1}[granularity]
        edges: list[tuple[int, int | None]] = [(k, k) for k in range(min(first_pair, maximum + 1))]
        edges += [(k, k + 1) for k in range(first_pair, maximum + 1, 2)]
        edges[-1] = (edges[-1][0], None)
        return cls(tuple(edges))

    @classmethod
    def for_block(cls, block: int, head_size: int, granularity: Granularity = "fine") -> Bins:
        """Build bins for blocks that hold up to ``(block // head_size) ** 2`` recognisable objects (paper, 3.1).

        Raises:
            InputError: objects larger than the block, or sizes below 1.
        """
        if not 1 <= head_size <= block:
            raise InputError(
                f"head_size is {head_size} for blocks of {block} pixels; expected 1 to {block}, or give max_count"
            )
        return cls.make(granularity, (block // head_size) ** 2)

    def __len__(self) -> int:
        return len(self.edges)

    @property
    def closed(self) -> bool:
        """True where the last bin has an upper end, beyond which counts fit no bin."""
        return self.edges[-1][1] is not None

    def to_list(self) -> list[list[int | None]]:
        """Convert to plain data, as it is stored in a checkpoint."""
        return [[low, high] for low, high in self.edges]

    def middle(self) -> list[float]:
        """Return the middle of each bin; the lowest count of one without an upper end."""
        return [float(low) if high is None else (low + high) / 2 for low, high in self.edges]

    def check(self, representatives: Sequence[float]) -> list[float]:
        """Check that there is one representative inside each bin, and return them.

        Raises:
            InputError: another number of them, or one outside its bin.
        """
        if len(representatives) != len(self):
            raise InputError(f"{len(representatives)} representatives for {len(self)} bins; expected one for each")
        for value, (low, high) in zip(representatives, self.edges, strict=True):
            if not low <= value <= (math.inf if high is None else high) or not math.isfinite(value):
                raise InputError(f"the representative {value} lies outside its bin {[low, high]}")
        return [float(value) for value in representatives]

    def classes_of(self, counts: Tensor, *, validate: bool = True) -> Tensor:
        """Find the bin of each count.

        Args:
            counts: any shape.
            validate: look for counts that fit no bin. On CUDA this waits for the device; counts of points need it
                only where the bins are :attr:`closed`.

        Returns:
            int64 of the same shape.

        Raises:
            InputError: a count that is not whole, below zero, or beyond the last bin. The reference gives such a count
                the first class (losses/dace_loss.py:42).
        """
        lows = torch.tensor([low for low, _ in self.edges], dtype=counts.dtype, device=counts.device)
        classes = torch.bucketize(counts.contiguous(), lows, right=True) - 1
        if validate:
            top = self.edges[-1][1]
            fits = (counts >= 0) & (counts == counts.round()) & (counts < (math.inf if top is None else top + 1))
            if not bool(fits.all()):
                bad = counts[~fits].flatten()[:5].tolist()
                raise InputError(
                    f"blocks with counts of {bad} fit none of the bins {self.to_list()}; counts are whole numbers, and "
                    "a last bin without an upper end ([4, inf]) takes all large ones"
                )
        return classes


def block_count_histogram(
    points: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    block: int,
    *,
    windows: Windows = "sliding",
    unique: bool = True,
) -> np.ndarray:
    """Histogram the numbers of points in blocks, over all images.

    Args:
        points: ``(N_i, 2)`` x, y of each image; what lies outside counts on the border, as in the reference.
        sizes: (H, W) of each image.
        block: side of a block in pixels.
        windows: ``sliding`` looks at a block at every pixel, as the reference does, ``aligned`` at the grid of blocks
            that training classifies (the last of which may reach beyond the image).
        unique: several points on one pixel count once, as in the reference.

    Returns:
        ``(largest count + 1,)`` int64.

    Raises:
        InputError: a block below one pixel, an image without a size, points that are no x, y, or an unknown kind of
            windows.

    Example:
        >>> block_count_histogram([np.array([[0.5, 0.5], [3.0, 0.0]])], [(2, 4)], 2)  # windows at x = 0, 1, 2
        array([1, 2])
    """
    if block < 1:
        raise InputError(f"block is {block} pixels; expected at least 1")
    if windows not in ("sliding", "aligned"):
        raise InputError(f"windows is {windows!r}; expected 'sliding' or 'aligned'")
    if len(points) != len(sizes):
        raise InputError(f"points of {len(points)} images came with {len(sizes)} sizes; expected one for each")
    total = np.zeros(1, np.int64)
    for i, (xy, size) in enumerate(zip(points, sizes, strict=True)):
        if size is None or min(size) < 1:
            raise InputError(f"image {i} has the size {size}; expected height and width in pixels")
        xy = np.asarray(xy)
        if xy.size and (xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all()):
            raise InputError(f"points of image {i}, of shape {xy.shape}: expected (N, 2) finite x, y in pixels")
        weight = _pixels(xy, size, unique)
        own = _aligned(*weight, size, block) if windows == "aligned" else _sliding(*weight, size, block)
        if len(own) > len(total):
            total = np.pad(total, (0, len(own) - len(total)))
        total[: len(own)] += own
    return total[: total.nonzero()[0].max(initial=0) + 1]


def _pixels(xy: np.ndarray, size: tuple[int, int], unique: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find rows and columns of the pixels that hold points, and how many each holds."""
    pixel = np.clip(np.floor(xy.reshape(-1, 2)).astype(np.int64), 0, [size[1] - 1, size[0] - 1])
    key, times = np.unique(pixel[:, 1] * size[1] + pixel[:, 0], return_counts=True)
    return key // size[1], key % size[1], np.ones_like(times) if unique else times


def _aligned(row: np.ndarray, column: np.ndarray, times: np.ndarray, size: tuple[int, int], block: int) -> np.ndarray:
    grid = (-(-size[0] // block), -(-size[1] // block))
    counts = np.bincount(row // block * grid[1] + column // block, weights=times, minlength=grid[0] * grid[1])
    return np.bincount(counts.astype(np.int64))


def _sliding(row: np.ndarray, column: np.ndarray, times: np.ndarray, size: tuple[int, int], block: int) -> np.ndarray:
    """Measure the stretches between the places where a row of windows begins or ceases to see a point."""
    rows, columns = size[0] - block + 1, size[1] - block + 1
    if rows < 1 or columns < 1:
        return np.zeros(1, np.int64)
    line = row[:, None] - np.arange(block)  # (N, block): windows that begin in these rows see the point
    seen = (line >= 0) & (line < rows)
    begins = line * (columns + 1) + np.maximum(column - block + 1, 0)[:, None]
    ends = line * (columns + 1) + np.minimum(column + 1, columns)[:, None]
    place = np.concatenate([begins[seen], ends[seen]])
    change = np.broadcast_to(times[:, None], line.shape)[seen]
    order = place.argsort(kind="stable")
    counts = np.concatenate([change, -change])[order].cumsum()[:-1]
    found = np.bincount(counts, np.diff(place[order])).astype(np.int64) if len(counts) else np.zeros(1, np.int64)
    found[0] = rows * columns - found[1:].sum()
    return found


def mean_representatives(bins: Bins, histogram: np.ndarray) -> list[float]:
    """Average the counts of the blocks in each bin, which makes expected counts unbiased (paper, section 3.2).

    A bin that no block falls into gets its middle, with a warning.

    Args:
        bins: the bins.
        histogram: ``(largest count + 1,)`` number of blocks with each count; see :func:`block_count_histogram`.

    Raises:
        InputError: blocks with more points than closed bins take.

    Example:
        >>> mean_representatives(Bins.make("fine", 2), np.array([90, 7, 2, 1]))
        [0.0, 1.0, 2.3333333333333335]
    """
    histogram = np.asarray(histogram, np.float64)
    count = np.arange(len(histogram))
    top = bins.edges[-1][1]
    if top is not None and histogram[top + 1 :].any():
        raise InputError(
            f"the training data have blocks of up to {np.flatnonzero(histogram)[-1]} objects, but the last bin "
            f"{[bins.edges[-1][0], top]} ends at {top}; leave its upper end open ([{bins.edges[-1][0]}, inf])"
        )
    values, empty = bins.middle(), []
    for i, (low, high) in enumerate(bins.edges):
        inside = slice(low, len(histogram) if high is None else high + 1)
        if low == high:
            continue
        if (n := histogram[inside].sum()) > 0:
            values[i] = float((count[inside] * histogram[inside]).sum() / n)
        else:
            empty.append([low, high])
    if empty:
        warnings.warn(
            f"no block of the training data falls into the bins {empty}, so their middles (or lowest counts) stand "
            "for them; a smaller max_count fits these data",
            stacklevel=2,
        )
    return values


def _whole(value: Any) -> int:
    if isinstance(value, bool | str) or int(value) != value:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _open(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower().lstrip("+.") in ("inf", "infinity")
    return value is None or value == math.inf


Style = Literal["word", "number"]


Wording = Literal["corrected", "official"]


_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]


_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_word(number: int) -> str:
    """Write 0 to 99, whole hundreds to 900, and 1000 in words, others in digits, as the reference has them.

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
    """Write one sentence for each bin.

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


# (reduction, truncation, data set): the representative of the last bin (configs/reduction_{8,16,32}.json).
_LAST = {
    (8, 2, "sha"): 2.24479,
    (8, 2, "shb"): 2.15171,
    (8, 2, "nwpu"): 2.10737,
    (8, 2, "qnrf"): 2.09296,
    (8, 2, "jhu"): 2.18589,
    (8, 4, "sha"): 4.29992,
    (8, 4, "shb"): 4.41009,
    (8, 4, "nwpu"): 4.21931,
    (8, 4, "qnrf"): 4.21937,
    (8, 4, "jhu"): 4.24058,
    (8, 11, "qnrf"): 11.0,
    (16, 8, "qnrf"): 9.23349,
    (32, 19, "qnrf"): 23.01897,
}


# The representatives of bins that hold several counts, where the reference has such bins.
_WIDE = {
    (16, 8, "qnrf", "dynamic"): [4.29278, 6.31441, 9.23349],
    (16, 8, "qnrf", "coarse"): [1.14978, 3.27641, 5.30609, 8.11466],
    (32, 19, "qnrf", "dynamic"): [10.42903, 12.4332, 14.43341, 16.43521, 21.93548],
    (32, 19, "qnrf", "coarse"): [
        1.23498,
        3.36108,
        5.40298,
        7.41406,
        9.42356,
        11.43094,
        13.43244,
        15.43697,
        17.43759,
        23.01897,
    ],
}


DATA_SETS = ("sha", "shb", "nwpu", "qnrf", "jhu")


def published_bins(
    reduction: int, truncation: int, dataset: str, granularity: str = "fine", anchors: str = "average"
) -> tuple[Bins, list[float]]:
    """Return bins and representatives of the reference's configs/reduction_*.json.

    Args:
        reduction: side of a block in pixels.
        truncation: the reference's name for the largest count that has a bin of its own.
        dataset: ``sha``, ``shb``, ``nwpu``, ``qnrf`` or ``jhu``.
        granularity: ``fine``, ``dynamic`` or ``coarse``.
        anchors: ``average`` or ``middle``.

    Raises:
        WeightsError: the reference has no such table; lists those it has.

    Example:
        >>> published_bins(8, 2, "shb")[1]
        [0.0, 1.0, 2.15171]
    """
    bins = Bins.make(granularity, truncation)  # type: ignore[arg-type]
    key = (reduction, truncation, dataset)
    wide = [_LAST[key]] if granularity == "fine" and key in _LAST else _WIDE.get((*key, granularity))
    if wide is None:
        known = sorted((*_LAST, *_WIDE), key=str)
        raise WeightsError(f"the reference has no bins for {(*key, granularity)}; it has {known}")
    values = bins.middle()
    if anchors == "average":
        values[-len(wide) :] = wide
    return bins, values
