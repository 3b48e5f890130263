"""The LightningModule base of everything that trains: steps by named terms, optimizers, the recipe in checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import lightning as L
import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from counting_zoo.checkpoints import CheckpointFiles, take_over_best
from counting_zoo.data.dataset import TrainingSampler
from counting_zoo.errors import CheckpointError, InputError, SupervisionError, check
from counting_zoo.nn.text import TextTower, TokenizerLike
from counting_zoo.types import Batch
from counting_zoo.version import __version__


def public_name(kind: type) -> str:
    """Name a model class as checkpoints do: where users import it from, which no move of files changes."""
    import counting_zoo

    own = kind.__module__.split(".")[0] == "counting_zoo" and kind.__qualname__ in counting_zoo.__all__
    return f"counting_zoo.{kind.__qualname__}" if own else f"{kind.__module__}.{kind.__qualname__}"


EARLIER_NAMES = {
    "counting_zoo.models.clip_count.module.CLIPCount": "counting_zoo.CLIPCount",
    "counting_zoo.models.clip_ebc.module.CLIPEBC": "counting_zoo.CLIPEBC",
    "counting_zoo.models.clip_ebc.module.EBC": "counting_zoo.EBC",
    "counting_zoo.models.lower_count.module.LowerCount": "counting_zoo.LowerCount",
    "counting_zoo.models.region_clip.module.RegionCLIPCounter": "counting_zoo.RegionCLIPCounter",
    "counting_zoo.models.region_clip.pretraining.RegionCLIPPretraining": "counting_zoo.RegionCLIPPretraining",
}
"""Classes as checkpoints of the first edition name them."""


def current_name(stored: str) -> str:
    """Map the class name in a checkpoint to its name today."""
    return EARLIER_NAMES.get(stored, stored)


class TrainingModule(L.LightningModule):
    """Training by named loss terms, with a recipe in every checkpoint; what does not count, such as a pretraining, too.

    Hyper-parameters of subclasses are stored as plain data, so that a checkpoint is a complete recipe that loading
    does not execute.

    Args:
        non_finite: a loss or gradient that is not finite stops training with an error naming the images (``raise``),
            or its step is left out and counted (``skip``), as if its images had never been seen.
        max_skipped_steps: so many steps may be left out in a row before training stops all the same.
        decay: weight decay for ``matrices`` only, or for ``all`` parameters.
        optimizer: called with parameter groups; the model's own default if ``None``.
        scheduler: called with the optimizer; the model's own default if ``None``.
    """

    #: The dataclass of the network's options, which the constructor takes as ``network``; ``None`` where there is none.
    config_class: ClassVar[type | None] = None
    #: Any one of these sets of batch keys is enough to train.
    trains_on: ClassVar[tuple[frozenset[str], ...]] = ()
    #: Whether training images of different sizes may come as a list, which the model pads.
    pads: ClassVar[bool] = False
    #: The score of validation that a schedule watches which lowers the rate where nothing improves; lower is better.
    monitored: ClassVar[str] = "val/mae"

    def __init__(
        self,
        *,
        non_finite: Literal["raise", "skip"] = "raise",
        max_skipped_steps: int = 20,
        decay: Literal["matrices", "all"] = "matrices",
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler", "_class_path", "_instantiator"])
        for name, value in self.hparams.items():
            self.hparams[name] = _plain(value)
        check("model.non_finite", non_finite, one_of=("raise", "skip"))
        check("model.max_skipped_steps", max_skipped_steps, at_least=0)
        self.non_finite, self.max_skipped_steps, self.decay = non_finite, max_skipped_steps, decay
        self.optimizer, self.scheduler = optimizer, scheduler
        self.skipped_steps = self.skipped_in_row = 0
        self._statistics: list[tuple[Tensor, Tensor]] | None = None  # of batch norms, as they were before this step

    def network_config(self, given: Any) -> Any:
        """Build the network's options as their dataclass, and keep them as plain data among the hyper-parameters.

        Args:
            given: the dataclass, a mapping as checkpoints hold it, or ``None`` for the defaults.

        Raises:
            InputError: an option that the network does not have.
        """
        assert self.config_class is not None, "asked only of models whose network has options"
        try:
            config = self.config_class(**given) if isinstance(given, Mapping) else given or self.config_class()
        except TypeError as error:
            names = ", ".join(f.name for f in dataclasses.fields(self.config_class))
            raise InputError(f"network of {type(self).__name__}: {error}; expected options among {names}") from error
        self.hparams["network"] = dataclasses.asdict(config)
        return config

    @abstractmethod
    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Compute the named, weighted terms of one step; their sum is what is minimised."""

    def read_facts(self, datamodule: Any) -> None:
        """Take what the model must know of the training data, once, before the first step."""

    def idle_parameters(self) -> list[nn.Parameter]:
        """List trainable parameters that the current stage of training does not reach."""
        return []

    def lr_factor(self, name: str) -> float:
        """Return the factor of a parameter's learning rate, such as less than 1 for a pretrained encoder."""
        return 1.0

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build the model's published optimizer."""
        return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.05)

    def default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Build the model's published schedule, which goes with its optimizer; ``None`` for a constant rate."""
        return None

    # -- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if self.non_finite == "skip" and self._statistics is None:
            norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
            self._statistics = [(b, b.clone()) for norm in norms for b in norm.buffers(recurse=False)]
        terms = self.training_losses(batch)
        loss = torch.stack(list(terms.values())).sum()
        self._step_images = batch["image_id"]
        if self.non_finite == "raise" and not torch.isfinite(loss):
            raise self._not_finite(f"the loss ({ {name: float(value.detach()) for name, value in terms.items()} })")
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
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        # Gradients are the same on every rank, so all ranks leave out the same steps.
        finite = not gradients or bool(torch.isfinite(nn.utils.get_total_norm(gradients)))
        if self.non_finite == "skip" and not finite:
            optimizer.zero_grad(set_to_none=True)
            for statistic, before in self._statistics or ():
                statistic.copy_(before)
            self.skipped_steps += 1
            self.skipped_in_row += 1
            if self.skipped_in_row > self.max_skipped_steps:
                raise self._not_finite(f"the gradient of {self.skipped_in_row} steps in a row")
        # A scaler of half precision tries out its scale on purpose, and leaves such steps out itself.
        elif not finite and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            raise self._not_finite("the gradient")
        self.skipped_in_row *= not finite
        self._statistics = None
        self.log("train/skipped_steps", float(self.skipped_steps)) if self.skipped_steps else None

    def _not_finite(self, found: str) -> FloatingPointError:
        """Describe what is not finite, on which images, and the checkpoint to go back to."""
        finite = getattr(self.trainer.strategy.checkpoint_io, "finite", None)
        last = f"all weights in {str(finite)!r} are finite" if finite else "this run has no checkpoint yet"
        return FloatingPointError(
            f"{found} is not finite at step {self.global_step} on the images {self._step_images}; the weights are "
            f"still those of the step before, and {last}. "
            "Look at these images, lower the learning rate, clip gradients, or leave such steps out with "
            "model.non_finite: skip"
        )

    def on_train_start(self) -> None:
        """Go on inside an epoch behind the batches that were trained on; Lightning begins the epoch's order again."""
        loop: Any = self.trainer.fit_loop
        loader: Any = self.trainer.train_dataloader
        sampler = getattr(loader, "sampler", None)
        if loop.restarting and loop.epoch_loop.val_loop.restarted_mid_evaluation:
            # The rest of a validation is no score of its own.
            loop.epoch_loop.val_loop.batch_progress.current.reset()
        if not loop.restarting or not isinstance(sampler, TrainingSampler):
            return
        progress = loop.epoch_loop.batch_progress.current
        if 0 < progress.processed < loop.max_batches:
            sampler.set_epoch(loop.epoch_progress.current.processed)
            sampler.start = progress.processed * loader.batch_size
            iter(loop._data_fetcher)  # loader processes have fetched the epoch's first batches by now
            warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")

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
        if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # another one is the user's choice
            self.trainer.strategy.checkpoint_io = CheckpointFiles()
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
        if provides is not None and not any(keys <= provides for keys in self.trains_on):
            needs = " or ".join(" and ".join(sorted(keys)) for keys in self.trains_on)
            raise SupervisionError(
                f"{type(self).__name__} trains on {needs}, which {type(datamodule).__name__} does not give (it gives "
                f"{', '.join(sorted(provides)) or 'nothing'}); choose data with {needs}, or test and predict only"
            )

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Group trainable parameters by their weight decay and share of the learning rate."""
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

    # -- texts ----------------------------------------------------------------------------------------------------

    @property
    def text_tower(self) -> TextTower | None:
        """The tower that embeds texts, whose tokenizer goes into the checkpoint; ``None`` where nothing is read."""
        return None

    def set_tokenizer(self, source: TokenizerLike) -> None:
        """Use a HuggingFace tokenizer, a folder, a hub name, or a callable ``list[str] -> (B, L)`` ids.

        Raises:
            InputError: the model reads no texts.
        """
        if self.text_tower is None:
            raise InputError(f"tokenizer={source!r} for a {type(self).__name__}, which reads no texts; leave it out")
        self.text_tower.set_tokenizer(source)

    def make_tokenizer(self, texts: Sequence[str]) -> None:
        """Use a tokenizer made of the words of some texts, until a checkpoint brings its own."""
        assert self.text_tower is not None, "asked only of models that read texts"
        self.set_tokenizer(self.text_tower.tokenizer_of(texts))
        self.text_tower.tokenizer_is_made = True

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        """Collect plain data beside weights and hyper-parameters that a checkpoint needs to give the same numbers."""
        tower = self.text_tower
        if tower is None:
            return {}
        return {"tokenizer": None if tower.tokenizer is None else tower.tokenizer.to_json()}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        """Take back what :meth:`recipe` gave."""
        tower, stored = self.text_tower, recipe.get("tokenizer")
        # A tokenizer given by the caller wins over the stored one, but not one made of this run's texts.
        if tower is not None and stored is not None and (tower.tokenizer is None or tower.tokenizer_is_made):
            self.set_tokenizer(stored)

    @classmethod
    def nested(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Move the network's options under ``network``; checkpoints of the first edition keep them beside the others.

        Example:
            >>> import counting_zoo
            >>> counting_zoo.CLIPCount.nested({"sigma": 1.0, "heads": 4})
            {'sigma': 1.0, 'network': {'heads': 4}}
        """
        if cls.config_class is None:
            return dict(settings)
        names = {f.name for f in dataclasses.fields(cls.config_class)}
        own = {name: value for name, value in settings.items() if name in names}
        given = settings.get("network") or {}
        rest = {name: value for name, value in settings.items() if name not in names | {"network"}}
        network = {**(given if isinstance(given, Mapping) else dataclasses.asdict(given)), **own}
        return {**rest, "network": network} if network else rest

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any], **overrides: Any) -> Self:
        """Build the model of a zoo checkpoint that was read already, with its weights.

        Args:
            checkpoint: as :func:`~counting_zoo.nn.weights.read_checkpoint` gives it.
            overrides: hyper-parameters that should differ from the stored ones; ``tokenizer`` replaces the stored one.

        Raises:
            TypeError: settings that the class does not take.
            CheckpointError: weights that do not fit the settings.
        """
        tokenizer = overrides.pop("tokenizer", None)
        stored, given = cls.nested(checkpoint["hyper_parameters"]), cls.nested(overrides)
        if "network" in stored and "network" in given:
            given["network"] = {**stored["network"], **given["network"]}
        module = cls(**{**stored, **given})
        if tokenizer is not None:
            module.set_tokenizer(tokenizer)
        module.on_load_checkpoint(checkpoint)
        try:
            module.load_state_dict(checkpoint["state_dict"], strict=True)
        except RuntimeError as error:
            raise CheckpointError(f"the weights of the checkpoint do not fit its own settings: {error}") from error
        return module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["counting_zoo"] = {
            "class": public_name(type(self)),
            "version": __version__,
            "recipe": self.recipe(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self.trainer.state.fn == "fit" and self.trainer.ckpt_path:
            states = checkpoint.get("callbacks", {})
            for callback in self.trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint) and callback.state_key in states:
                    state, resumed = states[callback.state_key], Path(self.trainer.ckpt_path)
                    one = self.trainer.is_global_zero
                    states[callback.state_key] = take_over_best(callback, state, resumed, copy=one)
        stored = checkpoint.get("counting_zoo")
        if stored is None:
            raise CheckpointError(
                "this is not a checkpoint of counting_zoo (it has no 'counting_zoo' entry); for weights of a "
                "reference implementation use counting_zoo.load_official or 'counting-zoo convert'"
            )
        own = public_name(type(self))
        if current_name(stored["class"]) != own:
            raise CheckpointError(
                f"the checkpoint holds a {stored['class']}, not a {own}; leave the model to the checkpoint "
                "(counting_zoo.load, or test --ckpt_path without --config for a model)"
            )
        self.restore_recipe(stored["recipe"])


def _plain(value: Any) -> Any:
    """Convert a hyper-parameter to plain data, which checkpoints load without executing anything."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "as_dict"):
        return value.as_dict()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return value
