"""The LightningModule base of every counting model: counting, training, scoring and its recipe."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from counting_zoo.data.records import Split, present_names, unasked_objects
from counting_zoo.errors import CheckpointError, InputError, NamesError, SupervisionError
from counting_zoo.geometry import Preprocess
from counting_zoo.images import as_picture
from counting_zoo.metrics.counts import GAME, ClassCountErrors, CountErrors, PromptErrors
from counting_zoo.metrics.intervals import IntervalCalibration, IntervalScores
from counting_zoo.nn.text import TextTower, TokenizerLike, word_tokenizer
from counting_zoo.ops import peak_points
from counting_zoo.prediction import Prediction
from counting_zoo.tiling import count_tiled
from counting_zoo.types import Batch, CountOutput, SpreadOutput
from counting_zoo.version import __version__


def wrong_prompts(batch: Batch, names: Sequence[str]) -> list[list[str]] | None:
    """Three prompts for each picture that its true prompt must be told from.

    Args:
        batch: pictures with one name each.
        names: every name of the split.

    Returns:
        B x [absent name, absent name that shares most words with the target, another picture's name]; the picture's
        own name stands where there is no such name. ``None`` where the split knows one name only.

    Example:
        >>> batch = {"image_id": ["a"], "classes": [["red discs"]], "image": []}
        >>> wrong_prompts(batch, ["red discs", "red rings"])
        [['red rings', 'red rings', 'red rings']]
    """
    if len(set(names)) < 2:
        return None
    known = batch.get("present") or batch["classes"]
    return [
        _for_one(image_id, asked[0], sorted(set(names) - {asked[0]}), set(present))
        for image_id, asked, present in zip(batch["image_id"], batch["classes"], known, strict=True)
    ]


def known_names(batch: Batch, vocabulary: Sequence[str]) -> Batch:
    """A batch that asks only about names of a list, for models that count nothing else.

    Args:
        batch: pictures as evaluation gives them, one by one.
        vocabulary: the names that are known.

    Returns:
        The batch without the other names, their counts, points and boxes, and without pictures that ask about none
        of the names; pictures that name nothing stay as they are.

    Raises:
        InputError: different numbers of known names are left in the pictures of one batch.

    Example:
        >>> batch = {"image_id": ["a", "b"], "image": [0, 1], "classes": [["figs", "dates"], ["dates"]]}
        >>> known_names(batch, ["figs"])
        {'image_id': ['a'], 'image': [0], 'classes': [['figs']]}
    """
    known = set(vocabulary)
    kept = [[k for k, name in enumerate(names) if name in known] for names in batch["classes"]]
    if all(len(k) == len(names) for k, names in zip(kept, batch["classes"], strict=True)):
        return batch
    lengths = {len(k): batch["image_id"][i] for i, k in enumerate(kept) if k}
    if len(lengths) > 1:
        raise InputError(
            f"of the names asked about, the pictures {sorted(lengths.values())} have different numbers that the model "
            f"knows ({sorted(lengths)}); ask about the same names in every picture (data.prompts: all), or about those "
            "the model knows (data.classes)"
        )
    asking = [i for i, names in enumerate(batch["classes"]) if kept[i] or not names]
    found: dict[str, Any] = {}
    for key, value in batch.items():
        found[key] = value if key == "failed" else [value[i] for i in asking]  # type: ignore[index]
    found["classes"] = [[batch["classes"][i][k] for k in kept[i]] for i in asking]
    if "counts" in batch:
        rows = [batch["counts"][i][kept[i]] for i in asking]
        found["counts"] = torch.stack(rows) if rows else batch["counts"][:0]
    for labels, places in (("labels", "points"), ("box_labels", "boxes")):
        if labels in batch:
            new = [_relabelled(batch[labels][i], kept[i], len(batch["classes"][i])) for i in asking]  # type: ignore[literal-required]
            if places in batch:
                found[places] = [place[label >= 0] for place, label in zip(found[places], new, strict=True)]
            found[labels] = [label[label >= 0] for label in new]
    if "exemplars" in batch:  # of the first name
        shown = [None if 0 in kept[i] or not batch["classes"][i] else 0 for i in asking]
        found["exemplars"] = [batch["exemplars"][i][:n] for i, n in zip(asking, shown, strict=True)]
    return cast(Batch, found)


def _relabelled(labels: Tensor, kept: list[int], n: int) -> Tensor:
    """Indices into the kept names; -1 for others."""
    new = torch.full((n + 1,), -1, dtype=labels.dtype, device=labels.device)
    new[kept] = torch.arange(len(kept), dtype=labels.dtype, device=labels.device)
    return new[labels]


def _for_one(image_id: str, target: str, others: list[str], present: set[str]) -> list[str]:
    absent = [name for name in others if name not in present]
    words = set(target.split())
    shared = [len(words & set(name.split())) for name in absent]
    hard = [name for name, n in zip(absent, shared, strict=True) if n == max(shared) > 0]
    draw = zlib.crc32(image_id.encode())
    return [
        choices[draw // step % len(choices)] if choices else target
        for choices, step in ((absent, 1), (hard, 7), (others, 49))
    ]


class Counter(nn.Module, ABC):
    """How every model of the zoo counts; :class:`~counting_zoo.module.CountingModule` adds how it is trained.

    The attributes are the part of a model's recipe that counting depends on; that class describes them.
    """

    preprocess: Preprocess
    window: int | None
    stride: int | None
    window_batch_size: int
    blend: Literal["average", "official"]
    pad: Literal["minimal", "official"]
    default_classes: list[str] | None
    #: Whether the model counts without names: K is 1 and it is scored on the sum over all names.
    class_blind: ClassVar[bool] = False
    #: How far off its counts are, where that was measured (:func:`counting_zoo.calibrate`); kept in checkpoints.
    interval_calibration: IntervalCalibration | None = None
    device: Any  # LightningModule's

    @abstractmethod
    def forward(self, image: Tensor, classes: list[list[str]]) -> CountOutput:
        """Count ``classes`` in ``(B, 3, H, W)`` pictures in [0, 1]; normalises inside."""

    @property
    def cell(self) -> int:
        """Pixels along one side of a density cell, which tiles must be multiples of."""
        return 1

    @property
    def vocabulary(self) -> list[str] | None:
        """The only names it can count; ``None`` where there is no such list."""
        return None

    def reported(self, counts: Tensor) -> Tensor:
        """What is said of a count: itself, or rounded or clamped where the recipe says so."""
        return counts

    @property
    def has_law(self) -> bool:
        """Whether it gives chances of counts, and not a number alone."""
        return False

    def check_law(self) -> None:
        """Refuse a model that gives a number alone where its chances of counts are needed.

        Raises:
            InputError: says which models give more.
        """
        if not self.has_law:
            raise InputError(
                f"{type(self).__name__} gives a count and no chances of counts, so intervals of width 'bins' cannot be "
                "made from it; take the width 'residual', or a CLIPEBC or EBC whose head is 'bins' or 'zip'"
            )

    def count_variance(self, output: CountOutput) -> Tensor:
        """``(B, K, h, w)`` variance of the count of each cell, of models that have a law of counts.

        Raises:
            InputError: the model gives a number alone.
        """
        self.check_law()
        assert isinstance(output, SpreadOutput), f"a {type(output).__name__}, whose variance the model should know"
        return output.variance

    def count_spread(self, output: CountOutput) -> Tensor:
        """``(B, K)`` standard deviation of the counts that the model itself expects; cells are taken for independent.

        Raises:
            InputError: the model gives a number alone.
        """
        return self.count_variance(output).float().sum((-2, -1)).sqrt()

    def interval(self, output: CountOutput) -> Tensor | None:
        """``(B, K, 2)`` float64 lower and upper bounds of the true counts, on the CPU; ``None`` if not calibrated."""
        calibration = self.interval_calibration
        if calibration is None:
            return None
        spread = self.count_spread(output).detach().cpu().numpy() if calibration.width == "bins" else None
        counts = self.reported(output.counts).detach().cpu().numpy()
        return torch.from_numpy(calibration.bounds(counts, spread))

    def extent(self, density: Tensor, size: tuple[int, int]) -> tuple[float, float] | None:
        """Height and width of a picture in the cells of its density, whose last ones may reach beyond it.

        Args:
            density: ``(..., h, w)``.
            size: (H, W) of the picture as the model saw it.

        Returns:
            ``(H / cell, W / cell)`` for a density of ``ceil(H / cell) x ceil(W / cell)`` cells, and ``None`` for
            every other one: it covers exactly the picture.
        """
        (height, width), cell = size, self.cell
        if cell == 1 or tuple(density.shape[-2:]) != (-(-height // cell), -(-width // cell)):
            return None
        return height / cell, width / cell

    def count_batch(
        self,
        images: Tensor | Sequence[Tensor],
        classes: list[list[str]],
        window: int | None = None,
        stride: int | None = None,
        *,
        image_ids: Sequence[str] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> CountOutput | list[CountOutput]:
        """Count whole pictures, in tiles where the recipe or the arguments say so.

        Args:
            images: ``(B, 3, H, W)``, or B pictures ``(3, H_i, W_i)`` of any size, uint8 or float in [0, 1].
            classes: B x K names.
            window: overrides the recipe's window; 0 for none.
            stride: overrides the recipe's stride.
            image_ids: what the pictures are called, for models that know something of each beforehand.
            sizes: (H, W) of the pictures as they are stored, where they were resized; for the same.

        Returns:
            One output for a tensor; for a list one output (of batch 1) for each picture.
        """
        if self.class_blind:
            classes = [[" + ".join(names)] for names in classes]
        pictures = [image.to(self.device) for image in images]
        side = (self.window or 0) if window is None else window
        step = (self.stride if window is None else None) if stride is None else stride
        if stride is not None and not side:
            raise InputError(f"stride={stride} without a window; give a window too, or no stride to count in one piece")
        if side:
            spreads = self.interval_calibration is not None and self.interval_calibration.width == "bins"
            found = count_tiled(
                self._with_variance if spreads else lambda tiles, names: self(tiles, names).density,
                pictures,
                classes=[names * 2 for names in classes] if spreads else classes,
                window=side,
                stride=step or side,
                cell=self.cell,
                window_batch_size=self.window_batch_size,
                blend=self.blend,
                pad=self.pad,
            )
            outputs = [
                SpreadOutput(*map_[None].chunk(2, dim=1)) if spreads else CountOutput(map_[None]) for map_ in found
            ]
        elif len({p.shape for p in pictures}) == len({len(names) for names in classes}) == 1:
            together = self(torch.stack([_as_float(p) for p in pictures]), classes)
            if isinstance(images, Tensor):
                return together
            outputs = together.split()
        else:
            outputs = [self(_as_float(p)[None], [names]) for p, names in zip(pictures, classes, strict=True)]
        if isinstance(images, Tensor):
            density = torch.cat([o.density for o in outputs])
            variances = [o.variance for o in outputs if isinstance(o, SpreadOutput)]
            return SpreadOutput(density, torch.cat(variances)) if variances else CountOutput(density)
        return outputs

    def _with_variance(self, tiles: Tensor, names: list[list[str]]) -> Tensor:
        """``(n, 2K, h, w)`` densities of tiles and then their variances; ``names`` has each of the K names twice.

        Where windows overlap, their variances are averaged as their densities are. That is never below the variance of
        the averaged density, however the windows depend on each other.
        """
        output = self(tiles, [own[: len(own) // 2] for own in names])
        return torch.cat([output.density, self.count_variance(output)], 1)

    @torch.inference_mode()
    def count(
        self,
        pictures: Any,
        names: str | Sequence[str] | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
    ) -> Prediction | list[Prediction]:
        """Count in pictures as they come.

        Args:
            pictures: a path, PIL image, ``(H, W[, C])`` array or ``(3, H, W)`` tensor, or a list of these.
            names: what to count; the model's default classes if ``None``.
            window: overrides the recipe's window; 0 for none.
            stride: overrides the recipe's stride.

        Returns:
            One :class:`Prediction`, or a list for a list. It has an interval where the model is calibrated and neither
            window nor stride differs from the recipe's, which it was calibrated with.

        Raises:
            InputError: no name, an empty name, or something that is no picture.
            ImageError: a file that cannot be read.
        """
        asked = [names] if isinstance(names, str) else list(names) if names is not None else self.default_classes
        if not asked:
            raise InputError("no name to count: count(picture, ['apples', ...]); this model has no default classes")
        if len(set(asked)) != len(asked):
            raise InputError(f"a name is asked about twice: {asked}")
        many = isinstance(pictures, list | tuple)
        training = self.training
        if training:
            self.eval()
        try:
            found = [self._count_one(p, asked, window, stride) for p in (pictures if many else [pictures])]
        finally:
            if training:
                self.train()
        return found if many else found[0]

    def _count_one(self, source: Any, names: list[str], window: int | None, stride: int | None) -> Prediction:
        picture, image_id = as_picture(source)  # (3, H, W) uint8
        seen = self.preprocess(picture)
        size = (picture.shape[1], picture.shape[2])
        output = self.count_batch([seen], [names], window, stride, image_ids=[image_id], sizes=[size])
        assert isinstance(output, list)
        prediction = self.to_prediction(output[0], names, size, image_id, seen)
        if window not in (None, self.window or 0) or stride not in (None, self.stride or self.window):
            prediction.interval = None
        return prediction

    def to_prediction(
        self, output: CountOutput, names: list[str], size: tuple[int, int], image_id: str, seen: Tensor
    ) -> Prediction:
        """One picture's output as plain data on the CPU; points are density peaks.

        Args:
            output: of batch 1.
            names: the names asked about.
            size: (H, W) of the picture given, which the points are in pixels of.
            image_id: what the picture is called.
            seen: ``(3, h, w)`` picture as the model saw it.
        """
        density = output.density[0].float()
        extent = self.extent(density, (seen.shape[1], seen.shape[2]))
        interval = self.interval(output)
        return Prediction(
            counts=self.reported(output.counts)[0].cpu(),
            names=list(names) if len(density) == len(names) else [" + ".join(names)],
            density=density.cpu(),
            points=[p.cpu() for p in peak_points(density, size, extent=extent)],
            interval=None if interval is None else interval[0].float(),
            image_id=image_id,
            image=_as_uint8(seen),
            size=size,
            extent=extent,
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        if not batch["image_id"]:
            return []
        names = [asked or self.default_classes or [] for asked in batch["classes"]]
        if not all(names):
            raise InputError(
                f"no name to count in {batch['image_id'][0]!r}: name it with --data.classes '[apples]'; this model "
                "has no default classes"
            )
        images = list(batch["image"])
        sizes = batch.get("original_size") or [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
        outputs = self.count_batch(images, names, image_ids=batch["image_id"], sizes=sizes)
        assert isinstance(outputs, list)
        return [
            self.to_prediction(o, n, s, i, picture)
            for o, n, s, i, picture in zip(outputs, names, sizes, batch["image_id"], images, strict=True)
        ]


def _as_float(image: Tensor) -> Tensor:
    image = image.contiguous()  # pictures from files have their colours beside each other
    return image if torch.is_floating_point(image) else image.float() / 255


def _as_uint8(image: Tensor) -> Any:
    """``(H, W, 3)`` uint8 array of a ``(3, H, W)`` picture."""
    if torch.is_floating_point(image):
        image = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return image.permute(1, 2, 0).cpu().numpy()


class TrainingModule(L.LightningModule):
    """Training by named loss terms; :class:`~counting_zoo.module.CountingModule` adds how counts are scored.

    Hyper-parameters of subclasses are stored as plain data, so that a checkpoint is a complete recipe that loading
    does not execute.

    Args:
        non_finite: a loss that is not finite stops training with an error naming the pictures (``raise``), or its
            step is left out and counted (``skip``).
        decay: weight decay for ``matrices`` only, or for ``all`` parameters.
        optimizer: called with parameter groups; the model's own default if ``None``.
        scheduler: called with the optimizer; the model's own default if ``None``.
    """

    #: Any one of these sets of batch keys is enough to train.
    requires: ClassVar[tuple[frozenset[str], ...]] = ()
    #: Whether training pictures of different sizes may come as a list, which the model pads.
    pads: ClassVar[bool] = False
    #: The score of validation that a schedule watches which lowers the rate where nothing improves; lower is better.
    monitored: ClassVar[str] = "val/mae"

    def __init__(
        self,
        *,
        non_finite: Literal["raise", "skip"] = "raise",
        decay: Literal["matrices", "all"] = "matrices",
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler", "_class_path", "_instantiator"])
        for name, value in self.hparams.items():
            self.hparams[name] = _plain(value)
        if non_finite not in ("raise", "skip"):
            raise InputError(f"non_finite is {non_finite!r}; expected 'raise' or 'skip'")
        self.non_finite, self.decay = non_finite, decay
        self.optimizer, self.scheduler = optimizer, scheduler
        self.skipped_steps = 0

    @abstractmethod
    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The named, weighted terms of one step; their sum is what is minimised."""

    def read_facts(self, datamodule: Any) -> None:
        """Take what the model must know of the training data, once, before the first step."""

    def idle_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that the current stage of training does not reach."""
        return []

    def lr_factor(self, name: str) -> float:
        """What the learning rate of a parameter is multiplied by, such as less than 1 for a pretrained encoder."""
        return 1.0

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The model's published optimizer."""
        return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)

    def default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The model's published schedule, which goes with its optimizer; ``None`` for a constant rate."""
        return None

    # -- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        terms = self.training_losses(batch)
        loss = torch.stack(list(terms.values())).sum()
        if self.non_finite == "raise" and not torch.isfinite(loss):
            bad = {name: float(value.detach()) for name, value in terms.items()}
            raise FloatingPointError(
                f"the loss is not finite at step {self.global_step} ({bad}) on the pictures {batch['image_id']}; "
                "weights are still those of the step before and the last checkpoint is good. Look at these pictures, "
                "lower the learning rate, clip gradients, or leave such steps out with model.non_finite: skip"
            )
        log = {f"train/{name}": value.detach() for name, value in terms.items()}
        self.log_dict(log | {"train/loss": loss.detach()}, batch_size=len(batch["image_id"]), prog_bar=False)
        if self._distributed():
            # DDP waits for a gradient of every parameter; those of another stage get a zero, removed below.
            loss = loss + sum(0.0 * p.sum() for p in self.idle_parameters())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._distributed():
            for p in self.idle_parameters():
                p.grad = None
        if self.non_finite == "skip":
            gradients = [p.grad for p in self.parameters() if p.grad is not None]
            # Gradients are the same on every rank, so all ranks leave out the same steps.
            if gradients and not torch.isfinite(torch.stack([g.float().norm() for g in gradients])).all():
                optimizer.zero_grad(set_to_none=True)
                self.skipped_steps += 1
        self.log("train/skipped_steps", float(self.skipped_steps)) if self.skipped_steps else None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Each step's dropout is a function of (seed, epoch, batch, rank), so a run taken up again is the same run.
        # Once an epoch would not do: loaders draw from the same generator, before or after the epoch's start.
        if "PL_GLOBAL_SEED" in os.environ:
            place = [int(os.environ["PL_GLOBAL_SEED"]), self.current_epoch, batch_idx, self.global_rank]
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))

    # -- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train()  # a loaded model comes in evaluation mode, which Lightning would keep
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and not precision.startswith(("32", "64")):
            raise InputError(
                f"trainer.precision is {precision!r}: what a step changes is rounded off in weights of it, and counts "
                "summed in it are off by about one; use 'bf16-mixed', '16-mixed' or '32-true'"
            )
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or datamodule is None:
            return
        self.check_supervision(datamodule)
        self.read_facts(datamodule)

    def check_supervision(self, datamodule: Any) -> None:
        """Make sure that the training data give what the model learns from.

        Raises:
            SupervisionError: they do not; says what is needed and what is given.
        """
        provides = getattr(datamodule, "provides", None)
        if provides is not None and not any(keys <= provides for keys in self.requires):
            needs = " or ".join(" and ".join(sorted(keys)) for keys in self.requires)
            raise SupervisionError(
                f"{type(self).__name__} trains on {needs}, which {type(datamodule).__name__} does not give (it gives "
                f"{', '.join(sorted(provides)) or 'nothing'}); choose data with {needs}, or test and predict only"
            )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters by their weight decay and share of the learning rate."""
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            plain = self.decay == "matrices" and (p.ndim < 2 or "embedding" in name or name.endswith("context"))
            factor = self.lr_factor(name)
            options = {"params": [], **({"weight_decay": 0.0} if plain else {}), "lr_factor": factor}
            groups.setdefault((plain, factor), options)["params"].append(p)
        return [groups[key] for key in sorted(groups)]

    def on_fit_start(self) -> None:
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        if self._distributed() and any(not isinstance(m, nn.SyncBatchNorm) for m in norms):
            warnings.warn(
                f"{type(self).__name__} has batch norm, and each of {self.trainer.world_size} processes normalises "
                "with its own part of the batch, so training differs from that of one process; on GPUs "
                "--trainer.sync_batchnorm true makes it the same",
                stacklevel=2,
            )

    def configure_optimizers(self) -> Any:
        groups = self._parameter_groups()
        optimizer = self.default_optimizer(groups) if self.optimizer is None else self.optimizer(groups)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_factor"]
        scheduler: Any = None
        if self.scheduler is not None:
            scheduler = self.scheduler(optimizer)
        elif self.optimizer is None:
            scheduler = self.default_scheduler(optimizer)
        if scheduler is None:
            return optimizer
        if len({group.get("max_lr") for group in optimizer.param_groups} - {None}) == 1:
            # OneCycleLR has put one rate of its own in the place of those of all groups.
            for group in optimizer.param_groups:
                group |= {key: group[key] * group["lr_factor"] for key in ("lr", "initial_lr", "max_lr", "min_lr")}
        if getattr(scheduler, "total_steps", 0) is None:
            steps = self.trainer.estimated_stepping_batches  # infinite where only max_time ends the run
            scheduler.total_steps = int(steps) if math.isfinite(steps) else None
        interval = getattr(scheduler, "interval", "epoch")
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        monitor = {"monitor": self.monitored} if plateau else {}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval, **monitor}}

    def _distributed(self) -> bool:
        return self._trainer is not None and self.trainer.world_size > 1

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        """What, beside weights and hyper-parameters, a checkpoint needs to give the same numbers (plain data)."""
        return {}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        """Take back what :meth:`recipe` gave."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kind = type(self)
        checkpoint["counting_zoo"] = {
            "class": f"{kind.__module__}.{kind.__qualname__}",
            "version": __version__,
            "recipe": self.recipe(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored = checkpoint.get("counting_zoo")
        if stored is None:
            raise CheckpointError(
                "this is not a checkpoint of counting_zoo (it has no 'counting_zoo' entry); for weights of a "
                "reference implementation use counting_zoo.load_official or 'counting-zoo convert'"
            )
        own = f"{type(self).__module__}.{type(self).__qualname__}"
        if stored["class"] != own:
            raise CheckpointError(
                f"the checkpoint holds a {stored['class']}, not a {own}; leave the model to the checkpoint "
                "(counting_zoo.load, or test --ckpt_path without --config for a model)"
            )
        self.restore_recipe(stored["recipe"])


def _plain(value: Any) -> Any:
    """Hyper-parameters as plain data, which checkpoints load without executing anything."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value


class CountingModule(Counter, TrainingModule):
    """Trains, scores and counts; subclasses implement ``forward`` and :meth:`losses`.

    Args:
        preprocess: geometry of whole pictures before the model sees them; stored in the checkpoint.
        window: side of the square tiles a picture is counted in; ``None`` counts it in one piece.
        stride: distance of neighbouring tiles; the window if ``None``.
        window_batch_size: tiles that go through the network together.
        blend: how overlapping tiles are mixed, ``average`` or the ``official`` sigmoid ramp of CLIP-Count.
        pad: ``minimal`` pads only pictures smaller than a tile; ``official`` pads a stride on the right.
        default_classes: names to count where nobody names any; the training classes where there are few.
        training: those of :class:`~counting_zoo.module.TrainingModule`.
    """

    requires: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points"}),)
    #: Whether the count depends on the name asked about.
    text_guided: ClassVar[bool] = False

    def __init__(
        self,
        *,
        preprocess: Preprocess | None = None,
        window: int | None = None,
        stride: int | None = None,
        window_batch_size: int = 16,
        blend: Literal["average", "official"] = "average",
        pad: Literal["minimal", "official"] = "minimal",
        default_classes: list[str] | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if stride is not None and (window is None or not 0 < stride <= window):
            raise InputError(f"stride is {stride} with window {window}; expected 0 < stride <= window")
        self.preprocess = Preprocess.of(preprocess)
        self.window, self.stride, self.window_batch_size = window, stride, window_batch_size
        self.blend, self.pad = blend, pad
        self.default_classes = default_classes
        self.val_errors, self.test_errors = CountErrors(), CountErrors()
        self.val_classes, self.test_classes = ClassCountErrors(present_1=True), ClassCountErrors(present_1=True)
        self.val_game, self.test_game = GAME(), GAME()
        self.val_prompts, self.test_prompts = PromptErrors(), PromptErrors()
        self.val_intervals, self.test_intervals = IntervalScores(), IntervalScores()

    # -- what a model implements ----------------------------------------------------------------------------------

    @abstractmethod
    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted terms of the loss; their sum is what is minimised."""

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of one step; override where a stage needs only part of the network."""
        images = batch["image"]
        assert isinstance(images, Tensor), "training pictures come as one tensor"
        return self.losses(self(images, batch["classes"]), batch)

    # -- steps ----------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _metrics(self, split: Split) -> tuple[CountErrors, ClassCountErrors, GAME, PromptErrors]:
        if split == "val":
            return self.val_errors, self.val_classes, self.val_game, self.val_prompts
        return self.test_errors, self.test_classes, self.test_game, self.test_prompts

    def _intervals(self, split: Split) -> IntervalScores:
        return self.val_intervals if split == "val" else self.test_intervals

    def _score(self, batch: Batch, split: Split) -> None:
        if "counts" not in batch:
            raise InputError(f"the {split} data of {batch['image_id'][:3]} carry no counts, so nothing can be scored")
        if not batch["image_id"]:
            return  # none of them asked about a name that the model knows
        asked, k = batch["classes"], len(batch["classes"][0])
        extra = wrong_prompts(batch, self._datamodule_names(split)) if self.text_guided and k == 1 else None
        names = asked if extra is None else [a + e for a, e in zip(asked, extra, strict=True)]
        images = batch["image"]
        outputs = self.count_batch(list(images), names, image_ids=batch["image_id"], sizes=batch.get("original_size"))
        assert isinstance(outputs, list)
        sizes = [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
        self.tally(outputs, batch, sizes, extra, split)

    def tally(
        self,
        outputs: list[Any],
        batch: Batch,
        sizes: list[tuple[int, int]],
        extra: list[list[str]] | None,
        split: Split,
    ) -> None:
        """Add one output for each picture of a batch, whose pictures may be gone by now, to the scores.

        Args:
            outputs: of the names asked about and then of ``extra``.
            batch: what is known of the pictures.
            sizes: (H, W) of the pictures as the model saw them.
            extra: wrong names that were asked about too, or ``None``.
            split: whose scores.
        """
        errors, classes, game, prompts = self._metrics(split)
        asked = batch["classes"]
        counts = self.reported(torch.cat([o.counts for o in outputs]))  # (B, K [+ 3])
        target = batch["counts"].sum(1, keepdim=True) if self.class_blind else batch["counts"]
        errors.update(counts[:, : target.shape[1]], target, batch["image_id"])
        bounds = [bounds for output in outputs if (bounds := self.interval(output)) is not None]
        if bounds:
            self._intervals(split).update(torch.cat(bounds)[:, : target.shape[1]], target, batch["image_id"])
        if target.shape[1] > 1 and asked[0] == (classes.classes or asked[0]) and len({tuple(n) for n in asked}) == 1:
            classes.classes = list(asked[0])
            classes.update(counts[:, : target.shape[1]], target, batch["image_id"])
        if "points" in batch and "labels" in batch:
            density = [o.density[0, : target.shape[1]] for o in outputs]
            labels = None if self.class_blind else batch["labels"]
            extents = [self.extent(d, size) for d, size in zip(density, sizes, strict=True)]
            game.update(density, batch["points"], sizes, batch["image_id"], labels=labels, extents=extents)
        self.score_more(outputs, batch, split)
        if extra is not None:
            own = torch.tensor([[name == a[0] for name in e] for a, e in zip(asked, extra, strict=True)])
            wrong = counts[:, 1:4].masked_fill(own.to(counts.device), math.nan)
            prompts.update(batch["image_id"], counts[:, 0], batch["counts"][:, 0], *wrong.unbind(1))

    def _log_scores(self, split: Split) -> None:
        errors, classes, game, prompts = self._metrics(split)
        constants = self._constants(split)
        errors.constants = {f"train_{name}": value for name, value in constants.items()}
        classes.constants = dict(errors.constants)
        with warnings.catch_warnings():
            # A rank without pictures computes too, or the others would wait for it for ever.
            warnings.filterwarnings("ignore", message=".*compute.*before.*update.*")
            scores = prompts.compute() | game.compute() | classes.compute() | errors.compute() | self.more_scores(split)
            if self.interval_calibration is not None:
                scores |= self._intervals(split).compute() | {"interval_level": self.interval_calibration.level}
        self.log_dict({f"{split}/{name}": float(value) for name, value in scores.items() if not name.startswith("n_")})
        for metric in (errors, classes, game, prompts, self._intervals(split)):
            metric.reset()
        classes.classes = None

    def score_more(self, outputs: list[CountOutput], batch: Batch, split: Split) -> None:
        """Keep what a model's own scores need of a batch, one output for each picture."""

    def more_scores(self, split: Split) -> dict[str, float]:
        """A model's own scores of a split, which they then forget; all processes call it."""
        return {}

    def _constants(self, split: Split) -> dict[str, float | list[float]]:
        """What constant predictors say, of the names that this model is scored on."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(datamodule, "constant_predictors"):
            return {}
        constants = datamodule.constant_predictors(total=self.class_blind)
        if self.vocabulary is None or not any(isinstance(value, list) for value in constants.values()):
            return constants
        asked = datamodule.asked_names(split) or []
        kept = [k for k, name in enumerate(asked) if name in self.vocabulary]
        return {name: [value[k] for k in kept] for name, value in constants.items()}

    def _datamodule_names(self, split: str) -> list[str]:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        return list(datamodule.class_names(split)) if hasattr(datamodule, "class_names") else []

    # -- intervals ------------------------------------------------------------------------------------------------

    def drop_intervals(self, changed: str) -> None:
        """Forget how far counts are off, with a warning, where something has changed that they depend on."""
        if self.interval_calibration is None:
            return
        warnings.warn(
            f"the intervals of this model were calibrated with other {changed}, and are dropped; calibrate it again "
            "(counting-zoo calibrate)",
            stacklevel=3,
        )
        self.interval_calibration = None

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.drop_intervals("weights than those that training now gives it")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.interval_calibration is not None:
            checkpoint["counting_zoo"]["intervals"] = self.interval_calibration.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint["counting_zoo"].get("intervals")
        self.interval_calibration = None if stored is None else IntervalCalibration.from_dict(stored)
        if changed := self._changed(checkpoint.get("hyper_parameters", {})):
            self.drop_intervals(f"settings than it is loaded with ({', '.join(changed)})")

    def _changed(self, stored: dict[str, Any]) -> list[str]:
        """Settings that differ from those of a checkpoint, among those that may change a count."""
        settings = set(stored) & set(self.hparams) - _NOT_COUNTING
        return sorted(name for name in settings if _as_text(stored[name]) != _as_text(self.hparams[name]))

    # -- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.class_blind and hasattr(datamodule, "asked_counts"):
            splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
            for split in splits.get(stage, ()):
                self._warn_of_names(datamodule, split)
        if hasattr(datamodule, "class_names"):
            self._check_names(datamodule, stage)
        super().setup(stage)
        if stage == "fit" and hasattr(datamodule, "class_names") and self.default_classes is None:
            known = datamodule.class_names("train")
            if self.class_blind or not self.text_guided or len(known) == 1:
                self.default_classes = self.hparams["default_classes"] = list(known)

    def _warn_of_names(self, datamodule: Any, split: Split) -> None:
        """A model without names counts every object it sees, so all of them must be asked about."""
        asked = datamodule.asked_counts(split, total=True)[:, 0]
        left_out, every = unasked_objects(datamodule.records(split), asked)
        if left_out > 0:
            warnings.warn(
                f"{type(self).__name__} counts without names, but {left_out:.0f} of {every:.0f} objects "
                f"in the {split} pictures have names that are not asked about, so counting them is taken for an error; "
                "use --data.merge_classes objects to give all of them one name",
                stacklevel=2,
            )

    def _check_names(self, datamodule: Any, stage: str) -> None:
        """A model with a fixed list of names is used on those that it shares with the data."""
        if self.vocabulary is None:
            return
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
            "predict": ("predict",),
        }
        for split in splits[stage]:
            asked = list(datamodule.class_names(split))
            left_out = [name for name in asked if name not in self.vocabulary]
            if asked and len(left_out) == len(asked):
                raise NamesError(
                    f"{type(self).__name__} counts {_some(self.vocabulary)} and nothing else, and the {split} pictures "
                    f"of {type(datamodule).__name__} are asked about {_some(asked)}: no name in common. Train it on "
                    "data with these names, or rename the data's"
                )
            if split == "train" and (unseen := [name for name in self.vocabulary if name not in asked]):
                warnings.warn(
                    f"{len(unseen)} of the {len(self.vocabulary)} classes of the model are not among the names of the "
                    f"training pictures, so nothing is learnt of them: {_some(unseen)}",
                    stacklevel=2,
                )
            if left_out and split == "train":
                where = {name: r.image_id for r in reversed(datamodule.records(split)) for name in present_names(r)}
                places = [f"{name!r} (in {where[name]})" if name in where else repr(name) for name in left_out]
                raise NamesError(
                    f"the training pictures of {type(datamodule).__name__} name {_some(places)}, which is not among "
                    f"the classes of the model, {_some(self.vocabulary)}; correct the annotation, leave them out of "
                    "the data, or train a model of all these names (without model.classes)"
                )
            if left_out:
                warnings.warn(
                    f"{type(self).__name__} does not know {len(left_out)} of the {len(asked)} names of the {split} "
                    f"pictures, and they are left out: {_some(left_out)}",
                    stacklevel=2,
                )


_NOT_COUNTING = {"window_batch_size", "default_classes", "non_finite", "decay", "tokenizer"}
"""Settings that change no count."""


def _as_text(value: Any) -> str:
    """The same for lists and tuples, of which YAML knows only the first."""
    return json.dumps(value, sort_keys=True, default=str)


def _some(names: Sequence[str], n: int = 12) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


class TextModule(TrainingModule):
    """Trains with a text tower, whose tokenizer is given, or made of the texts of its training data."""

    #: Whether the tokenizer was made here, of texts that this run has seen.
    _tokenizer_is_made = False

    @property
    @abstractmethod
    def text_tower(self) -> TextTower:
        """What embeds texts."""

    def set_tokenizer(self, source: TokenizerLike) -> None:
        """Use a HuggingFace tokenizer, a folder, a hub name, or a callable ``list[str] -> (B, L)`` ids."""
        self.text_tower.set_tokenizer(source)

    def make_tokenizer(self, texts: Sequence[str]) -> None:
        """Use a tokenizer made of the words of some texts, until a checkpoint brings its own."""
        vocab_size = self.text_tower.model.embeddings.token_embedding.num_embeddings
        self.set_tokenizer(word_tokenizer(texts, vocab_size))
        self._tokenizer_is_made = True

    def recipe(self) -> dict[str, Any]:
        tokenizer = self.text_tower.tokenizer
        return super().recipe() | {"tokenizer": None if tokenizer is None else tokenizer.to_json()}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        super().restore_recipe(recipe)
        # A tokenizer given by the caller wins over the one that was saved, but not one made of this run's texts.
        missing = self.text_tower.tokenizer is None or self._tokenizer_is_made
        if missing and recipe["tokenizer"] is not None:
            self.set_tokenizer(recipe["tokenizer"])
            self._tokenizer_is_made = False


class TextGuidedModule(CountingModule, TextModule):
    """Counts what a name says; subclasses set ``train_classes`` to an empty list where they begin."""

    text_guided: ClassVar[bool] = True
    #: Names of the training data, which its checkpoint keeps.
    train_classes: list[str]

    @abstractmethod
    def prompts_of(self, name: str) -> list[str]:
        """The texts that are embedded for a name."""

    def make_tokenizer_of_names(self, names: Sequence[str]) -> None:
        """Use a tokenizer made of the words in the texts for some names."""
        self.make_tokenizer([prompt for name in names for prompt in self.prompts_of(name)])

    def read_facts(self, datamodule: Any) -> None:
        self.train_classes = list(datamodule.class_names("train")) if hasattr(datamodule, "class_names") else []
        if self.text_tower.tokenizer is None:
            self.make_tokenizer_of_names(self.train_classes)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._warn_untrained()

    def on_test_start(self) -> None:
        super().on_test_start()
        self._warn_untrained()

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._warn_untrained()

    def _warn_untrained(self) -> None:
        """Not in ``setup``, which runs before the trainer restores a checkpoint with its tokenizer."""
        if self.text_tower.tokenizer is None:
            warnings.warn(
                f"this {type(self).__name__} has random weights and was never trained: its counts mean nothing. Give "
                "it a checkpoint (--ckpt_path) or CLIP weights (--model.clip, a hub name or folder)",
                stacklevel=2,
            )
            self.make_tokenizer_of_names([])

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | {"train_classes": self.train_classes}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        super().restore_recipe(recipe)
        self.train_classes = list(recipe["train_classes"])
