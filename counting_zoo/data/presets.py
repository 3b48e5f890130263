"""What the built-in scenes are made of: attributes, classes, and how many of each stand in a picture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (205, 35, 40),
    "orange": (240, 140, 25),
    "yellow": (235, 215, 45),
    "green": (40, 150, 60),
    "cyan": (50, 190, 200),
    "blue": (40, 70, 200),
    "purple": (130, 50, 170),
    "white": (240, 240, 240),
}


class Attributes(NamedTuple):
    """One class of the scenes.

    Example:
        >>> Attributes("rings", "yellow", "striped").name, Attributes("crosses", "red", "plain").singular
        ('striped yellow rings', 'red cross')
    """

    shape: str
    colour: str
    texture: str

    @property
    def name(self) -> str:
        """The prompt: "striped yellow rings", "red discs"."""
        return (
            f"{self.colour} {self.shape}" if self.texture == "plain" else f"{self.texture} {self.colour} {self.shape}"
        )

    @property
    def singular(self) -> str:
        """The name of one of them."""
        return self.name.removesuffix("es" if self.shape == "crosses" else "s")


@dataclass(frozen=True)
class ScenePreset(ABC):
    """What every scene of a preset has in common.

    Args:
        height: pixels.
        widths: pixels; each scene draws one.
        shapes, colours, textures: the words that classes are made of.
        fill: range of the part of the frame that the objects' bounding squares would take.
        radius: limits, in pixels, of the size of objects that follows from ``fill``.
        min_radius: pixels; no single object is smaller.
    """

    height: int
    widths: tuple[int, ...]
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    textures: tuple[str, ...]
    radius: tuple[float, float]
    min_radius: float
    fill: tuple[float, float] = (0.25, 0.6)
    min_target: int = 1

    @abstractmethod
    def class_splits(self) -> dict[str, list[Attributes]]:
        """The classes of train, val and test."""

    @abstractmethod
    def plan(self, rng: np.random.Generator, classes: Sequence[Attributes]) -> list[tuple[Attributes, int]]:
        """Which classes stand in one picture and how many of each; the target comes first."""


@dataclass(frozen=True)
class TargetPreset(ScenePreset):
    """Scenes with one target class, most of them with objects of other classes between.

    Three in four pictures have distractor classes, and half of the distractors share shape or colour with the target.

    Args:
        log_count: mean and standard deviation of the logarithm of the target's count.
        max_target: limit of the target's count; ``min_target`` is the lower one.
        distractor_ratio: a distractor has at most ``distractor_ratio * target + 5`` objects.
        max_objects: limit of all objects together.
        held_out: every (shape, colour) pair whose indices add up to a multiple of this is kept from training.
        n_classes: number of classes of train, val and test, drawn in a fixed order; all of them if ``None``.
    """

    log_count: tuple[float, float] = (2.6, 0.8)
    max_target: int = 60
    distractor_ratio: int = 1
    max_objects: int = 66
    held_out: int = 3
    n_classes: tuple[int, int, int] | None = None

    def class_splits(self) -> dict[str, list[Attributes]]:
        """Val and test hold (shape, colour) pairs that train, and the other of the two, never show.

        Every single word of them occurs in train.
        """
        pairs = list(product(range(len(self.shapes)), range(len(self.colours))))
        held = [pair for pair in pairs if sum(pair) % self.held_out == 0]
        # A shape's held-out colours go to val and test in turn; the second half of the shapes starts with test, so
        # that each of the two gets every colour.
        turn = [(i + (s >= len(self.shapes) // 2)) % 2 for i, (s, _) in enumerate(held)]
        chosen = {
            "train": [pair for pair in pairs if pair not in held],
            "val": [pair for pair, t in zip(held, turn, strict=True) if t == 0],
            "test": [pair for pair, t in zip(held, turn, strict=True) if t == 1],
        }
        splits = {}
        for k, (split, kept) in enumerate(chosen.items()):
            classes = [Attributes(self.shapes[s], self.colours[c], t) for s, c in kept for t in self.textures]
            if self.n_classes is not None:
                order = np.random.default_rng(k).permutation(len(classes))[: self.n_classes[k]]
                classes = [classes[i] for i in sorted(order)]
            splits[split] = classes
        return splits

    def held_out_pairs(self) -> list[tuple[str, str]]:
        """The (shape, colour) pairs that training never shows."""
        places = product(range(len(self.shapes)), range(len(self.colours)))
        return [(self.shapes[s], self.colours[c]) for s, c in places if (s + c) % self.held_out == 0]

    def plan(self, rng: np.random.Generator, classes: Sequence[Attributes]) -> list[tuple[Attributes, int]]:
        """The target with a log-normal count, and 0 to 3 distractors."""
        target = classes[int(rng.integers(len(classes)))]
        others = [c for c in classes if c != target]
        n_distractors = min(int(rng.choice(4, p=[0.25, 0.4, 0.25, 0.1])), len(others))
        chosen: list[Attributes] = []
        for _ in range(n_distractors):
            left = [c for c in others if c not in chosen]
            hard = [c for c in left if c.shape == target.shape or c.colour == target.colour]
            pool = hard if hard and rng.random() < 0.5 else left
            chosen.append(pool[int(rng.integers(len(pool)))])
        n = self._draw(rng)
        room = (self.max_objects - n) // max(n_distractors, 1)
        limit = max(1, min(self.distractor_ratio * n + 5, room))
        return [(target, n), *((c, min(self._draw(rng), limit)) for c in chosen)]

    def _draw(self, rng: np.random.Generator) -> int:
        return int(np.clip(np.round(np.exp(rng.normal(*self.log_count))), self.min_target, self.max_target))


@dataclass(frozen=True)
class CommonPreset(TargetPreset):
    """Scenes for pretraining: training shows only (shape, colour) pairs that none of other presets keeps from its own.

    Args:
        of: the other presets; what one of them holds out is in val and test in turn.
    """

    of: tuple[TargetPreset, ...] = ()

    def class_splits(self) -> dict[str, list[Attributes]]:
        """Every texture of the pairs of each split."""
        held = sorted({pair for preset in self.of for pair in preset.held_out_pairs()})
        seen = [pair for pair in product(self.shapes, self.colours) if pair not in held]
        chosen = {"train": seen, "val": held[::2], "test": held[1::2]}
        return {
            split: [Attributes(*pair, t) for pair in pairs for t in self.textures] for split, pairs in chosen.items()
        }


@dataclass(frozen=True)
class EachClassPreset(ScenePreset):
    """Scenes for image-level counts: every class of a short list may stand in every picture, most are absent.

    Args:
        classes: the fixed list.
        present: how likely each class is in a picture.
        max_each: limit of the count of a class; ``k`` objects are drawn with probability proportional to ``1 / k``.
    """

    classes: tuple[Attributes, ...] = ()
    present: float = 0.35
    max_each: int = 8

    def class_splits(self) -> dict[str, list[Attributes]]:
        """The same list for every split."""
        return {split: list(self.classes) for split in ("train", "val", "test")}

    def plan(self, rng: np.random.Generator, classes: Sequence[Attributes]) -> list[tuple[Attributes, int]]:
        """At least one class, the most numerous first."""
        weights = 1 / np.arange(1, self.max_each + 1)
        counts = rng.choice(np.arange(1, self.max_each + 1), len(classes), p=weights / weights.sum())
        counts *= rng.random(len(classes)) < self.present
        if not counts.any():
            counts[rng.integers(len(classes))] = 1
        order = np.argsort(-counts, kind="stable")
        return [(classes[i], int(counts[i])) for i in order if counts[i]]


_SIX_SHAPES = ("discs", "squares", "triangles", "stars", "crosses", "rings")
_SIX_COLOURS = ("red", "orange", "yellow", "green", "blue", "white")

PRESETS: dict[str, ScenePreset] = {
    "easy": TargetPreset(
        height=192, widths=(192,), shapes=_SIX_SHAPES, colours=_SIX_COLOURS, textures=("plain", "striped"),
        radius=(6, 26), min_radius=5,
    ),
    "low": EachClassPreset(
        height=256, widths=(256,), shapes=_SIX_SHAPES, colours=_SIX_COLOURS, textures=("plain", "striped"),
        radius=(8, 30), min_radius=7,
        # Two classes of every shape and of every colour, one of them striped: no single word tells a class.
        classes=tuple(
            Attributes(_SIX_SHAPES[i], _SIX_COLOURS[(i + 2 * k) % 6], texture)
            for k, texture in enumerate(("plain", "striped")) for i in range(6)
        ),
    ),
    "full": TargetPreset(
        height=384, widths=tuple(range(384, 688, 16)),
        shapes=("discs", "squares", "triangles", "stars", "hexagons", "crosses", "rings", "crescents", "hearts",
                "arrows"),
        colours=tuple(COLOURS), textures=("plain", "striped", "dotted", "checkered"),
        radius=(4.5, 46), min_radius=4, min_target=3, log_count=(3.5, 0.95), max_target=300, distractor_ratio=2,
        max_objects=330, held_out=4, n_classes=(89, 29, 29),
    ),
}  # fmt: skip
PRESETS["common"] = CommonPreset(
    height=192, widths=(192,), shapes=PRESETS["full"].shapes, colours=PRESETS["full"].colours,
    textures=PRESETS["full"].textures, radius=(3, 28), min_radius=2.5, log_count=(2.8, 0.9), max_target=120,
    max_objects=150, of=tuple(p for p in PRESETS.values() if isinstance(p, TargetPreset)),
)  # fmt: skip

__all__ = ["COLOURS", "PRESETS", "Attributes", "CommonPreset", "EachClassPreset", "ScenePreset", "TargetPreset"]
