"""Which names are asked about: wrong ones, the same on every machine, rank and run, and those a model knows."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from counting_zoo.errors import InputError
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


def known_names(batch: Batch, vocabulary: Sequence[str]) -> Batch:
    """A batch that asks only about names of a list, for models that count nothing else.

    Args:
        batch: pictures as evaluation gives them, one by one.
        vocabulary: the names that are known.

    Returns:
        The batch without the other names, their counts, points and boxes, and without pictures that ask about none
        of the names; pictures that name nothing stay as they are.

    Raises:
        InputError: different numbers of known names are left in the pictures of one batch.

    Example:
        >>> batch = {"image_id": ["a", "b"], "image": [0, 1], "classes": [["figs", "dates"], ["dates"]]}
        >>> known_names(batch, ["figs"])
        {'image_id': ['a'], 'image': [0], 'classes': [['figs']]}
    """
    known = set(vocabulary)
    kept = [[k for k, name in enumerate(names) if name in known] for names in batch["classes"]]
    if all(len(k) == len(names) for k, names in zip(kept, batch["classes"], strict=True)):
        return batch
    lengths = {len(k): batch["image_id"][i] for i, k in enumerate(kept) if k}
    if len(lengths) > 1:
        raise InputError(
            f"of the names asked about, the pictures {sorted(lengths.values())} have different numbers that the model "
            f"knows ({sorted(lengths)}); ask about the same names in every picture (data.prompts: all), or about those "
            "the model knows (data.classes)"
        )
    asking = [i for i, names in enumerate(batch["classes"]) if kept[i] or not names]
    found: dict[str, Any] = {}
    for key, value in batch.items():
        found[key] = value if key == "failed" else [value[i] for i in asking]  # type: ignore[index]
    found["classes"] = [[batch["classes"][i][k] for k in kept[i]] for i in asking]
    if "counts" in batch:
        rows = [batch["counts"][i][kept[i]] for i in asking]
        found["counts"] = torch.stack(rows) if rows else batch["counts"][:0]
    for labels, places in (("labels", "points"), ("box_labels", "boxes")):
        if labels in batch:
            new = [_relabelled(batch[labels][i], kept[i], len(batch["classes"][i])) for i in asking]  # type: ignore[literal-required]
            if places in batch:
                found[places] = [place[label >= 0] for place, label in zip(found[places], new, strict=True)]
            found[labels] = [label[label >= 0] for label in new]
    if "exemplars" in batch:  # of the first name
        shown = [None if 0 in kept[i] or not batch["classes"][i] else 0 for i in asking]
        found["exemplars"] = [batch["exemplars"][i][:n] for i, n in zip(asking, shown, strict=True)]
    return cast(Batch, found)


def _relabelled(labels: Tensor, kept: list[int], n: int) -> Tensor:
    """Indices into the kept names; -1 for others."""
    new = torch.full((n + 1,), -1, dtype=labels.dtype, device=labels.device)
    new[kept] = torch.arange(len(kept), dtype=labels.dtype, device=labels.device)
    return new[labels]


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


__all__ = ["known_names", "wrong_prompts"]
