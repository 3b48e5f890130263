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
from typing import Any

import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.evaluation.report import (
    TITLES,
    Drawing,
    cell,
    constant_label,
    embedded,
    jpeg,
    judge,
    render,
    scatter,
    table,
)
from counting_zoo.io import plain, write_table, write_whole
from counting_zoo.metrics.counts import GAME_COLUMNS, MEAN_STATISTICS, CountTable
from counting_zoo.metrics.statistics import JOIN, METRICS, Bootstrap, compare, summarise
from counting_zoo.version import __version__

Scores = Mapping[str, Any]


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
    """List the published results for a data set, best first by MAE or mRMSE.

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
    """Name the arguments of a data module that decide which published results belong to it.

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


LARGEST = 5
"""Number of the largest errors that are listed of each model."""


DIGITS = 10
"""Significant digits of floats in ``benchmark.json``, so that the order of a sum cannot be seen."""


@dataclass(frozen=True)
class Run:
    """One model on one data set.

    Args:
        model: the name it goes by; unlike those of the other models on these data.
        data: the name the data go by; the same for all models on them.
        table: what was counted.
        constants: predictions that need no image: one number, or one for each name.
        model_facts: what is known of the model: class, parameters, checksum of the checkpoint, ...; ready for JSON.
        data_facts: what is known of the data: ``class`` and ``split`` choose the published results that stand beside,
            ``settings`` (arguments of the data module) those of them that fit; pictures, checksum, ...; ready for JSON.
        protocol: how it was measured, a sentence each.
        images: drawings of the best and the worst.
        failed: id and reason of each image that could not be read or counted.
        costs: time and memory of counting; empty where they were not measured.
    """

    model: str
    data: str
    table: CountTable
    constants: dict[str, float | dict[str, float]] = field(default_factory=dict)
    model_facts: dict[str, Any] = field(default_factory=dict)
    data_facts: dict[str, Any] = field(default_factory=dict)
    protocol: list[str] = field(default_factory=list)
    images: list[Drawing] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    costs: dict[str, Any] = field(default_factory=dict)


def summarise_runs(
    runs: Sequence[Run],
    *,
    title: str,
    bootstrap: Bootstrap | None = None,
    skipped: Sequence[tuple[str, str, str]] = (),
) -> dict[str, Any]:
    """Score all runs: the content of ``benchmark.json``.

    Args:
        runs: at most one of each model and data set, in the order in which they are to be shown.
        title: of the reports.
        bootstrap: how intervals are made.
        skipped: model, data and reason of what could not be scored.

    Raises:
        InputError: two runs have the same model and data, a table cannot be scored, or a fact is not ready for JSON.
    """
    bootstrap = bootstrap or Bootstrap()
    seen: set[tuple[str, str]] = set()
    by_data: dict[str, list[tuple[Run, Sequence[str]]]] = {}
    for i, run in enumerate(runs):
        if (run.model, run.data) in seen:
            raise InputError(f"two runs of model {run.model!r} on data {run.data!r}; give each model a name of its own")
        seen.add((run.model, run.data))
        by_data.setdefault(run.data, []).append((run, _image_files(i, run)))
    results = {
        "title": title,
        "version": __version__,
        "bootstrap": asdict(bootstrap),
        "data": [_data(name, of_data, bootstrap) for name, of_data in by_data.items()],
        "skipped": [{"model": model, "data": data, "reason": reason} for model, data, reason in skipped],
    }
    return plain(results, "benchmark", digits=DIGITS)


def write_benchmark(out: str | Path, results: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Path]:
    """Write ``benchmark.json``, ``benchmark.csv``, ``benchmark.md``, ``benchmark.html`` and ``pictures/*.jpg``.

    Where costs were measured, ``costs.json`` and ``costs.md`` too (:func:`write_costs`).

    Args:
        out: the folder; files of an earlier benchmark are replaced.
        results: of :func:`summarise_runs`.
        runs: the same ones, for plots and drawings.

    Returns:
        The files by their endings, and ``pictures``.
    """
    out = Path(out)
    paths = {kind: out / f"benchmark.{kind}" for kind in ("json", "csv", "md", "html")}
    paths["pictures"] = out / "pictures"
    write_whole(
        paths["json"], json.dumps(results, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_whole(paths["md"], results_section(results, level=1, folder="."))
    write_whole(paths["html"], render("benchmark", "html", **_page(results, level=1, runs=runs)))
    write_table(paths["csv"], CSV_COLUMNS, _csv_rows(results))
    for old in paths["pictures"].glob("*.jpg"):
        if re.fullmatch(r"\d+-\d+\.jpg", old.name):
            old.unlink()
    for i, run in enumerate(runs):
        for drawing, file in zip(run.images, _image_files(i, run), strict=True):
            write_whole(out / file, jpeg(drawing.pixels))
    if costs := {f"{run.model} on {run.data}": run.costs for run in runs if run.costs}:
        write_costs(out, costs)
    return paths


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
    """Render a stored benchmark as Markdown.

    Args:
        results: what :func:`read_results` gives.
        level: of its heading.
        folder: of the benchmark, relative to the page, to show its images; ``None`` to leave them out.
    """
    return render("benchmark", "md", **_page(results, level, folder))


def write_costs(out: str | Path, costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Write what counting cost to ``costs.json`` and ``costs.md``: these change from run to run and machine to machine.

    Args:
        out: the folder.
        costs: by model, numbers and words such as ``pictures_per_second``, ``peak_memory_mib``, ``device``.
    """
    found = plain(costs, "costs", digits=DIGITS)
    keys = list(dict.fromkeys(key for each in found.values() for key in each))
    rows = [[name, *(each.get(key) for key in keys)] for name, each in found.items()]
    titles = [key.replace("pictures", "images").replace("_", " ") for key in keys]
    text = render("costs", "md", costs=table(["", *titles], rows))
    return {
        "json": write_whole(Path(out) / "costs.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n"),
        "md": write_whole(Path(out) / "costs.md", text),
    }


def _data(name: str, found: Sequence[tuple[Run, Sequence[str]]], bootstrap: Bootstrap) -> dict[str, Any]:
    """Summarise all models on one data set."""
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
            {"file": file, "group": image.group, "caption": image.caption}
            for image, file in zip(run.images, files, strict=True)
        ],
    }


def _largest_errors(table: CountTable) -> list[dict[str, Any]]:
    error = np.nan_to_num(np.abs(table.predicted - table.target), nan=-1.0, posinf=-1.0)
    image, name = table.image, table.name
    order = sorted(range(len(table)), key=lambda i: (-error[i], image[i], name[i]))[:LARGEST]
    return [
        {"image": image[i], "name": name[i], "target": table.target[i], "predicted": table.predicted[i]}
        for i in order
        if error[i] >= 0
    ]


_WITH_ENDS = (*METRICS, *GAME_COLUMNS)


CSV_COLUMNS = (
    "data",
    "name",
    "kind",
    "rows_of",
    "pictures",
    "rows",
    *(f"{key}{end}" for key in _WITH_ENDS for end in ("", "_low", "_high")),
    *MEAN_STATISTICS,
    *(f"total_{key}" for key in METRICS),
)


def _csv_rows(results: Mapping[str, Any]) -> Iterator[list[str | int | float]]:
    """Yield a row for each model, followed by those of its constants."""
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
                cells += [scores.get("classes", {}).get(key, "") for key in MEAN_STATISTICS]
                yield cells + [total.get(key, "") for key in METRICS]


def _image_files(i: int, run: Run) -> list[str]:
    return [f"pictures/{i:02d}-{j:02d}.jpg" for j in range(len(run.images))]


# -- what the templates show ------------------------------------------------------------------------------------------


def _page(results: Scores, level: int, folder: str | None = None, runs: Sequence[Run] = ()) -> dict[str, Any]:
    """Add to stored results all else that ``templates/benchmark.jinja`` names."""
    sets = []
    for entry in results["data"]:
        own = [run for run in runs if run.data == entry["name"]]
        drawings = [replace(one, group=f"{run.model}: {one.group}") for run in own for one in run.images]
        beside = {part: constants(entry, part) for part in ("", "totals", "classes")}
        shown = {"verdict": _verdict(entry), "matrix": _matrix(entry), "constants": beside, "facts": _facts(entry)}
        sets.append({**entry, **shown, "groups": embedded(drawings), "plots": [scatter(r.table, r.model) for r in own]})
    return {"level": level, "folder": folder, **results, "data": sets, "skipped": results.get("skipped", [])}


def _verdict(entry: Scores) -> dict[str, Any]:
    """Find the model with the least error, of totals where a model counts without names."""
    totals = any(model["all_names_together"] for model in entry["models"])
    scored = []
    for model in entry["models"]:
        figures = model["figures"].get("totals", model["figures"]) if totals else model["figures"]
        if "mae" in figures:
            scored.append((figures["mae"], model, figures))
    if not scored:
        return judge(None)
    error, best, figures = min(scored, key=lambda one: one[0])
    others = [(mae, model["model"]) for mae, model, _ in scored if model is not best]
    rival = None
    if others:
        mae, name = min(others)
        less, interval = mae - error, None
        for pair in entry["comparisons"]:  # on the images of both, which has an interval
            same = pair["compared"] == ("totals" if totals else "rows")
            if same and {pair["a"], pair["b"]} == {name, best["model"]} and "mae" in pair:
                sign = 1 if pair["a"] == name else -1
                less = sign * pair["mae"]["difference"]
                interval = sorted(sign * end for end in pair["mae"].get("interval", ())) or None
        rival = {"name": name, "less": cell(less, interval=interval), "sure": interval and interval[0] > 0}
    reads = best["facts"].get("text_guided", True)
    return judge(
        best["model"],
        error,
        {constant_label(name): one["mae"] for name, one in figures["constants"].items() if "mae" in one},
        interval=figures.get("interval", {}).get("mae"),
        follows="untested" if reads else "blind",
        rival=rival,
        totals=totals,
        uneven=len({figures.get("rows", figures["pictures"]) for _, _, figures in scored}) > 1,
    )


def constants(entry: Scores, part: str = "") -> list[tuple[str, Scores]]:
    """List label and scores of each constant prediction, once where all models have it on the same rows.

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


def _matrix(entry: Scores) -> dict[str, Any] | None:
    """Tabulate differences of MAE, row minus column."""
    cells = {}
    for pair in entry["comparisons"]:
        if "mae" in pair:
            value, ends = pair["mae"]["difference"], pair["mae"].get("interval")
            cells[pair["a"], pair["b"]] = cell(value, interval=ends, signed=True)
            cells[pair["b"], pair["a"]] = cell(-value, interval=ends and [-ends[1], -ends[0]], signed=True)
    names = [model["model"] for model in entry["models"]]
    rows = [[a, *("" if a == b else cells.get((a, b)) for b in names)] for a in names]
    return table(["MAE", *(f"- {name}" for name in names)], rows) if entry["comparisons"] else None


def _facts(entry: Scores) -> list[dict[str, Any]]:
    """Tabulate the facts of the data, once where that is the same for all models, and of the models."""
    names = [model["model"] for model in entry["models"]]
    differ = entry["facts_differ"]
    parts = [
        ("data", names if differ else [""], [m["data_facts"] for m in entry["models"]] if differ else [entry["facts"]]),
        ("model", names, [model["facts"] for model in entry["models"]]),
    ]
    return [
        table([title, *head], [[key, *(_fact(each, key) for each in facts)] for key in keys])
        for title, head, facts in parts
        if (keys := sorted(set().union(*facts)))
    ]


def _fact(facts: Scores, key: str, most: int = 100) -> str:
    """Write a fact in a cell; what is too long for one, such as a whole recipe, is in the JSON."""
    value = facts.get(key, "–")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
    return text if len(text) <= most else "see benchmark.json"
