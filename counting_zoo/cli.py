"""The command line's front: answers help and mistakes at once, and imports torch only for a command that needs it."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from counting_zoo.config_safety import ALLOW_FLAG, restrict_imports, take_allowed_packages
from counting_zoo.errors import InputError, plain_message
from counting_zoo.version import __version__

RUNS = ("fit", "validate", "test", "predict")
ON_DATA = ("describe", "pack", "audit", "calibrate")


HELP = f"""\
usage: counting-zoo COMMAND [options]       counting-zoo COMMAND --help for all options

  fit        train a model
  validate   score a model on the validation images of a data set
  test       score a model on the test images, with a report
  predict    count in images: tables, densities and overlays
  audit      ask a text-guided model right, wrong and empty prompts: does the count follow the text?
  calibrate  measure how far a model's counts are off, so that it gives an interval with each count
  describe   print what a data set holds, and what constant predictors score on it
  benchmark  any models on any data under one protocol, with intervals, images and published results
  pack       write a data set into one HDF5 file
  convert    turn weights of a reference implementation into a checkpoint
  export     write a counter as a graph (torch.export or ONNX) that runs without this package
  export-encoder  write the CLIP of a RegionCLIP pretraining, for pretrained_encoder of other models
  quickstart train, test and predict on the built-in scenes, in minutes

  counting-zoo fit --config configs/trainer/cpu.yaml --config configs/model/clip_count_small.yaml \\
                   --config configs/data/scenes_easy.yaml
  counting-zoo test --ckpt_path best.ckpt --config configs/data/scenes_easy.yaml
  counting-zoo predict --ckpt_path best.ckpt --data ImageFolder --data.root photos --data.classes '[apples]' \\
                       --predictions.dir out
  counting-zoo audit --ckpt_path best.ckpt --config configs/data/scenes_easy.yaml --out runs/audit
  counting-zoo calibrate --ckpt_path best.ckpt --config configs/data/scenes_easy.yaml --out calibrated.ckpt
  counting-zoo describe --config configs/data/fsc147.yaml --data.root FSC147
  counting-zoo pack --config configs/data/scenes_easy.yaml --out scenes.h5
  counting-zoo convert clip_count official.ckpt converted.ckpt --clip openai/clip-vit-base-patch16

Later files and options win over earlier ones; --print_config shows the result. validate, test and predict take the
model from the checkpoint. {ALLOW_FLAG} NAME lets configurations and checkpoints name classes of a package of yours.
"""


BENCHMARK_HELP = """\
Count every image of each data set with each model under one protocol. Models are checkpoints, model configurations
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
  title: Cells                # and split, precision, images, resamples, seed, costs, accelerator, devices

A benchmark that was interrupted goes on where it stopped when it is given the same --out.
"""

DATA_HELP = """
data:
  -c, --config FILE        YAML file with any of these options; files of the package by their names, such as
                           configs/data/fsc147.yaml
  --data CLASS             the data module, such as FSC147 or ImageFolder
  --data.OPTION VALUE      an option of the data module, such as --data.root FSC147
  --data.help CLASS        show all options of a data module
  --print_config           print the configuration that the other options give, and exit
"""

CHECKPOINT_HELP = f"""\
  --device DEVICE          where to count, such as cuda (default: cpu)
  {ALLOW_FLAG} NAME   let the checkpoint and the configuration name classes of this package
"""

#: Help of the commands whose options come from signatures: reading those would import torch. A test compares the two.
DATA_COMMANDS_HELP = {
    "describe": f"""\
usage: counting-zoo describe --config FILE [options]

Print what a data set holds, and what constant predictors score on it.
{DATA_HELP}""",
    "pack": f"""\
usage: counting-zoo pack --config FILE --out FILE [options]

Write images and checked annotation of a data set into one HDF5 file.

options:
  --out FILE               the HDF5 file to write (required)
  --splits [SPLIT,...]     splits to pack (default: [train,val,test])
  --broken error|skip      an image that cannot be decoded is an error, or is left out with a warning (default: error)
{DATA_HELP}""",
    "calibrate": f"""\
usage: counting-zoo calibrate --ckpt_path FILE --config FILE --out FILE [options]

Measure how far a model's counts are off, so that count, predict and test give an interval with each count.

options:
  --ckpt_path FILE         the checkpoint whose model is calibrated (required)
  --out FILE               the checkpoint to write (required)
  --split SPLIT            train, val or test; not the one that the model trained on (default: val)
  --level LEVEL            share of the true counts that intervals should hold (default: 0.9)
  --width residual|bins    residual widens intervals with the count; bins, with the deviation of the count that a model
                           of bins (CLIP-EBC) expects itself (default: residual)
{CHECKPOINT_HELP}{DATA_HELP}""",
    "audit": f"""\
usage: counting-zoo audit --ckpt_path FILE --config FILE --out FOLDER [options]

Ask a text-guided model about each image with right, wrong and empty prompts: does the count follow the text?

options:
  --ckpt_path FILE         the checkpoint whose model is asked (required)
  --out FOLDER             the folder of the report; an interrupted audit goes on there (required)
  --tests TEST,...         tests to make (default: negative,mosaic,pairs,labelfree)
  --split SPLIT            train, val or test (default: test)
  --limit N                number of images, taken evenly from the split (default: all)
  --mosaics N              classes drawn for the mosaics of each image; 0 for all, as PrACo does (default: 4)
  --prompts_at_once N      most prompts in one pass, which bounds the memory (default: 64)
  --seed SEED              of the mosaics' partners and of noise (default: 0)
  --examples N             number of images that are drawn (default: 3)
{CHECKPOINT_HELP}{DATA_HELP}""",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        args: the words behind ``counting-zoo``; those of the process if ``None``.

    Returns:
        The exit code: 0, or 2 with one line on standard error for an unusable setting, file or image. With
        ``COUNTING_ZOO_DEBUG=1`` the error is raised instead.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"counting-zoo {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    commands: dict[str, Callable[[list[str]], int]] = {
        **{name: partial(_lightning, name) for name in (*RUNS, *ON_DATA)},
        "benchmark": _benchmark,
        "convert": _convert,
        "export": _export,
        "export-encoder": _export_encoder,
        "quickstart": _quickstart,
    }
    if command not in commands:
        close = difflib.get_close_matches(command, commands, 1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(sorted(commands))}"
        print(f"error: counting-zoo has no command {command!r}{hint}", file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        reason = _foreseen(error)
        if reason is None or os.environ.get("COUNTING_ZOO_DEBUG", "0") not in ("", "0"):
            raise
        print(f"error: {plain_message(reason)}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # how argument parsers end
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2


def _foreseen(error: BaseException | None) -> InputError | FloatingPointError | None:
    """Find the zoo's own error, also where the parser has wrapped it in one of its own."""
    while error is not None and not isinstance(error, InputError | FloatingPointError):
        error = error.__cause__
    return error


def _lightning(command: str, arguments: list[str]) -> int:
    """Run a command that builds models or data, with the packages whose classes its configurations may name."""
    if command in DATA_COMMANDS_HELP and {"-h", "--help"} & set(arguments):
        print(DATA_COMMANDS_HELP[command], end="")
        return 0
    arguments, allowed = take_allowed_packages(arguments)
    restrict_imports(allowed)
    from counting_zoo import lightning_cli

    if command in RUNS:
        return lightning_cli.run(command, arguments)
    return getattr(lightning_cli, f"run_{command}")(arguments, allowed)


def benchmark_parser() -> argparse.ArgumentParser:
    """Build the parser of ``counting-zoo benchmark``."""
    parser = argparse.ArgumentParser(
        "counting-zoo benchmark", description=BENCHMARK_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", help="YAML file with models, data and options")
    parser.add_argument("--models", nargs="+", default=[], metavar="[NAME=]FILE", help=".ckpt, .yaml or .csv")
    parser.add_argument("--data", nargs="+", default=[], metavar="[NAME=]CONFIG", help="data configurations")
    parser.add_argument("--out", required=True, type=Path, help="folder for everything it writes")
    parser.add_argument("--title", help="heading of the report")
    parser.add_argument("--split", choices=("train", "val", "test"), help="default: test")
    parser.add_argument("--accelerator", help="cpu, gpu, ... (default: what is there)")
    parser.add_argument("--devices", type=int, help="how many share the images")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed", "16-mixed"), help="default: 32-true")
    parser.add_argument("--images", "--pictures", type=int, help="best and worst images drawn of each run (default: 3)")
    parser.add_argument("--resamples", type=int, help="of the bootstrap (default: 2000)")
    parser.add_argument("--seed", type=int, help="of the bootstrap (default: 0)")
    parser.add_argument("--costs", action=argparse.BooleanOptionalAction, help="measure time and memory")
    return parser


def _benchmark(arguments: list[str]) -> int:
    arguments, allowed = take_allowed_packages(arguments)
    options = benchmark_parser().parse_args(arguments)
    restrict_imports(allowed)

    from counting_zoo.lightning_cli import run_benchmark

    return run_benchmark(options, allowed)


def _quickstart(arguments: list[str]) -> int:
    from counting_zoo.quickstart import run

    return run(arguments, main)


def _convert(arguments: list[str]) -> int:
    arguments, extra = take_allowed_packages(arguments)
    parser = argparse.ArgumentParser(
        "counting-zoo convert", description="Turn weights of a reference implementation into a checkpoint of the zoo."
    )
    parser.add_argument("name", help="which system: clip_count, clip_ebc, lower_count or region_clip")
    parser.add_argument("source", help="the reference's checkpoint or state dict; pickled code in it is never run")
    parser.add_argument("out", help="the checkpoint to write")
    parser.add_argument("--config", help="the reference's settings, JSON or YAML, where the file does not carry them")
    parser.add_argument("--clip", help="CLIP weights the file lacks: hub name, folder, or OpenAI-layout state dict")
    parser.add_argument("--tokenizer", help="folder or hub name")
    options = parser.parse_args(arguments)
    restrict_imports(extra)
    config = None if options.config is None else _read_mapping(options.config)

    from counting_zoo.loading import load_official, read_checkpoint, save

    clip: Any = options.clip
    if clip is not None and os.path.isfile(clip):
        clip = read_checkpoint(clip)
    model = load_official(options.name, options.source, config=config, clip=clip, tokenizer=options.tokenizer)
    print(f"wrote {save(model, options.out)}")
    return 0


def _export(arguments: list[str]) -> int:
    arguments, extra = take_allowed_packages(arguments)
    parser = argparse.ArgumentParser(
        "counting-zoo export", description="Write a counter as a graph that runs without this package."
    )
    parser.add_argument("checkpoint", help="of a model that counts by density")
    parser.add_argument("out", help="the file to write: .pt2 (torch.export) or .onnx")
    parser.add_argument("--names", nargs="+", help="what the graph counts; the model's default classes if not given")
    options = parser.parse_args(arguments)
    restrict_imports(extra)

    from counting_zoo.exporting import export
    from counting_zoo.lightning_cli import counter_of

    print(f"wrote {export(counter_of(options.checkpoint, extra), options.out, options.names)}")
    return 0


def _export_encoder(arguments: list[str]) -> int:
    arguments, extra = take_allowed_packages(arguments)
    parser = argparse.ArgumentParser(
        "counting-zoo export-encoder", description="Write the CLIP that RegionCLIPPretraining trained."
    )
    parser.add_argument("checkpoint", help="of RegionCLIPPretraining")
    parser.add_argument("out", help="the .safetensors file to write")
    parser.add_argument("--half", action="store_true", help="in half precision")
    options = parser.parse_args(arguments)
    restrict_imports(extra)

    from counting_zoo.lightning_cli import model_of
    from counting_zoo.models.region_clip import RegionCLIPPretraining

    model = model_of(options.checkpoint, extra)
    if not isinstance(model, RegionCLIPPretraining):
        raise InputError(f"{options.checkpoint!r} is of {type(model).__name__}; expected one of RegionCLIPPretraining")
    print(f"wrote {model.export(options.out, half=options.half)}")
    return 0


def _read_mapping(path: str) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping."""
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read as JSON or YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: holds a {type(content).__name__}; expected a mapping of settings")
    return content


if __name__ == "__main__":
    sys.exit(main())
