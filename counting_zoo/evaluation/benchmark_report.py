"""The files of a benchmark: several models on several data sets, as JSON, CSV, Markdown and HTML.

Nothing in them depends on when or where they are written, so the same counts give the same bytes. What does, time and
memory, goes to files of its own (:func:`write_costs`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from counting_zoo.errors import InputError
from counting_zoo.evaluation.benchmark_tables import CLASS_MEANS, constant_label, constants, data_blocks, skipped_blocks
from counting_zoo.evaluation.bootstrap import Bootstrap
from counting_zoo.evaluation.comparison import JOIN, compare
from counting_zoo.evaluation.count_table import GAME_COLUMNS, CountTable
from counting_zoo.evaluation.document import Block, Cell, Heading, Images, Table, Text, to_html, to_markdown
from counting_zoo.evaluation.page import Picture, interval_plot, jpeg, page, picture_section, scatter
from counting_zoo.evaluation.published import published
from counting_zoo.evaluation.statistics import METRICS, summarise
from counting_zoo.evaluation.tables import replacing, write_table
from counting_zoo.version import __version__

LARGEST = 5
"""So many of the largest errors of each model are listed."""


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
        resamples: of the bootstrap (:class:`~counting_zoo.evaluation.bootstrap.Bootstrap`).
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
        with replacing(paths[kind]) as temporary:
            temporary.write_text(content, encoding="utf-8")
    write_table(paths["csv"], CSV_COLUMNS, _csv_rows(results))
    for old in paths["pictures"].glob("*.jpg"):
        if re.fullmatch(r"\d+-\d+\.jpg", old.name):
            old.unlink()
    for run, files in zip(runs, names, strict=True):
        for picture, file in zip(run.pictures, files, strict=True):
            with replacing(out / file) as temporary:
                temporary.write_bytes(jpeg(picture.drawing))
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
    return _plain(results, "benchmark")


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
    found = _plain(costs, "costs")
    keys = list(dict.fromkeys(key for each in found.values() for key in each))
    rows: list[list[Cell]] = [[name, *(_cost(each.get(key)) for key in keys)] for name, each in found.items()]
    note = "Measured apart from accuracy; these figures belong to the machine and the moment."
    blocks: list[Block] = [
        Heading("Costs"),
        Table(["", *(key.replace("_", " ") for key in keys)], rows, numbers=False),
        Text(note),
    ]
    paths = {"json": out / "costs.json", "md": out / "costs.md"}
    with replacing(paths["json"]) as temporary:
        temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(paths["md"]) as temporary:
        temporary.write_text(to_markdown(blocks), encoding="utf-8")
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
            "MAE", "Mean absolute errors with their intervals; grey: the same number whatever the picture",
        )  # fmt: skip
        dots = "".join(scatter(_dots(run.table), run.model) for run in own)
        drawings = [replace(p, group=f"{run.model}: {p.group}") for run in own for p in run.pictures]
        sections += [
            to_html([heading], 2), f'<div class="figures">{plot}</div><div class="figures">{dots}</div>',
            to_html(blocks, 2), picture_section(drawings, 3),
        ]  # fmt: skip
    sections.append(to_html(skipped_blocks(results["skipped"]), 2))
    return page(results["title"], sections)


def _dots(table: CountTable) -> list[tuple[float, float]]:
    """True and predicted counts, in an order that is not that of the rows."""
    rows = zip(table.image, table.name, table.target.tolist(), table.predicted.tolist(), strict=True)
    return [(target, predicted) for _, _, target, predicted in sorted(rows, key=lambda row: row[:2])]


_WITH_ENDS = (*METRICS, *GAME_COLUMNS)
CSV_COLUMNS = (
    "data", "name", "kind", "rows_of", "pictures", "rows",
    *(f"{key}{end}" for key in _WITH_ENDS for end in ("", "_low", "_high")), *CLASS_MEANS,
    *(f"total_{key}" for key in METRICS),
)  # fmt: skip


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


def _plain(value: Any, where: str) -> Any:
    """The same as JSON has it; floats with ten digits, so that the order of a sum cannot be seen.

    Raises:
        InputError: something in it is no JSON.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(each, f"{where}.{key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, where) for each in value]
    if isinstance(value, float):
        return float(f"{value:.10g}") if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    raise InputError(
        f"{where} is a {type(value).__name__}; expected what JSON has: text, numbers, lists or dictionaries"
    )


__all__ = ["Run", "benchmark_results", "read_results", "results_section", "write_benchmark", "write_costs"]
