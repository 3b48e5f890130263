"""RESULTS.md from what ``benchmarks/results.py measure`` stored; no figure is typed here."""

from __future__ import annotations

import json
from typing import Any

from results import AUDITED, EASY, HERE, INTERVALS, STORED, fits

SYSTEMS = {
    "clip_count": "CLIP-Count small, from the small CLIP",
    "region_clip": "RegionCLIP counter small, from the small CLIP",
    "ebc": "EBC small, counts without names",
    "lower_count": "Lower-Count small, image-level counts",
    "cells-ebc_small": "`ebc_small`: bins of 8 pixels",
    "cells-density_small": "`density_small`: density regression",
}
INTRODUCTION = """\
# Results

`benchmarks/results.py` measured everything here and stored it in `results/`; this page is written from there. Errors
stand beside those of constant predictions, which know nothing of the image. Square brackets are 95 % bootstrap
intervals over test images; the spread over training runs shows in the seeds. The scored checkpoint of a run is that
of the best validation MAE (of blood cells the last one). Published figures are in the READMEs of the models, and in
the reports of `counting-zoo benchmark`.

```bash
python benchmarks/results.py train      # or --only scenes; --jobs 2 trains two at a time, with a thread each
python benchmarks/results.py measure
python benchmarks/results.py page
```
"""
NOTES = {
    "easy": "One name is asked about in each image, of a shape and colour that training never showed together.",
    "objects": "The images of the first table with every object under one name, for a model that counts without names.",
    "low": (
        "Twelve names are asked about in each image. Lower-Count was trained on them (1,500 images, nothing but "
        "counts). The text-guided models were trained on `easy` and never saw this list; EBC, trained on `easy` too, "
        "is scored on the total of an image."
    ),
    "cells": (
        "64 images to train, 36 to validate, 100 to test; two draws of the first two. The constants are those of "
        "draw 0."
    ),
    "bccd": (
        "263 images of trainval to train, 72 to test; three names in each, learnt from counts up to four. "
        'Nearly every image has five or more red cells, of which the model learns "more than four" only; its README '
        "has the same with a higher limit, and the errors of each class."
    ),
}
COLUMNS = ("MAE", "RMSE", "NAE", "bias", "MAE of the total", "mRMSE", "images/s")


def write_page() -> None:
    """Write RESULTS.md."""
    training = stored("training") or {}
    parts = [INTRODUCTION, f"Machine: {training.get('machine', 'unknown')}.\n"]
    parts += ["## Built-in scenes\n", *commands("scenes", training)]
    parts += [line for name in ("easy", "objects", "low") for line in benchmark_table(name)]
    parts += [*audit_table(), *interval_tables()]
    parts += ["## VGG cells\n", *commands("cells", training), *benchmark_table("cells")]
    parts += ["## Blood cells (BCCD)\n", *commands("bccd", training), *benchmark_table("bccd")]
    (HERE / "RESULTS.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    print("wrote RESULTS.md")


def stored(name: str) -> Any:
    """What was measured under a name; ``None`` if nothing was."""
    path = STORED / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def commands(part: str, training: dict[str, Any]) -> list[str]:
    """What trained the models of a part: the command of the first of each system, and how long all took."""
    runs = [fit for fit in fits() if fit.part == part and fit.name in training]
    first = {fit.name if part == "bccd" else system(fit.name): fit for fit in reversed(runs)}
    lines = [fit.command("$COUNTING_ZOO_DATA") for fit in reversed(first.values())]
    took = ", ".join(f"{fit.name} {training[fit.name]} s" for fit in runs)
    text = f"Training, with its start and its validation, with other work on the machine: {took}."
    if part != "bccd":
        text += " Other seeds and draws differ in `--seed_everything` and `--data.seed`, or in `--data.split_seed`."
    return ["```bash", *lines, "```\n", f"{text}\n"]


def system(run: str) -> str:
    """A run's name without its seed."""
    return run.rpartition("-")[0]


def benchmark_table(name: str) -> list[str]:
    """One row for each run and each constant of a stored benchmark, and the mean of each system over its seeds."""
    results = stored(name)
    if results is None:
        return [f"### {name}: not measured\n"]
    costs = stored(f"{name}-costs") or {}
    (entry,) = results["data"]
    rows: list[list[str]] = []
    for one in dict.fromkeys(system(run["model"]) for run in entry["models"]):
        runs = [run for run in entry["models"] if system(run["model"]) == one]
        for run in runs:
            speed = costs.get(f"{run['model']} on {entry['name']}", {}).get("pictures_per_second")
            cells = figures(run["figures"], run["all_names_together"])
            rows.append([run["model"], *cells, f"{speed:.0f}" if speed else "–"])
        if len(runs) > 1 and one in SYSTEMS:
            mae, rmse = (sum(run["figures"][key] for run in runs) / len(runs) for key in ("mae", "rmse"))
            label = f"**{SYSTEMS[one]}**, mean of {len(runs)}"
            means = {"MAE": f"**{mae:.2f}**", "RMSE": f"{rmse:.2f}"}
            if runs[0]["all_names_together"]:
                means = {"MAE of the total": f"**{mae:.2f}**"}
            rows.append([label, *(means.get(column, "") for column in COLUMNS)])
    for run in entry["models"]:
        for constant, found in run["figures"].get("constants", {}).items():
            together = run["all_names_together"]
            label = f"always the {constant.replace('train_', 'training ')}" + (" of the total" if together else "")
            row = [label, *figures(found, together), ""]
            if row not in rows:
                rows.append(row)
    facts = entry["facts"]
    about = f"{facts['pictures']} images, {facts['objects']} annotated objects"
    text = f"{NOTES[name]} {about}, annotation sha256 `{facts['sha256'][:16]}`.\n"
    left = [f"{one['model']}: {one['reason']}" for one in results.get("skipped", [])]
    lines = [f"### {results['title']}\n", text, *markdown_table(["", *COLUMNS], rows), ""]
    return lines + ([f"Not scored: {'; '.join(left)}\n"] if left else [])


def figures(found: dict[str, Any], together: bool = False) -> list[str]:
    """The cells of one row, MAE with its interval.

    Args:
        found: the figures.
        together: whether they are of totals, and nothing is known of each name.
    """
    ends = found.get("interval", {}).get("mae")
    mae = two(found["mae"]) + (f" [{ends[0]:.2f}, {ends[1]:.2f}]" if ends else "")
    if together:
        return [*["–"] * 4, mae, "–"]
    return [
        mae,
        two(found["rmse"]),
        two(found.get("nae")),
        f"{found['bias']:+.2f}",
        two(found.get("totals", {}).get("mae")),
        two(found.get("classes", {}).get("mrmse")),
    ]


def audit_table() -> list[str]:
    """Whether counts follow prompts, a row for each audited checkpoint."""
    rows = []
    for name in AUDITED:
        if (audit := stored(f"audit-{name}")) is None:
            continue
        judged, negative = audit["verdict"], audit.get("negative") or {}
        mosaic = (audit.get("mosaic") or {}).get("global") or {}
        keys = (("ratio", judged), ("mae", judged), ("shuffled_mae", judged), ("nmn", negative), ("pccn", negative))
        cells = [two(found.get(key)) for key, found in keys]
        rows.append([name, judged["follows"], *cells, *(two(mosaic.get(k)) for k in ("cnt_p", "cnt_r", "cnt_f1"))])
    head = [
        "",
        "follows the text",
        "absent / right",
        "MAE",
        "MAE, prompts shuffled",
        "NMN",
        "PCCN",
        "CntP",
        "CntR",
        "CntF1",
    ]
    checkpoint = "runs/results/clip_count-0/checkpoints/best.ckpt"
    return [
        "### Prompt audit\n",
        "Every name of the split, mosaics and other ways to ask, on 100 test images of `easy`. NMN, PCCN and Cnt* "
        "are those of Ciampi et al. (2024).\n",
        "```bash",
        f"counting-zoo audit --ckpt_path {checkpoint} {EASY} --limit 100 --out runs/audit",
        "```\n",
        *markdown_table(head, rows, text_columns=2),
        "",
    ]


def interval_tables() -> list[str]:
    """Coverage of intervals, as ``benchmarks/interval_coverage.py`` printed it."""
    lines = ["### Coverage of intervals\n"]
    for name in INTERVALS:
        path = STORED / f"intervals-{name}.md"
        if path.exists():
            table = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
            command = f"python benchmarks/interval_coverage.py runs/results/{name}/checkpoints/best.ckpt"
            lines += [f"Intervals of 90 % for {name}:\n", "```bash", command, "```\n", *table, ""]
    return lines


def markdown_table(head: list[str], rows: list[list[str]], text_columns: int = 1) -> list[str]:
    """Lines of a table whose cells, but the first few, are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return ["| " + " | ".join(row) + " |" for row in [head, rule, *rows]]


def two(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "–" if value is None else f"{value:.2f}"


__all__ = ["write_page"]
