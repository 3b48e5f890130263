"""The files of a benchmark: several models on several data sets, as JSON, CSV, Markdown and HTML.

Nothing in them depends on when or where they are written, so the same counts give the same bytes. What does, time and
memory, goes to files of its own (:func:`write_costs`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.evaluation.report import (
    Block,
    Cell,
    Heading,
    Images,
    Items,
    Link,
    Picture,
    Table,
    Text,
    interval_plot,
    jpeg,
    page,
    picture_section,
    scatter,
    to_html,
    to_markdown,
)
from counting_zoo.io import plain, write_table, write_whole
from counting_zoo.metrics.counts import GAME_COLUMNS, CountTable, MeanStatistic
from counting_zoo.metrics.statistics import JOIN, METRICS, Bootstrap, compare, summarise
from counting_zoo.version import __version__


@dataclass(frozen=True)
class Published:
    """One published result; nothing in it was measured by this package.

    Args:
        model: its name, and which weights where there are several.
        data: the class of the data module, such as ``FSC147``.
        settings: arguments of the data module that the result belongs to, such as ``{"part": "A"}``.
        split: ``val`` or ``test``.
        metrics: by the names of :mod:`counting_zoo.metrics.counts`: ``mae``, ``rmse``, ``nae`` (a share, not per cent),
            ``mrmse``, ...
        source: where it was read.
        url: of the source, empty where none is on record.
        arxiv: id of the model's paper, empty where none is on record.
        protocol: what else it depends on.
    """

    model: str
    data: str
    settings: Mapping[str, Any]
    split: str
    metrics: Mapping[str, float]
    source: str
    url: str
    arxiv: str
    protocol: str


def published(data: str, split: str, settings: Mapping[str, Any] | None = None) -> list[Published]:
    """What is published for a data set, best first by MAE or mRMSE.

    Figures that were not read at a source, and those on which sources disagree, are not in the list.

    Args:
        data: the class of the data module.
        split: ``train``, ``val`` or ``test``.
        settings: arguments of the data module: a result for other settings is left out. ``None`` takes all.

    Example:
        >>> [(r.model, r.metrics["mae"]) for r in published("ShanghaiTech", "test", {"part": "B"})][0]
        ('ZIP-B, 105.6 M parameters', 5.51)
    """
    return [
        result
        for result in _all()
        if (result.data, result.split) == (data, split)
        and (settings is None or all(settings.get(key) == value for key, value in result.settings.items()))
    ]


def deciding_settings(data: str) -> list[str]:
    """The arguments of a data module that decide which published results belong to it.

    Example:
        >>> deciding_settings("ShanghaiTech"), deciding_settings("FSC147")
        (['part'], [])
    """
    return sorted({key for result in _all() if result.data == data for key in result.settings})


@cache
def _all() -> tuple[Published, ...]:
    text = resources.files("counting_zoo.evaluation").joinpath("published.json").read_text(encoding="utf-8")
    found = [Published(**entry) for entry in json.loads(text)]
    return tuple(sorted(found, key=lambda r: (r.metrics.get("mae", r.metrics.get("mrmse", 0.0)), r.model)))


TITLES = {
    "mae": "MAE",
    "rmse": "RMSE",
    "nae": "NAE",
    "bias": "bias",
    "game1": "GAME(1)",
    "game2": "GAME(2)",
    "game3": "GAME(3)",
    "mrmse": "mRMSE",
    "mrmse_nz": "mRMSE-nz",
    "m_rel_rmse": "m-relRMSE",
    "m_rel_rmse_nz": "m-relRMSE-nz",
}


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
    for part in (_published, _comparisons, _decades, _coverage, _largest_error_table, _failed, _facts):
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
        lines.append(
            [
                pair["a"],
                pair["b"],
                f"{pair['rows']} {on}, {pair['pictures']} pictures",
                _difference(rmse["difference"], rmse.get("interval")) if rmse else "–",
                *(f"{100 * pair[key]:.0f} %" if key in pair else "–" for key in ("a_better", "b_better")),
                f"{skipped} pictures, {pair['rows_left_out']} counts",
            ]
        )
    note = (
        "MAE of the row minus MAE of the column on the same pictures, below zero where the row is better; * where the "
        "interval leaves out zero, without a correction for the number of pairs. A better model of a picture has the "
        "smaller absolute error, summed over its names."
    )
    return [
        Heading("Paired differences", 1),
        Table(["MAE", *(f"- {name}" for name in names)], matrix),
        Text(note),
        Table(header, lines, numbers=False),
    ]


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
                "–"
                if decade is None
                else f"{_number(decade['mae'])} / {_signed(decade['bias'])} / "
                f"{_number(decade['nae'], 'nae') if 'nae' in decade else '–'} ({decade['rows']})"
            )
        rows.append(row)
    return [
        Heading("Errors by true count", 1),
        Table(["true count", *(model["model"] for model in models)], rows),
        Text("MAE / bias / NAE (how many counts)."),
    ]


def _coverage(entry: Scores) -> list[Block]:
    rows = []
    for model in entry["models"]:
        coverage = model["figures"].get("coverage")
        for part in [coverage, *coverage["decades"]] if coverage else []:
            label = "all" if part is coverage else f"from {part['from']}, below {part['below']}"
            ends = " to ".join(f"{100 * bound:.1f}" for bound in part["bounds"])
            width = _number(part["mean_width"]) if "mean_width" in part else "–"
            rows.append(
                [
                    model["model"],
                    label,
                    str(part["rows"]),
                    f"{100 * part['share']:.1f} % ({ends})",
                    width,
                    str(part["unbounded"]),
                ]
            )
    if not rows:
        return []
    header = ["", "predicted count", "counts", "true count inside", "mean width", "without bound"]
    note = (
        "The model's own intervals; in brackets, exact binomial bounds of the share, which take counts for independent."
    )
    return [Heading("Intervals of the models", 1), Table(header, rows), Text(note)]


def _largest_error_table(entry: Scores) -> list[Block]:
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


LARGEST = 5
"""So many of the largest errors of each model are listed."""


DIGITS = 10
"""Significant digits of floats in ``benchmark.json``, so that the order of a sum cannot be seen."""


@dataclass(frozen=True)
class Run:
    """One model on one data set.

    Args:
        model: the name it goes by; unlike those of the other models on these data.
        data: the name the data go by; the same for all models on them.
        table: what was counted.
        constants: predictions that need no picture: one number, or one for each name.
        model_facts: what is known of the model: class, parameters, checksum of the checkpoint, ...; ready for JSON.
        data_facts: what is known of the data: ``class`` and ``split`` choose the published results that stand beside,
            ``settings`` (arguments of the data module) those of them that fit; pictures, checksum, ...; ready for JSON.
        protocol: how it was measured, a sentence each.
        pictures: drawings of the best and the worst.
        failed: id and reason of each picture that could not be read or counted.
    """

    model: str
    data: str
    table: CountTable
    constants: dict[str, float | dict[str, float]] = field(default_factory=dict)
    model_facts: dict[str, Any] = field(default_factory=dict)
    data_facts: dict[str, Any] = field(default_factory=dict)
    protocol: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def write_benchmark(
    out: str | Path,
    runs: Sequence[Run],
    *,
    title: str,
    resamples: int = 2000,
    seed: int = 0,
    skipped: Sequence[tuple[str, str, str]] = (),
) -> dict[str, Path]:
    """Write ``benchmark.json``, ``benchmark.csv``, ``benchmark.md``, ``benchmark.html`` and ``pictures/*.jpg``.

    Args:
        out: the folder; files of an earlier benchmark are replaced.
        runs: in the order in which they are to be shown.
        title: of the reports.
        resamples: of the bootstrap (:class:`~counting_zoo.metrics.statistics.Bootstrap`).
        seed: of its draws.
        skipped: model, data and reason of what could not be scored.

    Returns:
        The files by their endings, and ``pictures``.

    Raises:
        InputError: two runs have the same model and data, a table cannot be scored, or a fact is not ready for JSON.
    """
    out = Path(out)
    names = [_file_names(i, run) for i, run in enumerate(runs)]
    results = benchmark_results(runs, names, title=title, bootstrap=Bootstrap(resamples, seed), skipped=skipped)
    paths = {kind: out / f"benchmark.{kind}" for kind in ("json", "csv", "md", "html")}
    paths["pictures"] = out / "pictures"
    text = {
        "json": json.dumps(results, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "md": results_section(results, level=1, folder="."),
        "html": _html(results, runs),
    }
    for kind, content in text.items():
        write_whole(paths[kind], content)
    write_table(paths["csv"], CSV_COLUMNS, _csv_rows(results))
    for old in paths["pictures"].glob("*.jpg"):
        if re.fullmatch(r"\d+-\d+\.jpg", old.name):
            old.unlink()
    for run, files in zip(runs, names, strict=True):
        for picture, file in zip(run.pictures, files, strict=True):
            write_whole(out / file, jpeg(picture.drawing))
    return paths


def benchmark_results(
    runs: Sequence[Run],
    pictures: Sequence[Sequence[str]],
    *,
    title: str,
    bootstrap: Bootstrap,
    skipped: Sequence[tuple[str, str, str]] = (),
) -> dict[str, Any]:
    """What ``benchmark.json`` holds.

    Args:
        runs: at most one of each model and data set.
        pictures: for each run, the files of its pictures.
        title: of the reports.
        bootstrap: how intervals are made.
        skipped: model, data and reason of what could not be scored.
    """
    seen: set[tuple[str, str]] = set()
    by_data: dict[str, list[tuple[Run, Sequence[str]]]] = {}
    for run, files in zip(runs, pictures, strict=True):
        if (run.model, run.data) in seen:
            raise InputError(f"two runs of model {run.model!r} on data {run.data!r}; give each model a name of its own")
        seen.add((run.model, run.data))
        by_data.setdefault(run.data, []).append((run, files))
    results = {
        "title": title,
        "version": __version__,
        "bootstrap": asdict(bootstrap),
        "data": [_data(name, found, bootstrap) for name, found in by_data.items()],
        "skipped": [{"model": model, "data": data, "reason": reason} for model, data, reason in skipped],
    }
    return plain(results, "benchmark", digits=DIGITS)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read ``benchmark.json``, or that of a folder.

    Raises:
        InputError: it is not there, or something else.
    """
    path = Path(path)
    path = path / "benchmark.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as the JSON of a benchmark: {error}") from error
    missing = {"title", "bootstrap", "data"} - set(found if isinstance(found, dict) else ())
    if missing:
        raise InputError(f"{path}: is not the JSON of a benchmark: it has no {', '.join(sorted(missing))}")
    return found


def results_section(results: Mapping[str, Any], level: int = 2, folder: str | None = None) -> str:
    """The Markdown of a stored benchmark.

    Args:
        results: what :func:`read_results` gives.
        level: of its heading.
        folder: of the benchmark, relative to the page, to show its pictures; ``None`` to leave them out.
    """
    blocks: list[Block] = [Heading(results["title"])]
    for entry in results["data"]:
        blocks += [_lower(block) for block in data_blocks(entry, results["bootstrap"])]
        files = [
            (f"{folder}/{picture['file']}", f"{model['model']}, {picture['group']}: {picture['caption']}")
            for model in entry["models"]
            for picture in model["pictures"]
        ]
        if files and folder is not None:
            blocks += [Heading("Pictures", 2), Images(files)]
    blocks += [_lower(block) for block in skipped_blocks(results.get("skipped", []))]
    return to_markdown(blocks, level)


def write_costs(out: str | Path, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Write what counting cost to ``costs.json`` and ``costs.md``: these change from run to run and machine to machine.

    Args:
        out: the folder.
        costs: by model, numbers and words such as ``pictures_per_second``, ``peak_memory_mib``, ``device``.
    """
    out = Path(out)
    found = plain(costs, "costs", digits=DIGITS)
    keys = list(dict.fromkeys(key for each in found.values() for key in each))
    rows: list[list[Cell]] = [[name, *(_cost(each.get(key)) for key in keys)] for name, each in found.items()]
    note = "Measured apart from accuracy; these figures belong to the machine and the moment."
    blocks: list[Block] = [
        Heading("Costs"),
        Table(["", *(key.replace("_", " ") for key in keys)], rows, numbers=False),
        Text(note),
    ]
    paths = {"json": out / "costs.json", "md": out / "costs.md"}
    write_whole(paths["json"], json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_whole(paths["md"], to_markdown(blocks))
    return paths


def _data(name: str, found: Sequence[tuple[Run, Sequence[str]]], bootstrap: Bootstrap) -> dict[str, Any]:
    """All models on one data set."""
    runs = [run for run, _ in found]
    facts = runs[0].data_facts
    shared = [sentence for sentence in runs[0].protocol if all(sentence in run.protocol for run in runs)]
    beside = published(str(facts.get("class")), str(facts.get("split")), facts.get("settings", {}))
    return {
        "name": name,
        "facts": facts,
        "facts_differ": [run.model for run in runs if run.data_facts != facts],
        "protocol": shared,
        "models": [_model(run, files, shared, bootstrap) for run, files in found],
        "comparisons": [
            {"a": a.model, "b": b.model, **compare(a.table, b.table, bootstrap)} for a, b in combinations(runs, 2)
        ],
        "published": [asdict(result) for result in beside],
    }


def _model(run: Run, files: Sequence[str], shared: Sequence[str], bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "model": run.model,
        "facts": run.model_facts,
        "data_facts": run.data_facts,
        "protocol": [sentence for sentence in run.protocol if sentence not in shared],
        "all_names_together": any(JOIN in name for name in run.table.name),
        "figures": summarise(run.table, run.constants, bootstrap),
        "largest_errors": _largest_errors(run.table),
        "failed": run.failed,
        "pictures": [
            {"file": file, "group": picture.group, "caption": picture.caption}
            for picture, file in zip(run.pictures, files, strict=True)
        ],
    }


def _largest_errors(table: CountTable) -> list[dict[str, Any]]:
    error = np.nan_to_num(np.abs(table.predicted - table.target), nan=-1.0, posinf=-1.0)
    order = sorted(range(len(table)), key=lambda i: (-error[i], table.image[i], table.name[i]))[:LARGEST]
    return [
        {"image": table.image[i], "name": table.name[i], "target": table.target[i], "predicted": table.predicted[i]}
        for i in order
        if error[i] >= 0
    ]


def _html(results: Mapping[str, Any], runs: Sequence[Run]) -> str:
    sections = [to_html([Heading(results["title"])])]
    for entry in results["data"]:
        heading, *blocks = data_blocks(entry, results["bootstrap"])
        own = [run for run in runs if run.data == entry["name"]]
        rows = [(model["model"], model["figures"], True) for model in entry["models"]]
        rows += [(label, scores, False) for label, scores in constants(entry)]
        plot = interval_plot(
            [(n, s["mae"], s.get("interval", {}).get("mae"), model) for n, s, model in rows if "mae" in s],
            "MAE",
            "Mean absolute errors with their intervals; grey: the same number whatever the picture",
        )
        dots = "".join(scatter(_dots(run.table), run.model) for run in own)
        drawings = [replace(p, group=f"{run.model}: {p.group}") for run in own for p in run.pictures]
        sections += [
            to_html([heading], 2),
            f'<div class="figures">{plot}</div><div class="figures">{dots}</div>',
            to_html(blocks, 2),
            picture_section(drawings, 3),
        ]
    sections.append(to_html(skipped_blocks(results["skipped"]), 2))
    return page(results["title"], sections)


def _dots(table: CountTable) -> list[tuple[float, float]]:
    """True and predicted counts, in an order that is not that of the rows."""
    rows = zip(table.image, table.name, table.target.tolist(), table.predicted.tolist(), strict=True)
    return [(target, predicted) for _, _, target, predicted in sorted(rows, key=lambda row: row[:2])]


_WITH_ENDS = (*METRICS, *GAME_COLUMNS)


CSV_COLUMNS = (
    "data",
    "name",
    "kind",
    "rows_of",
    "pictures",
    "rows",
    *(f"{key}{end}" for key in _WITH_ENDS for end in ("", "_low", "_high")),
    *CLASS_MEANS,
    *(f"total_{key}" for key in METRICS),
)


def _csv_rows(results: Mapping[str, Any]) -> Iterator[list[str | int | float]]:
    """A row for each model, followed by those of its constants."""
    for entry in results["data"]:
        for model in entry["models"]:
            figures, name = model["figures"], model["model"]
            totals = figures.get("totals", {})
            scored = [("model", name, figures, totals)]
            scored += [
                ("constant", constant_label(constant), scores, totals.get("constants", {}).get(constant, {}))
                for constant, scores in figures["constants"].items()
            ]
            for kind, label, scores, total in scored:
                cells = [entry["name"], label, kind, name, figures["pictures"], figures["rows"]]
                for key in _WITH_ENDS:
                    cells += [scores.get(key, ""), *scores.get("interval", {}).get(key, ("", ""))]
                cells += [scores.get("classes", {}).get(key, "") for key in CLASS_MEANS]
                yield cells + [total.get(key, "") for key in METRICS]


def _file_names(i: int, run: Run) -> list[str]:
    return [f"pictures/{i:02d}-{j:02d}.jpg" for j in range(len(run.pictures))]


def _lower(block: Block) -> Block:
    """The same one level down."""
    return replace(block, level=block.level + 1) if isinstance(block, Heading) else block


def _cost(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
