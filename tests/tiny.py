"""The shipped configurations at the size of tests: tiny models over small copies of every data set."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, Literal

import fakes
import yaml
from jsonargparse import ArgumentParser

import counting_zoo
from counting_zoo.cli import main
from counting_zoo.data.base import CountingDataModule
from counting_zoo.module import CountingModule

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
TRAINERS, MODELS, DATA, WHOLE = (
    sorted((CONFIGS / kind).glob("*.yaml")) for kind in ("trainer", "model", "data", "pretraining")
)
#: Configurations of models elsewhere, which the contract holds for too (notebooks/add_a_model.ipynb).
OUTSIDE = sorted(Path(__file__).with_name("models_elsewhere").glob("*.yaml"))
if "COUNTING_ZOO_MODELS" in os.environ:
    OUTSIDE += sorted(Path(os.environ["COUNTING_ZOO_MODELS"]).glob("*.yaml"))


def clip_config(patch: int = 16, width: int = 32, layers: int = 2, image: int = 32) -> dict[str, Any]:
    """A CLIP ViT with random weights; 128 is the narrowest joint space that the published decoder takes."""
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2, "projection_dim": 128}
    return {
        "projection_dim": 128,
        "vision_config": tower | {"num_hidden_layers": layers, "image_size": image, "patch_size": patch},
        "text_config": tower | {"num_hidden_layers": 1, "vocab_size": 320, "max_position_embeddings": 24},
    }


def resnet_config() -> dict[str, Any]:
    """A CLIP ResNet with random weights."""
    return clip_config() | {"vision_config": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}}


#: What shrinks each model YAML; a new one without an entry fails the contract test, which says so.
SHRUNK: dict[str, dict[str, Any]] = {
    "clip_count": {
        "clip": clip_config(),
        "window": 32,
        "stride": 16,
        "preprocess": {"resize": "short", "size": 32},
        "prompt_width": 2,
        "prompt_depth": 2,
        "contrast_epochs": 1,
        "window_batch_size": 64,
    },
    "clip_count_small": {
        "clip": clip_config(),
        "window": 32,
        "input_size": 32,
        "preprocess": {"resize": "short", "size": 32},
        "contrast_epochs": 1,
        "window_batch_size": 64,
    },
    "clip_ebc": {"clip": clip_config(), "visual_prompts": 2, "window": 32, "stride": 32, "count_loss": "dm"},
    "clip_ebc_resnet50": {"clip": resnet_config(), "window": 64, "count_loss": "mae"},
    "ebc_vgg19": {"encoder": "small", "pretrained": None, "width": 8, "window": 64},
    "ebc_small": {"width": 8, "window": 64},
    "density_small": {"width": 8, "window": 64},
    "lower_count": {
        "encoder": {
            "model_type": "resnet",
            "depths": [1, 1, 1],
            "layer_type": "basic",
            "embedding_size": 8,
            "hidden_sizes": [8, 8, 16],
        },
        "pretrained": None,
        "reduction": 16,
        "preprocess": {"resize": "warp", "size": 64},
        "first_stage": 0,
    },
    "lower_count_small": {"width": 8, "preprocess": {"resize": "warp", "size": 64}, "first_stage": 1},
    "region_clip_counter": {
        "clip": resnet_config(),
        "width": 8,
        "n_regions": 8,
        "preprocess": {"resize": "short", "size": 64},
    },
    "region_clip_counter_small": {
        "clip": clip_config(),
        "pretrained_encoder": None,
        "width": 8,
        "n_regions": 8,
    },
}

#: The checkpoint to go on from, as in configs/trainer.
LAST = {"filename": "last", "save_on_train_epoch_end": True, "enable_version_counter": False}
SMALL = {"batch_size": 2, "num_workers": 0}
SCENES = SMALL | {"sizes": {"train": 4, "val": 2, "test": 3}}
CROP = {"class_path": "PlainAugmentation", "init_args": {"crop": 32, "flip": True}}
MOSAIC = {"class_path": "CLIPCountAugmentation", "init_args": {"crop": 32}}


def write_data(name: str, root: Path) -> dict[str, Any]:
    """A small copy of what ``configs/data/<name>.yaml`` reads, in its real layout; the options that lead to it."""
    if name.startswith("scenes_"):
        return SCENES | {"root": str(root), "augmentation": CROP} | ({"processes": 1} if name == "scenes_full" else {})
    options: dict[str, Any] = SMALL | {"root": str(root), "augmentation": CROP}
    if name == "fsc147":
        fakes.fsc147(root)
        options["augmentation"] = MOSAIC
    elif name == "carpk":
        fakes.carpk(root)
    elif name.startswith("shanghaitech_"):
        fakes.shanghaitech(root, part=f"part_{name[-1].upper()}_final")
    elif name in ("ucf_qnrf", "nwpu_crowd", "jhu_crowd"):
        getattr(fakes, name)(root)
    elif name in ("voc2007", "voc2012", "bccd"):
        classes = ("RBC", "WBC", "Platelets") if name == "bccd" else ("cat", "dog", "person")
        fakes.voc(root, {"bccd": "BCCD"}.get(name, f"VOCdevkit/VOC{name[3:]}"), classes)
        options["classes"] = list(classes)  # 20 would take the tests of each model longer than all other data
    elif name in ("coco2014", "coco2017"):
        fakes.coco(root, int(name[4:]))
        options["classes"] = list(fakes.COCO_IDS)
    elif name == "captions":
        fakes.coco_captions(root)
        options["sizes"] = {"test": 2}
    elif name == "vgg_cells":
        fakes.dot_pairs(root)
        options |= {"splits": {"train": [0, 6], "test": [6, 10]}, "sizes": {"train": 4, "val": 2}}
    elif name == "folder":
        rows = {f"photo {i}.png": [(x + i, 2 * x, "figs") for x in range(i + 1)] for i in range(8)}
        fakes.folder(root, rows, header="image,x,y,label")
        options["sizes"] = {"train": 0.5, "val": 0.25, "test": 0.25}
    elif name == "packed":
        scenes = words("data", SCENES | {"root": str(root / "scenes")})
        file = str(root / "scenes.h5")
        assert run("pack", "--config", CONFIGS / "data" / "scenes_easy.yaml", *scenes, "--out", file) == 0
        options["root"] = file
    else:
        raise AssertionError(f"configs/data/{name}.yaml is new: tests/tiny.py must say what a small copy of it is")
    return options


def write_counts_folder(root: Path) -> dict[str, Any]:
    """A folder with nothing but image-level counts."""
    fakes.folder(root, {f"{i}.png": [("figs", i)] for i in range(8)}, header="image,label,count", name="counts.csv")
    return SMALL | {"root": str(root), "augmentation": CROP, "sizes": {"train": 0.5, "val": 0.25, "test": 0.25}}


def words(prefix: str, options: dict[str, Any]) -> list[str]:
    """Options as words of the command line."""
    return [
        f"--{prefix}.{key}={json.dumps(value) if not isinstance(value, str) else value}"
        for key, value in options.items()
    ]


def model(name: str, **options: Any) -> list[str]:
    """A shipped model, shrunk, or one from elsewhere as it is."""
    if name in (names := [path.stem for path in OUTSIDE]):
        return ["--config", str(OUTSIDE[names.index(name)]), *words("model", options)]
    path = CONFIGS / "model" / f"{name}.yaml"
    kind = getattr(counting_zoo, yaml.safe_load(path.read_text())["model"]["class_path"].rpartition(".")[2])
    settings = kind.nested(SHRUNK[name] | options)
    network = settings.pop("network", {})
    return ["--config", str(path), *words("model", settings), *words("model.network", network)]


def data(name: str, options: dict[str, Any]) -> list[str]:
    """A shipped data configuration on its small copy."""
    return ["--config", str(CONFIGS / "data" / f"{name}.yaml"), *words("data", options)]


def trainer(**options: Any) -> list[str]:
    """The shipped CPU trainer without its progress bar, for one epoch."""
    quiet = {"max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "enable_model_summary": False}
    best = {"monitor": "val/mae", "filename": "best"}
    chosen = [{"class_path": "ModelCheckpoint", "init_args": arguments} for arguments in (best, LAST)]
    options = (
        quiet
        | {
            "enable_progress_bar": False,
            "logger": [{"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "", "version": "a"}}],
            "callbacks": chosen,
        }
        | options
    )
    return ["--config", str(CONFIGS / "trainer" / "cpu.yaml"), *words("trainer", options)]


@cache
def _parsed(kind: str, *arguments: str) -> tuple[Any, Any]:
    """The parser of one option and what it made of the words; reading them takes longer than building a tiny model."""
    from counting_zoo.config_safety import restrict_imports
    from counting_zoo.lightning_cli import _import_classes

    allowed = os.environ.get("COUNTING_ZOO_ALLOW", "tiny_zoo")  # models elsewhere
    restrict_imports(["tiny_zoo", *allowed.split(",")])
    _import_classes()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments({"model": CountingModule, "data": CountingDataModule}[kind], kind)
    return parser, parser.parse_args(list(arguments))


def build(kind: Literal["model", "data"], *arguments: str) -> Any:
    """A new model or data module from words of the command line, which are read once."""
    parser, config = _parsed(kind, *arguments)
    return parser.instantiate(config)[kind]


def run(*arguments: Any) -> int:
    """The command line in this process; unusable input raises (COUNTING_ZOO_DEBUG)."""
    return main([str(argument) for argument in arguments])
