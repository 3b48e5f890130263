"""Two models on the same pictures."""

from __future__ import annotations

from typing import Any

import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.evaluation.bootstrap import Bootstrap, summed_by_picture
from counting_zoo.evaluation.count_table import CountTable

JOIN = " + "
"""Stands between the names of a model that counts without names."""


def compare(a: CountTable, b: CountTable, bootstrap: Bootstrap | None = None) -> dict[str, Any]:
    """Two models on the same pictures: the difference of their errors, and how sure it is.

    Rows of the same picture and name are compared. Where one model counts without names, so that its rows carry the
    joined names of the other's, the totals of pictures are compared instead.

    Args:
        a, b: their tables.
        bootstrap: how intervals are made; both tables are scored on the same draws.

    Returns:
        - ``compared``: ``rows`` or ``totals``; ``pictures`` and ``rows`` (or totals): how many.
        - ``mae`` and ``rmse``: each ``a``, ``b``, ``difference`` (a - b; below zero where a is better) and its
          ``interval``.
        - ``a_better``, ``b_better``: share of pictures with the smaller absolute error (summed over their rows).
        - ``only_a``, ``only_b``: pictures of one table; ``left_out``: pictures of both of which no row could be
          compared; ``rows_left_out``: rows whose picture is in both tables that were not compared, because the name is
          missing from the other, the true count is unknown or not the same, or a prediction is not finite.

    Raises:
        InputError: a picture comes twice with a name, or a true count is negative or infinite.

    Example:
        >>> a = CountTable.of([("1", "figs", 3, 3), ("2", "figs", 5, 5)])
        >>> b = CountTable.of([("1", "figs", 3, 4), ("2", "figs", 5, 2)])
        >>> found = compare(a, b)
        >>> found["mae"]["difference"], found["a_better"], found["compared"]
        (-2.0, 1.0, 'rows')
    """
    bootstrap = bootstrap or Bootstrap()
    check_rows(a)
    check_rows(b)
    common = set(a.image) & set(b.image)
    totals = _asks_the_same_joined(a, b, common)
    columns_a, columns_b = (_totals(t, common) if totals else _rows(t, common) for t in (a, b))
    keys = [key for key in columns_a if key in columns_b]
    pairs = np.array([(*columns_a[key], *columns_b[key]) for key in keys], np.float64).reshape(-1, 4)
    target, said_a, target_b, said_b = pairs.T
    usable = np.isclose(target, target_b, rtol=1e-5, atol=1e-6) & np.isfinite(said_a) & np.isfinite(said_b)
    images = [key[0] for key, use in zip(keys, usable, strict=True) if use]
    rows = int(usable.sum())
    result: dict[str, Any] = {
        "compared": "totals" if totals else "rows",
        "pictures": len(set(images)),
        "rows": rows,
        "only_a": len(set(a.image) - common),
        "only_b": len(set(b.image) - common),
        "left_out": len(common) - len(set(images)),
        "rows_left_out": len(columns_a.keys() | columns_b.keys()) - rows,
    }
    if not rows:
        return result
    picture = np.unique(images, return_inverse=True)[1]
    error = np.stack([said_a - target, said_b - target], 1)[usable]  # (N, 2)
    sums = summed_by_picture(np.column_stack([np.abs(error), error**2, np.ones(rows)]), picture)  # (P, 5)
    drawn = np.concatenate(list(bootstrap.sums(sums)))
    for name, of in (("mae", lambda s: s[..., :2] / s[..., 4:]), ("rmse", lambda s: np.sqrt(s[..., 2:4] / s[..., 4:]))):
        value_a, value_b = of(sums.sum(0)).tolist()
        result[name] = {"a": value_a, "b": value_b, "difference": value_a - value_b}
        if len(sums) > 1:
            each = of(drawn)
            result[name]["interval"] = bootstrap.interval(each[:, 0] - each[:, 1])
    return result | {
        "a_better": float((sums[:, 0] < sums[:, 1]).mean()),
        "b_better": float((sums[:, 1] < sums[:, 0]).mean()),
    }


def check_rows(table: CountTable) -> None:
    """Raise if a row cannot be scored.

    Raises:
        InputError: a picture comes twice with a name, or a true count is negative or infinite.
    """
    keys = list(zip(table.image, table.name, strict=True))
    if len(set(keys)) < len(keys):
        seen: set[tuple[str, str]] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InputError(
            f"the table of counts has two rows of picture {twice[0]!r} and name {twice[1]!r}; expected one"
        )
    wrong = (table.target < 0) | np.isinf(table.target)
    if wrong.any():
        i = int(wrong.argmax())
        raise InputError(
            f"the true count of {table.name[i]!r} in picture {table.image[i]!r} is {table.target[i]:g}; expected 0 or "
            "more, or an empty cell where it is not known"
        )


def _asks_the_same_joined(a: CountTable, b: CountTable, common: set[str]) -> bool:
    """Whether in some picture the tables name the same things, one of them joined."""

    def names(table: CountTable) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for image, name in zip(table.image, table.name, strict=True):
            found.setdefault(image, set()).add(name)
        return found

    of_a, of_b = names(a), names(b)
    return any(of_a[i] != of_b[i] and _parts(of_a[i]) == _parts(of_b[i]) for i in common)


def _parts(names: set[str]) -> frozenset[str]:
    return frozenset(part for name in names for part in name.split(JOIN))


def _rows(table: CountTable, common: set[str]) -> dict[tuple[str, object], tuple[float, float]]:
    """True and predicted count by picture and name."""
    keys = zip(table.image, table.name, table.target.tolist(), table.predicted.tolist(), strict=True)
    return {(image, name): (target, said) for image, name, target, said in keys if image in common}


def _totals(table: CountTable, common: set[str]) -> dict[tuple[str, object], tuple[float, float]]:
    """True and predicted total by picture and everything it is asked about."""
    images, picture = table.pictures()
    asked: list[set[str]] = [set() for _ in images]
    for i, name in zip(picture.tolist(), table.name, strict=True):
        asked[i].add(name)
    sums = summed_by_picture(np.column_stack([table.target, table.predicted]), picture).tolist()
    return {
        (image, _parts(names)): (target, said)
        for image, names, (target, said) in zip(images, asked, sums, strict=True)
        if image in common
    }


__all__ = ["JOIN", "check_rows", "compare"]
