"""The only training loop of the zoo: every model is a subclass that says how it counts and what it loses."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from counting_zoo.class_metrics import ClassCountErrors
from counting_zoo.counter import Counter
from counting_zoo.data.records import Split, n_objects, present_names
from counting_zoo.errors import CheckpointError, InputError, NamesError, SupervisionError
from counting_zoo.geometry import Preprocess
from counting_zoo.metrics import GAME, CountErrors, PromptErrors
from counting_zoo.prompts import wrong_prompts
from counting_zoo.types import Batch, CountOutput
from counting_zoo.version import __version__


class CountingModule(Counter, L.LightningModule):
    """Trains, scores and counts; subclasses implement ``forward`` and :meth:`losses`.

    Args:
        preprocess: geometry of whole pictures before the model sees them; stored in the checkpoint.
        window: side of the square tiles a picture is counted in; ``None`` counts it in one piece.
        stride: distance of neighbouring tiles; the window if ``None``.
        window_batch_size: tiles that go through the network together.
        blend: how overlapping tiles are mixed, ``average`` or the ``official`` sigmoid ramp of CLIP-Count.
        pad: ``minimal`` pads only pictures smaller than a tile; ``official`` pads a stride on the right.
        default_classes: names to count where nobody names any; the training classes where there are few.
        non_finite: a loss that is not finite stops training with an error naming the pictures (``raise``), or its
            step is left out and counted (``skip``).
        decay: weight decay for ``matrices`` only, or for ``all`` parameters.
        optimizer: called with parameter groups; the model's own default if ``None``.
        scheduler: called with the optimizer; the model's own default if ``None``.
    """

    #: Any one of these sets of batch keys is enough to train.
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
        non_finite: Literal["raise", "skip"] = "raise",
        decay: Literal["matrices", "all"] = "matrices",
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler", "_class_path", "_instantiator"])
        for name, value in self.hparams.items():
            self.hparams[name] = _plain(value)
        if stride is not None and (window is None or not 0 < stride <= window):
            raise InputError(f"stride is {stride} with window {window}; expected 0 < stride <= window")
        if non_finite not in ("raise", "skip"):
            raise InputError(f"non_finite is {non_finite!r}; expected 'raise' or 'skip'")
        self.preprocess = Preprocess.of(preprocess)
        self.window, self.stride, self.window_batch_size = window, stride, window_batch_size
        self.blend, self.pad = blend, pad
        self.default_classes = default_classes
        self.non_finite, self.decay = non_finite, decay
        self.optimizer, self.scheduler = optimizer, scheduler
        self.skipped_steps = 0
        self.val_errors, self.test_errors = CountErrors(), CountErrors()
        self.val_classes, self.test_classes = ClassCountErrors(present_1=True), ClassCountErrors(present_1=True)
        self.val_game, self.test_game = GAME(), GAME()
        self.val_prompts, self.test_prompts = PromptErrors(), PromptErrors()

    # -- what a model implements ----------------------------------------------------------------------------------

    @abstractmethod
    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted terms of the loss; their sum is what is minimised."""

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The terms of one step; override where a stage needs only part of the network."""
        images = batch["image"]
        assert isinstance(images, Tensor), "training pictures come as one tensor"
        return self.losses(self(images, batch["classes"]), batch)

    def idle_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters that the current stage of training does not reach."""
        return []

    def read_facts(self, datamodule: Any) -> None:
        """Take what the model must know of the training data, once, before the first step."""

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

    def _score(self, batch: Batch, split: Split) -> None:
        errors, classes, game, prompts = self._metrics(split)
        if "counts" not in batch:
            raise InputError(f"the {split} data of {batch['image_id'][:3]} carry no counts, so nothing can be scored")
        if not batch["image_id"]:
            return  # none of them asked about a name that the model knows
        asked, k = batch["classes"], len(batch["classes"][0])
        extra = wrong_prompts(batch, self._datamodule_names(split)) if self.text_guided and k == 1 else None
        names = asked if extra is None else [a + e for a, e in zip(asked, extra, strict=True)]
        images = batch["image"]
        outputs = self.count_batch(list(images), names)
        assert isinstance(outputs, list)
        counts = self.reported(torch.cat([o.counts for o in outputs]))  # (B, K [+ 3])
        target = batch["counts"].sum(1, keepdim=True) if self.class_blind else batch["counts"]
        errors.update(counts[:, : target.shape[1]], target, batch["image_id"])
        if target.shape[1] > 1 and asked[0] == (classes.classes or asked[0]) and len({tuple(n) for n in asked}) == 1:
            classes.classes = list(asked[0])
            classes.update(counts[:, : target.shape[1]], target, batch["image_id"])
        if "points" in batch and "labels" in batch:
            density = [o.density[0, : target.shape[1]] for o in outputs]
            sizes = [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
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
        self.log_dict({f"{split}/{name}": float(value) for name, value in scores.items() if not name.startswith("n_")})
        for metric in (errors, classes, game, prompts):
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

    # -- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.train()  # a loaded model comes in evaluation mode, which Lightning would keep
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and not precision.startswith(("32", "64")):
            raise InputError(
                f"trainer.precision is {precision!r}: counts summed in it are off by about one; "
                "use 'bf16-mixed', '16-mixed' or '32-true'"
            )
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.class_blind and hasattr(datamodule, "asked_counts"):
            splits: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
            for split in splits.get(stage, ()):
                self._warn_of_names(datamodule, split)
        if hasattr(datamodule, "class_names"):
            self._check_names(datamodule, stage)
        if stage != "fit" or datamodule is None:
            return
        provides = getattr(datamodule, "provides", None)
        if provides is not None and not any(keys <= provides for keys in self.requires):
            needs = " or ".join(" and ".join(sorted(keys)) for keys in self.requires)
            raise SupervisionError(
                f"{type(self).__name__} trains on {needs}, which {type(datamodule).__name__} does not give (it gives "
                f"{', '.join(sorted(provides)) or 'nothing'}); choose data with {needs}, or test and predict only"
            )
        if hasattr(datamodule, "class_names") and self.default_classes is None:
            known = datamodule.class_names("train")
            if self.class_blind or not self.text_guided or len(known) == 1:
                self.default_classes = self.hparams["default_classes"] = list(known)
        self.read_facts(datamodule)

    def _warn_of_names(self, datamodule: Any, split: Split) -> None:
        """A model without names counts every object it sees, so all of them must be asked about."""
        present = np.array([n_objects(record) for record in datamodule.records(split)], np.float64)
        left_out = np.nansum(present - datamodule.asked_counts(split, total=True)[:, 0])
        if left_out > 0:
            warnings.warn(
                f"{type(self).__name__} counts without names, but {left_out:.0f} of {np.nansum(present):.0f} objects "
                f"in the {split} pictures have names that are not asked about, so counting them is taken for an error; "
                "use --data.merge_classes objects to give all of them one name",
                stacklevel=2,
            )

    def _check_names(self, datamodule: Any, stage: str) -> None:
        """A model with a fixed list of names is used on those that it shares with the data."""
        if self.vocabulary is None:
            return
        splits: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",),
        }  # fmt: skip
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
        monitor = {"monitor": "val/mae"} if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else {}
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


def _some(names: Sequence[str], n: int = 12) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


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


__all__ = ["CountingModule"]
