"""Intervals of figures that are worked out from sums over pictures, and of shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from counting_zoo.errors import InputError

RESAMPLED_AT_ONCE = 2**21
"""Pictures times resamples in memory at once."""


@dataclass(frozen=True)
class Bootstrap:
    """Percentile bootstrap over pictures (Efron, 1979).

    All rows of a picture are drawn together, since the counts of one picture are not independent. An interval says how
    much a figure owes to the choice of pictures, not how much to the training run.

    Args:
        resamples: how many draws.
        seed: of the draws; equal seeds give equal intervals, whatever the memory at hand.
        level: share of the draws within an interval.

    Raises:
        InputError: no draws, or a level outside (0, 1).
    """

    resamples: int = 2000
    seed: int = 0
    level: float = 0.95

    def __post_init__(self) -> None:
        if self.resamples < 1 or not 0 < self.level < 1:
            raise InputError(
                f"a bootstrap of {self.resamples} resamples and level {self.level}; expected at least one resample, "
                "and a level between 0 and 1"
            )

    def sums(self, sums: np.ndarray) -> Iterator[np.ndarray]:
        """Sums over as many pictures as there are, drawn with replacement.

        Args:
            sums: ``(P, C)`` sums over the rows of each picture.

        Returns:
            Parts of ``(resamples, C)`` that fit into memory.
        """
        generator = np.random.default_rng(self.seed)
        n = len(sums)
        most = max(1, RESAMPLED_AT_ONCE // n)
        for first in range(0, self.resamples, most):
            drawn = min(most, self.resamples - first)
            chosen = generator.integers(n, size=(drawn, n)) + np.arange(drawn)[:, None] * n
            times = np.bincount(chosen.ravel(), minlength=drawn * n).reshape(drawn, n)
            yield times.astype(np.float64) @ sums

    def interval(self, values: np.ndarray) -> list[float]:
        """Lower and upper bound of a figure, given its value for each draw; draws without one (NaN) are left out."""
        tail = (1 - self.level) / 2
        return np.nanquantile(values, [tail, 1 - tail]).tolist()


def summed_by_picture(rows: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Sums over the rows of each picture.

    Args:
        rows: ``(N, C)``.
        picture: ``(N,)`` index of the picture of each row.

    Returns:
        ``(P, C)``, P one more than the highest index.

    Example:
        >>> summed_by_picture(np.array([[1.0], [2.0], [4.0]]), np.array([1, 0, 1])).tolist()
        [[2.0], [5.0]]
    """
    n = int(picture.max()) + 1 if len(picture) else 0
    return np.stack([np.bincount(picture, column, minlength=n) for column in rows.T], 1)


def binomial_bounds(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Exact bounds of a share (Clopper and Pearson, Biometrika 1934).

    Args:
        hits: how many of ``n`` independent trials succeeded.
        n: at least 1.
        level: of the interval.

    Raises:
        InputError: ``hits`` is not between 0 and ``n``, or ``n`` is 0.

    Example:
        >>> tuple(round(bound, 4) for bound in binomial_bounds(9, 10))
        (0.555, 0.9975)
    """
    if n < 1 or not 0 <= hits <= n:
        raise InputError(f"{hits} hits of {n} trials; expected at least one trial and no more hits than trials")
    tail = (1 - level) / 2
    low = float(betaincinv(hits, n - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, n - hits, 1 - tail)) if hits < n else 1.0
    return low, high


__all__ = ["Bootstrap", "binomial_bounds", "summed_by_picture"]
