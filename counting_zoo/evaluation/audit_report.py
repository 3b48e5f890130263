"""The files of an audit: JSON, tables, Markdown and a page of HTML that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from counting_zoo.evaluation.audit import GRIDS, AskedImage, Audit
from counting_zoo.evaluation.audit_metrics import (
    FOLLOWS_LOSS,
    FOLLOWS_RATIO,
    IGNORES_LOSS,
    IGNORES_RATIO,
    PRESENT_ABOVE,
    count_ratio,
    false_positive_share,
    localised_mosaic_scores,
    mosaic_scores,
    multi_class_negative_label,
    negative_label,
    pair_figures,
    shuffled_error,
    spread,
    verdict,
)
from counting_zoo.evaluation.audit_prompts import EMPTY, NONSENSE, variants
from counting_zoo.evaluation.report import embedded, judge, render
from counting_zoo.io import plain, write_table, write_whole
from counting_zoo.metrics.counts import CountTable

KINDS = ("right", "other present", "absent", "empty", "nonsense", "paraphrase", "number", "case")
"""Kinds of prompts, in the order of reports."""


def audit_figures(audit: Audit) -> dict[str, Any]:
    """Score an audit: every figure and what it was calculated from, as plain data, the same for the same answers.

    A figure that is not known is ``None``.
    """
    own = [one for one in audit.images if one.target is not None]
    counts = _kind_table(own, audit.names, lambda one: one.counts)  # (N, C)
    truth = _kind_table(own, audit.names, lambda one: one.truth)
    positive = np.array([audit.names.index(str(one.target)) for one in own], np.int64)
    absent = np.array([[name not in one.present for name in audit.names] for one in own], bool)
    absent = absent.reshape(len(own), len(audit.names))
    right, true = counts[np.arange(len(own)), positive], truth[np.arange(len(own)), positive]
    tests = audit.protocol["tests"]
    wrong = np.where(absent, counts, np.nan)
    error = float(np.abs(right - true).mean()) if own else math.nan
    found: dict[str, Any] = {
        "verdict": asdict(verdict(count_ratio(wrong, right), error, shuffled_error(counts, positive, true)))
    }
    found["verdict"] |= {
        "follows_ratio": FOLLOWS_RATIO,
        "ignores_ratio": IGNORES_RATIO,
        "follows_loss": FOLLOWS_LOSS,
        "ignores_loss": IGNORES_LOSS,
        "constant_mae": float(np.abs(true - np.median(true)).mean()) if own else math.nan,
    }
    if "negative" in tests:
        found["negative"] = negative_label(counts, positive, true, absent=absent)
        found["negative"]["absent_above_half"] = false_positive_share(counts, absent, PRESENT_ABOVE)
        found["negative"]["official"] = negative_label(counts, positive, true, official=True)
        if any(len(set(one.present) & set(audit.names)) > 1 for one in own):
            found["multi_class"] = multi_class_negative_label(counts, np.where(~absent & (truth == 0), np.nan, truth))
    if "mosaic" in tests:
        found["mosaic"] = _mosaics(audit, own)
    if "pairs" in tests:
        found["pairs"] = _pair_figures(own)
    if "labelfree" in tests:
        found["label_free"] = _label_free_figures(audit, own, right)
    found["kinds"] = {kind: _distribution(values) for kind, values in _by_kind(own, audit.names).items()}
    found["n_pictures"], found["n_without_target"] = len(own), len(audit.images) - len(own)
    found["left_out"], found["failed"] = dict(audit.left_out), [list(pair) for pair in audit.failed]
    found["classes"], found["protocol"] = list(audit.names), dict(audit.protocol)
    return plain(found, "audit")


def _mosaics(audit: Audit, own: Sequence[AskedImage]) -> dict[str, Any]:
    """Score the whole halves, and each grid."""
    row = {one.image_id: i for i, one in enumerate(own)}
    shape = (len(own), len(audit.names))
    truth = np.full(len(own), np.nan)
    upper, lower = np.full(shape, np.nan), np.full(shape, np.nan)
    tp, fp = np.full((len(GRIDS), *shape), np.nan), np.full((len(GRIDS), *shape), np.nan)
    for mosaic in audit.mosaics:
        place = row[mosaic.image_id], audit.names.index(mosaic.name)
        truth[place[0]] = mosaic.truth
        upper[place], lower[place] = mosaic.upper, mosaic.lower
        tp[:, *place], fp[:, *place] = mosaic.tp, mosaic.fp
    found: dict[str, Any] = {"global": mosaic_scores(upper, lower, truth)}
    for grid, right, many in zip(GRIDS, tp, fp, strict=True):
        found[f"{grid}x{grid}"] = localised_mosaic_scores(right, many, truth)
    if len(audit.mosaics) == len(own) * (len(audit.names) - 1):  # PrACo asks about all classes
        found["official"] = mosaic_scores(upper, lower, truth, official=True)
    return found


def _pair_figures(own: Sequence[AskedImage]) -> dict[str, float]:
    pairs = [one for one in own if one.both is not None]
    truth = [sum(one.truth.get(name, 0.0) for name in one.present) for one in pairs]
    a = np.array([one.truth[str(one.target)] for one in pairs])
    f_a = np.array([one.counts[str(one.target)] for one in pairs])
    return pair_figures(a, np.array(truth) - a, f_a, np.array([one.both for one in pairs], np.float64))


def _label_free_figures(audit: Audit, own: Sequence[AskedImage], right: np.ndarray) -> dict[str, Any]:
    """Compute the checks that need no annotation but a name that is present."""
    other = {str(one.target): variants(str(one.target)) for one in own}

    def counts(prompts: Mapping[str, Sequence[str]], with_own: bool) -> np.ndarray:
        """Collect ``(N, P)`` counts of the prompts that belong to each target."""
        longest = max((len(asked) for asked in prompts.values()), default=0) + with_own
        found = np.full((len(own), longest), np.nan)
        for row, one in zip(found, own, strict=True):
            asked = [*[str(one.target)] * with_own, *prompts[str(one.target)]]
            row[: len(asked)] = [one.counts[prompt] for prompt in asked]
        return found

    kinds = {
        kind: {name: prompts[kind] for name, prompts in other.items()} for kind in ("paraphrase", "number", "case")
    }
    every = {name: [p for prompts in found.values() for p in prompts] for name, found in other.items()}
    return {
        "empty_ratio": count_ratio(counts(dict.fromkeys(other, EMPTY), False), right),
        "nonsense_ratio": count_ratio(counts(dict.fromkeys(other, NONSENSE), False), right),
        "paraphrase_ratio": count_ratio(counts(kinds["paraphrase"], False), right),
        "spread": {kind: spread(counts(prompts, True)) for kind, prompts in {**kinds, "all": every}.items()},
        "blank": {
            kind: {"mean": float(np.mean(list(said.values()))), "max": max(said.values())}
            for kind, said in audit.blanks.items()
        },
    }


def prompt_rows(audit: Audit) -> list[tuple[str, str, float | None, float]]:
    """List (image, prompt, true count where there is one, count) of every answer."""
    rows: list[tuple[str, str, float | None, float]] = []
    for one in audit.images:
        same = {p for kind in variants(one.target).values() for p in kind} if one.target is not None else set()
        own = one.truth[one.target] if one.target is not None else None
        for prompt, count in one.counts.items():
            true = one.truth.get(prompt, own if prompt in same else 0.0)
            rows.append((one.image_id, prompt, true, count))
    return rows


def _by_kind(own: Sequence[AskedImage], names: Sequence[str]) -> dict[str, list[float]]:
    """Count over the true count of the image's own name, for every answer."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for one in own:
        target = str(one.target)
        if not (true := one.truth[target]):
            continue  # all its points lay outside the image, and were dropped
        asked = {
            "right": [target],
            "other present": [name for name in one.present if name != target and name in names],
            "absent": [name for name in names if name not in one.present],
            "empty": list(EMPTY),
            "nonsense": list(NONSENSE),
            **variants(target),
        }
        for kind, prompts in asked.items():
            found[kind] += [one.counts[prompt] / true for prompt in prompts if prompt in one.counts]
    return {kind: values for kind, values in found.items() if values}


def _distribution(values: Sequence[float]) -> dict[str, float]:
    low, first, middle, third, high = np.percentile(values, [5, 25, 50, 75, 95]).tolist()
    return {
        "n": len(values),
        "mean": float(np.mean(values)),
        "p5": low,
        "p25": first,
        "median": middle,
        "p75": third,
        "p95": high,
    }


def _kind_table(
    own: Sequence[AskedImage], names: Sequence[str], of: Callable[[AskedImage], Mapping[str, float]]
) -> np.ndarray:
    return np.array([[of(one)[name] for name in names] for one in own], np.float64).reshape(len(own), len(names))


def write_audit(audit: Audit, folder: str | Path) -> dict[str, Any]:
    """Write everything that is known of an audit.

    ``audit.json`` (all figures), ``audit.md``, ``audit.html``, ``audit_counts.csv`` (every image and prompt) and
    ``audit_mosaics.csv`` are the same for the same answers; times are in ``audit_cost.json`` alone.

    Args:
        audit: what was answered.
        folder: made if it is not there.

    Returns:
        the figures, as in ``audit.json``.
    """
    folder, figures = Path(folder), audit_figures(audit)
    write_whole(folder / "audit.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    CountTable.of(prompt_rows(audit)).write(folder / "audit_counts.csv")
    cells = [f"{kind}_{grid}x{grid}" for grid in GRIDS for kind in ("tp", "fp")]
    write_table(
        folder / "audit_mosaics.csv",
        ("image", "class_below", "image_below", "true", "upper", "lower", *cells),
        [
            (m.image_id, m.name, m.below, m.truth, m.upper, m.lower, *sum(zip(m.tp, m.fp, strict=True), ()))
            for m in audit.mosaics
        ],
    )
    judged, name = figures["verdict"], figures["protocol"]["model"]
    baselines = {"always the median true count": judged["constant_mae"]} if judged["constant_mae"] is not None else {}
    page = {
        "title": f"Does {name} count what it is asked for?",
        "verdict": judge(name, judged["mae"], baselines, follows=judged["follows"], ratio=judged["ratio"]),
        "audit": figures,
    }
    write_whole(folder / "audit.md", render("audit", "md", **page))
    write_whole(folder / "audit.html", render("audit", "html", **page, groups=embedded(audit.examples)))
    if audit.cost is not None:
        cost = asdict(audit.cost) | {"ratio": audit.cost.ratio}
        write_whole(folder / "audit_cost.json", json.dumps(cost, indent=1) + "\n")
    return figures
