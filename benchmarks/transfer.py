"""What a pretrained encoder does for CLIP-Count on kinds of object that training never showed, seed by seed.

Trains the small CLIP-Count on the built-in scenes from random weights and from each encoder given, for the same number
of pictures, and prints test errors as a table. Finished runs are kept in ``--out`` and not repeated with the same
settings and the same encoder.

    python benchmarks/transfer.py --starts random small image_text=image_text.safetensors --seeds 0 1 2 --epochs 3
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import sys
import time
from pathlib import Path

from counting_zoo import SyntheticScenes
from counting_zoo.cli import main
from counting_zoo.nn.pretrained import SMALL, small_file
from counting_zoo.quickstart import config

COLUMNS = {
    "test/mae": "MAE",
    "test/rmse": "RMSE",
    "test/absent_ratio": "absent",
    "test/hard_absent_ratio": "look-alike absent",
    "seconds": "fit with its start and one validation, s",
}


def fingerprint(source: str | None, more: list[str]) -> str:
    """What the name of a run's folder does not say: the encoder's bytes, and more options."""
    digest = hashlib.sha256(json.dumps(more).encode())
    if source is not None:
        file = small_file() if source == SMALL else Path(source).expanduser()
        digest.update(file.read_bytes())
    return digest.hexdigest()[:10]


def command(words: list[str]) -> None:
    """Run a command of counting-zoo, and stop where it fails."""
    if code := main(words):
        sys.exit(code)


def run(start: str, source: str | None, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and test once; the scores."""
    name = f"{options.preset}-{start}-{seed}-{options.epochs}-{fingerprint(source, options.more)}"
    folder: Path = options.out / name
    done = folder / "scores.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    data = [
        "--config",
        str(config(f"data/scenes_{options.preset}.yaml")),
        "--data.prompts",
        "3",
        "--data.num_workers",
        "0",
    ]

    def logger(name: str) -> list[str]:
        made = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": name, "version": ""}}
        return ["--trainer.logger", json.dumps([made]), "--trainer.enable_progress_bar", "false"]

    # From random weights the recipe begins with contrast alone, for three epochs of ten.
    first = round(0.3 * options.epochs) if source is None else 0
    SyntheticScenes(preset=options.preset).prepare_data()  # rendering is no part of what is timed
    begun = time.perf_counter()
    command(
        [
            "fit",
            "--config",
            str(config("trainer/quick.yaml")),
            "--config",
            str(config("model/clip_count_small.yaml")),
            *data,
            *logger("fit"),
            "--seed_everything",
            str(seed),
            "--data.seed",
            str(seed),
            "--model.pretrained_encoder",
            source or "null",
            "--model.contrast_epochs",
            str(first),
            "--trainer.max_epochs",
            str(options.epochs),
            "--trainer.check_val_every_n_epoch",
            str(options.epochs),
            "--trainer.precision",
            "bf16-mixed",
            *options.more,
        ]
    )
    seconds = time.perf_counter() - begun
    last = folder / "fit" / "checkpoints" / "last.ckpt"
    command(["test", "--ckpt_path", str(last), *data, *logger("test")])
    with (folder / "test" / "metrics.csv").open(encoding="utf-8", newline="") as file:
        scores = {key: float(value) for row in csv.DictReader(file) for key, value in row.items() if value}
    done.write_text(json.dumps(scores | {"seconds": seconds}), encoding="utf-8")
    return scores | {"seconds": seconds}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Mean of the seeds, and the seeds in brackets."""
    lines = ["| start | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for start, scores in found.items():
        cells = []
        for key in COLUMNS:
            values = [one[key] for one in scores]
            digits = 0 if key == "seconds" else 3 if "ratio" in key else 2
            cells.append(f"{statistics.mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})")
        lines.append(f"| {start} | " + " | ".join(cells) + " |")
    median = next(iter(found.values()))[0].get("test/train_median_mae")
    return "\n".join([*lines, f"| always the training median | {median:.2f} |" + " |" * (len(COLUMNS) - 1)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--starts", nargs="+", default=["random", "small"], help="random, small, or name=file.safetensors"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--preset", default="easy", choices=["easy", "full"])
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="more options of fit")
    given = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for word in given.starts:
        name, _, file = word.partition("=")
        origin = None if name == "random" else file or name
        for number in given.seeds:
            results.setdefault(name, []).append(run(name, origin, number, given))
            print(f"{name}, seed {number}: {results[name][-1]['test/mae']:.2f}", flush=True)
    print(table(results))
