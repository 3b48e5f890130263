"""Any set of models on any set of data under one protocol; ``counting-zoo benchmark`` is its command.

Three stages: count (a table of counts on disk for each model and data set), summarise, and render.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.checks import fingerprint
from counting_zoo.data.dataset import collate
from counting_zoo.data.records import Split, unasked_objects
from counting_zoo.errors import InputError, plain_message
from counting_zoo.evaluation.benchmark_report import Run, deciding_settings, summarise_runs, write_benchmark
from counting_zoo.evaluation.counting import (
    CountedSplit,
    count_again,
    count_split,
    counts_of_file,
    measure_costs,
    read_parts,
)
from counting_zoo.evaluation.report import Drawing
from counting_zoo.io import file_sha256, sha256
from counting_zoo.loading import load, model_sha256
from counting_zoo.metrics.counts import CountTable
from counting_zoo.metrics.statistics import JOIN, Bootstrap
from counting_zoo.module import CountingModule
from counting_zoo.ops import usable_precision
from counting_zoo.queries import known_names
from counting_zoo.version import __version__

log = logging.getLogger(__name__)


Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


COSTED = 8
"""Images that time and memory are measured on."""


@dataclass(frozen=True)
class BenchmarkFiles:
    """Files of :func:`benchmark`.

    Args:
        folder: where.
        results: ``benchmark.json``: everything but times and memory.
        runs: one for each model and data set, in the order given.
        skipped: (model, data, reason) of those that do not fit together.
    """

    folder: Path
    results: Path
    runs: list[Run]
    skipped: list[tuple[str, str, str]] = field(default_factory=list)


def benchmark(
    models: Mapping[str, CountingModule | str | Path],
    data: Mapping[str, CountingDataModule],
    out: str | Path,
    *,
    split: Split = "test",
    title: str = "Benchmark",
    accelerator: str = "auto",
    devices: int = 1,
    precision: Precision = "32-true",
    images: int = 3,
    costs: bool = True,
    resamples: int = 2000,
    seed: int = 0,
) -> BenchmarkFiles:
    """Count every image of every data set with every model, and report the errors with their intervals.

    Finished images are kept below ``out/parts`` under a hash of the model's weights and recipe, of the annotation, of
    the names asked about and of the image's file. An interrupted benchmark goes on where it stopped, and one with
    another model counts with that one alone. Nobody hashes a model's source: delete ``parts`` when you have changed it.
    An image that cannot be read or counted is listed and left out of all scores.

    Args:
        models: by name: a model, a checkpoint of the zoo, or a CSV file of counts from elsewhere.
        data: by name; their ``prompts`` say which names images are asked about.
        out: folder for ``benchmark.{json,csv,md,html}``, ``counts/`` (a table for each run), ``pictures/``, and for
            what differs between two equal runs: ``costs.{json,md}``.
        split: what is scored.
        title: heading of the report.
        accelerator, devices: as Lightning takes them; several devices share the images.
        precision: of the networks; counts are added up in float32 in any case.
        images: how many best and how many worst images of each run are drawn.
        costs: whether to measure time and memory.
        resamples, seed: of the bootstrap.

    Raises:
        InputError: there is no model or no data, an option is out of range, a file cannot be read, or nothing fits
            together.
    """
    if not models or not data:
        raise InputError(f"a benchmark of {len(models)} models on {len(data)} data sets; expected at least one of each")
    _check_options(split, precision, devices=devices, images=images, resamples=resamples, seed=seed, costs=costs)
    models, data = _by_text("models", models), _by_text("data", data)
    for name, source in models.items():
        if isinstance(source, str | Path) and not Path(source).expanduser().is_file():
            raise InputError(f"model {name!r}: no file at {str(source)!r}; expected a checkpoint or a .csv of counts")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"out is {str(out)!r}, which is a file; expected a folder")
    fabric = _fabric(accelerator, devices, precision)
    runs, skipped = _count_all(models, data, split, out, fabric, images=images, costs=costs)
    if not fabric.is_global_zero:
        return BenchmarkFiles(out, out / "benchmark.json", [])
    if not runs:
        raise InputError("nothing could be scored: " + "; ".join(f"{m} on {d}: {why}" for m, d, why in skipped))
    results = summarise_runs(runs, title=title, bootstrap=Bootstrap(resamples, seed), skipped=skipped)
    files = write_benchmark(out, results, runs)
    return BenchmarkFiles(out, files["json"], runs, skipped)


# -- options ----------------------------------------------------------------------------------------------------------


def _check_options(split: str, precision: str, *, costs: bool, **numbers: int) -> None:
    """Refuse what is out of range with an :class:`InputError`, before hours of counting."""
    splits, precisions = ("train", "val", "test"), get_args(Precision)
    for name, word, known in (("split", split, splits), ("precision", precision, precisions)):
        if word not in known:
            raise InputError(f"{name} is {word!r}; expected one of {', '.join(known)}")
    for name, number in numbers.items():
        least = 1 if name in ("devices", "resamples") else 0
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(f"{name} is {number!r}; expected a whole number of at least {least}")
    if not isinstance(costs, bool):
        raise InputError(f"costs is {costs!r}; expected true or false")


def _by_text(kind: str, named: Mapping[Any, Any]) -> dict[str, Any]:
    """Turn names into text, as YAML reads some as numbers; two equal ones raise."""
    by_text = {str(name): value for name, value in named.items()}
    if len(by_text) < len(named):
        raise InputError(f"two {kind} have the same name among {', '.join(map(str, named))}; name them apart")
    return by_text


def _fabric(accelerator: str, devices: int, precision: Precision) -> L.Fabric:
    """Start a process on each device; an :class:`InputError` where there are no such devices."""
    try:
        fabric = L.Fabric(
            accelerator=accelerator,
            devices=devices,
            precision=usable_precision(precision, accelerator),  # type: ignore[arg-type]
            strategy="ddp" if devices > 1 else "auto",
        )
    except (ValueError, RuntimeError, MisconfigurationException) as error:
        raise InputError(f"accelerator {accelerator!r} with {devices} devices cannot be used: {error}") from error
    if devices > 1:
        fabric.launch()
    return fabric


# -- counting ---------------------------------------------------------------------------------------------------------


def _count_all(
    models: Mapping[str, CountingModule | str | Path],
    data: Mapping[str, CountingDataModule],
    split: Split,
    out: Path,
    fabric: L.Fabric,
    *,
    images: int,
    costs: bool,
) -> tuple[list[Run], list[tuple[str, str, str]]]:
    """Count every data set with every model; the runs are those of the first process.

    Returns:
        The runs, and (model, data, reason) of the pairs that do not fit together.
    """
    runs: list[Run] = []
    skipped: list[tuple[str, str, str]] = []
    file_names = _file_names([*models, *data])
    if fabric.is_global_zero:
        for datamodule in data.values():
            datamodule.prepare_data()
    fabric.barrier()
    for model_name, source in models.items():
        model = _model(source, fabric)
        facts = _model_facts(model, source)
        for data_name, datamodule in data.items():
            where = f"{model_name} on {data_name}"
            try:
                data_facts = _data_facts(datamodule, split)
                counted = _count(model, facts["sha256"], datamodule, data_facts["sha256"], split, out, where, fabric)
            except InputError as error:  # in all processes, or in none
                skipped.append((model_name, data_name, plain_message(error)))
                log.warning("%s is left out: %s", where, skipped[-1][-1])
                continue
            if not fabric.is_global_zero:
                continue
            table = counted.table
            if not len(table):
                reasons = "; ".join(sorted({reason for _, reason in counted.failed})[:3])
                skipped.append((model_name, data_name, f"no image was counted: {reasons}"))
                continue
            table.write(out / "counts" / f"{file_names[model_name]}--{file_names[data_name]}.csv")
            drawings: list[Drawing] = []
            measured: dict[str, Any] = {}
            if isinstance(model, CountingModule):
                with fabric.autocast():
                    drawings = _drawings(model, datamodule, split, table, images)
                    if costs:
                        measured = _costs(model, datamodule, split, table, fabric._precision.precision)
            runs.append(
                Run(
                    model_name,
                    data_name,
                    table,
                    constants=_constants(model, datamodule, split, table),
                    model_facts=facts,
                    data_facts=data_facts,
                    protocol=_protocol(model, datamodule, split, fabric._precision.precision),
                    images=drawings,
                    failed=counted.failed,
                    costs=measured,
                )
            )
        del model  # before the next one takes its memory
    fabric.barrier()
    return runs, skipped


def _model(source: CountingModule | str | Path, fabric: L.Fabric) -> CountingModule | Path:
    """Load a model onto its device, or return the path of a file of counts from elsewhere."""
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.suffix.lower() == ".csv":
            return path
        source = load(path)
        if not isinstance(source, CountingModule):
            raise InputError(f"{path} is of {type(source).__name__}, which does not count")
    if not isinstance(source, CountingModule):
        raise InputError(f"a model is a {type(source).__name__}; expected a CountingModule, a checkpoint or a CSV file")
    return source.to(fabric.device).eval()


def _count(
    model: CountingModule | Path,
    model_hash: str,
    datamodule: CountingDataModule,
    annotation_hash: str,
    split: Split,
    out: Path,
    where: str,
    fabric: L.Fabric,
) -> CountedSplit:
    """Count a split with all processes, going on where an interrupted benchmark of the same content stopped.

    Raises:
        InputError: model and data do not fit together; in all processes.
    """
    if isinstance(model, Path):
        return counts_of_file(model, datamodule, split)
    protocol = [
        fabric._precision.precision,
        split,
        datamodule.prompts,
        datamodule.asked_names(split),
        datamodule.outside,
        datamodule.checksums,
    ]
    key = json.dumps([__version__, model_hash, str(model.interval_calibration), annotation_hash, protocol])
    parts = out / "parts" / sha256(key)[:16]
    if fabric.is_global_zero:
        parts.mkdir(parents=True, exist_ok=True)
        (parts / "of.json").write_text(json.dumps({"run": where}), encoding="utf-8")
    fabric.barrier()
    refusal: str | None = None
    try:
        with fabric.autocast():
            counted = count_split(
                model,
                datamodule,
                split,
                parts=parts,
                rank=fabric.global_rank,
                world_size=fabric.world_size,
                description=where,
            )
    except InputError as error:
        if fabric.world_size == 1:
            raise
        refusal = plain_message(error)
    if fabric.world_size == 1:
        return counted
    reasons: list[str | None] = [None] * fabric.world_size
    torch.distributed.all_gather_object(reasons, refusal)
    if refusal := next((reason for reason in reasons if reason is not None), None):
        raise InputError(refusal)  # in all processes, or the others would wait for this one for ever
    return read_parts(parts, datamodule, split)


def _model_facts(model: CountingModule | Path, source: Any) -> dict[str, Any]:
    if isinstance(model, Path):
        return {"class": "counts from elsewhere", "file": model.name, "sha256": file_sha256(model)}
    facts: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": model_sha256(model),
        "class_blind": model.class_blind,
        "text_guided": model.text_guided,
        "recipe": json.loads(json.dumps(dict(model.hparams), default=str)),
    }
    if isinstance(source, str | Path):
        facts |= {"checkpoint": Path(source).name, "checkpoint_sha256": file_sha256(Path(source).expanduser())}
    return facts


def _data_facts(datamodule: CountingDataModule, split: Split) -> dict[str, Any]:
    name = type(datamodule).__name__
    return {
        "class": name,
        "split": split,
        "names": len(datamodule.class_names(split)),
        "settings": {key: getattr(datamodule, key) for key in deciding_settings(name)},
        **fingerprint(datamodule.records(split)),
    }


def _constants(
    model: CountingModule | Path, datamodule: CountingDataModule, split: Split, table: CountTable
) -> dict[str, float | dict[str, float]]:
    """Collect the constant predictions of the data: one number each, or one for each name."""
    total = model.class_blind if isinstance(model, CountingModule) else all(JOIN in name for name in table.name)
    names = datamodule.asked_names(split) or []
    return {
        f"train_{name}": dict(zip(names, value, strict=True)) if isinstance(value, list) else value
        for name, value in datamodule.constant_predictors(total=total).items()
    }


def _protocol(model: CountingModule | Path, datamodule: CountingDataModule, split: Split, precision: str) -> list[str]:
    """Describe the protocol behind the numbers, in sentences."""
    names = "every name of the data set" if datamodule.prompts == "all" else "the first name of its annotation"
    said = [f"Every image of the {split} split once.", f"Every image was asked about {names}."]
    if datamodule.merge_classes is not None:
        said.append(f"All objects of the data have one name, {datamodule.merge_classes!r}.")
    if isinstance(model, Path):
        return [*said, "The counts were read from a file; how they came about is not known here."]
    rule = model.preprocess
    said.append(
        "Images keep their size."
        if rule.resize == "none" and rule.multiple == 1 and rule.max_long is None
        else f"Images are resized as the model's recipe says: {rule}."
    )
    said.append(
        "Each is counted in one piece."
        if not model.window
        else f"Each is counted in windows of {model.window} pixels, {model.stride or model.window} apart."
    )
    if model.class_blind:
        said.append("The model counts without names: it is scored on the sum over the names asked about.")
        left_out, every = unasked_objects(datamodule.records(split), datamodule.asked_counts(split, total=True)[:, 0])
        if left_out > 0:
            said.append(
                f"{left_out:.0f} of {every:.0f} objects have names that are not asked about: counting them "
                "is taken for an error, unless data.merge_classes gives all of them one name."
            )
    if model.vocabulary is not None:
        unknown = [name for name in datamodule.class_names(split) if name not in model.vocabulary]
        left = f"; left out: {', '.join(unknown)}" if unknown else ""
        said.append(f"The model counts a fixed list of names: it is scored on those that the data share{left}.")
    if (made := model.interval_calibration) is not None:
        said.append(f"Its intervals are to hold {100 * made.level:.4g} % of the true counts (width {made.width!r}).")
    said.append(f"Networks ran in {precision}; counts are sums of the density in float32.")
    return said


def _drawings(
    model: CountingModule, datamodule: CountingDataModule, split: Split, table: CountTable, n: int
) -> list[Drawing]:
    """Draw the images with the largest error, and those with the smallest relative one."""
    ids, index = table.images()
    error = np.bincount(index, np.abs(table.predicted - table.target))
    share = error / np.maximum(np.bincount(index, table.target), 1)
    full = np.bincount(index, table.target) > 0
    worst = np.argsort(-error, kind="stable")[:n]
    best = [i for i in np.argsort(share, kind="stable") if full[i] and i not in worst][:n]
    drawings = []
    for group, chosen in (("worst", worst), ("best", best)):
        for i in chosen:
            rows = np.flatnonzero(index == i)
            row = rows[np.abs(table.predicted - table.target)[rows].argmax()] if group == "worst" else rows[0]
            record = next(r for r in datamodule.records(split) if r.image_id == ids[i])
            data = datamodule.evaluation_dataset(split, model.preprocess, records=[record])
            batch = collate([data[0]])
            if model.vocabulary is not None:
                batch = known_names(batch, model.vocabulary)
            prediction = count_again(model, batch, 0)
            name = table.name[row]
            drawings.append(
                Drawing(
                    prediction.overlay(name),
                    group,
                    f"{ids[i]}, {name}: {table.predicted[row]:.1f} counted, {table.target[row]:g} true",
                )
            )
    return drawings


def _costs(
    model: CountingModule, datamodule: CountingDataModule, split: Split, table: CountTable, precision: str
) -> dict[str, Any]:
    counted = set(table.image)
    records = [record for record in datamodule.records(split) if record.image_id in counted]
    chosen = [records[i] for i in np.linspace(0, len(records) - 1, min(COSTED, len(records))).astype(int)]
    data = datamodule.evaluation_dataset(split, model.preprocess, records=chosen, tolerate=True)
    items: list[Any] = [item for i in range(len(data)) if "failed" not in (item := data[i])]
    known = model.vocabulary
    names = [[name for name in item["query"].names if known is None or name in known] for item in items]
    asked = [(item["image"], own) for item, own in zip(items, names, strict=True) if own]
    if not asked:
        return {}
    found = measure_costs(model, [image for image, _ in asked], [own for _, own in asked])
    return {**found, "precision": precision}


def _file_names(names: Sequence[str]) -> dict[str, str]:
    """Make a distinct part of a file name for each name, whatever the case of letters."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
        taken = {part.casefold() for part in found.values()}
        numbered = (f"{plain}_{n}" for n in range(2, len(names) + 2))
        found[name] = next(part for part in (plain, *numbered) if part.casefold() not in taken)
    return found
