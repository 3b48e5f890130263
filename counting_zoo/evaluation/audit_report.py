"""The files of an audit: JSON, tables, Markdown and a page of HTML that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from counting_zoo.evaluation.audit import EMPTY, GRIDS, NONSENSE, AskedPicture, Audit, variants
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
from counting_zoo.evaluation.report import (
    Block,
    Heading,
    Table,
    Text,
    number,
    page,
    picture_section,
    svg,
    to_html,
    to_markdown,
)
from counting_zoo.io import plain, write_table, write_whole
from counting_zoo.metrics.counts import CountTable

KINDS = ("right", "other present", "absent", "empty", "nonsense", "paraphrase", "number", "case")
"""Kinds of prompts, in the order of reports."""


def audit_figures(audit: Audit) -> dict[str, Any]:
    """Every figure of an audit and what it was worked out from, as plain data: the same for the same answers.

    A figure that is not known is ``None``.
    """
    own = [one for one in audit.pictures if one.target is not None]
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
    found["n_pictures"], found["n_without_target"] = len(own), len(audit.pictures) - len(own)
    found["left_out"], found["failed"] = dict(audit.left_out), [list(pair) for pair in audit.failed]
    found["classes"], found["protocol"] = list(audit.names), dict(audit.protocol)
    return plain(found, "audit")


def _mosaics(audit: Audit, own: Sequence[AskedPicture]) -> dict[str, Any]:
    """Scores of the whole halves, and on each grid."""
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


def _pair_figures(own: Sequence[AskedPicture]) -> dict[str, float]:
    pairs = [one for one in own if one.both is not None]
    truth = [sum(one.truth.get(name, 0.0) for name in one.present) for one in pairs]
    a = np.array([one.truth[str(one.target)] for one in pairs])
    f_a = np.array([one.counts[str(one.target)] for one in pairs])
    return pair_figures(a, np.array(truth) - a, f_a, np.array([one.both for one in pairs], np.float64))


def _label_free_figures(audit: Audit, own: Sequence[AskedPicture], right: np.ndarray) -> dict[str, Any]:
    """Checks that need no annotation but a name that is there."""
    other = {str(one.target): variants(str(one.target)) for one in own}

    def counts(prompts: Mapping[str, Sequence[str]], with_own: bool) -> np.ndarray:
        """``(N, P)`` counts of the prompts that belong to each target."""
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
    """(picture, prompt, true count where there is one, count) of every answer."""
    rows: list[tuple[str, str, float | None, float]] = []
    for one in audit.pictures:
        same = {p for kind in variants(one.target).values() for p in kind} if one.target is not None else set()
        own = one.truth[one.target] if one.target is not None else None
        for prompt, count in one.counts.items():
            true = one.truth.get(prompt, own if prompt in same else 0.0)
            rows.append((one.image_id, prompt, true, count))
    return rows


def _by_kind(own: Sequence[AskedPicture], names: Sequence[str]) -> dict[str, list[float]]:
    """Count over the true count of the picture's own name, for every answer."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for one in own:
        target = str(one.target)
        if not (true := one.truth[target]):
            continue  # all its points lay outside the picture, and were dropped
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


def _kind_table(own: Sequence[AskedPicture], names: Sequence[str], of: Any) -> np.ndarray:
    return np.array([[of(one)[name] for name in names] for one in own], np.float64).reshape(len(own), len(names))


def write_audit(audit: Audit, folder: str | Path) -> dict[str, Any]:
    """Write everything that is known of an audit.

    ``audit.json`` (all figures), ``audit.md``, ``audit.html``, ``audit_counts.csv`` (every picture and prompt) and
    ``audit_mosaics.csv`` are the same for the same answers; times are in ``audit_cost.json`` alone.

    Args:
        audit: what was answered.
        folder: made if it is not there.

    Returns:
        the figures, as in ``audit.json``.
    """
    folder, figures = Path(folder), audit_figures(audit)
    tables = _tables(figures)
    title = f"Does {figures['protocol']['model']} count what it is asked for?"
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
    write_whole(folder / "audit.md", _markdown(title, figures, tables))
    write_whole(folder / "audit.html", _html(title, figures, tables, audit))
    if audit.cost is not None:
        cost = asdict(audit.cost) | {"ratio": audit.cost.ratio}
        write_whole(folder / "audit_cost.json", json.dumps(cost, indent=1) + "\n")
    return figures


# -- tables -----------------------------------------------------------------------------------------------------------


def _tables(figures: Mapping[str, Any]) -> list[Block]:
    judged = figures["verdict"]
    blocks = _table(
        "Right and wrong prompts",
        ("", "figure"),
        [
            ("count of absent names / count of the right one", _figure(judged["ratio"])),
            ("mean absolute error, right prompts", _figure(judged["mae"])),
            ("mean absolute error, prompts of other classes", _figure(judged["shuffled_mae"])),
            ("how many times as large", _figure(judged["loss"])),
            ("mean absolute error of always saying the median true count", _figure(judged["constant_mae"])),
        ],
    )
    for name, tables in (
        ("negative", _negative),
        ("multi_class", _multi_class),
        ("mosaic", _mosaic),
        ("pairs", _pairs),
        ("label_free", _label_free),
    ):
        if name in figures:
            blocks += tables(figures[name])
    if figures["left_out"]:
        blocks += _table("Left out", ("test", "because"), list(figures["left_out"].items()), numbers=False)
    if figures["failed"]:
        rows = [(str(image_id), str(reason)) for image_id, reason in figures["failed"]]
        blocks += _table(f"Not counted: {len(rows)}", ("picture", "because"), rows[:20], numbers=False)
    return blocks


def _table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], note: str = "", *, numbers: bool = True
) -> list[Block]:
    """A table below its title, with what it means."""
    return [Heading(title, 1), Table(header, rows, numbers=numbers), *([Text(note)] if note else [])]


def _negative(found: Mapping[str, Any]) -> list[Block]:
    official = found["official"]
    rows = [
        (label, _figure(found[key]), _figure(official.get(key)))
        for key, label in (
            ("nmn", "NMN: mean count of absent names / true count (0 at best)"),
            ("pccn", "PCCN: % of pictures whose own count is nearer to the truth (100 at best)"),
            ("avg_np", "count of the own name / true count (1 at best)"),
            ("mae", "MAE of the own name"),
            ("rmse", "RMSE of the own name"),
            ("absent_above_half", "part of the absent names counted above 0.5"),
        )
    ]
    note = (
        f"{found['n']} pictures, each asked about every class (PrACo, arXiv 2409.15953). Other classes that a picture "
        "shows are no absent names; the last column takes them for such and rounds to two decimals, as PrACo does."
    )
    return _table("Negative labels", ("", "figure", "as PrACo"), rows, note)


def _multi_class(found: Mapping[str, Any]) -> list[Block]:
    rows = [
        (label, _figure(found[f"{key}_macro"]), _figure(found[f"{key}_micro"]))
        for key, label in (
            ("mnp", "MNP: mean count of absent names"),
            ("nmn", "NMN: the same / sum of the true counts"),
            ("mae", "MAE of the names that are there"),
            ("rmse", "RMSE of the names that are there"),
        )
    ]
    rows += [
        ("PCCN, one true count at a time", _figure(found["pccn_one_at_a_time"]), ""),
        ("PCCN, mean of the true counts", _figure(found["pccn_mean_truth"]), ""),
    ]
    note = f"{found['n']} pictures, all names that are there taken for right ones (PrACo++); {found['n_left_out']} out."
    return _table("Several classes in a picture", ("", "over pictures", "pooled"), rows, note)


def _mosaic(found: Mapping[str, Any]) -> list[Block]:
    labels = {"global": "halves", "official": "halves, as PrACo"}
    rows = [
        (
            labels.get(place, place),
            *(_figure(scores[key]) for key in ("cnt_p", "cnt_r", "cnt_f1", "cnt_f1_zeros")),
            *(str(scores[key]) for key in ("n", "n_without_f1")),
        )
        for place, scores in found.items()
    ]
    note = (
        "A picture above another one that lacks its name, asked for its own: what is counted below is false. Averaged "
        "over the classes below, then over pictures. What has a denominator of 0 is skipped, as in PrACo: mosaics in "
        "which nothing was counted rightly have no F1, and 0 in the column beside."
    )
    header = ("", "CntP", "CntR", "CntF1", "CntF1 with zeros", "mosaics", "of these without F1")
    return _table("Mosaics", header, rows, note)


def _pairs(found: Mapping[str, Any]) -> list[Block]:
    rows = [
        (label, _figure(found[key]))
        for key, label in (
            ("error_a", "|f(A) - a|"),
            ("error_both", "|f(A+B) - (a+b)|"),
            ("a_from_both", "|f(A) - (a+b)|"),
            ("change", "|f(A) - f(A+B)|"),
            ("over", "f(A) > a, %"),
            ("nearer_both", "f(A) nearer to a+b than to a, %"),
        )
    ]
    note = (
        f"{found['n']} pictures that show exactly two classes: a of the own name A and b of the other, B (PairTally, "
        "arXiv 2509.13939). f(A+B) is the sum of the counts of both names when both are asked together."
    )
    return _table("Two classes in one picture", ("", "mean"), rows, note)


def _label_free(found: Mapping[str, Any]) -> list[Block]:
    ratios = [
        (label, _figure(found[key]))
        for key, label in (
            ("empty_ratio", "empty prompt (a full stop)"),
            ("nonsense_ratio", "nonsense"),
            ("paraphrase_ratio", "paraphrases (1 at best)"),
        )
    ]
    labels = {"number": "singular and plural", "case": "upper and lower case", "all": "all of these"}
    spreads = [
        (labels.get(kind, "paraphrases"), _figure(one["mean"]), _figure(one["p95"]), str(one["n"]))
        for kind, one in found["spread"].items()
    ]
    blanks = [(kind, _figure(one["mean"]), _figure(one["max"])) for kind, one in found["blank"].items()]
    note = "Standard deviation over mean of the counts within a picture, the name itself among them."
    same = ("", "mean", "95th percentile", "pictures")
    return [
        *_table("Prompts without meaning, and other words for the same", ("", "count / count of the name"), ratios),
        *_table("Spread over prompts that mean the same", same, spreads, note),
        *_table("Pictures that show nothing", ("", "mean count", "largest of a class"), blanks),
    ]


def _figure(value: float | None) -> str:
    """Two decimals, and no sign on a zero."""
    return number(None if value is None else round(value, 2) + 0.0)


# -- pages ------------------------------------------------------------------------------------------------------------


def _about(figures: Mapping[str, Any]) -> str:
    protocol, data = figures["protocol"], figures["protocol"]["data"]
    together = (
        "all prompts of a picture in one pass"
        if protocol["prompts_together"]
        else "each prompt in a pass of its own, because names compete in this model"
    )
    drawn = protocol["mosaics"]
    below = f"mosaics with {drawn} classes drawn for each picture" if drawn else "mosaics with all classes"
    return (
        f"{figures['n_pictures']} pictures of {protocol['data_module']}, {protocol['split']} split "
        f"({data['pictures']} pictures, {data['objects']} objects, {str(data['sha256'])[:12]}), "
        f"{len(figures['classes'])} classes; {together}; {below}; model {protocol['model_sha256'][:12]}, "
        f"seed {protocol['seed']}. {figures['n_without_target']} pictures show none of the classes."
    )


def _markdown(title: str, figures: Mapping[str, Any], tables: Sequence[Block]) -> str:
    return to_markdown([Heading(title), Text(figures["verdict"]["sentence"]), Text(_about(figures)), *tables])


def _html(title: str, figures: Mapping[str, Any], tables: Sequence[Block], audit: Audit) -> str:
    sections = [
        to_html([Heading(title)]),
        f"<p><strong>{escape(figures['verdict']['sentence'])}</strong></p>",
        to_html([Text(_about(figures))]),
        _kinds(figures["kinds"]),
        to_html(tables),
        picture_section(audit.examples),
    ]
    return page(title, sections)


_WIDTH, _LEFT, _ROW = 640, 130, 30


def _kinds(kinds: Mapping[str, Mapping[str, float]]) -> str:
    """Count over true count for each kind of prompt: middle half, 5 to 95 %, median and mean."""
    if not kinds:
        return ""
    low = min(0.0, *(one["p5"] for one in kinds.values()))
    high = max(1.5, *(max(one["p95"], one["mean"]) for one in kinds.values()))
    height = _ROW * len(kinds) + 40

    def x(value: float) -> str:
        return f"{_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - 16):.1f}"

    def upright(value: float, middle: float, half: float, style: str) -> str:
        return f'<line x1="{x(value)}" x2="{x(value)}" y1="{middle - half:.1f}" y2="{middle + half:.1f}" {style}/>'

    dashed, thick = 'stroke="#b8c0cc" stroke-dasharray="4 3"', 'stroke="#2a6fdb" stroke-width="2"'
    drawn = [
        f'<text x="{x(value)}" y="{height - 8}" text-anchor="middle">{value:g}</text>'
        + upright(value, height / 2 - 14, height / 2 - 18, dashed)
        for value in (0.0, 1.0)
    ]
    drawn.append(f'<text x="{_WIDTH - 16}" y="{height - 8}" text-anchor="end">{high:.2f}</text>')
    for i, (kind, one) in enumerate(kinds.items()):
        y, box = 20 + _ROW * i, float(x(one["p75"])) - float(x(one["p25"]))
        drawn.append(
            f'<text x="{_LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(kind)}</text>'
            f'<line x1="{x(one["p5"])}" x2="{x(one["p95"])}" y1="{y}" y2="{y}" stroke="#2a6fdb"/>'
            f'<rect x="{x(one["p25"])}" y="{y - 8}" width="{max(box, 1):.1f}" height="16" fill="#2a6fdb" '
            f'fill-opacity=".35"/>{upright(one["median"], y, 8, thick)}'
            f'<circle cx="{x(one["mean"])}" cy="{y}" r="4" fill="#d9480f"/>'
        )
    caption = "Count over the true count of the picture's own name: middle half, 5 to 95 %, median; dot: mean"
    return f"<figure>{svg(''.join(drawn), _WIDTH, height)}<figcaption>{escape(caption)}</figcaption></figure>"
