"""Commands that need Lightning: ``fit``, ``validate``, ``test``, ``predict``, and those on data and checkpoints."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import pkgutil
import signal
import tempfile
import warnings
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from counting_zoo import data, models
from counting_zoo.callbacks import PredictionWriter, SaveOnTermination, TestReport
from counting_zoo.config_safety import CURE
from counting_zoo.data.base import CountingDataModule
from counting_zoo.errors import CheckpointError, InputError
from counting_zoo.module import CountingModule
from counting_zoo.ops import usable_precision
from counting_zoo.quickstart import config_or_path
from counting_zoo.training import TrainingModule, current_name

log = logging.getLogger(__name__)


def run(command: str, arguments: Sequence[str]) -> int:
    """Run one of the trainer's commands with the words behind it; the exit code."""
    _import_classes()
    _silence()
    try:
        CountingCLI([command, *arguments])
    except SIGTERMException:
        return 128 + signal.SIGTERM  # what shells and schedulers take for ended from outside
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning ends with 1
            return 128 + signal.SIGINT
        raise
    return 0


def run_describe(arguments: Sequence[str], allowed: Sequence[str] = ()) -> int:
    """Run ``counting-zoo describe``; the exit code is 2 if no split can be read."""
    from counting_zoo.data.describe import describe, print_description

    parser = _data_parser("describe", "Print what a data set holds.")
    made = parser.instantiate(parser.parse_args(list(arguments)))
    made.data.prepare_data()
    found = describe(made.data)
    print_description(found, protocol=made.data.hparams)
    return 2 if all(isinstance(value, InputError) for value in found.values()) else 0


def run_pack(arguments: Sequence[str], allowed: Sequence[str] = ()) -> int:
    """Run ``counting-zoo pack``; return the exit code."""
    from counting_zoo.data.pack import pack

    parser = _data_parser("pack", "Write a data set into one HDF5 file.")
    parser.add_function_arguments(pack, skip={"datamodule", "path"})
    parser.add_argument("--out", type=str, required=True, help="The HDF5 file to write.")
    config = parser.parse_args(list(arguments))
    made = parser.instantiate(config)
    made.data.prepare_data()
    print(f"wrote {pack(made.data, made.out, splits=made.splits, broken=made.broken)}")
    return 0


def made_from_config(kind: type, key: str, path: str | Path, options: Mapping[str, Any]) -> Any:
    """Build a model or data module from its configuration file.

    Args:
        kind: base class of what is made.
        key: ``model`` or ``data``, under which the file says it.
        path: the YAML file.
        options: settings that win over the file's.

    Raises:
        InputError: the file cannot be read, or says something that does not exist; names the file.
    """
    _import_classes()
    parser = _Parser(prog=str(path), exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_subclass_arguments(kind, key, required=True)
    words = [
        f"--{key}.{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()
    ]
    try:
        return parser.instantiate(parser.parse_args(["--config", str(path), *words]))[key]
    except ArgumentError as error:
        cure = f" {CURE}" if "not allowed, denied by" in str(error) else ""
        raise InputError(f"{path}: {error}{cure}") from error


def run_calibrate(arguments: Sequence[str], allowed: Sequence[str] = ()) -> int:
    """Run ``counting-zoo calibrate``; return the exit code.

    Args:
        arguments: the words behind the command.
        allowed: packages of the user's own that the checkpoint may name a model of.
    """
    from counting_zoo.evaluation.calibrate import calibrate, write_calibrated

    parser = _data_parser("calibrate", "Give a model intervals, from known counts.")
    parser.add_function_arguments(calibrate, skip={"model", "datamodule"})
    parser.add_argument("--ckpt_path", type=str, required=True, help="The checkpoint whose model is calibrated.")
    parser.add_argument("--out", type=str, required=True, help="The checkpoint to write.")
    parser.add_argument("--device", type=str, default="cpu", help="Where to count, such as cuda.")
    made = parser.instantiate(parser.parse_args(list(arguments)))
    model = counter_of(made.ckpt_path, allowed, device=made.device)
    done = calibrate(model, made.data, made.split, made.level, made.width)
    print(f"{done.describe()}\nwrote {write_calibrated(made.ckpt_path, made.out, done.calibration)}")
    return 0


def run_audit(arguments: Sequence[str], allowed: Sequence[str] = ()) -> int:
    """Run ``counting-zoo audit``; return the exit code.

    Args:
        arguments: the words behind the command.
        allowed: packages of the user's own that the checkpoint may name a model of.
    """
    from counting_zoo.evaluation.audit import TESTS, audit
    from counting_zoo.evaluation.audit_report import write_audit

    parser = _data_parser("audit", "See whether a model counts what its prompt says.")
    parser.add_argument("--tests", type=str, default=",".join(TESTS), help="Which tests, with commas between them.")
    parser.add_function_arguments(audit, skip={"model", "datamodule", "tests", "parts"})
    parser.add_argument("--ckpt_path", type=str, required=True, help="The checkpoint whose model is asked.")
    parser.add_argument("--out", type=str, required=True, help="The folder for the report; an audit goes on there.")
    parser.add_argument("--device", type=str, default="cpu", help="Where to count, such as cuda.")
    made = parser.instantiate(parser.parse_args(list(arguments)))
    made.data.prepare_data()
    found = audit(
        counter_of(made.ckpt_path, allowed, device=made.device),
        made.data,
        made.split,
        tests=[test.strip() for test in made.tests.split(",")],
        limit=made.limit,
        mosaics=made.mosaics,
        prompts_at_once=made.prompts_at_once,
        seed=made.seed,
        examples=made.examples,
        parts=Path(made.out) / "parts",
    )
    figures = write_audit(found, made.out)
    print(figures["verdict"]["sentence"])
    if found.cost is not None:
        print(f"{found.cost.prompts} prompts in one pass took 1/{found.cost.ratio:.1f} of the time of a pass for each")
    print(f"wrote {Path(made.out) / 'audit.html'}")
    return 0


def counter_of(path: str, allowed: Sequence[str], **options: Any) -> CountingModule:
    """Load the counter of a checkpoint, which may be of a package that the user allows.

    Args:
        path: the checkpoint.
        allowed: packages of the user's own.
        options: those of :func:`~counting_zoo.loading.load`.

    Raises:
        CheckpointError: it counts nothing, or is no checkpoint of the zoo.
    """
    model = model_of(path, allowed, **options)
    if not isinstance(model, CountingModule):
        raise CheckpointError(f"{path!r} is of {type(model).__name__}, which counts nothing")
    return model


def model_of(path: str, allowed: Sequence[str], **options: Any) -> Any:
    """Load any model of a checkpoint; the arguments are those of :func:`counter_of`."""
    from counting_zoo.loading import load, read_checkpoint

    home = str(read_checkpoint(path).get("counting_zoo", {}).get("class", "")).rpartition(".")[0]
    if any(home == name or home.startswith(f"{name}.") for name in allowed):
        importlib.import_module(home)
    return load(path, **options)


def _data_parser(command: str, description: str) -> _Parser:
    """Build the parser of a command that reads a data module."""
    _import_classes()
    parser = _Parser(prog=f"counting-zoo {command}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with the options below.")
    parser.add_subclass_arguments(CountingDataModule, "data", required=True)
    return parser


class _Parser(LightningArgumentParser):
    """Takes whole option names only, finds shipped configurations, and adds a cure to a refused import."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def parse_args(  # type: ignore[override]  # jsonargparse differs from argparse here too
        self, args: Sequence[str] | None = None, *others: Any, **kwargs: Any
    ) -> Any:
        return super().parse_args(None if args is None else _current_words(args), *others, **kwargs)

    def parse_string(self, content: str, *others: Any, **kwargs: Any) -> Any:  # of every configuration file
        return super().parse_string(_current_data(content), *others, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        refused = "not allowed, denied by" in f"{message} {ex}"
        return super().error(f"{message}\n{CURE}" if refused else message, ex)


class CountingCLI(LightningCLI):
    """LightningCLI for the zoo's models and data.

    A checkpoint given with ``--ckpt_path`` is read as the first configuration file: it says which model to build and
    how, and everything on the command line wins over it. (Lightning lets the checkpoint win, silently.)

    Args:
        args: command and options; never those of the process, which DDP's children need as they are.
    """

    def __init__(self, args: list[str]) -> None:
        self._command = args[0]
        super().__init__(
            TrainingModule,
            CountingDataModule,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"default_root_dir": "runs", "callbacks": [SaveOnTermination()]},
            parser_class=_Parser,
            parser_kwargs={"prog": "counting-zoo"},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is static, and called on self
        """Build only the parser of the requested subcommand; each of the others adds 0.1 s to start-up."""
        return {self._command: super().subcommands()[self._command]}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        super().setup_parser(*args, **kwargs)
        parser = self._parser(self._command)
        if self._command == "predict":
            parser.add_lightning_class_args(PredictionWriter, "predictions")
        if self._command == "test":
            parser.add_lightning_class_args(TestReport, "report")
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "runs", "name": self._command},
        }
        parser.set_defaults({"trainer.logger": logger})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        assert isinstance(args, list)
        checkpoint = _checkpoint_path(args)
        if checkpoint is None:
            self.config = parser.parse_args(args)
            return
        descriptor, recipe = tempfile.mkstemp(suffix=".yaml", prefix="recipe_")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                yaml.safe_dump({"model": _recipe(checkpoint)}, file)
            self.config = parser.parse_args([args[0], "--config", recipe, *args[1:]])
        finally:
            os.unlink(recipe)

    def _parse_ckpt_path(self) -> None:
        """Skip Lightning's own reading of the checkpoint, by which it overrides the command line."""

    def before_instantiate_classes(self) -> None:
        """Fit the trainer's settings to this machine: its instructions, and whether TensorBoard is installed."""
        config = self.config[self.config.subcommand]
        asked = str(config.get("trainer.precision"))
        precision = usable_precision(asked, str(config.get("trainer.accelerator")))
        if precision != asked:
            log.warning("this processor has no bfloat16 instructions: computing in %s, not %s", precision, asked)
            config["trainer.precision"] = precision
        loggers = config.get("trainer.logger")
        if isinstance(loggers, list) and importlib.util.find_spec("tensorboard") is None:
            kept = [entry for entry in loggers if not str(entry.get("class_path", "")).endswith("TensorBoardLogger")]
            if len(kept) < len(loggers):
                log.warning("tensorboard is not installed (pip install 'counting-zoo[viz]'): logging without it")
                config["trainer.logger"] = kept

    def predict(self, model: CountingModule, **kwargs: Any) -> None:
        """Write predictions as they come; keeping them all would fill the memory."""
        self.trainer.predict(model, **{**kwargs, "return_predictions": False})


#: Options under the names of the first edition, which command lines may still give.
EARLIER_OPTIONS = {
    "--predictions.pictures": "--predictions.images",
    "--predictions.max_pictures": "--predictions.max_images",
    "--report.pictures": "--report.images",
    "--data.picture": "--data.image",
    "--data.pictures": "--data.images",
}


def _current_words(args: Sequence[str]) -> list[str]:
    """Replace the names of shipped configurations behind ``--config`` by their files, and earlier names of options."""
    words: list[str] = []
    for word in args:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-c") and equals:
            value = config_or_path(value)
        elif words and words[-1] in ("--config", "-c"):
            flag, equals, value = config_or_path(word), "", ""
        words.append(f"{EARLIER_OPTIONS.get(flag, flag)}{equals}{value}")
    return words


#: Data modules as configuration files of the first edition name them and their options; the class today, and options.
EARLIER_DATA = {
    "CaptionedPictures": ("CaptionedImages", {"pictures": "images"}),
    "ImageFolder": ("ImageFolder", {"picture": "image"}),
}


def _current_data(content: str) -> str:
    """Replace earlier names in the ``data`` of a configuration; what has none stays as it is, to the byte."""
    if "icture" not in content:
        return content
    try:
        config = yaml.safe_load(content)
    except yaml.YAMLError:
        return content  # the parser says what is wrong, and where
    given = config.get("data") if isinstance(config, dict) else None
    if not isinstance(given, dict):
        return content
    package, dot, kind = str(given.get("class_path")).rpartition(".")
    if kind not in EARLIER_DATA or package.split(".")[0] not in ("", "counting_zoo"):
        return content
    kind, options = EARLIER_DATA[kind]
    init_args = {options.get(name, name): value for name, value in (given.get("init_args") or {}).items()}
    current = {**given, "class_path": f"{package}{dot}{kind}", "init_args": init_args}
    return yaml.safe_dump({**config, "data": current}, sort_keys=False)


def _import_classes() -> None:
    """Import every model and data module, so that configurations may call them by their short names."""
    for package in (models, data):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


def _silence() -> None:
    """Silence adverts, and warnings about what is meant here."""
    for message in (
        ".*callbacks used to create the checkpoint need to be provided.*",  # testing needs none of them
        "The dirpath has changed from.*",  # the same
        ".*module.s. in eval mode at the start of training.*",  # frozen towers stay in evaluation mode
        "It is recommended to use .*sync_dist=True.*",  # metrics come gathered, the same on every process
        "You're using the WeightAveraging callback with a model.*",  # Lower-Count's branches need no sharding
        "You have overridden `on_after_batch_transfer` in `LightningModule`.*",  # no data module has one
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own call of torch
    ):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: For seamless cloud" not in record.getMessage())


def _checkpoint_path(args: Sequence[str]) -> Path | None:
    """Find the checkpoint file that the options or their YAML files name; the last one wins, as everywhere.

    Raises:
        CheckpointError: it is not there.
    """
    found: str | None = None
    words = iter(args[1:])
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("--ckpt_path", "--config", "-c"):
            continue
        value = value if equals else next(words, "")
        found = value if flag == "--ckpt_path" else _checkpoint_in_yaml(value) or found
    if found is None or found in ("null", "best", "last", "hpc", "registry") or "://" in found:
        return None
    path = Path(found).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise CheckpointError(f"--ckpt_path {found!r} is {kind}; expected a checkpoint file such as best.ckpt")
    return path


def _checkpoint_in_yaml(path: str) -> str | None:
    """Read ``ckpt_path`` of a configuration file; a file that is not there is left to the parser.

    Raises:
        InputError: the file is no YAML; the parser would not say which one.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read as YAML: {error}") from error
    value = content.get("ckpt_path") if isinstance(content, dict) else None
    return value if isinstance(value, str) else None


def _recipe(path: Path) -> dict[str, Any]:
    """Read the class and hyper-parameters that a checkpoint was written with.

    Raises:
        CheckpointError: it is not the zoo's.
    """
    from counting_zoo.loading import model_class, read_checkpoint

    checkpoint = read_checkpoint(path)
    if "counting_zoo" not in checkpoint:
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of counting_zoo (its keys: {sorted(map(str, checkpoint))[:6]}); for "
            "weights of a reference implementation use 'counting-zoo convert' first"
        )
    name = current_name(checkpoint["counting_zoo"]["class"])
    return {"class_path": name, "init_args": model_class(name).nested(checkpoint.get("hyper_parameters", {}))}


def run_benchmark(given: argparse.Namespace, allowed: Sequence[str] = ()) -> int:
    """Run ``counting-zoo benchmark``; return the exit code.

    Args:
        given: options, as :func:`counting_zoo.cli.benchmark_parser` reads them.
        allowed: packages of the user's own that checkpoints may name a model of.
    """
    names = [name for name in vars(given) if name not in ("config", "models", "data", "out")]
    content = {} if given.config is None else _read(given.config, ("models", "data", *names))
    models = {**(content.get("models") or {}), **_named(given.models, "--models")}
    data = {**(content.get("data") or {}), **_named(given.data, "--data")}
    options = {name: content[name] for name in names if name in content}
    options |= {name: value for name in names if (value := getattr(given, name)) is not None}

    from counting_zoo.evaluation.benchmark import benchmark

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


def _read(path: str, known: Sequence[str]) -> dict[str, Any]:
    """Read the benchmark's file.

    Raises:
        InputError: it cannot be read, or has keys that say nothing.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict) or (unknown := set(content) - set(known)):
        found = ", ".join(sorted(map(str, unknown))) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"--config {path}: holds {found}; expected a mapping of {', '.join(known)}")
    for key in ("models", "data"):
        if not isinstance(content.get(key, {}), dict):
            raise InputError(f"--config {path}: {key} is {content[key]!r}; expected names with a file each")
    return content


def _named(words: Sequence[str], flag: str) -> dict[str, str]:
    """Split ``name=file``; files without a name go under their own."""
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
    """Split the entry of one model or data set into its kind, file and options."""
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
