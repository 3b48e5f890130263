"""Wrong prompts: the same names for the same picture on every machine, rank and run."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from counting_zoo.types import Batch


def wrong_prompts(batch: Batch, names: Sequence[str]) -> list[list[str]] | None:
    """Three prompts for each picture that its true prompt must be told from.

    Args:
        batch: pictures with one name each.
        names: every name of the split.

    Returns:
        B x [absent name, absent name that shares most words with the target, another picture's name]; the picture's
        own name stands where there is no such name. ``None`` where the split knows one name only.

    Example:
        >>> batch = {"image_id": ["a"], "classes": [["red discs"]], "image": []}
        >>> wrong_prompts(batch, ["red discs", "red rings"])
        [['red rings', 'red rings', 'red rings']]
    """
    if len(set(names)) < 2:
        return None
    known = batch.get("present") or batch["classes"]
    return [
        _for_one(image_id, asked[0], sorted(set(names) - {asked[0]}), set(present))
        for image_id, asked, present in zip(batch["image_id"], batch["classes"], known, strict=True)
    ]


def _for_one(image_id: str, target: str, others: list[str], present: set[str]) -> list[str]:
    absent = [name for name in others if name not in present]
    words = set(target.split())
    shared = [len(words & set(name.split())) for name in absent]
    hard = [name for name, n in zip(absent, shared, strict=True) if n == max(shared) > 0]
    draw = zlib.crc32(image_id.encode())
    return [
        choices[draw // step % len(choices)] if choices else target
        for choices, step in ((absent, 1), (hard, 7), (others, 49))
    ]


__all__ = ["wrong_prompts"]
