"""Loading models: the zoo's own checkpoints, and weights of the reference implementations."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counting_zoo.checkpoints import write_checkpoint
from counting_zoo.errors import CheckpointError, InputError
from counting_zoo.geometry import Preprocess
from counting_zoo.io import tensors_sha256
from counting_zoo.module import CountingModule
from counting_zoo.nn.weights import read_checkpoint
from counting_zoo.training import TrainingModule, current_name

#: The models that :func:`load_official` reads weights of.
OFFICIAL = ("clip_count", "clip_ebc", "lower_count", "region_clip")


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    tokenizer: Any = None,
    verify: bool = True,
    **overrides: Any,
) -> Any:
    """Load the model of a zoo checkpoint, of whichever class it is, ready to count.

    Args:
        path: a checkpoint that training, ``convert`` or ``save`` wrote.
        device: where it should live.
        tokenizer: replaces the stored one.
        verify: refuse a file whose content differs from its checksums.
        overrides: hyper-parameters that should differ from the stored ones, such as ``window_batch_size``.

    Raises:
        CheckpointError: not a zoo checkpoint, damaged, of a class from elsewhere, or weights that do not fit.

    Example:
        >>> load("missing.ckpt")
        Traceback (most recent call last):
        ...
        counting_zoo.errors.CheckpointError: no checkpoint at 'missing.ckpt'; expected a file such as best.ckpt
    """
    checkpoint = read_checkpoint(path, verify=verify)
    if "counting_zoo" not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of counting_zoo (its keys: {sorted(map(str, checkpoint))[:6]}); for "
            "weights of a reference implementation use load_official or 'counting-zoo convert'"
        )
    try:
        _, kind = checkpoint["hyper_parameters"], model_class(current_name(checkpoint["counting_zoo"]["class"]))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{str(path)!r} misses part of its recipe: {error}") from error
    try:
        module = kind.of_checkpoint(checkpoint, tokenizer=tokenizer, **overrides)
    except TypeError as error:
        raise CheckpointError(
            f"{kind.__name__} does not take the settings of {str(path)!r} and {overrides}: {error}; a checkpoint of a "
            "later version needs that version of counting_zoo"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error
    return module.to(device).eval()


def save(module: CountingModule, path: str | Path) -> Path:
    """Write a model as a zoo checkpoint with its whole recipe, without a trainer."""
    path = Path(path).expanduser()
    checkpoint: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": _lightning_version(),
        "epoch": 0,
        "global_step": 0,
    }
    module.on_save_checkpoint(checkpoint)
    return write_checkpoint(checkpoint, path)


def model_class(name: str) -> type[TrainingModule]:
    """Find the class a checkpoint names, if it is the zoo's or the caller has already imported it.

    Raises:
        CheckpointError: importing it could run code of somebody else's choice, or it is no model.
    """
    module_name, _, class_name = name.rpartition(".")
    if module_name.split(".")[0] != "counting_zoo" and module_name not in sys.modules:
        raise CheckpointError(
            f"the checkpoint is of {name!r}, from outside counting_zoo; import that module first if you trust it (on "
            f"the command line: --allow_packages {module_name.split('.')[0]})"
        )
    try:
        kind = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"the checkpoint is of {name!r}, which this version of counting_zoo does not have; update counting_zoo"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, TrainingModule)):
        raise CheckpointError(f"the checkpoint names {name!r}, which is no model of counting_zoo")
    return kind


def load_official(
    name: str,
    source: str | Path | Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    clip: Any = None,
    tokenizer: Any = None,
) -> CountingModule:
    """Build a model with the weights of a reference implementation, which predicts as the reference does.

    Args:
        name: ``clip_count``, ``clip_ebc``, ``lower_count``, or ``region_clip`` (a counter by detection that needs no
            training, see :func:`~counting_zoo.models.region_clip.weights.from_official`).
        source: the reference's weights as a file, a mapping, or a folder with ``model.safetensors`` and
            ``config.json``: a bare state dict, or one under ``state_dict``, ``model_state_dict`` (resume files),
            ``model`` or ``weights``, with or without ``model.`` / ``module.`` prefixes.
        config: the reference's settings under its own names, over those the file carries; for ``region_clip`` also
            options of the counter, such as ``proposals`` and ``score``.
        clip: frozen CLIP weights where the file has none: hub name, folder, or an OpenAI-layout state dict (the
            mapping or a file of it).
        tokenizer: a HuggingFace tokenizer, a folder, a hub name, or a callable ``list[str] -> (B, L)`` ids.

    Raises:
        InputError: no such model.
        CheckpointError: the file cannot be read, or would run code.
        WeightsError: a key of the file is unknown, or one of the model's is missing; lists them. Or a setting that no
            tensor shows, such as bins, is given nowhere.
    """
    if name not in OFFICIAL:
        raise InputError(f"load_official knows no {name!r}; expected one of {', '.join(map(repr, OFFICIAL))}")
    if isinstance(clip, str | Path) and Path(clip).expanduser().is_file():
        clip = read_checkpoint(clip)
    settings: dict[str, Any] = {}
    if isinstance(source, Mapping):
        content = dict(source)
    else:
        content, settings = _read_official(Path(source).expanduser())
    for key in ("hyper_parameters", "config"):
        if isinstance(content.get(key), Mapping):
            settings |= content[key]
    wraps = ("state_dict", "model_state_dict", "model", "weights")
    wrapped = next((key for key in wraps if isinstance(content.get(key), Mapping)), None)
    state = content if wrapped is None else content[wrapped]
    tensors = {_bare(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"no tensors in {source if isinstance(source, str | Path) else 'the mapping'!r}")
    settings |= config or {}
    if name == "clip_count":
        from counting_zoo.models.clip_count.weights import from_official

        return from_official(tensors, settings, clip, tokenizer)
    if name == "lower_count":
        from counting_zoo.models.lower_count import weights as lower_count

        return lower_count.from_official(tensors, settings)
    if name == "region_clip":
        from counting_zoo.models.region_clip import weights as region_clip

        return region_clip.from_official(tensors, settings, clip, tokenizer)
    from counting_zoo.models.clip_ebc import weights as clip_ebc

    if isinstance(source, str | Path):
        settings = clip_ebc.settings_of_path(Path(source)) | settings
    return clip_ebc.from_official(tensors, settings, clip, tokenizer)


def _read_official(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the content of a reference's file, and the settings that lie beside it in ``config.json``."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(f"{str(path)!r} holds {len(files)} *.safetensors files; expected one, or name a file")
        path = files[0]
    content, beside = read_checkpoint(path), path.with_name("config.json")
    if path.suffix != ".safetensors" or not beside.is_file():
        return content, {}
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(beside)!r} cannot be read as JSON: {error}") from error
    return content, dict(settings)


def _bare(key: str) -> str:
    while key.startswith(("model.", "module.")):
        key = key.split(".", 1)[1]
    return key


def _lightning_version() -> str:
    import lightning

    return lightning.__version__


_PLAIN = (type(None), str, int, float, list, tuple, dict, Preprocess)


def model_sha256(model: CountingModule) -> str:
    """Hash a model's weights and settings, by which finished work is known again.

    Settings are taken as they are now: whoever gives ``model.window`` another value counts with another model. What
    else a checkpoint would keep, such as the tokenizer, is part of it.
    """
    own = vars(model)
    settings = {
        name: str(own[name] if name in own and isinstance(own[name], _PLAIN) else value)
        for name, value in sorted(getattr(model, "hparams", {}).items())
    }
    kind = type(model)
    recipe: Any = getattr(model, "recipe", dict)
    named = json.dumps([f"{kind.__module__}.{kind.__qualname__}", settings, recipe()], sort_keys=True, default=str)
    return tensors_sha256(named, sorted(model.state_dict().items()))
