"""Tensors out of weight files, TorchScript archives among them, without running anything the file says."""

from __future__ import annotations

import _codecs
import importlib
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from counting_zoo.errors import CheckpointError, WeightsError

# Scores beside the weights of the references' resume files; none of these runs anything.
_MULTIARRAY: Any = importlib.import_module("numpy._core.multiarray")


_PLAIN_NUMPY: list[Any] = [
    _MULTIARRAY.scalar,
    (_MULTIARRAY.scalar, "numpy.core.multiarray.scalar"),
    _MULTIARRAY._reconstruct,
    (_MULTIARRAY._reconstruct, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
    _codecs.encode,
]


def read_checkpoint(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint file as plain data and tensors on the CPU; pickled code is refused, never executed.

    Args:
        path: the file.
        verify: compare its content with the checksums in it (0.3 s for 600 MB); a flipped bit is another weight.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds more than plain data.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {str(path)!r}; expected a file such as best.ckpt")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise CheckpointError(f"{str(path)!r} cannot be read as safetensors: {_first_line(error)}") from error
    if verify and (damaged := _damaged_record(path)) is not None:
        raise CheckpointError(
            f"{str(path)!r} is damaged: {damaged!r} in it has another checksum than when it was written; copy it "
            "again, or take an earlier checkpoint (load(..., verify=False) reads it as it is)"
        )
    try:
        with torch.serialization.safe_globals(_PLAIN_NUMPY):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            start = file.read(2)
        if start[:1] != b"\x80" and start != b"PK":
            raise CheckpointError(f"{str(path)!r} is no checkpoint: it begins with {start!r}") from error
        raise CheckpointError(
            f"{str(path)!r} holds Python objects beside plain data and tensors, and loading those could run code; "
            f"refused. If you trust the file, save its state_dict alone with torch.save. ({_first_line(error)})"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(f"{str(path)!r} cannot be read as a checkpoint: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{str(path)!r} holds a {type(loaded).__name__}; expected a checkpoint (a mapping)")
    return loaded


def _damaged_record(path: Path) -> str | None:
    """Find a record of a zip file whose content differs from its checksum; ``None`` in files of other kinds."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            # torch compresses nothing, and a record of others may unpack to any size.
            if all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist()):
                return archive.testzip()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        pass  # torch's own reader says what is wrong
    return None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a ``.safetensors`` file, a file of ``torch.save``, or a TorchScript archive such as OpenAI's.

    What kind it is follows from its content. A state dict may stand under ``state_dict``, and its keys under
    ``module.``.

    Raises:
        WeightsError: the file cannot be read, holds something else than tensors, or wants to run code.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if head[8:] == b"{":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        elif head[:2] == b"PK" and (records := _torchscript_records(path)) is not None:
            loaded = _read_torchscript(path, records)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own errors for what is damaged
        raise WeightsError(f"{str(path)!r} cannot be read as a file of weights: {error}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        inside = sorted(map(str, loaded))[:6] if isinstance(loaded, Mapping) else type(loaded).__name__
        raise WeightsError(f"{str(path)!r} holds no state dict of tensors: found {inside}")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def stored_settings(path: Path) -> dict[str, Any]:
    """Read the settings of an encoder that this package exported, beside its weights; empty for any other file.

    Raises:
        WeightsError: the file says so and cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as opened:
        if opened.read(9)[8:] != b"{":
            return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get("counting_zoo", "{}")))
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


def _torchscript_records(path: Path) -> str | None:
    """Find the folder inside a TorchScript archive, which has constants too; ``None`` for other archives."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            root, _, leaf = name.rpartition("/")
            if leaf == "constants.pkl" and "/" not in root:
                return root
    return None


class _Module:
    """Stands in for any module of a TorchScript archive: it keeps the attributes and has no behaviour."""

    attributes: Mapping[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, Mapping) else {}


class _TensorUnpickler(pickle.Unpickler):
    """Modules become :class:`_Module`, tensors are made here, and nothing else can be named.

    ``torch.jit.load`` would compile and run the archive's own code (CVE-2025-32434 went through it).
    """

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _CALLS:
            return _CALLS[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a state dict")

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, size = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(f"{self._root}/data/{key}")) or bytearray(dtype.itemsize)
            self._storages[key] = torch.frombuffer(data, dtype=dtype, count=size or -1)
        return self._storages[key]


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    # A copy, so that no tensor keeps others' memory; as_strided checks that it lies in the storage.
    return storage.as_strided(size, stride, offset).clone() if math.prod(size) else storage.new_empty(size)


def _first(value: Any, *_: Any) -> Any:
    return value


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch.jit._pickle", f"build_{kind}list"): _first for kind in ("int", "double", "bool", "tensor")},
    ("torch.jit._pickle", "restore_type_tag"): _first,
}


def _read_torchscript(path: Path, root: str) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        return dict(_named_tensors(_TensorUnpickler(archive, root).load(), ""))


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, _Module):
        for key, inside in value.attributes.items():
            yield from _named_tensors(inside, f"{name}.{key}" if name else str(key))


def load_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], what: str, *, optional: Callable[[str], bool]
) -> None:
    """Fill a module, strictly but for what may stay as it is.

    Args:
        module: whose tensors are replaced.
        tensors: under the module's own names.
        what: the module is called in messages.
        optional: says of a name whether its tensor may be missing.

    Raises:
        WeightsError: names are missing or unknown, or shapes differ; lists them.
    """
    target = module.state_dict()
    missing = sorted(key for key in target if key not in tensors and not optional(key))
    unknown = sorted(key for key in tensors if key not in target)
    wrong = [
        f"{key}: {tuple(value.shape)} makes no {tuple(target[key].shape)}"
        for key, value in tensors.items()
        if key in target and value.shape != target[key].shape
    ]
    if missing or unknown or wrong:
        raise WeightsError(
            f"these weights do not fit {what}: {len(missing)} are missing {missing[:6]}, {len(unknown)} have no place "
            f"{unknown[:6]}, {len(wrong)} have another shape {wrong[:6]}"
        )
    module.load_state_dict(tensors, strict=False)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
