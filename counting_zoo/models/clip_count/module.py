"""CLIP-Count as a Lightning module: stages, losses, facts taken from data, and the recipe in its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from counting_zoo.errors import InputError, WeightsError
from counting_zoo.models.clip_count.loss import (
    DensityMask,
    density_mse,
    patch_text_contrastive,
    positive_patches,
    positive_patches_of_density,
    region_text,
    region_weights,
)
from counting_zoo.models.clip_count.network import CLIPCountConfig, CLIPCountNet, CLIPCountOutput, TextHead
from counting_zoo.module import CountingModule
from counting_zoo.nn.clip import CLIPSource, build_clip, clip_config, tokenizer_of
from counting_zoo.nn.pretrained import PretrainedCLIP, clip_state, load_text, load_vision, read_pretrained
from counting_zoo.nn.text import TextTower, TokenizerLike
from counting_zoo.nn.weights import read_checkpoint
from counting_zoo.ops import points_to_density
from counting_zoo.training import current_name, public_name
from counting_zoo.types import Batch, CountOutput, Query


@torch.no_grad()
def start_from_clip(network: CLIPCountNet, pretrained: PretrainedCLIP, tokenizer: TokenizerLike | None = None) -> None:
    """Take both towers of a CLIP, and its projection where a ``conv`` stem makes that of the patches the same.

    Args:
        network: what begins to train.
        pretrained: whose architecture must be the same.
        tokenizer: taken where neither has one.

    Raises:
        WeightsError, InputError: as :func:`~counting_zoo.nn.pretrained.load_vision` and ``load_text`` do.
    """
    load_vision(network.vision, pretrained)
    load_text(network.text, pretrained, tokenizer)
    if network.vision.stem is not None:
        for layer in (network.patch_proj, network.contrast_proj):
            if layer is not None:
                layer.weight.copy_(pretrained.state["visual_projection.weight"])
                layer.bias.zero_()


def start_from_counter(network: CLIPCountNet, counter: CLIPCount, source: str) -> None:
    """Take all of another counter but its interaction and decoder: towers, prompts, context and projections.

    Args:
        network: what begins to train.
        counter: has trained.
        source: what it is called in messages.

    Raises:
        WeightsError: the architectures differ; says in what.
        InputError: its texts were read at another place.
    """
    other = counter.network
    tokenizer = other.text.tokenizer
    kept = {"clip": counter.hparams["clip"], "text_pool": other.text.pool}
    kept |= {} if tokenizer is None else {"tokenizer": tokenizer.to_json()}
    towers = PretrainedCLIP(source, clip_state(other.vision, other.text), kept)
    load_vision(network.vision, towers)
    load_text(network.text, towers)  # these two say best what differs in the towers; below comes what is no CLIP's
    for part in ("vision", "text", "patch_proj", "contrast_proj"):
        own, given = getattr(network, part), getattr(other, part)
        if own is None and given is None:
            continue
        cure = "Give both the same prompt_width, prompt_depth, n_context and contrast"
        if own is None or given is None:
            raise WeightsError(
                f"{part} of pretrained_encoder={source!r} does not fit the model's: only one of them has it. {cure}"
            )
        try:
            own.load_state_dict(given.state_dict())
        except RuntimeError as error:
            raise WeightsError(
                f"{part} of pretrained_encoder={source!r} does not fit the model's: {error}. {cure}"
            ) from error


_TOWERS = (
    "network.vision.model",
    "network.vision.stem",
    "network.vision.lateral",
    "network.vision.fuse",
    "network.text.model",
    "network.text.projection",
)


class CLIPCount(CountingModule):
    """Text-guided zero-shot counting (Jiang et al., "CLIP-Count", ACM MM 2023, arXiv 2305.07304).

    The defaults are the published model with the reference's faults mended; ``load_official`` chooses the reference's
    behaviour where it differs. ``configs/model/clip_count_small.yaml`` is a variant that trains from scratch.

    Args:
        clip: CLIP weights: hub name, folder, or a config mapping for random weights.
        pretrained_encoder: a file that ``RegionCLIPPretraining.export`` wrote, or ``small`` for the zoo's own small
            CLIP: both towers start from it in place of ``clip``'s weights, and so does the projection of patches where
            a ``conv`` stem makes them the same. Or the checkpoint (``.ckpt``) of a CLIPCount of the same shape, for
            towers and projections that have learned to count, under a head that begins anew.
        tower_lr: what the learning rate is multiplied by in CLIP's own weights (a ``conv`` stem's among them), where
            these train: below 1 they keep more of what they knew of names that training does not show, with 0 all.
        tokenizer: folder or hub name; where ``clip`` has one if ``None``. A random-weight CLIP makes its own from the
            class names of its training data.
        prompt_template: ``{}`` is replaced by the name asked about; the same in training, test and prediction.
        network: options of the network.
        contrast: ``patch`` is the paper's patch-text loss, ``region`` compares features at object centres with the
            texts of all training classes, ``none`` trains on density alone.
        contrast_epochs: epochs of contrast alone before density training begins. The reference's 20 are 21, because
            it compares with ``<=`` (run.py:167).
        contrast_weight: weight of the contrastive loss in its stage.
        contrast_weight_after: its weight once density training has begun; 0 in the paper.
        normalize_contrast: divide each prompt's contrastive loss by its number of positive patches.
        positives: which patches hold an object: ``points`` for those with an object's point, ``official`` for those
            the blurred target reaches, sampled to the nearest pixel.
        sigma: of the Gaussian on each point, in density cells.
        splat: a point falls into one cell (``nearest``) or is shared by four (``bilinear``), for coarse grids.
        unique_points: count several points in one pixel once, as the reference does.
        density_mask: see :func:`~counting_zoo.models.clip_count.loss.density_mse`.
        count_weight: weight of the absolute count error of an image.
    """

    config_class: ClassVar[type | None] = CLIPCountConfig
    trains_on: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points", "labels"}),)
    asks_for: ClassVar[frozenset[str]] = frozenset({"names"})
    text_guided: ClassVar[bool] = True

    def __init__(
        self,
        clip: CLIPSource = "openai/clip-vit-base-patch16",
        *,
        pretrained_encoder: str | None = None,
        tower_lr: float = 1.0,
        tokenizer: str | None = None,
        prompt_template: str = "{}",
        window: int = 384,
        network: CLIPCountConfig | None = None,
        contrast: Literal["patch", "region", "none"] = "patch",
        contrast_epochs: int = 20,
        contrast_weight: float = 1.0,
        contrast_weight_after: float = 0.0,
        normalize_contrast: bool = False,
        positives: Literal["points", "official"] = "points",
        sigma: float = 1.0,
        splat: Literal["nearest", "bilinear"] = "nearest",
        unique_points: bool = False,
        density_mask: DensityMask = "none",
        count_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(window=window, **kwargs)
        if "{}" not in prompt_template:
            raise InputError(f"prompt_template is {prompt_template!r}; expected a text with {{}} for the name")
        if not 0 <= tower_lr < math.inf:
            raise InputError(f"tower_lr is {tower_lr}; expected at least 0, such as 0.1, or 0 for towers that stay")
        self.tower_lr = tower_lr
        if contrast not in ("patch", "region", "none"):
            raise InputError(f"contrast is {contrast!r}; expected 'patch', 'region' or 'none'")
        towers = build_clip(clip)
        # The checkpoint rebuilds the shapes from this and takes the weights from its own state.
        self.hparams["clip"] = clip_config(towers)
        self.hparams["tokenizer"] = None  # the checkpoint brings it along
        config = self.network_config(network)
        self.network = CLIPCountNet(towers, config, window=window, contrast_proj=contrast != "none")
        if tokenizer is not None or (isinstance(clip, str) and pretrained_encoder is None):
            self.set_tokenizer(tokenizer or str(clip))
        if pretrained_encoder is not None:
            self._start_from(pretrained_encoder, clip)
        if tower_lr == 0:
            for name, p in self.named_parameters():
                p.requires_grad_(p.requires_grad and not name.startswith(_TOWERS))
        self.prompt_template = prompt_template
        self.contrast, self.contrast_epochs = contrast, contrast_epochs if contrast != "none" else 0
        self.contrast_weight, self.contrast_weight_after = contrast_weight, contrast_weight_after
        self.normalize_contrast, self.positives = normalize_contrast, positives
        self.sigma, self.splat, self.unique_points = sigma, splat, unique_points
        self.density_mask, self.count_weight = density_mask, count_weight

    def _start_from(self, pretrained_encoder: str, clip: CLIPSource) -> None:
        self.hparams["pretrained_encoder"] = None  # the checkpoint has the weights
        if not pretrained_encoder.endswith(".ckpt"):
            start_from_clip(self.network, read_pretrained(pretrained_encoder), tokenizer_of(clip))
            return
        checkpoint = read_checkpoint(pretrained_encoder)
        kind = current_name(str(checkpoint.get("counting_zoo", {}).get("class", "something else")))
        if kind != public_name(CLIPCount):
            raise WeightsError(
                f"pretrained_encoder={pretrained_encoder!r} is a checkpoint of {kind.rpartition('.')[2]}; expected one "
                "of CLIPCount, or a CLIP that 'counting-zoo export-encoder' wrote"
            )
        start_from_counter(self.network, CLIPCount.of_checkpoint(checkpoint), pretrained_encoder)

    def train(self, mode: bool = True) -> CLIPCount:
        super().train(mode)
        if self.tower_lr == 0:  # batch norms that stay as they are
            for module in self.network.vision.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    @property
    def cell(self) -> int:
        return self.network.cell

    @property
    def text_tower(self) -> TextTower:
        return self.network.text

    def forward(self, images: Tensor, queries: Sequence[Query]) -> CLIPCountOutput:
        return self.network(images, self._prompts(queries))

    def _prompts(self, queries: Sequence[Query]) -> list[list[str]]:
        if any(not name.strip() for query in queries for name in query.names):
            raise InputError(f"an empty prompt in {[q.names for q in queries[:3]]}; name what is to be counted")
        return [[prompt for name in query.names for prompt in self.prompts_of(name)] for query in queries]

    def prompts_of(self, name: str) -> list[str]:
        return [self.prompt_template.replace("{}", name)]

    # -- training -------------------------------------------------------------------------------------------------

    @property
    def contrasting(self) -> bool:
        """True while training is in its contrastive stage."""
        return self._trainer is not None and self.current_epoch < self.contrast_epochs

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        if not self.contrasting:
            return super().training_losses(batch)
        images = batch["image"]
        assert isinstance(images, Tensor), "training images come as one tensor"
        seen = self.network.embed(images, self._prompts(batch["queries"]))
        size = (images.shape[-2], images.shape[-1])
        return {"contrast": self.contrast_weight * self._contrast(seen.contrast, seen.text, batch, size)}

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        assert isinstance(output, CLIPCountOutput), f"losses of a {type(output).__name__}"
        images = batch["image"]
        size = (int(images[0].shape[-2]), int(images[0].shape[-1]))
        target = self._target(batch, size, output.density.shape[-2:])
        terms = {
            "density": density_mse(output.raw_density, target * self.network.config.density_scale, self.density_mask)
        }
        if self.count_weight:
            error = output.counts - target.sum((-2, -1))
            terms["count"] = self.count_weight * error.abs().mean()
        if self.contrast_weight_after and self.contrast != "none":
            features = output.contrast_embeds.transpose(1, 2).unflatten(2, output.grid)
            loss = self._contrast(features, output.text_embeds, batch, size)
            terms["contrast"] = self.contrast_weight_after * loss
        return terms

    def _target(self, batch: Batch, size: tuple[int, int], cells: torch.Size) -> Tensor:
        """Derive the target: ``(B, K, h, w)`` objects per cell."""
        stride = size[0] // cells[0]
        if (cells[0] * stride, cells[1] * stride) != size:
            raise InputError(
                f"training images of {size[0]} x {size[1]} pixels do not divide into {cells[0]} x {cells[1]} density "
                f"cells; give data.augmentation a crop that is a multiple of {2 * self.cell} pixels, such as the "
                f"model's window, {self.network.window}"
            )
        return points_to_density(
            batch["points"],
            size,
            labels=batch["labels"],
            num_classes=len(batch["queries"][0].names),
            stride=stride,
            sigma=self.sigma,
            splat=self.splat,
            unique=self.unique_points,
        )

    def _contrast(self, features: Tensor, text: Tensor, batch: Batch, size: tuple[int, int]) -> Tensor:
        """Compute the contrastive loss of ``(B, D, gh, gw)`` features and ``(B, K, D)`` texts."""
        if self.contrast == "region":
            return self._region_text(features, batch, size)
        k = len(batch["queries"][0].names)
        grid = (int(features.shape[-2]), int(features.shape[-1]))
        if self.positives == "official":
            inner = (grid[0] * self.network.vision.patch, grid[1] * self.network.vision.patch)
            target = self._target(batch, size, torch.Size(size))
            positive = positive_patches_of_density(target, inner, self.network.vision.patch)
        else:
            positive = positive_patches(batch["points"], size, grid, labels=batch["labels"], num_classes=k)
        return patch_text_contrastive(
            features.flatten(2).transpose(1, 2),
            text,
            positive.flatten(2).to(features.device),
            normalize_positives=self.normalize_contrast,
        )

    def _region_text(self, features: Tensor, batch: Batch, size: tuple[int, int]) -> Tensor:
        names = list(dict.fromkeys([*self.train_classes, *(n for query in batch["queries"] for n in query.names)]))
        text = self.network.text([prompt for name in names for prompt in self.prompts_of(name)])
        place = {name: i for i, name in enumerate(names)}
        targets = [
            torch.tensor([place[n] for n in query.names], device=features.device)[labels]
            for query, labels in zip(batch["queries"], batch["labels"], strict=True)
        ]
        # The same number on every rank, so that the mean of their gradients is that of one process.
        total = region_weights(targets, len(names)).sum().to(features.device)
        total = self.trainer.strategy.reduce(total, reduce_op="mean") if self._distributed() else total
        return region_text(features, batch["points"], targets, text, size, total=total)

    def idle_parameters(self) -> list[nn.Parameter]:
        network = self.network
        idle: list[nn.Module] = []
        if self.contrasting:
            idle = [network.interaction, network.decoder]
            if network.contrast_proj is not None:
                idle.append(network.patch_proj)
        elif network.contrast_proj is not None and not self.contrast_weight_after and not self._density_uses_contrast:
            idle = [network.contrast_proj]
        return [p for module in idle for p in module.parameters() if p.requires_grad]

    @property
    def _density_uses_contrast(self) -> bool:
        return isinstance(self.network.decoder, TextHead)

    def lr_factor(self, name: str) -> float:
        return self.tower_lr if name.startswith(_TOWERS) else 1.0

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build AdamW (reference: run.py)."""
        return torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05)

    def default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Drop the rate to a third every 100 epochs (reference: run.py)."""
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=100, gamma=0.33)
