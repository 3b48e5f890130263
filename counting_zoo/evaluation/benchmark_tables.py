"""The tables of a benchmark on one data set, from its stored JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from counting_zoo.class_metrics import MeanStatistic
from counting_zoo.evaluation.count_table import GAME_COLUMNS
from counting_zoo.evaluation.document import Block, Cell, Heading, Items, Link, Table, Text
from counting_zoo.evaluation.statistics import METRICS

TITLES = {
    "mae": "MAE", "rmse": "RMSE", "nae": "NAE", "bias": "bias", "game1": "GAME(1)", "game2": "GAME(2)",
    "game3": "GAME(3)", "mrmse": "mRMSE", "mrmse_nz": "mRMSE-nz", "m_rel_rmse": "m-relRMSE",
    "m_rel_rmse_nz": "m-relRMSE-nz",
}  # fmt: skip
CLASS_MEANS: tuple[str, ...] = get_args(MeanStatistic)
Scores = Mapping[str, Any]


def data_blocks(entry: Scores, bootstrap: Scores) -> list[Block]:
    """Everything about one data set.

    Args:
        entry: one of ``data`` in ``benchmark.json``.
        bootstrap: how its intervals were made.
    """
    blocks: list[Block] = [Heading(entry["name"]), Items(list(_protocol(entry)))]
    blocks += [Heading("Errors", 1), _score_table(entry, ""), *_score_notes(entry, bootstrap)]
    if any("totals" in model["figures"] for model in entry["models"]):
        blocks += [Heading("Errors of the total of each picture", 1), _score_table(entry, "totals")]
    if any("classes" in model["figures"] for model in entry["models"]):
        note = "Means over classes (Chattopadhyay et al., CVPR 2017); nz: over pictures that have the class."
        blocks += [Heading("Errors by class", 1), _score_table(entry, "classes"), Text(note)]
    for part in (_published, _comparisons, _decades, _coverage, _largest_errors, _failed, _facts):
        blocks += part(entry)
    return blocks


def skipped_blocks(skipped: Sequence[Scores]) -> list[Block]:
    """What could not be scored, and why."""
    if not skipped:
        return []
    return [Heading("Not scored"), Items([f"{one['model']} on {one['data']}: {one['reason']}" for one in skipped])]


def constants(entry: Scores, part: str = "") -> list[tuple[str, Scores]]:
    """Label and scores of each constant prediction, once where all models have it on the same rows.

    Args:
        entry: of the data set.
        part: ``totals``, ``classes``, or empty for the figures over rows.
    """
    found: dict[str, dict[str, list[str]]] = {}
    scores: dict[str, Scores] = {}
    for model in entry["models"]:
        figures = model["figures"]
        source = figures["totals"] if part == "totals" and "totals" in figures else figures
        for name, values in source["constants"].items():
            picked = (
                values.get("classes", {}) if part == "classes" else {k: v for k, v in values.items() if k in TITLES}
            )
            if picked:
                key = json.dumps(picked, sort_keys=True)
                found.setdefault(name, {}).setdefault(key, []).append(model["model"])
                scores[key] = values["classes"] if part == "classes" else values
    return [
        (constant_label(name) + (f" (on the rows of {', '.join(models)})" if len(by_key) > 1 else ""), scores[key])
        for name, by_key in found.items()
        for key, models in by_key.items()
    ]


def constant_label(name: str) -> str:
    """What a constant predictor is called.

    Example:
        >>> constant_label("train_mean"), constant_label("always_1")
        ('always the training mean', 'always 1')
    """
    words = name.replace("train_", "training ").replace("_", " ")
    return words if words.startswith("always") else f"always the {words}"


def with_interval(scores: Scores, metric: str) -> str:
    """``3.29 [2.80, 3.81]``.

    Example:
        >>> with_interval({"mae": 3.287, "interval": {"mae": [2.8, 3.81]}}, "mae")
        '3.29 [2.80, 3.81]'
    """
    if metric not in scores:
        return "–"
    return _number(scores[metric], metric) + _ends(scores.get("interval", {}).get(metric), metric)


def _score_table(entry: Scores, part: str) -> Table:
    """Models and constants with their intervals; ``part`` as for :func:`constants`."""
    rows: list[tuple[str, Scores]] = []
    for model in entry["models"]:
        figures = model["figures"]
        if part == "classes":
            figures = figures.get("classes", {})
        elif part == "totals":
            figures = figures.get("totals", figures)
        rows.append((model["model"], figures))
    n_models = len(rows)
    rows += constants(entry, part)
    allowed = {"": (*METRICS, *GAME_COLUMNS), "totals": METRICS, "classes": CLASS_MEANS}[part]
    metrics = [key for key in allowed if any(key in scores for _, scores in rows)]
    lines = [[name, *(with_interval(scores, metric) for metric in metrics)] for name, scores in rows]
    return Table(["", *(TITLES[metric] for metric in metrics)], lines, bold=frozenset(range(n_models)))


def _protocol(entry: Scores) -> Iterator[str]:
    yield from entry["protocol"]
    for model in entry["models"]:
        yield from (f"{model['model']}: {sentence}" for sentence in model["protocol"])
    if entry["facts_differ"]:
        names = ", ".join(entry["facts_differ"])
        yield f"Not the same data: what is known of them differs for {names}; see the facts at the end."


def _score_notes(entry: Scores, bootstrap: Scores) -> list[Block]:
    level = f"{100 * bootstrap['level']:g}"
    notes = [
        f"In brackets, {level} % intervals over the choice of pictures ({bootstrap['resamples']} bootstrap draws, seed "
        f"{bootstrap['seed']}); how much another training run would change is not in them. NAE is the mean of "
        "|predicted - true| / true over counts above zero; bias is the mean of predicted - true. The last rows say the "
        "same whatever the picture."
        if constants(entry)
        else f"In brackets, {level} % intervals over the choice of pictures ({bootstrap['resamples']} bootstrap draws, "
        f"seed {bootstrap['seed']}). No constant predictors are known for these data."
    ]
    for model in entry["models"]:
        figures, name = model["figures"], model["model"]
        said = [f"{name}: {figures['rows']} counts in {figures['pictures']} pictures"]
        if model["all_names_together"]:
            said.append("counts without names, and is scored on all names together")
        if figures["rows_without_target"]:
            said.append(f"{figures['rows_without_target']} counts whose true count is not known are left out")
        if figures["rows_not_finite"]:
            said.append(f"NaN or infinity was predicted {figures['rows_not_finite']} times, so there are no errors")
        if model["failed"]:
            said.append(f"not counted: {len(model['failed'])} (see below)")
        if "n_game" in figures and figures["n_game"] < figures["rows"]:
            said.append(f"GAME over the {figures['n_game']} counts that have points")
        notes.append("; ".join(said) + ".")
    return [Text(notes[0]), Items(notes[1:])]


def _published(entry: Scores) -> list[Block]:
    found = entry["published"]
    if not found:
        return []
    metrics = [key for key in TITLES if any(key in result["metrics"] for result in found)]
    rows: list[list[Cell]] = [
        [
            result["model"],
            *(str(result["metrics"][key]) if key in result["metrics"] else "–" for key in metrics),
            result["protocol"],
            Link(result["source"] + (f" (arXiv {result['arxiv']})" if result["arxiv"] else ""), result["url"]),
        ]
        for result in found
    ]
    header = ["published, not measured here", *(TITLES[key] for key in metrics), "protocol", "source"]
    note = "Others' figures under their own protocols: a difference to a figure measured here may be the protocol's."
    return [Heading("Published results", 1), Table(header, rows, numbers=False), Text(note)]


def _comparisons(entry: Scores) -> list[Block]:
    found = entry["comparisons"]
    if not found:
        return []
    names = [model["model"] for model in entry["models"]]
    cells = {}
    for pair in found:
        if "mae" in pair:
            difference, ends = pair["mae"]["difference"], pair["mae"].get("interval")
            cells[pair["a"], pair["b"]] = _difference(difference, ends)
            cells[pair["b"], pair["a"]] = _difference(-difference, ends and [-ends[1], -ends[0]])
    matrix = [[a, *("" if a == b else cells.get((a, b), "–") for b in names)] for a in names]
    header = ["", "", "compared on", "difference of RMSE", "first is better", "second is better", "not compared"]
    lines = []
    for pair in found:
        on = "pictures' totals" if pair["compared"] == "totals" else "counts"
        skipped = pair["only_a"] + pair["only_b"] + pair["left_out"]
        rmse = pair.get("rmse", {})
        lines.append([
            pair["a"], pair["b"], f"{pair['rows']} {on}, {pair['pictures']} pictures",
            _difference(rmse["difference"], rmse.get("interval")) if rmse else "–",
            *(f"{100 * pair[key]:.0f} %" if key in pair else "–" for key in ("a_better", "b_better")),
            f"{skipped} pictures, {pair['rows_left_out']} counts",
        ])  # fmt: skip
    note = (
        "MAE of the row minus MAE of the column on the same pictures, below zero where the row is better; * where the "
        "interval leaves out zero, without a correction for the number of pairs. A better model of a picture has the "
        "smaller absolute error, summed over its names."
    )
    return [
        Heading("Paired differences", 1), Table(["MAE", *(f"- {name}" for name in names)], matrix), Text(note),
        Table(header, lines, numbers=False),
    ]  # fmt: skip


def _decades(entry: Scores) -> list[Block]:
    models = [model for model in entry["models"] if model["figures"].get("decades")]
    if not models:
        return []
    by_model = [{decade["from"]: decade for decade in model["figures"]["decades"]} for model in models]
    starts = sorted(set().union(*by_model))
    rows = []
    for start in starts:
        row = [_counts(start)]
        for found in by_model:
            decade = found.get(start)
            row.append(
                "–" if decade is None else f"{_number(decade['mae'])} / {_signed(decade['bias'])} / "
                f"{_number(decade['nae'], 'nae') if 'nae' in decade else '–'} ({decade['rows']})"
            )  # fmt: skip
        rows.append(row)
    return [
        Heading("Errors by true count", 1), Table(["true count", *(model["model"] for model in models)], rows),
        Text("MAE / bias / NAE (how many counts)."),
    ]  # fmt: skip


def _coverage(entry: Scores) -> list[Block]:
    rows = []
    for model in entry["models"]:
        coverage = model["figures"].get("coverage")
        for part in [coverage, *coverage["decades"]] if coverage else []:
            label = "all" if part is coverage else f"from {part['from']}, below {part['below']}"
            ends = " to ".join(f"{100 * bound:.1f}" for bound in part["bounds"])
            width = _number(part["mean_width"]) if "mean_width" in part else "–"
            rows.append([model["model"], label, str(part["rows"]), f"{100 * part['share']:.1f} % ({ends})", width,
                         str(part["unbounded"])])  # fmt: skip
    if not rows:
        return []
    header = ["", "predicted count", "counts", "true count inside", "mean width", "without bound"]
    note = (
        "The model's own intervals; in brackets, exact binomial bounds of the share, which take counts for independent."
    )
    return [Heading("Intervals of the models", 1), Table(header, rows), Text(note)]


def _largest_errors(entry: Scores) -> list[Block]:
    rows = [
        [model["model"], row["image"], row["name"], f"{row['target']:g}", _number(row["predicted"])]
        for model in entry["models"]
        for row in model["largest_errors"]
    ]
    table = Table(["", "picture", "name", "true", "predicted"], rows, numbers=False)
    return [Heading("Largest errors", 1), table] if rows else []


def _failed(entry: Scores, most: int = 20) -> list[Block]:
    items = []
    for model in entry["models"]:
        failed = model["failed"]
        items += [f"{model['model']}: {image}: {reason}" for image, reason in failed[:most]]
        if len(failed) > most:
            items.append(f"{model['model']}: and {len(failed) - most} more")
    return [Heading("Pictures that were not counted", 1), Items(items)] if items else []


def _facts(entry: Scores) -> list[Block]:
    models = entry["models"]
    data = [model["data_facts"] for model in models] if entry["facts_differ"] else [entry["facts"]]
    header = ["data", *(m["model"] for m in models)] if entry["facts_differ"] else ["data", ""]
    tables: list[Block] = [_fact_table(header, data)] if any(data) else []
    if any(model["facts"] for model in models):
        tables.append(_fact_table(["model", *(m["model"] for m in models)], [model["facts"] for model in models]))
    return [Heading("What was measured", 1), *tables] if tables else []


def _fact_table(header: list[str], facts: Sequence[Mapping[str, Any]]) -> Table:
    keys = sorted(set().union(*facts))
    rows = [[key, *(_fact(each[key]) if key in each else "–" for each in facts)] for key in keys]
    return Table(header, rows, numbers=False)


def _fact(value: Any, most: int = 100) -> str:
    """A fact in a cell; what is too long for one, such as a whole recipe, is in the JSON."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= most else "see benchmark.json"


def _counts(start: int) -> str:
    return f"{start} to {10 * start - 1}" if start else "0"


def _number(value: float, metric: str = "") -> str:
    digits = 3 if metric in ("nae", *CLASS_MEANS) else 2
    return f"{value:.{digits}f}" if abs(value) < 1000 else f"{value:.0f}"


def _signed(value: float) -> str:
    return f"+{_number(value)}" if value > 0 else _number(value)


def _ends(ends: Sequence[float] | None, metric: str = "") -> str:
    return f" [{_number(ends[0], metric)}, {_number(ends[1], metric)}]" if ends else ""


def _difference(value: float, ends: Sequence[float] | None) -> str:
    sure = ends is not None and (ends[0] > 0 or ends[1] < 0)
    return _signed(value) + (f" [{_signed(ends[0])}, {_signed(ends[1])}]" if ends else "") + ("*" if sure else "")


__all__ = ["CLASS_MEANS", "TITLES", "constant_label", "constants", "data_blocks", "skipped_blocks", "with_interval"]
