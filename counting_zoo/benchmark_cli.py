"""``counting-zoo benchmark``: its options and its file, and nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from counting_zoo.data.base import CountingDataModule
from counting_zoo.errors import InputError
from counting_zoo.module import CountingModule
from counting_zoo.training_cli import counter_of, made_from_config

HELP = """\
Count every picture of each data set with each model under one protocol. Models are checkpoints, model configurations
(for models that need no training) or CSV files of counts from elsewhere; data are data configurations.

  counting-zoo benchmark --models ours=best.ckpt theirs=counts.csv --data cells=configs/data/vgg_cells.yaml --out runs/b
  counting-zoo benchmark --config benchmark.yaml --out runs/benchmark

The file says the same, with options:

  models:
    ours: best.ckpt
    windows: {checkpoint: best.ckpt, set: {window: 384, stride: 128}}
    theirs: counts.csv
  data:
    cells: {config: configs/data/vgg_cells.yaml, set: {root: vgg_cells}}
  title: Cells                # and split, precision, pictures, resamples, seed, costs

A benchmark that was interrupted goes on where it stopped when it is given the same --out.
"""
OPTIONS = ("title", "split", "precision", "pictures", "resamples", "seed", "costs", "accelerator", "devices")


def run(arguments: Sequence[str], allowed: Sequence[str] = ()) -> int:
    """The command; the exit code.

    Args:
        arguments: the words behind the command.
        allowed: packages of the user's own that checkpoints may name a model of.
    """
    parser = argparse.ArgumentParser(
        "counting-zoo benchmark", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file with models, data and options")
    parser.add_argument("--models", nargs="+", default=[], metavar="[NAME=]FILE", help=".ckpt, .yaml or .csv")
    parser.add_argument("--data", nargs="+", default=[], metavar="[NAME=]CONFIG", help="data configurations")
    parser.add_argument("--out", required=True, type=Path, help="folder for everything it writes")
    parser.add_argument("--title")
    parser.add_argument("--split", choices=("train", "val", "test"))
    parser.add_argument("--accelerator", help="cpu, gpu, ... (default: what is there)")
    parser.add_argument("--devices", type=int, help="how many share the pictures")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"))
    parser.add_argument("--pictures", type=int, help="best and worst pictures drawn of each run (default 3)")
    parser.add_argument("--resamples", type=int, help="of the bootstrap (default 2000)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--costs", action=argparse.BooleanOptionalAction, help="measure time and memory")
    given = parser.parse_args(list(arguments))

    content = {} if given.config is None else _read(given.config)
    models = {**(content.get("models") or {}), **_named(given.models, "--models")}
    data = {**(content.get("data") or {}), **_named(given.data, "--data")}
    options = {name: content[name] for name in OPTIONS if name in content}
    options |= {name: value for name in OPTIONS if (value := getattr(given, name)) is not None}

    from counting_zoo.benchmarking import benchmark

    found = benchmark(
        {name: _model(name, entry, allowed) for name, entry in models.items()},
        {name: _data(name, entry) for name, entry in data.items()},
        given.out,
        **options,
    )
    if found.runs:  # of several processes, the first has them
        print((found.folder / "benchmark.md").read_text(encoding="utf-8"))
        print(f"report: {found.folder / 'benchmark.html'}")
    return 0


def _read(path: str) -> dict[str, Any]:
    """The benchmark's file.

    Raises:
        InputError: it cannot be read, or has keys that say nothing.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read as YAML: {error}") from error
    known = ("models", "data", *OPTIONS)
    if not isinstance(content, dict) or (unknown := set(content) - set(known)):
        found = ", ".join(sorted(map(str, unknown))) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"--config {path}: holds {found}; expected a mapping of {', '.join(known)}")
    for key in ("models", "data"):
        if not isinstance(content.get(key, {}), dict):
            raise InputError(f"--config {path}: {key} is {content[key]!r}; expected names with a file each")
    return content


def _named(words: Sequence[str], flag: str) -> dict[str, str]:
    """``name=file``, or files under their own names."""
    found: dict[str, str] = {}
    for word in words:
        name, equals, file = word.partition("=")
        if not equals or Path(word).is_file():  # Lightning calls checkpoints epoch=3-step=10.ckpt
            name, file = Path(word).stem, word
        if name in found:
            raise InputError(f"{flag}: two are called {name!r}; name them apart: {name}=..., other={word}")
        found[name] = file
    return found


def _entry(name: str, entry: Any, keys: tuple[str, ...]) -> tuple[str, str, dict[str, Any]]:
    """Kind, file and options of one model or data set."""
    if isinstance(entry, str):
        return "", entry, {}
    kinds = [key for key in keys if isinstance(entry, Mapping) and isinstance(entry.get(key), str)]
    if len(kinds) != 1 or set(entry) - {*kinds, "set"} or not isinstance(entry.get("set", {}), Mapping):
        forms = " or ".join(f"{{{key}: FILE, set: {{option: value}}}}" for key in keys)
        raise InputError(f"{name} is {entry!r}; expected a file, or {forms}")
    return kinds[0], entry[kinds[0]], dict(entry.get("set") or {})


def _model(name: str, entry: Any, allowed: Sequence[str]) -> CountingModule | Path:
    kind, file, options = _entry(name, entry, ("checkpoint", "config", "counts"))
    kind = kind or {".yaml": "config", ".yml": "config", ".csv": "counts"}.get(Path(file).suffix.lower(), "checkpoint")
    if kind == "counts":
        if Path(file).suffix.lower() != ".csv":
            raise InputError(f"{name}: counts are read from .csv files, got {file!r}")
        if options:
            raise InputError(f"{name}: counts from a file have no options, got {sorted(options)}")
        return Path(file)
    if kind == "config":
        made = made_from_config(CountingModule, "model", file, options)
        assert isinstance(made, CountingModule)
        made.configure_model()
        return made
    return counter_of(file, allowed, **options)


def _data(name: str, entry: Any) -> CountingDataModule:
    _, file, options = _entry(name, entry, ("config",))
    made = made_from_config(CountingDataModule, "data", file, options)
    assert isinstance(made, CountingDataModule)
    return made


__all__ = ["run"]
