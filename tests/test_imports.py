"""The dependency direction of the package, read from its imports, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import counting_zoo

PACKAGE = Path(counting_zoo.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: The files of a model folder that are plain torch; its Lightning modules and readers of weights stand above.
PARTS = tuple(f"models.*.{part}" for part in ("network", "heads", "loss", "bins", "instances", "proposals", "concepts"))
#: Readers of files without a data set, which read what models are given as files, such as proposals.
READERS = ("data.detection", "data.tables")
#: A module imports lower layers, and neighbours in its own folder. What is not named is on top.
LAYERS = (
    ("version", "errors", "class_lists"),
    ("io", "types", "schedules", "config_safety"),
    ("images", "geometry", "ops"),
    ("tiling", "prediction", "metrics", "nn", "checkpoints"),
    ("data.records", "data.checks", *READERS),
    ("data", *PARTS),
    ("queries", "training"),
    ("module",),
    ("models",),
    ("loading",),
    ("exporting",),
    ("evaluation",),
    ("callbacks",),
)
PURE = ("types", "geometry", "ops", "tiling", "nn", *PARTS)


@dataclass(frozen=True)
class Import:
    """One imported module: whose, at which line, and whether importing the file runs it."""

    target: str
    line: int
    at_once: bool
    for_types: bool


def imports_of(path: Path) -> Iterator[Import]:
    """Every import of a file; ``from a import b`` gives ``a.b`` where that is a module."""

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" if is_module(f"{node.module}.{alias.name}") else str(node.module)
                     for alias in node.names]  # fmt: skip
        for name in names:
            yield Import(name, node.lineno, not in_function and not for_types, for_types)  # type: ignore[attr-defined]
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside, for_types or typing_only)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False, False)


def is_module(dotted: str) -> bool:
    """Whether a dotted name is a module of the package, not something defined in one."""
    place = PACKAGE.parent.joinpath(*dotted.split("."))
    return dotted.startswith("counting_zoo") and (place.with_suffix(".py").exists() or place.is_dir())


def part_of(path: Path) -> str:
    """``models.clip_count.network`` for a file, ``nn`` for a package's ``__init__``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def matches(part: str, pattern: str) -> bool:
    """``nn`` matches ``nn`` and everything below; ``*`` stands for one name."""
    given, wanted = part.split("."), pattern.split(".")
    return len(given) >= len(wanted) and all(w in ("*", g) for g, w in zip(given, wanted, strict=False))


def layer(part: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if any(matches(part, name) for name in names)), len(LAYERS))


def named(path: Path) -> str:
    return part_of(path) or "counting_zoo"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_downwards(path: Path) -> None:
    own = part_of(path)
    if path.name == "__init__.py":
        return  # faces hand names on
    for found in imports_of(path):
        if not found.target.startswith("counting_zoo.") or found.for_types:
            continue
        other = found.target.removeprefix("counting_zoo.")
        together = own.rpartition(".")[0] == other.rpartition(".")[0] != ""
        allowed = layer(other) < layer(own) or (together and layer(other) <= layer(own)) or layer(own) == len(LAYERS)
        assert allowed, f"{path}:{found.line}: {own} (layer {layer(own)}) imports {other} (layer {layer(other)})"


def test_no_circles() -> None:
    """Over imports in functions too: a circle that is put off is a circle still."""
    edges = {
        part_of(path): {
            found.target.removeprefix("counting_zoo.")
            for found in imports_of(path)
            if found.target.startswith("counting_zoo.") and not found.for_types
        }
        for path in FILES
        if path.name != "__init__.py"
    }
    remaining = {name: targets & set(edges) - {name} for name, targets in edges.items()}
    while free := [name for name, targets in remaining.items() if not targets & set(remaining)]:
        for name in free:
            del remaining[name]
    assert not remaining, f"circles among {sorted(remaining)}"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_what_may_be_imported_only_in_its_place(path: Path) -> None:
    own = part_of(path)
    for found in imports_of(path):
        top, where = found.target.split(".")[0], f"{path}:{found.line} imports {found.target}"
        if top in ("transformers", "tokenizers") and not found.for_types:
            assert matches(own, "nn") or own == "models.region_clip.proposals", where
        if top == "albumentations":
            assert own == "data.transforms", where
        if top == "PIL":
            assert own == "images", where
        if top in ("lightning", "pytorch_lightning"):
            assert found.target.startswith("lightning"), where
            assert not any(matches(own, pure) for pure in PURE), f"{where}: mathematics without Lightning"
        if top in ("torchvision", "timm", "open_clip", "matplotlib", "tensorboard", "gradio", "pandas"):
            assert not found.at_once, f"{where}: not in the core"
        if matches(own, "data") or matches(own, "nn") or own == "module":
            assert not found.target.startswith("counting_zoo.models"), where
        if own.startswith("models."):
            folder = own.split(".")[1]
            other = found.target.removeprefix("counting_zoo.models.").split(".")[0]
            assert not found.target.startswith("counting_zoo.models.") or other == folder, f"{where}: another model's"
            reader = found.target.removeprefix("counting_zoo.") in READERS
            assert reader or not found.target.startswith("counting_zoo.data"), f"{where}: models know batches, not data"


def test_the_rules_see_what_they_should() -> None:
    """The reading itself: a rule that reads nothing would pass on anything."""
    found = {(i.target, i.at_once) for i in imports_of(PACKAGE / "module.py")}
    assert ("counting_zoo.metrics.counts", True) in found
    assert ("counting_zoo.tiling", True) in found
    assert any(i.target == "transformers" for i in imports_of(PACKAGE / "nn" / "clip.py"))
    assert any(i.target == "albumentations" for i in imports_of(PACKAGE / "data" / "transforms.py"))
    assert layer("types") < layer("ops") < layer("metrics.counts") < layer("models.a.network") < layer("module")
    assert layer("module") < layer("models.a.module") < layer("callbacks") < layer("cli") == len(LAYERS)
    assert matches("nn.text", "nn")
    assert not matches("nnx", "nn")


@pytest.mark.parametrize("name", counting_zoo.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(counting_zoo, name) is not None
    assert name in dir(counting_zoo)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="CLIPCount"):
        counting_zoo.CLIPcount  # type: ignore[attr-defined]  # noqa: B018


#: Commands whose help needs no heavy library; that of fit, validate, test and predict is LightningCLI's.
LIGHT_HELP = (
    "describe",
    "pack",
    "audit",
    "benchmark",
    "calibrate",
    "convert",
    "export",
    "export-encoder",
    "quickstart",
)


@pytest.mark.parametrize(
    "code",
    [
        "import counting_zoo",
        "from counting_zoo.cli import main; main(['--help'])",
        "from counting_zoo.cli import main; main(['--version'])",
        "from counting_zoo.cli import main; main(['fitt'])",
        *(f"from counting_zoo.cli import main; assert main(['{command}', '--help']) == 0" for command in LIGHT_HELP),
    ],
)
def test_heavy_libraries_stay_out(code: str) -> None:
    heavy = [
        "torch",
        "lightning",
        "transformers",
        "numpy",
        "cv2",
        "PIL",
        "h5py",
        "albumentations",
        "jsonargparse",
        "scipy",
        "jinja2",
    ]
    check = f"{code}; import sys; print('LOADED', *[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_help_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "counting_zoo.cli", "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    for command in ("fit", "validate", "test", "predict", "pack", "convert"):
        assert f"\n  {command} " in done.stdout
