"""Everything that RESULTS.md shows: trains the models, runs the benchmarks, audits and intervals, writes the page.

    python benchmarks/results.py train          # about two hours on two cores; what is finished is not repeated
    python benchmarks/results.py measure        # benchmarks, audits, intervals: stores their JSON in results/
    python benchmarks/results.py page           # RESULTS.md from results/*.json

``--only scenes`` (or ``cells``, ``bccd``) takes a part. The built-in scenes need nothing; the others are looked for in
``--data`` (default ``$COUNTING_ZOO_DATA`` or ``../shared/data``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from counting_zoo import CountingDataModule, SyntheticScenes, benchmark
from counting_zoo.evaluation.benchmark_report import read_results
from counting_zoo.lightning_cli import made_from_config

HERE = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
EASY, LOW = "--config configs/data/scenes_easy.yaml", "--config configs/data/scenes_low.yaml"
QUICK, PHOTOS = "--config configs/trainer/quick.yaml", "--config configs/trainer/quick_photos.yaml"
CELLS = "--config configs/data/vgg_cells.yaml --data.root {data}/vgg_cells"
BCCD = "--config configs/data/bccd.yaml --data.root {data}/bccd --data.train_split trainval --data.val_split drawn"


@dataclass(frozen=True)
class Fit:
    """One training run.

    Args:
        name: of its folder below ``runs/results``.
        part: of RESULTS.md.
        words: of ``counting-zoo fit``.
        keep: the checkpoint that is scored: of the ``best`` validation MAE, or of the ``last`` epoch.
    """

    name: str
    part: str
    words: str
    keep: str = "best"

    @property
    def checkpoint(self) -> str:
        return f"runs/results/{self.name}/checkpoints/{self.keep}.ckpt"

    def command(self, data: str | Path) -> str:
        """As a person would type it, with the folder of data sets."""
        folder = f"--trainer.logger.save_dir runs/results --trainer.logger.name {self.name} --trainer.logger.version ''"
        return f"counting-zoo fit {self.words.replace('{data}', str(data))} --trainer.logger CSVLogger {folder}"


def fits() -> list[Fit]:
    """Every run, those that others wait for first."""
    found = []
    for seed in SEEDS:
        seeded = f"--seed_everything {seed} --data.seed {seed} --data.num_workers 0"
        found += [
            Fit(
                f"clip_count-{seed}",
                "scenes",
                f"{QUICK} --config configs/model/clip_count_small.yaml {EASY} --model.pretrained_encoder small "
                f"--model.contrast_epochs 0 --data.prompts 3 --trainer.max_epochs 20 {seeded}",
            ),
            Fit(
                f"ebc-{seed}",
                "scenes",
                f"{QUICK} --config configs/model/ebc_small.yaml {EASY} --data.merge_classes objects "
                f"--trainer.max_epochs 6 {seeded}",
            ),
            Fit(
                f"lower_count-{seed}",
                "scenes",
                f"{QUICK} --config configs/model/lower_count_small.yaml {LOW} --trainer.max_epochs 14 {seeded}",
            ),
            Fit(
                f"region_clip-{seed}",
                "scenes",
                f"{QUICK} --config configs/model/region_clip_counter_small.yaml {EASY} --model.boxes examples "
                f"--data.prompts 5 --trainer.max_epochs 4 {seeded}",
            ),
        ]
    for draw in SEEDS[:2]:
        for name in ("ebc_small", "density_small"):
            words = f"{PHOTOS} --config configs/model/{name}.yaml {CELLS} --data.split_seed {draw} --data.num_workers 0"
            found.append(Fit(f"cells-{name}-{draw}", "cells", words))
    small = "--config configs/model/lower_count_small.yaml --model.reduction 16 --model.network.peak_gradient sum"
    both = f"{PHOTOS} {small} {BCCD} --data.batch_size 8 --data.num_workers 0 --trainer.max_epochs 60"
    found.append(
        Fit(
            "bccd-limit4",
            "bccd",
            f"{both} --model.preprocess '{{resize: height, size: 192}}' --model.first_stage 5",
            "last",
        )
    )
    return found


def train(parts: list[str], data: Path, jobs: int, names: list[str]) -> None:
    """Run what is not finished, ``jobs`` at a time with a thread each (with two threads where it is one)."""
    waiting = [fit for fit in fits() if fit.part in parts and (not names or fit.name in names)]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(lambda fit: _train(fit, data, threads), waiting):
            print(line, flush=True)


def _train(fit: Fit, data: Path, threads: str) -> str:
    folder = HERE / "runs" / "results" / fit.name
    seconds = folder / "seconds.txt"
    if seconds.exists():
        return f"{fit.name}: there already, {seconds.read_text()} s"
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with (folder / "log.txt").open("w") as log:
        command = f"{fit.command(data)} --trainer.enable_progress_bar false"
        code = subprocess.run(
            ["bash", "-c", f"{Path(sys.executable).parent}/{command}"],
            cwd=HERE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        ).returncode
    if code:
        return f"{fit.name}: ended with {code}, see {folder / 'log.txt'}"
    seconds.write_text(f"{time.perf_counter() - start:.0f}")
    return f"{fit.name}: {seconds.read_text()} s"


# -- measuring --------------------------------------------------------------------------------------------------------

STORED = HERE / "results"
INTERVALS = ("clip_count-0", "ebc-0")
AUDITED = ("clip_count-0", "clip_count-1", "clip_count-2", "region_clip-0")


def measure(parts: list[str], data: Path) -> None:
    """Benchmark, audit and calibrate what is trained; store the figures as JSON and text below ``results/``."""
    STORED.mkdir(exist_ok=True)
    _store("training", {fit.name: _seconds(fit) for fit in fits() if _seconds(fit)} | {"machine": _machine()})
    if "scenes" in parts:
        scenes: dict[str, Any] = {"num_workers": 0}
        text, blind = ("clip_count", "region_clip"), ("ebc",)
        _benchmark("easy", "Kinds of object that training never showed", text, SyntheticScenes(preset="easy", **scenes))
        merged = SyntheticScenes(preset="easy", merge_classes="objects", **scenes)
        _benchmark("objects", "All objects, whatever they are", blind, merged)
        every = ("lower_count", *text, *blind)
        _benchmark("low", "Twelve kinds at once", every, SyntheticScenes(preset="low", prompts="all", **scenes))
        for name in AUDITED:
            if (path := _trained(name)) is not None:
                out = HERE / "runs" / "results" / "audit" / name
                _run(f"counting-zoo audit --ckpt_path {path} {EASY} --data.num_workers 0 --limit 100 --out {out}")
                _store(f"audit-{name}", json.loads((out / "audit.json").read_text()))
        for name in INTERVALS:
            if (path := _trained(name)) is not None:
                printed = _run(f"python benchmarks/interval_coverage.py {path}")
                (STORED / f"intervals-{name}.md").write_text(printed)
    if "cells" in parts:
        cells = made_from_config(
            CountingDataModule, "data", HERE / "configs/data/vgg_cells.yaml", {"root": str(data / "vgg_cells")}
        )
        _benchmark("cells", "VGG cells", ("cells-ebc_small", "cells-density_small"), cells)
    if "bccd" in parts:
        options = {"root": str(data / "bccd"), "train_split": "trainval", "val_split": "drawn", "num_workers": 0}
        blood = made_from_config(CountingDataModule, "data", HERE / "configs/data/bccd.yaml", options)
        _benchmark("bccd", "Blood cells", ("bccd",), blood)


def _benchmark(name: str, title: str, systems: tuple[str, ...], data: CountingDataModule) -> None:
    runs = [fit for fit in fits() if fit.name.rpartition("-")[0] in systems and _seconds(fit)]
    if not runs:
        print(f"{name}: nothing is trained of {', '.join(systems)}")
        return
    models: dict[str, Any] = {fit.name: HERE / fit.checkpoint for fit in runs}
    found = benchmark(models, {title: data}, HERE / "runs" / "results" / "benchmark" / name, title=title)
    _store(name, read_results(found.results))
    _store(f"{name}-costs", json.loads((found.folder / "costs.json").read_text()))


def _store(name: str, content: Any) -> None:
    (STORED / f"{name}.json").write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    print(f"stored results/{name}.json", flush=True)


def _run(command: str) -> str:
    """What a command prints; its progress goes to the terminal."""
    program, *words = command.split()
    done = subprocess.run([Path(sys.executable).parent / program, *words], cwd=HERE, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: ended with {done.returncode}")
    return done.stdout


def _seconds(fit: Fit) -> int | None:
    path = HERE / "runs" / "results" / fit.name / "seconds.txt"
    return int(path.read_text()) if path.exists() else None


def _trained(name: str) -> Path | None:
    fit = next(fit for fit in fits() if fit.name == name)
    return HERE / fit.checkpoint if _seconds(fit) else None


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{os.cpu_count()} cores ({name}), no GPU, torch {torch.__version__}, Python {sys.version.split()[0]}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "page"))
    parser.add_argument("--only", nargs="+", choices=("scenes", "cells", "bccd"), default=["scenes", "cells", "bccd"])
    parser.add_argument("--names", nargs="+", default=[], help="of runs, to train no others")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time")
    parser.add_argument(
        "--data", type=Path, default=Path(os.environ.get("COUNTING_ZOO_DATA", HERE.parent / "shared" / "data"))
    )
    options = parser.parse_args()
    if options.what == "train":
        train(options.only, options.data, options.jobs, options.names)
    elif options.what == "measure":
        measure(options.only, options.data)
    else:
        from results_page import write_page

        write_page()


if __name__ == "__main__":
    main()
