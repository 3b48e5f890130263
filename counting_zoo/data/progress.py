"""A progress bar for work that turns out to take long."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], total: int, description: str, patience: float = 2.0) -> Iterator[T]:
    """Yield ``items``, and show a bar on standard error once ``patience`` seconds have passed.

    Args:
        items: what is worked on.
        total: how many there are.
        description: stands before the bar.
        patience: seconds.

    Example:
        >>> list(progress("abc", 3, "letters"))
        ['a', 'b', 'c']
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(description, total=total)
    start = time.monotonic()
    shown = False
    try:
        for done, item in enumerate(items):
            bar.update(task, completed=done)
            if not shown and time.monotonic() - start > patience:
                bar.start()
                shown = True
            yield item
    finally:
        if shown:
            bar.stop()


__all__ = ["progress"]
