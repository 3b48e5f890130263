"""Asking a text-guided model about each picture with right, wrong, other and empty prompts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from counting_zoo.counter import Counter
from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.fingerprint import fingerprint
from counting_zoo.data.progress import progress
from counting_zoo.data.records import Record, Split, present_names
from counting_zoo.errors import InputError
from counting_zoo.evaluation.asking import Asker, Cost, check_listens, model_sha256
from counting_zoo.evaluation.audit_prompts import EMPTY, NONSENSE, PARAPHRASES
from counting_zoo.evaluation.audit_questions import GRIDS, AskedMosaic, AskedPicture, Questions
from counting_zoo.evaluation.finished import FinishedPictures, picture_key
from counting_zoo.evaluation.page import Picture
from counting_zoo.geometry import Preprocess
from counting_zoo.version import __version__

TESTS = ("negative", "mosaic", "pairs", "labelfree")


@dataclass(frozen=True)
class Audit:
    """Everything that was asked and answered.

    Args:
        names: the classes of the split.
        pictures: in the order of the data.
        mosaics: those of each picture together, in the same order.
        blanks: count of each class in pictures that show nothing, by kind.
        failed: (id, reason) of what could not be counted.
        left_out: why a test was not made, by test.
        protocol: what was asked, in plain data.
        examples: drawings with right and wrong prompts.
        cost: time, apart from everything else.
    """

    names: list[str]
    pictures: list[AskedPicture]
    mosaics: list[AskedMosaic] = field(default_factory=list)
    blanks: dict[str, dict[str, float]] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    protocol: dict[str, Any] = field(default_factory=dict)
    examples: list[Picture] = field(default_factory=list)
    cost: Cost | None = None


def audit(
    model: Counter,
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
    """Ask a model about every picture of a split; each picture is encoded once for all its prompts.

    Args:
        model: text-guided, in evaluation mode, on the device it should count on.
        datamodule: whose classes are asked about.
        split: whose pictures.
        tests: which of :data:`TESTS`.
        limit: of the number of pictures, taken evenly from the split; all if ``None``.
        mosaics: how many classes are drawn for each picture's mosaics, each a picture of its own to encode; 0 for all,
            as PrACo does.
        prompts_at_once: most prompts in one pass, which bounds the memory; a picture that is asked more is encoded
            once for each part.
        seed: of the mosaics' partners and of noise.
        examples: how many pictures are drawn.
        parts: a folder where each finished picture is kept at once, so that an interrupted audit goes on; what was
            kept of another model, data or question is not used.

    Raises:
        InputError: the model does not read prompts, an option is out of range, the data carry no counts, or not one
            picture could be counted.
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
        files = [] if parts is None else [picture_key(datamodule, record) for record in records.values()]
        key = hashlib.sha256(json.dumps([protocol, names, GRIDS, files], sort_keys=True).encode()).hexdigest()[:16]
        found = _answers(questions, chosen, None if parts is None else parts / f"{key}.jsonl")
        failed = [(str(image_id), str(reason)) for one in found for image_id, reason in one["failed"]]
        pictures = [AskedPicture(**one["picture"]) for one in found if one["picture"]]
        if not pictures:
            raise InputError(f"none of the {len(chosen)} pictures could be counted; {': '.join(failed[0])}")
        blanks = questions.blanks(chosen, failed) if "labelfree" in asked else {}
        drawn = questions.examples(pictures, examples)
    return Audit(
        names=names,
        pictures=pictures,
        mosaics=[AskedMosaic(**mosaic) for one in found for mosaic in one["mosaics"]],
        blanks=blanks,
        failed=failed,
        left_out=left_out,
        protocol=protocol | {"pictures": len(chosen)},
        examples=drawn,
        cost=cost,
    )


def _answers(questions: Questions, chosen: Sequence[str], path: Path | None) -> list[dict[str, Any]]:
    """What is known of each picture, of which those that are in the file already are not asked about again."""
    with FinishedPictures(path) as finished:
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
        raise InputError(f"split is {split!r}; expected train, val or test, whose pictures are annotated")


def _missing(names: Sequence[str], records: Iterable[Record]) -> dict[str, str]:
    """Why a test cannot be made with these data, by test."""
    records = list(records)
    if any(record.labels is None and record.counts is None for record in records):
        raise InputError("pictures of the split carry no counts, so there is no right prompt; annotate them")
    if not names:
        raise InputError("the data name no class, so there is no prompt; name one with data.classes")
    found = {}
    if len(names) == 1:
        only = f"the data have one class only, {names[0]!r}"
        found = {"negative": f"{only}, so no absent name can be asked about", "mosaic": f"{only}, so nothing is below"}
    elif any(record.points is None for record in records):
        found["mosaic"] = "the data have no points, so nobody knows which half an object is in"
    if not any(len(set(present_names(record)) & set(names)) == 2 for record in records):
        found["pairs"] = "no picture shows exactly two of the classes"
    return found


__all__ = ["TESTS", "Audit", "audit"]
