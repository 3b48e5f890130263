"""Wrong prompts: the same names for the same picture on every machine, rank and run."""

from __future__ import annotations

import zlib

from counting_zoo.types import Batch


def wrong_prompts(batch: Batch, names: list[str]) -> list[list[str]] | None:
    """Three prompts for each picture that its true prompt must be told from.

    Args:
        batch: pictures with one name each.
        names: every name of the split.

    Returns:
        B x [absent name, absent name that shares most words with the target, another picture's name], or ``None``
        where a picture has no absent name.
    """
    found = []
    for image_id, asked, present in zip(
        batch["image_id"], batch["classes"], batch.get("present") or batch["classes"], strict=True
    ):
        absent = sorted(set(names) - set(present) - set(asked))
        others = sorted(set(names) - set(asked))
        if not absent:
            return None
        draw = zlib.crc32(image_id.encode())
        words = set(asked[0].split())
        shared = [len(words & set(name.split())) for name in absent]
        hard = [name for name, n in zip(absent, shared, strict=True) if n == max(shared)]
        found.append([absent[draw % len(absent)], hard[draw // 7 % len(hard)], others[draw // 49 % len(others)]])
    return found


__all__ = ["wrong_prompts"]
