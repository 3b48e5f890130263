"""A counter as a graph that runs without this package: ``torch.export`` or ONNX."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from counting_zoo.errors import InputError
from counting_zoo.io import replacing
from counting_zoo.module import CountingModule
from counting_zoo.types import Query
from counting_zoo.version import __version__

SUFFIXES = (".pt2", ".onnx")


RECIPE = "counting_zoo.json"
"""Name of the recipe inside a ``.pt2`` file, and of the metadata in an ONNX file."""


UNIT = 32
"""Sides of images are multiples of this in a graph."""


class _OneNameList(nn.Module):
    """A model that is always asked about the same names."""

    def __init__(self, model: CountingModule, names: list[str]) -> None:
        super().__init__()
        self.model, self.query = model, Query(tuple(names))

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image, [self.query]).density


def export(model: CountingModule, path: str | Path, names: str | Sequence[str] | None = None) -> Path:
    """Write a graph from one image to its density, for names that are then fixed.

    The graph takes ``image``, ``(1, 3, H, W)`` float32 RGB in [0, 1] with sides that are multiples of 32, and gives
    ``density``, ``(1, K, h, w)`` objects per cell; the count is its sum. What comes before and after is not in it, but
    in the recipe beside it (JSON): the names, how images are resized, the windows they are counted in, and whether
    counts are clamped and rounded. The graph runs on the CPU; the model is left where and in the mode it was.

    Args:
        model: any counter but those that count boxes.
        path: ends in ``.pt2`` (``torch.export.load``) or ``.onnx`` (needs the extra ``export``).
        names: what to count, each once; the model's default classes if ``None``.

    Returns:
        ``path``.

    Raises:
        InputError: another suffix, no names, one of them twice, a model that detects, or a graph whose density is not
            the model's.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise InputError(f"export writes {' or '.join(SUFFIXES)} files, not {path.name!r}")
    asked = [names] if isinstance(names, str) else list(names or model.default_classes or model.vocabulary or [])
    if not asked:
        raise InputError("no name to count: export(model, path, ['apples', ...]); this model has no default classes")
    if len(set(asked)) != len(asked):
        raise InputError(f"a name is asked about twice: {asked}")
    if model.class_blind:
        asked = [" + ".join(asked)]
    device, training = model.device, model.training
    try:
        _write(model.cpu().eval(), path, asked)
    finally:
        model.to(device).train(training)
    return path


def _write(model: CountingModule, path: Path, asked: list[str]) -> None:
    """Export a model on the CPU, and compare what was written with it before it is kept."""
    one = _OneNameList(model, asked)
    side = max(model.window or 0, 2 * UNIT)
    side += -side % UNIT
    image = torch.rand(1, 3, side, side + UNIT, generator=torch.Generator().manual_seed(0))
    sides = {axis: UNIT * torch.export.Dim(name, min=1, max=256) for axis, name in ((2, "rows"), (3, "columns"))}
    with torch.no_grad():
        output = model(image, [Query(tuple(asked))])
    if hasattr(output, "boxes"):
        raise InputError(
            f"{type(model).__name__} counts boxes, of which there are more or fewer in each image; a graph has a "
            "fixed shape. Export a model that counts by density"
        )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # about what the exporters do inside
        program = torch.export.export(one, (image,), dynamic_shapes={"image": sides}, strict=False)
        with replacing(path) as temporary:
            write, run = (_write_pt2, _run_pt2) if path.suffix == ".pt2" else (_write_onnx, _run_onnx)
            write(program, temporary, json.dumps(_recipe(model, asked), indent=1))
            found, expected = run(temporary, image), output.density
            if not torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())):
                worst = float((found - expected).abs().max())
                raise InputError(f"the graph's density differs from the model's by up to {worst:g}: nothing is written")


def _recipe(model: CountingModule, names: list[str]) -> dict[str, Any]:
    """Collect the steps before and after the graph."""
    return {
        "model": type(model).__name__,
        "counting_zoo": __version__,
        "names": names,
        "input": "image: (1, 3, H, W) float32 RGB in [0, 1]; H and W multiples of 32",
        "output": "density: (1, K, h, w) objects per cell; its sum is the count",
        "preprocess": asdict(model.preprocess),
        "window": model.window,
        "stride": model.stride or model.window,
        "blend": model.blend,
        "pad": model.pad,
        "cell": model.cell,
        "clamp_counts": bool(getattr(model, "clamp_counts", False)),
        "round_counts": bool(getattr(model, "round_counts", False)),
    }


def _write_pt2(program: Any, path: Path, recipe: str) -> None:
    torch.export.save(program, path, extra_files={RECIPE: recipe})


def _run_pt2(path: Path, image: Tensor) -> Tensor:
    with path.open("rb") as file:
        return torch.export.load(io.BytesIO(file.read())).module()(image)


def _write_onnx(program: Any, path: Path, recipe: str) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401  # what was written is run before it is kept
    except ImportError as error:
        raise InputError(f"ONNX files need more packages: pip install 'counting-zoo[export]' ({error})") from error
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(
            program,
            (),
            path,
            input_names=["image"],
            output_names=["density"],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    graph = onnx.load(path)
    graph.metadata_props.add(key=RECIPE, value=recipe)
    onnx.save(graph, path)


def _run_onnx(path: Path, image: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["density"], {"image": image.numpy()})[0])
