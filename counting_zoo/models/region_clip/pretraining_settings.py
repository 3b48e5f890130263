"""What settings of RegionCLIP's pretraining may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from counting_zoo.errors import InputError

Labels = Literal["teacher", "boxes"]

CHOICES = {
    "gather": ("image_text", "all", "none"), "same_caption": ("positive", "negative"),
    "picture_box": ("picture", "canvas"), "fallback": ("none", "official"), "ensemble": ("normalised", "official"),
    "missing_regions": ("error", "empty"),
}  # fmt: skip
"""What settings with a few values may be."""


def term_weights(given: Mapping[str, float] | None) -> dict[str, float]:
    """The weight of each term of the loss, 1 where none is given.

    Raises:
        InputError: an unknown term, a weight that is negative or not finite, or no weight above 0.

    Example:
        >>> term_weights({"image_text": 0.3})
        {'region_text': 1.0, 'distillation': 1.0, 'image_text': 0.3}
    """
    weights = {"region_text": 1.0, "distillation": 1.0, "image_text": 1.0}
    if unknown := set(given or {}) - set(weights):
        raise InputError(f"weights names {sorted(unknown)}; expected some of {', '.join(weights)}")
    weights |= given or {}
    if not all(0 <= w < math.inf for w in weights.values()) or not any(weights.values()):
        raise InputError(f"weights are {weights}; expected finite numbers of at least 0, and one above it")
    return weights


def check_choices(**settings: str) -> None:
    """Refuse a setting that is none of its :data:`CHOICES`.

    Raises:
        InputError: names the setting and its choices.
    """
    for name, value in settings.items():
        if value not in CHOICES[name]:
            raise InputError(f"{name} is {value!r}; expected one of {', '.join(map(repr, CHOICES[name]))}")


def check_settings(
    *,
    labels: str,
    regions: str,
    concepts: str | list[str],
    train_text: bool,
    n_regions: int,
    concept_count: int,
    concept_words: int,
    concept_limit: int | None,
    caption_template: str,
    threshold: float,
    temperature: float,
) -> None:
    """Refuse numbers out of range, and settings that do not go together.

    The arguments are those of ``RegionCLIPPretraining``.

    Raises:
        InputError: names the setting, and what to set instead.
    """
    if labels not in ("teacher", "boxes"):
        raise InputError(f"labels is {labels!r}; expected 'teacher', or 'boxes' for the names of the data's boxes")
    if labels == "boxes" and (regions != "boxes" or concepts != "classes"):
        raise InputError(
            f"labels 'boxes' are names of the data's own boxes; set regions to 'boxes' (it is {regions!r}) and "
            f"concepts to 'classes' (it is {concepts!r})"
        )
    if labels == "teacher" and train_text:
        raise InputError(
            "train_text moves the concepts away from the teacher that labels regions with them; set train_text to "
            "false, or labels to 'boxes'"
        )
    if min(concept_count, concept_words) < 1 or (concept_limit is not None and concept_limit < 1):
        raise InputError(
            f"concept_count is {concept_count}, concept_words {concept_words} and concept_limit {concept_limit}; "
            "expected at least 1"
        )
    if n_regions < 1 or "{}" not in caption_template:
        raise InputError(
            f"n_regions is {n_regions} and caption_template {caption_template!r}; expected at least 1 region, and a "
            "text with {} for the names"
        )
    if not 0 <= threshold < math.inf or not 0 < temperature < math.inf:
        raise InputError(
            f"threshold is {threshold} and temperature {temperature}; expected at least 0, such as 0.1, and above 0, "
            "such as 0.01"
        )


__all__ = ["CHOICES", "Labels", "check_choices", "check_settings", "term_weights"]
