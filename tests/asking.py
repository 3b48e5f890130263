"""Queries of names, as tests write them and read them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from counting_zoo.types import Query


def ask(names: Iterable[Sequence[str]]) -> list[Query]:
    """A query of the names of each image."""
    return [Query(tuple(own)) for own in names]


def names_of(batch: Any) -> list[list[str]]:
    """The names that each image of a batch is asked for."""
    return [list(query.names) for query in batch["queries"]]
