"""The files of an audit: JSON, tables, Markdown and a page of HTML that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from counting_zoo.evaluation.audit import Audit
from counting_zoo.evaluation.audit_figures import audit_figures, prompt_rows
from counting_zoo.evaluation.audit_questions import GRIDS
from counting_zoo.evaluation.count_table import CountTable
from counting_zoo.evaluation.page import number, page, picture_section, svg
from counting_zoo.evaluation.tables import replacing, write_table


@dataclass(frozen=True)
class Section:
    """A table of the report with its title and what it means."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


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
    sections = _sections(figures)
    title = f"Does {figures['protocol']['model']} count what it is asked for?"
    _write(folder / "audit.json", json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    CountTable.of(prompt_rows(audit)).write(folder / "audit_counts.csv")
    cells = [f"{kind}_{grid}x{grid}" for grid in GRIDS for kind in ("tp", "fp")]
    write_table(
        folder / "audit_mosaics.csv",
        ("image", "class_below", "image_below", "true", "upper", "lower", *cells),
        [
            (m.image_id, m.name, m.below, m.truth, m.upper, m.lower, *sum(zip(m.tp, m.fp, strict=True), ()))
            for m in audit.mosaics
        ],
    )  # fmt: skip
    _write(folder / "audit.md", _markdown(title, figures, sections))
    _write(folder / "audit.html", _html(title, figures, sections, audit))
    if audit.cost is not None:
        cost = asdict(audit.cost) | {"ratio": audit.cost.ratio}
        _write(folder / "audit_cost.json", json.dumps(cost, indent=1) + "\n")
    return figures


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# -- tables -----------------------------------------------------------------------------------------------------------


def _sections(figures: Mapping[str, Any]) -> list[Section]:
    judged = figures["verdict"]
    sections = [
        Section(
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
    ]
    if "negative" in figures:
        sections.append(_negative(figures["negative"]))
    if "multi_class" in figures:
        sections.append(_multi_class(figures["multi_class"]))
    if "mosaic" in figures:
        sections.append(_mosaic(figures["mosaic"], figures["protocol"]["mosaics"]))
    if "pairs" in figures:
        sections.append(_pairs(figures["pairs"]))
    if "label_free" in figures:
        sections += _label_free(figures["label_free"])
    if figures["left_out"]:
        sections.append(Section("Left out", ("test", "because"), list(figures["left_out"].items())))
    if figures["failed"]:
        rows = [(str(image_id), str(reason)) for image_id, reason in figures["failed"]]
        sections.append(Section(f"Not counted: {len(rows)}", ("picture", "because"), rows[:20]))
    return sections


def _negative(found: Mapping[str, Any]) -> Section:
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
    return Section("Negative labels", ("", "figure", "as PrACo"), rows, note)


def _multi_class(found: Mapping[str, Any]) -> Section:
    rows = [
        (label, _figure(found[f"{key}_macro"]), _figure(found[f"{key}_micro"]))
        for key, label in (
            ("mnp", "MNP: mean count of absent names"), ("nmn", "NMN: the same / sum of the true counts"),
            ("mae", "MAE of the names that are there"), ("rmse", "RMSE of the names that are there"),
        )
    ]  # fmt: skip
    rows += [
        ("PCCN, one true count at a time", _figure(found["pccn_one_at_a_time"]), ""),
        ("PCCN, mean of the true counts", _figure(found["pccn_mean_truth"]), ""),
    ]
    note = f"{found['n']} pictures, all names that are there taken for right ones (PrACo++); {found['n_left_out']} out."
    return Section("Several classes in a picture", ("", "over pictures", "pooled"), rows, note)


def _mosaic(found: Mapping[str, Any], drawn: int) -> Section:
    labels = {"global": "halves", "official": "halves, as PrACo"}
    rows = [
        (labels.get(place, place), *(_figure(scores[key]) for key in ("cnt_p", "cnt_r", "cnt_f1")), str(scores["n"]))
        for place, scores in found.items()
    ]
    note = (
        "A picture above another one that lacks its name, asked for its own: what is counted below is false. Averaged "
        "over the classes below, then over pictures; what has a denominator of 0 is skipped. "
        + (f"{drawn} classes were drawn for each picture." if drawn else "All classes, as in PrACo.")
    )
    return Section("Mosaics", ("", "CntP", "CntR", "CntF1", "mosaics"), rows, note)


def _pairs(found: Mapping[str, Any]) -> Section:
    rows = [
        (label, _figure(found[key]))
        for key, label in (
            ("error_a", "|f(A) - a|"), ("error_both", "|f(A+B) - (a+b)|"), ("a_from_both", "|f(A) - (a+b)|"),
            ("change", "|f(A) - f(A+B)|"), ("over", "f(A) > a, %"), ("nearer_both", "f(A) nearer to a+b than to a, %"),
        )
    ]  # fmt: skip
    note = (
        f"{found['n']} pictures that show exactly two classes: a of the own name A and b of the other, B (PairTally, "
        "arXiv 2509.13939). f(A+B) is the sum of the counts of both names when both are asked together."
    )
    return Section("Two classes in one picture", ("", "mean"), rows, note)


def _label_free(found: Mapping[str, Any]) -> list[Section]:
    ratios = [
        (label, _figure(found[key]))
        for key, label in (
            ("empty_ratio", "empty prompt (a full stop)"), ("nonsense_ratio", "nonsense"),
            ("paraphrase_ratio", "paraphrases (1 at best)"),
        )
    ]  # fmt: skip
    labels = {"number": "singular and plural", "case": "upper and lower case", "all": "all of these"}
    spreads = [
        (labels.get(kind, "paraphrases"), _figure(one["mean"]), _figure(one["p95"]), str(one["n"]))
        for kind, one in found["spread"].items()
    ]
    blanks = [(kind, _figure(one["mean"]), _figure(one["max"])) for kind, one in found["blank"].items()]
    note = "Standard deviation over mean of the counts within a picture, the name itself among them."
    return [
        Section("Prompts without meaning, and other words for the same", ("", "count / count of the name"), ratios),
        Section("Spread over prompts that mean the same", ("", "mean", "95th percentile", "pictures"), spreads, note),
        Section("Pictures that show nothing", ("", "mean count", "largest of a class"), blanks),
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
    return (
        f"{figures['n_pictures']} pictures of {protocol['data_module']}, {protocol['split']} split "
        f"({data['pictures']} pictures, {data['objects']} objects, {str(data['sha256'])[:12]}), "
        f"{len(figures['classes'])} classes; {together}; model {protocol['model_sha256'][:12]}, "
        f"seed {protocol['seed']}. {figures['n_without_target']} pictures show none of the classes."
    )


def _markdown(title: str, figures: Mapping[str, Any], sections: Sequence[Section]) -> str:
    parts = [f"# {title}", f"**{figures['verdict']['sentence']}**", _about(figures)]
    for section in sections:
        rows = [section.head, ["---"] * len(section.head), *section.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        parts += [f"## {section.title}", table, *([section.note] if section.note else [])]
    return "\n\n".join(parts) + "\n"


def _html(title: str, figures: Mapping[str, Any], sections: Sequence[Section], audit: Audit) -> str:
    blocks = [
        f"<h1>{escape(title)}</h1>",
        f"<p><strong>{escape(figures['verdict']['sentence'])}</strong></p>",
        f'<p class="note">{escape(_about(figures))}</p>',
        _kinds(figures["kinds"]),
    ]
    for section in sections:
        head = "".join(f"<th{_numeric(i)}>{escape(cell)}</th>" for i, cell in enumerate(section.head))
        rows = "".join(
            "<tr>" + "".join(f"<td{_numeric(i)}>{escape(cell)}</td>" for i, cell in enumerate(row)) + "</tr>"
            for row in section.rows
        )
        note = f'<p class="note">{escape(section.note)}</p>' if section.note else ""
        blocks.append(f"<h2>{escape(section.title)}</h2><table><tr>{head}</tr>{rows}</table>{note}")
    return page(title, [*blocks, picture_section(audit.examples)])


def _numeric(column: int) -> str:
    return ' class="n"' if column else ""


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


__all__ = ["write_audit"]
