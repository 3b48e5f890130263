"""Built-in scenes: coloured, textured shapes whose every centre, box and name is known exactly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import cv2
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
    """Attributes that every scene of a preset has in common.

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
        """Return the classes of train, val and test."""

    @abstractmethod
    def plan(self, rng: np.random.Generator, classes: Sequence[Attributes]) -> list[tuple[Attributes, int]]:
        """Draw the classes of one image and the number of each; the target comes first."""


@dataclass(frozen=True)
class TargetPreset(ScenePreset):
    """Scenes with one target class, most of them with objects of other classes between.

    Three in four images have distractor classes, and half of the distractors share shape or colour with the target.

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
        """Give val and test (shape, colour) pairs that train, and the other of the two, never show.

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
        """Return the (shape, colour) pairs that training never shows."""
        places = product(range(len(self.shapes)), range(len(self.colours)))
        return [(self.shapes[s], self.colours[c]) for s, c in places if (s + c) % self.held_out == 0]

    def plan(self, rng: np.random.Generator, classes: Sequence[Attributes]) -> list[tuple[Attributes, int]]:
        """Draw the target with a log-normal count, and 0 to 3 distractors."""
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
        """Return every texture of the pairs of each split."""
        held = sorted({pair for preset in self.of for pair in preset.held_out_pairs()})
        seen = [pair for pair in product(self.shapes, self.colours) if pair not in held]
        chosen = {"train": seen, "val": held[::2], "test": held[1::2]}
        return {
            split: [Attributes(*pair, t) for pair in pairs for t in self.textures] for split, pairs in chosen.items()
        }


@dataclass(frozen=True)
class EachClassPreset(ScenePreset):
    """Scenes for image-level counts: every class of a short list may stand in every image, most are absent.

    Args:
        classes: the fixed list.
        present: how likely each class is in an image.
        max_each: limit of the count of a class; ``k`` objects are drawn with probability proportional to ``1 / k``.
    """

    classes: tuple[Attributes, ...] = ()
    present: float = 0.35
    max_each: int = 8

    def class_splits(self) -> dict[str, list[Attributes]]:
        """Return the same list for every split."""
        return {split: list(self.classes) for split in ("train", "val", "test")}

    def plan(self, rng: np.random.Generator, classes: Sequence[Attributes]) -> list[tuple[Attributes, int]]:
        """Draw at least one class, the most numerous first."""
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
        height=192,
        widths=(192,),
        shapes=_SIX_SHAPES,
        colours=_SIX_COLOURS,
        textures=("plain", "striped"),
        radius=(6, 26),
        min_radius=5,
    ),
    "low": EachClassPreset(
        height=256,
        widths=(256,),
        shapes=_SIX_SHAPES,
        colours=_SIX_COLOURS,
        textures=("plain", "striped"),
        radius=(8, 30),
        min_radius=7,
        # Two classes of every shape and of every colour, one of them striped: no single word tells a class.
        classes=tuple(
            Attributes(_SIX_SHAPES[i], _SIX_COLOURS[(i + 2 * k) % 6], texture)
            for k, texture in enumerate(("plain", "striped"))
            for i in range(6)
        ),
    ),
    "full": TargetPreset(
        height=384,
        widths=tuple(range(384, 688, 16)),
        shapes=(
            "discs",
            "squares",
            "triangles",
            "stars",
            "hexagons",
            "crosses",
            "rings",
            "crescents",
            "hearts",
            "arrows",
        ),
        colours=tuple(COLOURS),
        textures=("plain", "striped", "dotted", "checkered"),
        radius=(4.5, 46),
        min_radius=4,
        min_target=3,
        log_count=(3.5, 0.95),
        max_target=300,
        distractor_ratio=2,
        max_objects=330,
        held_out=4,
        n_classes=(89, 29, 29),
    ),
}


PRESETS["common"] = CommonPreset(
    height=192,
    widths=(192,),
    shapes=PRESETS["full"].shapes,
    colours=PRESETS["full"].colours,
    textures=PRESETS["full"].textures,
    radius=(3, 28),
    min_radius=2.5,
    log_count=(2.8, 0.9),
    max_target=120,
    max_objects=150,
    of=tuple(p for p in PRESETS.values() if isinstance(p, TargetPreset)),
)


FINE = 2  # drawing resolution over image resolution


MIN_VISIBLE = 0.55  # of every object, after everything is placed


MIN_INSIDE = 0.6  # of every object lies within the frame


MIN_PIXELS = 12  # of every object lie within the frame


ATTEMPTS = 12  # places tried for one object before it is left out


SHIFT = 4  # fractional bits of the coordinates that OpenCV draws with


@dataclass(frozen=True)
class Scene:
    """One rendered image and everything in it.

    Args:
        image: ``(H, W, 3)`` uint8 RGB.
        classes: those in the image, the target first.
        points: ``(N, 2)`` float32 centres x, y, inside the frame.
        labels: ``(N,)`` int64 index into ``classes``.
        boxes: ``(N, 4)`` float32 x1, y1, x2, y2 of the whole object within the frame, hidden parts included.
        visible: ``(N,)`` float32 part of each object's area that can be seen.
        exemplars: ``(E, 4)`` float32 boxes of up to three well visible objects of the target.
    """

    image: np.ndarray
    classes: list[Attributes]
    points: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    visible: np.ndarray
    exemplars: np.ndarray


@dataclass
class _Objects:
    """The objects that found a place, one row each."""

    labels: np.ndarray  # (N,)
    centres: np.ndarray  # (N, 2)
    radii: np.ndarray  # (N,)
    angles: np.ndarray  # (N,)
    boxes: np.ndarray  # (N, 4)
    visible: np.ndarray  # (N,)
    ids: np.ndarray  # (FINE * H, FINE * W) int32: 0 for background, else 1 + row


def render(preset: ScenePreset, classes: Sequence[Attributes], seed: Sequence[int]) -> Scene:
    """Render one scene: a function of its arguments alone.

    Args:
        preset: what the scenes look like.
        classes: the classes to choose from.
        seed: the image's own seed, such as ``(seed, split, index)``.

    Example:
        >>> from counting_zoo.data.scenes import PRESETS
        >>> scene = render(PRESETS["easy"], PRESETS["easy"].class_splits()["train"], (0, 0, 7))
        >>> scene.image.shape, len(scene.points) == len(scene.boxes) == len(scene.labels)
        ((192, 192, 3), True)
    """
    attempt = 0
    while True:  # a crowded frame may leave no room for enough objects of the target: then draw another scene
        rng = np.random.default_rng([*seed, attempt])
        plan = preset.plan(rng, classes)
        height, width = preset.height, int(rng.choice(preset.widths))
        objects = _place(preset, plan, (height, width), rng)
        if int((objects.labels == 0).sum()) >= preset.min_target:
            break
        attempt += 1
    names = [attributes for attributes, _ in plan]
    present, labels = np.unique(objects.labels, return_inverse=True)  # a crowded frame may lack a whole distractor
    image = _background(height, width, rng)
    image = _shade(image, names, objects, rng)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 0.9))
    gain, noise = np.float32(rng.uniform(0.75, 1.1)), np.float32(rng.uniform(1, 6))
    image = image * gain + rng.standard_normal(image.shape, np.float32) * noise
    return Scene(
        image=np.clip(image, 0, 255).astype(np.uint8),
        classes=[names[i] for i in present],
        points=objects.centres.astype(np.float32),
        labels=labels,
        boxes=objects.boxes.astype(np.float32),
        visible=objects.visible.astype(np.float32),
        exemplars=_exemplars(objects, rng),
    )


# -- geometry ---------------------------------------------------------------------------------------------------------


def _circle(n: int, radius: float = 1.0, start: float = 0.0) -> np.ndarray:
    angles = np.arange(n) * (2 * np.pi / n) + start
    return radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _star() -> np.ndarray:
    corners = _circle(10, start=-np.pi / 2)
    corners[1::2] *= 0.45
    return corners


def _cross(arm: float = 0.36) -> np.ndarray:
    quarter = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turn = np.array([[0, 1], [-1, 0]])  # a quarter turn of row vectors
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3, -y / 16], 1)


def _arrow() -> np.ndarray:
    right = np.array([[0, -1], [0.8, -0.1], [0.32, -0.1], [0.32, 1]])
    return np.concatenate([right, right[:0:-1] * [-1, 1]])


def _crescent() -> np.ndarray:
    t = np.linspace(-2.2, 2.2, 24)
    outer = np.stack([np.cos(t), np.sin(t)], 1)
    t = t[::-1]
    inner = np.stack([0.75 * np.cos(t) + 0.02 - 0.45 * (1 - np.abs(t) / 2.2), 0.8 * np.sin(t)], 1)
    return np.concatenate([outer, inner])


def _centred(corners: np.ndarray) -> np.ndarray:
    """Move a polygon so that its centroid is the origin."""
    after = np.roll(corners, -1, 0)
    cross = corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]
    return corners - ((corners + after) * cross[:, None]).sum(0) / (3 * cross.sum())


# Contours of unit size around the centroid; overlapping contours cut holes (even-odd rule).
CONTOURS: dict[str, list[np.ndarray]] = {
    "discs": [_circle(40)],
    "squares": [_circle(4, start=np.pi / 4)],
    "triangles": [_circle(3, start=-np.pi / 2)],
    "stars": [_star()],
    "hexagons": [_circle(6)],
    "crosses": [_cross()],
    "rings": [_circle(40), _circle(40, 0.55)],
    "crescents": [_centred(_crescent())],
    "hearts": [_centred(_heart())],
    "arrows": [_centred(_arrow())],
}


def _place(
    preset: ScenePreset, plan: list[tuple[Attributes, int]], size: tuple[int, int], rng: np.random.Generator
) -> _Objects:
    """Put the planned objects down one after another, each where it hides nothing too much."""
    height, width = size
    labels = rng.permutation(np.repeat(np.arange(len(plan)), [n for _, n in plan]))  # (N,)
    n = len(labels)
    base = np.sqrt(height * width * rng.uniform(*preset.fill) / max(n, 8)) / 2
    slope = rng.uniform(0, 0.7) if rng.random() < 0.5 else 0.0  # how much smaller things are at the top
    relative = rng.uniform(0.8, 1.25, len(plan))[labels, None]  # objects of one class have about one size
    draws = rng.random((6, n, ATTEMPTS))
    y = draws[0] * height
    radius = np.clip(base, *preset.radius) * relative * (0.8 + 0.4 * draws[1]) * (1 - slope * (1 - y / height))
    radius = np.maximum(radius, preset.min_radius)
    y = np.clip(y, radius / 2, height - radius / 2)
    x = radius / 2 + draws[2] * (width - radius)
    angle = 2 * np.pi * draws[3]
    stretch = 0.85 + 0.3 * draws[4]

    ids = np.zeros((FINE * height, FINE * width), np.int32)
    area = np.ones(n + 1)  # row 0 is the background, which may be covered without limit
    visible = np.zeros(n + 1)
    least = np.full(n + 1, -np.inf)
    rows: list[tuple[int, int]] = []
    boxes: list[tuple[float, float, float, float]] = []
    for i in range(n):
        new = len(rows) + 1
        contours = CONTOURS[plan[labels[i]][0].shape]
        for j in range(ATTEMPTS):
            cos, sin, r, s = np.cos(angle[i, j]), np.sin(angle[i, j]), radius[i, j], stretch[i, j]
            # Unit contour -> stretched, turned and moved; row vectors.
            transform = np.array([[r * s * cos, r * s * sin], [-r / s * sin, r / s * cos]])
            moved = [contour @ transform + (x[i, j], y[i, j]) for contour in contours]
            low, high = moved[0].min(0), moved[0].max(0)
            left, top = (np.floor(low * FINE).astype(int) - 1).tolist()
            right, bottom = (np.ceil(high * FINE).astype(int) + 1).tolist()
            mask = np.zeros((bottom - top, right - left), np.uint8)
            # OpenCV's integer coordinates are pixel centres, hence the half.
            fixed = [((c * FINE - 0.5 - (left, top)) * (1 << SHIFT)).round().astype(np.int32) for c in moved]
            cv2.fillPoly(mask, fixed, 1, cv2.LINE_8, SHIFT)
            x0, y0 = max(left, 0), max(top, 0)
            window = ids[y0:bottom, x0:right]
            hit = mask[y0 - top :, x0 - left :][: window.shape[0], : window.shape[1]].view(bool)
            whole, inside = cv2.countNonZero(mask), int(np.count_nonzero(hit))
            if inside < MIN_INSIDE * whole or inside < MIN_PIXELS * FINE**2:
                continue
            left_over = visible[:new] - np.bincount(window[hit], minlength=new)
            if (left_over < least[:new]).any():
                continue
            visible[:new] = left_over
            area[new], visible[new], least[new] = whole, inside, MIN_VISIBLE * whole
            window[hit] = new
            rows.append((i, j))
            boxes.append((max(low[0], 0.0), max(low[1], 0.0), min(high[0], width), min(high[1], height)))
            break
    chosen = np.array(rows, np.int64).reshape(-1, 2).T  # (2, objects): which object, at which attempt
    return _Objects(
        labels=labels[chosen[0]].astype(np.int64),
        centres=np.stack([x[*chosen], y[*chosen]], 1),
        radii=radius[*chosen],
        angles=angle[*chosen],
        boxes=np.array(boxes, np.float64).reshape(-1, 4),
        visible=(visible / area)[1 : len(rows) + 1],
        ids=ids,
    )


def _exemplars(objects: _Objects, rng: np.random.Generator) -> np.ndarray:
    """Choose ``(E, 4)`` boxes of up to three objects among the better visible half of the target's."""
    mine = np.flatnonzero(objects.labels == 0)
    mine = mine[np.argsort(-objects.visible[mine], kind="stable")][: max(3, len(mine) // 2)]
    return objects.boxes[rng.permutation(mine)[:3]].astype(np.float32)


# -- colour -----------------------------------------------------------------------------------------------------------


def _background(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw an ``(H, W, 3)`` float32 background: soft, pale patches of colour under coarse grain."""
    patches = rng.uniform(40, 215, (int(rng.integers(2, 7)), int(rng.integers(2, 9)), 3)).astype(np.float32)
    grey = patches.mean(2, keepdims=True)
    smooth = cv2.resize(grey + 0.35 * (patches - grey), (width, height), interpolation=cv2.INTER_CUBIC)
    grain = rng.standard_normal((height // 3, width // 3), np.float32) * np.float32(rng.uniform(2, 12))
    return smooth + cv2.resize(grain, (width, height))[..., None]


def _shade(image: np.ndarray, names: list[Attributes], objects: _Objects, rng: np.random.Generator) -> np.ndarray:
    """Draw all objects over ``image``: every covered pixel of the fine grid is coloured by the object on top."""
    n = len(objects.labels)
    colours = np.array([COLOURS[a.colour] for a in names])[objects.labels]  # (N, 3)
    light = colours * rng.uniform(0.85, 1.1, (n, 1)) + rng.normal(0, 6, (n, 3))
    lift = np.array([60.0 * (a.colour == "white") for a in names])[objects.labels]
    palette = np.stack([light, light * 0.35 + lift[:, None]], 1).astype(np.float32)  # (N, plain or pattern, 3)
    textures = np.array([a.texture for a in names])[objects.labels]

    flat = np.flatnonzero(objects.ids)
    owner = objects.ids.ravel()[flat] - 1  # (P,)
    y, x = np.divmod(flat.astype(np.int32), np.int32(objects.ids.shape[1]))
    centres, turn = objects.centres.astype(np.float32), np.exp(1j * objects.angles) / objects.radii
    cos, sin = turn.real.astype(np.float32)[owner], turn.imag.astype(np.float32)[owner]
    dx = (x.astype(np.float32) + 0.5) / FINE - centres[owner, 0]
    dy = (y.astype(np.float32) + 0.5) / FINE - centres[owner, 1]
    u, v = dx * cos + dy * sin, dy * cos - dx * sin  # the object's own frame, in radii

    pattern = np.zeros(len(flat), np.int64)
    for texture in sorted({a.texture for a in names} - {"plain"}):
        mine = np.flatnonzero((textures == texture)[owner])
        pattern[mine] = _pattern(texture, u[mine], v[mine])
    layer = np.zeros((*objects.ids.shape, 4), np.float32)
    pixels = layer.reshape(-1, 4)
    pixels[flat, :3] = np.clip(palette[owner, pattern] * (1 - 0.15 * (u + v))[:, None], 0, 255)  # lit from one side
    pixels[flat, 3] = 1
    layer = cv2.resize(layer, image.shape[1::-1], interpolation=cv2.INTER_AREA)
    return image * (1 - layer[..., 3:]) + layer[..., :3]


def _pattern(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Compute the dark part of a texture; ``u`` and ``v`` are in radii."""
    if texture == "striped":
        return np.sin(9 * u) > 0
    if texture == "checkered":
        return np.sin(7 * u) * np.sin(7 * v) > 0
    return np.cos(9 * u) + np.cos(9 * v) > 0.9  # dotted
