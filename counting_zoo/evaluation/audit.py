"""Audit of a text-guided model: each image is counted with right, wrong, other and empty prompts."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import fingerprint
from counting_zoo.data.dataset import CountingDataset
from counting_zoo.data.records import Record, Split, present_names
from counting_zoo.errors import ImageError, InputError
from counting_zoo.evaluation.audit_metrics import grid_matches
from counting_zoo.evaluation.audit_prompts import EMPTY, NONSENSE, PARAPHRASES, variants
from counting_zoo.evaluation.counting import FinishedImages, finished_key
from counting_zoo.evaluation.report import Drawing
from counting_zoo.geometry import Preprocess, resize_image, scale_points
from counting_zoo.io import progress, sha256
from counting_zoo.loading import model_sha256
from counting_zoo.module import CountingModule
from counting_zoo.ops import points_to_grid, resize_density, sum_blocks
from counting_zoo.types import CountOutput, Query
from counting_zoo.version import __version__


@dataclass(frozen=True)
class Mosaic:
    """An image above another one, with the points of both.

    Args:
        image: ``(3, 2 h, w)`` uint8 with ``w = min`` of the two images' heights and ``h = w // 2``; rows 0 to h are
            the upper image.
        points: ``(N, 2)`` float32 x, y: those of the upper image above row h, then those of the lower one.
        n_upper: how many of them are the upper image's.
    """

    image: Tensor
    points: Tensor
    n_upper: int


def make_mosaic(upper: Tensor, lower: Tensor, upper_points: Tensor, lower_points: Tensor) -> Mosaic:
    """Stack two images as PrACo does: each is squeezed to twice as wide as high, bicubic with antialiasing.

    Args:
        upper, lower: ``(3, H, W)`` uint8, of any sizes.
        upper_points, lower_points: ``(N, 2)`` x, y in the closed interval of either image.

    Raises:
        InputError: an image is less than 2 pixels high.

    Example:
        >>> mosaic = make_mosaic(*torch.zeros(2, 3, 10, 6).byte(), torch.tensor([[6.0, 10.0]]), torch.zeros(1, 2))
        >>> tuple(mosaic.image.shape), [[round(v, 3) for v in xy] for xy in mosaic.points.tolist()]
        ((3, 10, 10), [[10.0, 5.0], [0.0, 5.0]])
    """
    side = min(upper.shape[-2], lower.shape[-2])
    if side < 2:
        raise InputError(f"images of {tuple(upper.shape)} and {tuple(lower.shape)}; a mosaic needs 2 rows of each")
    size = (side // 2, side)
    halves = [resize_image(image, size, antialias=True, interpolation="bicubic") for image in (upper, lower)]
    above = scale_points(upper_points, (upper.shape[-2], upper.shape[-1]), size)
    # A point on the upper image's last edge would be the lower one's: cells are half-open.
    seam = float(np.nextafter(np.float32(size[0]), np.float32(0)))
    above[:, 1] = above[:, 1].clamp(max=seam)
    below = scale_points(lower_points, (lower.shape[-2], lower.shape[-1]), size)
    below[:, 1] += size[0]
    return Mosaic(torch.cat(halves, 1), torch.cat([above, below]), len(above))


def choose_partners(
    image_id: str,
    target: str,
    names: Sequence[str],
    holders: Mapping[str, Sequence[str]],
    present: Mapping[str, Collection[str]],
    *,
    n_classes: int | None = None,
    seed: int = 0,
) -> dict[str, str]:
    """Choose the image of each other class that goes below an image: the same on every machine and in every audit.

    Args:
        image_id: the upper image.
        target: what it will be asked about.
        names: all classes, those of the negatives.
        holders: ids of the images that show a class, by class.
        present: the classes that each image shows, by id; one that shows the target is never below.
        n_classes: draw that many of the classes for which there is an image; all if ``None``.
        seed: of the draws.

    Returns:
        the lower image's id by class.

    Example:
        >>> holders = {"figs": ["a"], "dates": ["b", "c"]}
        >>> choose_partners("a", "figs", ["figs", "dates"], holders, {"b": ["dates"], "c": ["dates", "figs"]})
        {'dates': 'b'}
    """
    fitting = {
        name: [other for other in holders.get(name, ()) if other != image_id and target not in present[other]]
        for name in names
        if name != target
    }
    fitting = {name: others for name, others in fitting.items() if others}
    rng = np.random.default_rng([seed, zlib.crc32(image_id.encode())])
    chosen = {name: others[int(rng.integers(len(others)))] for name, others in fitting.items()}
    if n_classes is None or n_classes >= len(chosen):
        return chosen
    kept = {list(chosen)[i] for i in rng.permutation(len(chosen))[:n_classes]}
    return {name: other for name, other in chosen.items() if name in kept}


INDEPENDENT_WITHIN = 1e-3
"""Counts of a prompt asked alone and among others that differ by more than this part of the larger one, or of 1, come
from a model in which names compete."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one pass for all prompts, beside one pass for each.

    Args:
        images, prompts: how many of each were asked both ways.
        one_by_one, together: seconds.
        difference: largest difference of a count between the two, relative to the count or to 1.
    """

    images: int
    prompts: int
    one_by_one: float
    together: float
    difference: float

    @property
    def ratio(self) -> float:
        """Ratio of the time of one pass for each prompt to that of one pass for all."""
        return self.one_by_one / self.together if self.together > 0 else math.nan


def check_listens(model: CountingModule) -> None:
    """Refuse a model that cannot be asked about any name.

    Raises:
        InputError: it does not read prompts, or knows a fixed list of names only.
    """
    kind = type(model).__name__
    if not getattr(model, "text_guided", False):
        raise InputError(
            f"{kind} does not read a prompt when it counts, so an audit of prompts says nothing about it; expected a "
            "text-guided model such as CLIPCount or RegionCLIPCounter"
        )
    if model.vocabulary is not None:
        raise InputError(
            f"{kind} counts {len(model.vocabulary)} fixed names and takes no other prompt; expected a text-guided "
            "model such as CLIPCount or RegionCLIPCounter"
        )


class Asker:
    """Counter of many prompts in an image.

    Args:
        model: in evaluation mode. Its texts are encoded once and remembered by itself.
        prompts_at_once: most prompts in one pass.
    """

    def __init__(self, model: CountingModule, prompts_at_once: int = 64) -> None:
        self.model = model
        self.prompts_at_once = prompts_at_once
        #: Whether the prompts of an image may go through together; see :meth:`compare`.
        self.together = True

    def output(self, seen: Tensor, prompts: list[str], image_id: str, stored: tuple[int, int]) -> CountOutput:
        """Count all prompts in a preprocessed ``(3, H, W)`` image in one pass."""
        return self.model.count_images([seen], [Query(tuple(prompts))], image_ids=[image_id], sizes=[stored])[0]

    def counts(self, seen: Tensor, prompts: Sequence[str], image_id: str, stored: tuple[int, int]) -> dict[str, float]:
        """Count each prompt.

        Raises:
            FloatingPointError: one is not finite.
        """
        step = self.prompts_at_once if self.together else 1
        found: dict[str, float] = {}
        for first in range(0, len(prompts), step):
            asked = list(prompts[first : first + step])
            counts = self.model.reported(self.output(seen, asked, image_id, stored).counts)[0].tolist()
            found.update(zip(asked, counts, strict=True))
        if not all(math.isfinite(count) for count in found.values()):
            raise FloatingPointError(f"counts are {found}")
        return found

    def compare(self, images: Sequence[tuple[Tensor, str, tuple[int, int]]], prompts: Sequence[str]) -> Cost:
        """Ask images all prompts in one pass and in one pass for each, and go on with what gives the counts alone.

        Args:
            images: as the model sees them, with their ids and stored sizes.
            prompts: which are asked.
        """
        alone, together, difference = 0.0, 0.0, 0.0
        self.together = True
        for seen, image_id, stored in images:
            self.counts(seen, prompts, image_id, stored)  # texts are encoded, and the device is warm
            start = self._now()
            at_once = self.counts(seen, prompts, image_id, stored)
            middle = self._now()
            one_by_one = {p: self.counts(seen, [p], image_id, stored)[p] for p in prompts}
            alone, together = alone + self._now() - middle, together + middle - start
            for prompt, count in one_by_one.items():
                difference = max(difference, abs(at_once[prompt] - count) / max(1.0, abs(count)))
        self.together = difference <= INDEPENDENT_WITHIN
        return Cost(len(images), len(prompts), alone, together, difference)

    def _now(self) -> float:
        if torch.device(self.model.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


GRIDS = (2, 4, 8)


BLANKS = {"black": 0, "grey": 128, "white": 255}


COSTED, COSTED_NAMES = 2, 32
"""So many images and names are also asked one by one, to see that the counts are the same and what that costs."""


FAILURES = (InputError, FloatingPointError, RuntimeError)
"""What ends the work on an image, and not the audit; the last is torch's, of images too small or too large."""


@dataclass(frozen=True)
class AskedImage:
    """Counts of one image, by prompt.

    Args:
        image_id: of the image.
        target: its own name: the first that it shows; ``None`` where it shows nothing that is asked about.
        present: every name that it is known to show.
        truth: true count of each class.
        counts: count of each prompt.
        both: count of both names asked together, where the image shows exactly two.
    """

    image_id: str
    target: str | None
    present: list[str]
    truth: dict[str, float]
    counts: dict[str, float]
    both: float | None = None


@dataclass(frozen=True)
class AskedMosaic:
    """Counts of an image above another one, asked for the upper image's own name.

    Args:
        image_id: of the upper image.
        name: class for which the lower one was chosen.
        below: id of the lower image.
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
    """Prompts of each image.

    Args:
        model: text-guided.
        data: the images of a split as they are stored; unreadable ones are tolerated.
        names: classes that every image is asked about.
        shown: the names that each image is known to show, by id.
        tests: which tests the answers are for.
        mosaics: how many classes are drawn for an image's mosaics; 0 for all.
        seed: of the mosaics' partners and of noise.
        asker: asks the model.
    """

    model: CountingModule
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

    def image(self, image_id: str) -> dict[str, Any]:
        """Read an image as it is stored, with its annotation.

        Raises:
            ImageError: it cannot be read.
        """
        item = self.data[self.place[image_id]]
        assert isinstance(item, dict)  # there are no crops without augmentation
        if "failed" in item:
            raise ImageError(item["failed"][1])
        return item

    def target(self, image_id: str) -> str | None:
        """Choose the first name that an image shows, of those asked about."""
        return next((name for name in self.shown[image_id] if name in self.names), None)

    def prompts(self, target: str | None) -> list[str]:
        """List all prompts for an image, each once."""
        prompts = list(self.names)
        if "labelfree" in self.tests:
            prompts += [*EMPTY, *NONSENSE]
            if target is not None:
                prompts += [prompt for kind in variants(target).values() for prompt in kind]
        return list(dict.fromkeys(prompts))

    def of(self, image_id: str) -> dict[str, Any]:
        """Collect all counts of one image as plain data; what cannot be counted is under ``failed``."""
        found: dict[str, Any] = {"picture": None, "mosaics": [], "failed": []}
        try:
            item = self.image(image_id)
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

    def _asked(self, item: dict[str, Any]) -> AskedImage:
        image_id, seen = item["image_id"], self.model.preprocess(item["image"])
        target, present = self.target(image_id), [n for n in self.shown[image_id] if n in self.names]
        counts = self.asker.counts(seen, self.prompts(target), image_id, item["original_size"])
        both = None
        if "pairs" in self.tests and len(present) == 2:
            both = sum(counts[name] for name in present)
            if not self.asker.together:  # names compete, so asking for both is another question
                both = float(self.asker.output(seen, present, image_id, item["original_size"]).counts.sum())
        truth = dict(zip(self.names, item["counts"].tolist(), strict=True))
        return AskedImage(image_id, target, list(self.shown[image_id]), truth, counts, both)

    def _mosaic(self, item: dict[str, Any], target: str, name: str, partner: str) -> AskedMosaic:
        image_id = item["image_id"]
        points = item["points"][item["labels"] == self.names.index(target)]
        mosaic = make_mosaic(item["image"], self.image(partner)["image"], points, points[:0])
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
        """Count all classes in blank images of the size of the first image.

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
        images = {kind: torch.full_like(image, value) for kind, value in BLANKS.items()} | {"noise": noise}
        for kind, blank in images.items():
            try:
                seen = self.model.preprocess(blank)
                found[kind] = self.asker.counts(seen, self.names, kind, item["original_size"])
            except FAILURES as error:
                failed.append((f"{kind} picture", f"{type(error).__name__}: {error}"))
        return found

    def first(self, chosen: Sequence[str]) -> dict[str, Any] | None:
        """Find the first image that can be read."""
        for image_id in chosen:
            try:
                return self.image(image_id)
            except ImageError:
                continue
        return None

    def compare_with_one_by_one(self, chosen: Sequence[str]) -> Cost | None:
        """Ask a few images both ways; names that compete in the model are asked alone from then on."""
        images: list[tuple[Tensor, str, tuple[int, int]]] = []
        for image_id in chosen:
            if len(images) == COSTED:
                break
            if item := self.first([image_id]):
                images.append((self.model.preprocess(item["image"]), image_id, item["original_size"]))
        names = self.names[:COSTED_NAMES] if len(self.names) > 1 else [*self.names, *NONSENSE]
        try:
            return self.asker.compare(images, names) if images else None
        except FAILURES:  # said of each image, later
            return None

    def examples(self, images: Sequence[AskedImage], n: int) -> list[Drawing]:
        """Draw some images with their own name and with the absent one that is counted highest."""
        usable = [one for one in images if one.target is not None]
        kept = [usable[i * len(usable) // n] for i in range(n)] if len(usable) > n else usable
        drawn = []
        for one in kept:
            assert one.target is not None
            absent = [name for name in self.names if name not in one.present]
            wrong = max(absent, key=lambda name: one.counts[name]) if absent else NONSENSE[0]
            item = self.image(one.image_id)
            seen = self.model.preprocess(item["image"])
            for name in (one.target, wrong):
                output = self.asker.output(seen, [name], one.image_id, item["original_size"])
                prediction = self.model.to_prediction(output, [name], item["original_size"], one.image_id, seen)
                text = f"asked for {name}: {float(prediction.counts[0]):.1f} counted, {one.truth.get(name, 0):g} there"
                drawn.append(Drawing(prediction.overlay(name), one.image_id, text))
        return drawn


def _matches(predicted: Tensor, true: Tensor, block: int) -> tuple[float, float]:
    tp, fp = grid_matches(sum_blocks(predicted, block).numpy(), sum_blocks(true, block).numpy())
    return float(tp), float(fp)


TESTS = ("negative", "mosaic", "pairs", "labelfree")


@dataclass(frozen=True)
class Audit:
    """Everything that was asked and answered.

    Args:
        names: the classes of the split.
        images: in the order of the data.
        mosaics: those of each image together, in the same order.
        blanks: count of each class in images that show nothing, by kind.
        failed: (id, reason) of what could not be counted.
        left_out: why a test was not made, by test.
        protocol: what was asked, in plain data.
        examples: drawings with right and wrong prompts.
        cost: time, apart from everything else.
    """

    names: list[str]
    images: list[AskedImage]
    mosaics: list[AskedMosaic] = field(default_factory=list)
    blanks: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    examples: list[Drawing] = field(default_factory=list)
    cost: Cost | None = None


def audit(
    model: CountingModule,
    datamodule: CountingDataModule,
    split: Split = "test",
    *,
    tests: Sequence[str] = TESTS,
    limit: int | None = None,
    mosaics: int = 4,
    prompts_at_once: int = 64,
    seed: int = 0,
    examples: int = 3,
    parts: Path | None = None,
) -> Audit:
    """Ask a model about every image of a split; each image is encoded once for all its prompts.

    Args:
        model: text-guided, in evaluation mode, on the device it should count on.
        datamodule: whose classes are asked about.
        split: whose images.
        tests: which of :data:`TESTS`.
        limit: of the number of images, taken evenly from the split; all if ``None``.
        mosaics: how many classes are drawn for each image's mosaics, each an image of its own to encode; 0 for all,
            as PrACo does.
        prompts_at_once: most prompts in one pass, which bounds the memory; an image that is asked more is encoded
            once for each part.
        seed: of the mosaics' partners and of noise.
        examples: how many images are drawn.
        parts: a folder where each finished image is kept at once, so that an interrupted audit goes on; what was
            kept of another model, data or question is not used.

    Raises:
        InputError: the model does not read prompts, an option is out of range, the data carry no counts, or not one
            image could be counted.
    """
    check_listens(model)
    _check_options(tests, limit, mosaics, prompts_at_once, split)
    records = {record.image_id: record for record in datamodule.records(split)}
    names = list(datamodule.class_names(split))
    shown = {image_id: present_names(record) for image_id, record in records.items()}
    left_out = {test: reason for test, reason in _missing(names, records.values()).items() if test in tests}
    asked = [test for test in TESTS if test in tests and test not in left_out]
    if not asked:
        raise InputError("no test of the audit can be made: " + "; ".join(f"{t}: {why}" for t, why in left_out.items()))
    data = datamodule.evaluation_dataset(split, Preprocess(), tolerate=True, records=list(records.values()))
    every = list(records)
    chosen = every if limit is None or limit >= len(every) else [every[i * len(every) // limit] for i in range(limit)]
    questions = Questions(model, data, names, shown, asked, mosaics, seed, Asker(model, prompts_at_once))
    with torch.inference_mode():
        cost = questions.compare_with_one_by_one(chosen)
        protocol = {
            "model": type(model).__name__,
            "model_sha256": model_sha256(model),
            "data_module": type(datamodule).__name__,
            "data": {**fingerprint(records.values())},
            "split": split,
            "tests": asked,
            "mosaics": mosaics,
            "seed": seed,
            "prompts_together": questions.asker.together,
            "prompts_at_once": prompts_at_once,
            "empty": list(EMPTY),
            "nonsense": list(NONSENSE),
            "paraphrases": list(PARAPHRASES),
            "counting_zoo": __version__,
        }
        files = [] if parts is None else [finished_key(datamodule, record) for record in records.values()]
        key = sha256(json.dumps([protocol, names, GRIDS, files], sort_keys=True))[:16]
        found = _answers(questions, chosen, None if parts is None else parts / f"{key}.jsonl")
        failed = [(str(image_id), str(reason)) for one in found for image_id, reason in one["failed"]]
        images = [AskedImage(**one["picture"]) for one in found if one["picture"]]
        if not images:
            raise InputError(f"none of the {len(chosen)} images could be counted; {': '.join(failed[0])}")
        blanks = questions.blanks(chosen, failed) if "labelfree" in asked else {}
        drawn = questions.examples(images, examples)
    return Audit(
        names=names,
        images=images,
        mosaics=[AskedMosaic(**mosaic) for one in found for mosaic in one["mosaics"]],
        blanks=blanks,
        failed=failed,
        left_out=left_out,
        protocol=protocol | {"pictures": len(chosen)},
        examples=drawn,
        cost=cost,
    )


def _answers(questions: Questions, chosen: Sequence[str], path: Path | None) -> list[dict[str, Any]]:
    """Collect the answers for each image; those that are in the file already are not asked again."""
    with FinishedImages(path) as finished:
        for image_id in progress(chosen, len(chosen), "audit"):
            if image_id not in finished or finished[image_id]["failed"]:
                finished.add(image_id, questions.of(image_id))
        return [finished[image_id] for image_id in chosen]


def _check_options(tests: Sequence[str], limit: int | None, mosaics: int, prompts_at_once: int, split: str) -> None:
    if not tests or not set(tests) <= set(TESTS):
        raise InputError(f"tests are {list(tests)}; expected some of {', '.join(TESTS)}")
    for name, value, least in (("limit", limit, 1), ("prompts_at_once", prompts_at_once, 1), ("mosaics", mosaics, 0)):
        if value is not None and value < least:
            raise InputError(f"{name} is {value}; expected at least {least}")
    if split not in get_args(Split) or split == "predict":
        raise InputError(f"split is {split!r}; expected train, val or test, whose images are annotated")


def _missing(names: Sequence[str], records: Iterable[Record]) -> dict[str, str]:
    """Explain, by test, why it cannot be made with these data."""
    records = list(records)
    if any(record.labels is None and record.counts is None for record in records):
        raise InputError("images of the split carry no counts, so there is no right prompt; annotate them")
    if not names:
        raise InputError("the data name no class, so there is no prompt; name one with data.classes")
    found = {}
    if len(names) == 1:
        only = f"the data have one class only, {names[0]!r}"
        found = {"negative": f"{only}, so no absent name can be asked about", "mosaic": f"{only}, so nothing is below"}
    elif any(record.points is None for record in records):
        found["mosaic"] = "the data have no points, so nobody knows which half an object is in"
    if not any(len(set(present_names(record)) & set(names)) == 2 for record in records):
        found["pairs"] = "no image shows exactly two of the classes"
    return found
