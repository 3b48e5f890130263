"""What an audit asks about each picture, and what it keeps of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from counting_zoo.counter import Counter
from counting_zoo.data.dataset import CountingDataset
from counting_zoo.errors import ImageError, InputError
from counting_zoo.evaluation.asking import Asker, Cost
from counting_zoo.evaluation.audit_metrics import grid_matches
from counting_zoo.evaluation.audit_prompts import EMPTY, NONSENSE, variants
from counting_zoo.evaluation.mosaics import choose_partners, make_mosaic
from counting_zoo.evaluation.page import Picture
from counting_zoo.ops import points_to_grid, resize_density, sum_blocks

GRIDS = (2, 4, 8)
BLANKS = {"black": 0, "grey": 128, "white": 255}
COSTED, COSTED_NAMES = 2, 32
"""So many pictures and names are also asked one by one, to see that the counts are the same and what that costs."""

FAILURES = (InputError, FloatingPointError, RuntimeError)
"""What ends the work on a picture, and not the audit; the last is torch's, of pictures too small or too large."""


@dataclass(frozen=True)
class AskedPicture:
    """What a model said of one picture.

    Args:
        image_id: of the picture.
        target: its own name: the first that it shows; ``None`` where it shows nothing that is asked about.
        present: every name that it is known to show.
        truth: true count of each class.
        counts: count of each prompt.
        both: count of both names asked together, where the picture shows exactly two.
    """

    image_id: str
    target: str | None
    present: list[str]
    truth: dict[str, float]
    counts: dict[str, float]
    both: float | None = None


@dataclass(frozen=True)
class AskedMosaic:
    """What a model said of a picture above another one, asked for the upper picture's own name.

    Args:
        image_id: of the upper picture.
        name: class for which the lower one was chosen.
        below: id of the lower picture.
        truth: objects in the upper half.
        upper, lower: counts of the halves.
        tp, fp: :func:`~counting_zoo.evaluation.audit_metrics.grid_matches` on each of :data:`GRIDS`.
    """

    image_id: str
    name: str
    below: str
    truth: float
    upper: float
    lower: float
    tp: list[float]
    fp: list[float]


@dataclass
class Questions:
    """What is asked about each picture.

    Args:
        model: text-guided.
        data: the pictures of a split as they are stored; unreadable ones are tolerated.
        names: classes that every picture is asked about.
        shown: the names that each picture is known to show, by id.
        tests: which tests the answers are for.
        mosaics: how many classes are drawn for a picture's mosaics; 0 for all.
        seed: of the mosaics' partners and of noise.
        asker: asks the model.
    """

    model: Counter
    data: CountingDataset
    names: list[str]
    shown: dict[str, list[str]]
    tests: list[str]
    mosaics: int
    seed: int
    asker: Asker

    def __post_init__(self) -> None:
        self.data.choose_names = lambda record, rng: list(self.names)
        self.place = {record.image_id: i for i, record in enumerate(self.data.records)}
        self.holders: dict[str, list[str]] = {}
        for image_id, present in self.shown.items():
            for name in present:
                self.holders.setdefault(name, []).append(image_id)

    def picture(self, image_id: str) -> dict[str, Any]:
        """The picture as it is stored, with its annotation.

        Raises:
            ImageError: it cannot be read.
        """
        item = self.data[self.place[image_id]]
        assert isinstance(item, dict)  # there are no crops without augmentation
        if "failed" in item:
            raise ImageError(item["failed"][1])
        return item

    def target(self, image_id: str) -> str | None:
        """The first name that a picture shows, of those asked about."""
        return next((name for name in self.shown[image_id] if name in self.names), None)

    def prompts(self, target: str | None) -> list[str]:
        """Everything that a picture is asked, each once."""
        prompts = list(self.names)
        if "labelfree" in self.tests:
            prompts += [*EMPTY, *NONSENSE]
            if target is not None:
                prompts += [prompt for kind in variants(target).values() for prompt in kind]
        return list(dict.fromkeys(prompts))

    def of(self, image_id: str) -> dict[str, Any]:
        """All answers about one picture, as plain data; what cannot be counted is under ``failed``."""
        found: dict[str, Any] = {"picture": None, "mosaics": [], "failed": []}
        try:
            item = self.picture(image_id)
            found["picture"] = asdict(self._asked(item))
        except FAILURES as error:
            found["failed"].append((image_id, f"{type(error).__name__}: {error}"))
            return found
        target = self.target(image_id)
        if "mosaic" not in self.tests or target is None:
            return found
        below = choose_partners(
            image_id, target, self.names, self.holders, self.shown, n_classes=self.mosaics or None, seed=self.seed
        )
        for name, partner in below.items():
            try:
                found["mosaics"].append(asdict(self._mosaic(item, target, name, partner)))
            except FAILURES as error:
                found["failed"].append((f"{image_id} above {partner}", f"{type(error).__name__}: {error}"))
        return found

    def _asked(self, item: dict[str, Any]) -> AskedPicture:
        image_id, seen = item["image_id"], self.model.preprocess(item["image"])
        target, present = self.target(image_id), [n for n in self.shown[image_id] if n in self.names]
        counts = self.asker.counts(seen, self.prompts(target), image_id, item["original_size"])
        both = None
        if "pairs" in self.tests and len(present) == 2:
            both = sum(counts[name] for name in present)
            if not self.asker.together:  # names compete, so asking for both is another question
                both = float(self.asker.output(seen, present, image_id, item["original_size"]).counts.sum())
        truth = dict(zip(self.names, item["counts"].tolist(), strict=True))
        return AskedPicture(image_id, target, list(self.shown[image_id]), truth, counts, both)

    def _mosaic(self, item: dict[str, Any], target: str, name: str, partner: str) -> AskedMosaic:
        image_id = item["image_id"]
        points = item["points"][item["labels"] == self.names.index(target)]
        mosaic = make_mosaic(item["image"], self.picture(partner)["image"], points, points[:0])
        stored = (int(mosaic.image.shape[1]), int(mosaic.image.shape[2]))
        seen = self.model.preprocess(mosaic.image)
        size = (int(seen.shape[1]), int(seen.shape[2]))
        density = self.asker.output(seen, [target], f"{image_id} above {partner}", stored).density[0, 0].float().cpu()
        extent = self.model.extent(density, size)
        halves = resize_density(density, (2, 1), extent)[:, 0].tolist()
        if not np.isfinite(halves).all():
            raise FloatingPointError(f"the count is {halves}")
        finest = max(GRIDS)
        predicted = resize_density(density.clamp(min=0), (finest, finest), extent)
        true = points_to_grid([mosaic.points], stored, (finest, finest))[0, 0]
        tp, fp = zip(*(_matches(predicted, true, finest // grid) for grid in GRIDS), strict=True)
        return AskedMosaic(
            image_id, name, partner, float(mosaic.n_upper), upper=halves[0], lower=halves[1], tp=list(tp), fp=list(fp)
        )

    def blanks(self, chosen: Sequence[str], failed: list[tuple[str, str]]) -> dict[str, dict[str, float]]:
        """Counts of all classes in pictures that show nothing, of the size of the first picture.

        Args:
            chosen: ids.
            failed: gets what could not be counted.
        """
        item = self.first(chosen)
        if item is None:
            return {}
        image: Tensor = item["image"]
        noise = torch.from_numpy(np.random.default_rng(self.seed).integers(0, 256, tuple(image.shape), np.uint8))
        found = {}
        pictures = {kind: torch.full_like(image, value) for kind, value in BLANKS.items()} | {"noise": noise}
        for kind, picture in pictures.items():
            try:
                seen = self.model.preprocess(picture)
                found[kind] = self.asker.counts(seen, self.names, kind, item["original_size"])
            except FAILURES as error:
                failed.append((f"{kind} picture", f"{type(error).__name__}: {error}"))
        return found

    def first(self, chosen: Sequence[str]) -> dict[str, Any] | None:
        """The first picture that can be read."""
        for image_id in chosen:
            try:
                return self.picture(image_id)
            except ImageError:
                continue
        return None

    def compare_with_one_by_one(self, chosen: Sequence[str]) -> Cost | None:
        """Ask a few pictures both ways; names that compete in the model are asked alone from then on."""
        pictures: list[tuple[Tensor, str, tuple[int, int]]] = []
        for image_id in chosen:
            if len(pictures) == COSTED:
                break
            if item := self.first([image_id]):
                pictures.append((self.model.preprocess(item["image"]), image_id, item["original_size"]))
        names = self.names[:COSTED_NAMES] if len(self.names) > 1 else [*self.names, *NONSENSE]
        try:
            return self.asker.compare(pictures, names) if pictures else None
        except FAILURES:  # said of each picture, later
            return None

    def examples(self, pictures: Sequence[AskedPicture], n: int) -> list[Picture]:
        """Some pictures with their own name and with the absent one that is counted highest."""
        usable = [one for one in pictures if one.target is not None]
        kept = [usable[i * len(usable) // n] for i in range(n)] if len(usable) > n else usable
        drawn = []
        for one in kept:
            assert one.target is not None
            absent = [name for name in self.names if name not in one.present]
            wrong = max(absent, key=lambda name: one.counts[name]) if absent else NONSENSE[0]
            item = self.picture(one.image_id)
            seen = self.model.preprocess(item["image"])
            for name in (one.target, wrong):
                output = self.asker.output(seen, [name], one.image_id, item["original_size"])
                prediction = self.model.to_prediction(output, [name], item["original_size"], one.image_id, seen)
                text = f"asked for {name}: {float(prediction.counts[0]):.1f} counted, {one.truth.get(name, 0):g} there"
                drawn.append(Picture(prediction.overlay(name), one.image_id, text))
        return drawn


def _matches(predicted: Tensor, true: Tensor, block: int) -> tuple[float, float]:
    tp, fp = grid_matches(sum_blocks(predicted, block).numpy(), sum_blocks(true, block).numpy())
    return float(tp), float(fp)


__all__ = ["BLANKS", "GRIDS", "AskedMosaic", "AskedPicture", "Questions"]
