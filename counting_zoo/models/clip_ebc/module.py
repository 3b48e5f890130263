"""Blockwise counters with and without CLIP: their networks, texts of bins, and the recipe in their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.bins import (
    Bins,
    Granularity,
    Style,
    Wording,
    bin_prompts,
    block_count_histogram,
    mean_representatives,
)
from counting_zoo.models.clip_ebc.heads import (
    BinHead,
    EBCOutput,
    HeadKind,
    LinearHead,
    RegressionHead,
    Representatives,
    TextHead,
    ZeroInflatedHead,
    ZIPOutput,
)
from counting_zoo.models.clip_ebc.loss import (
    block_mae,
    block_mse,
    classification_loss,
    count_error,
    dm_loss,
    multiscale_mae,
    positive_bins_loss,
    zip_nll,
)
from counting_zoo.models.clip_ebc.network import Block, BlockwiseNet, Decoder, build_encoder
from counting_zoo.module import CountingModule
from counting_zoo.nn.backbones import SmallEncoder
from counting_zoo.nn.clip import CLIPSource, build_towers, tokenizer_of, towers_config
from counting_zoo.nn.clip_resnet import CLIPResNet, CLIPResNetModel
from counting_zoo.nn.pretrained import load_text, load_vision, read_pretrained
from counting_zoo.nn.text import TextTower, TokenizerLike
from counting_zoo.nn.vision import Normalization, PromptedViT
from counting_zoo.ops import points_to_counts, points_to_density
from counting_zoo.schedules import WarmupCosineRestarts
from counting_zoo.types import Batch, CountOutput, Query

CountLoss = Literal["dm", "mae", "mse", "multiscale", "none"]


# Of squares of so many blocks a side, and how much an object too many or too few in one of them costs.
SCALES, SCALE_COSTS = (1, 2, 4, 8), (0.25, 0.5, 1.0, 1.0)


ZIP_WEIGHTS = {"classification": 1.0, "nll": 1.0, "multiscale": 1.0}


class BlockwiseCounter(CountingModule):
    """Base of ``CLIPEBC`` and ``EBC``: everything but the network.

    Args:
        reduction: side of a block in pixels.
        head: ``bins`` is enhanced blockwise classification, ``zip`` the zero-inflated Poisson law of its successor,
            ``regression`` the baseline without bins.
        bins: their lowest and highest counts, ``[[0, 0], [1, 1], [2, inf]]``; overrides the next three.
        granularity: one count in each bin (``fine``), in pairs from half the maximum on (``dynamic``), or in pairs
            throughout (``coarse``).
        max_count: the count from which on all are in the last bin; ``None`` derives it from ``head_size``.
        head_size: side of the smallest recognisable object in pixels: the maximum is ``(reduction // head_size) ** 2``,
            and 1 for blocks that are smaller.
        representatives: the count that stands for each bin: ``mean`` of the training data, ``middle``, or a list.
        windows: blocks that the mean is taken over: at every pixel (``sliding``, the reference) or ``aligned``.
        count_loss: beside the classification: ``dm`` (DM-Count's transport, total variation and count), ``mae`` or
            ``mse`` of blocks, ``multiscale`` for absolute errors of 1, 2, 4 and 8 blocks a side, or ``none``.
        count_weight: its weight (lambda of the paper).
        total_weight: weight of the absolute error of an image's count, on top.
        ot_reduction: ``mean`` of the transport term over the batch; the reference takes the ``sum``, so that its
            weight grows with the batch.
        log_domain: solve the transport with logarithms, where the reference's float32 underflows.
        unique_points: several points on one pixel count once, as in the reference.
        sigma: of a Gaussian over the target, in blocks; with ``regression`` only.
        zip_weights: weights of ``classification``, ``nll`` and ``multiscale`` with ``head: zip``; its count error
            always has weight 1.
        options: those of :class:`~counting_zoo.module.CountingModule`.

    Raises:
        InputError: bins with gaps or overlaps, representatives outside their bins, or options that do not fit.
    """

    trains_on: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points"}),)
    class_blind: ClassVar[bool] = True
    network: BlockwiseNet

    def __init__(
        self,
        *,
        reduction: int = 8,
        head: HeadKind = "bins",
        bins: list[Any] | None = None,
        granularity: Granularity = "fine",
        max_count: int | None = None,
        head_size: int = 4,
        representatives: Literal["mean", "middle"] | list[float] = "mean",
        windows: Literal["sliding", "aligned"] = "sliding",
        count_loss: CountLoss = "dm",
        count_weight: float = 1.0,
        total_weight: float = 0.0,
        ot_reduction: Literal["mean", "sum"] = "mean",
        log_domain: bool = False,
        unique_points: bool = False,
        sigma: float = 0.0,
        zip_weights: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if head not in ("bins", "zip", "regression"):
            raise InputError(f"head is {head!r}; expected 'bins', 'zip' or 'regression'")
        if reduction < 1:
            raise InputError(f"reduction is {reduction}; expected the side of a block in pixels, such as 8")
        if count_loss not in get_args(CountLoss):
            raise InputError(f"count_loss is {count_loss!r}; expected one of {', '.join(get_args(CountLoss))}")
        if sigma and head != "regression":
            raise InputError(
                f"sigma is {sigma} with head {head!r}; blurred counts fall in no bin, so only "
                "head='regression' takes one"
            )
        for name, side in (("window", self.window), ("stride", self.stride)):
            if side is not None and side % reduction:
                raise InputError(f"{name} is {side}, which is no multiple of the block (reduction={reduction} pixels)")
        if set(zip_weights or {}) - set(ZIP_WEIGHTS):
            raise InputError(f"zip_weights is {zip_weights}; expected weights of {sorted(ZIP_WEIGHTS)}")
        if bins is not None:
            self.bins = Bins.of(bins)
        elif max_count is not None:
            self.bins = Bins.make(granularity, max_count)
        else:
            self.bins = Bins.for_block(reduction, min(head_size, reduction), granularity)
        self.hparams["bins"] = self.bins.to_list()
        self.reduction, self.head, self.windows = reduction, head, windows
        self.known_values: list[float] | None = None
        if representatives == "middle":
            self.known_values = self.bins.middle()
        elif not isinstance(representatives, str):
            self.known_values = self.bins.check([float(v) for v in representatives])
        elif representatives != "mean":
            raise InputError(f"representatives is {representatives!r}; expected 'mean', 'middle' or a list of counts")
        self.count_loss, self.count_weight, self.total_weight = count_loss, count_weight, total_weight
        self.ot_reduction, self.log_domain = ot_reduction, log_domain
        self.unique_points, self.sigma = unique_points, sigma
        self.zip_weights = ZIP_WEIGHTS | (zip_weights or {})
        self.predicts_distribution = head != "regression"

    @property
    def cell(self) -> int:
        return self.reduction

    def _representatives(self) -> Representatives:
        """Return the representatives of all bins, or of those above zero."""
        first = 1 if self.head == "zip" else 0
        if first and self.bins.edges[0] != (0, 0):
            raise InputError(
                f"head 'zip' keeps empty blocks apart, but the first bin is {self.bins.edges[0]}; expected [0, 0]"
            )
        values = None if self.known_values is None else self.known_values[first:]
        return Representatives(len(self.bins) - first, values)

    def forward(self, images: Tensor, queries: Sequence[Query]) -> CountOutput:
        return self.network(images)

    def read_facts(self, datamodule: Any) -> None:
        known = getattr(self.network.head, "representatives", None)
        if known is None or known.known:
            return
        sizes = datamodule.train_sizes()
        points = datamodule.train_points()
        seen = [self.preprocess.target_size(*size) for size in sizes]
        moved = [p * [new[1] / old[1], new[0] / old[0]] for p, old, new in zip(points, sizes, seen, strict=True)]
        histogram = block_count_histogram(moved, seen, self.reduction, windows=self.windows, unique=self.unique_points)
        values = mean_representatives(self.bins, histogram)
        known.set(values[1:] if self.head == "zip" else values)

    # -- losses ---------------------------------------------------------------------------------------------------

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        images, points = batch["image"], batch["points"]
        size = (int(images[0].shape[-2]), int(images[0].shape[-1]))
        if size[0] % self.reduction or size[1] % self.reduction:
            raise InputError(
                f"training images of {size[0]} x {size[1]} pixels do not divide into blocks of {self.reduction}; "
                f"give data.augmentation a crop that is a multiple of {self.reduction}"
            )
        counts = points_to_counts(points, size, self.reduction, unique=self.unique_points)  # (B, 1, h, w)
        if isinstance(output, ZIPOutput):
            terms = self._zip_losses(output, counts)
        elif isinstance(output, EBCOutput):
            classes = self.bins.classes_of(counts[:, 0], validate=self.bins.closed)
            terms = {"classification": classification_loss(output.logits.float(), classes)}
            terms |= self._count_losses(output.density, counts, points)
        else:
            if self.sigma:
                counts = points_to_density(points, size, stride=self.reduction, sigma=self.sigma, splat="bilinear")
            terms = self._count_losses(output.density, counts, points)
        if self.total_weight:
            terms["total"] = self.total_weight * count_error(output.density, counts)
        if not terms:
            raise InputError("head 'regression' with count_loss 'none' and total_weight 0 leaves nothing to train on")
        return terms

    def _count_losses(self, density: Tensor, counts: Tensor, points: list[Tensor]) -> dict[str, Tensor]:
        if self.count_loss == "none":
            return {}
        if self.count_loss == "dm":
            terms = dm_loss(
                density, counts, points, self.reduction, ot_reduction=self.ot_reduction, log_domain=self.log_domain
            )
            return {name: self.count_weight * term for name, term in terms.items()}
        if self.count_loss == "multiscale":
            weights = [cost * scale**2 for scale, cost in zip(SCALES, SCALE_COSTS, strict=True)]
            return {"multiscale": self.count_weight * multiscale_mae(density, counts, scales=SCALES, weights=weights)}
        loss = block_mae if self.count_loss == "mae" else block_mse
        return {self.count_loss: self.count_weight * loss(density, counts)}

    def _zip_losses(self, output: ZIPOutput, counts: Tensor) -> dict[str, Tensor]:
        weights = self.zip_weights
        classes = self.bins.classes_of(counts[:, 0], validate=self.bins.closed)
        return {
            "classification": weights["classification"] * positive_bins_loss(output.logits.float(), classes),
            "nll": weights["nll"] * zip_nll(output.zero_logits.float(), output.rate, counts),
            "multiscale": weights["multiscale"] * multiscale_mae(output.density, counts),
            "count": count_error(output.density, counts),
        }

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Build Adam (reference: trainer.py)."""
        return torch.optim.Adam(groups, lr=1e-4, weight_decay=1e-4)

    def default_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Build cosine restarts behind a warm-up of 50 epochs (reference: trainer.py)."""
        return WarmupCosineRestarts(optimizer)


class EBC(BlockwiseCounter):
    """Enhanced blockwise classification, its zero-inflated successor or blockwise regression, without CLIP.

    Args:
        encoder: ``small`` (from scratch on a CPU), ``vgg19_ae`` (DM-Count's), ``csrnet``, ``cannet`` or another name
            of :func:`~counting_zoo.models.clip_ebc.network.build_encoder`; ``auto:`` with a hub name or folder, or
            a config mapping with ``model_type``, for any transformers ``AutoBackbone``.
        pretrained: weights of the encoder: ``imagenet``, a file, or ``None`` for random ones.
        width: of the ``small`` encoder.
        activation: of ``head: regression``.
        density_scale: with ``head: regression``, the network gives so many times the count of a block.
        normalization: whose mean and deviation images are normalised with.
        options: those of :class:`~counting_zoo.models.clip_ebc.module.BlockwiseCounter`.
    """

    def __init__(
        self,
        encoder: str | dict[str, Any] = "vgg19_ae",
        *,
        pretrained: str | None = None,
        width: int = 32,
        activation: Literal["relu", "none"] = "relu",
        density_scale: float = 1.0,
        normalization: Normalization = "imagenet",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        body: Any
        if encoder == "small":
            body = SmallEncoder(self.reduction, width)
        else:
            body = build_encoder(encoder, self.reduction, pretrained)
        self.hparams["pretrained"] = None  # the checkpoint brings the weights along
        if (config := getattr(body, "config_dict", None)) is not None:
            self.hparams["encoder"] = config
        decoder = Decoder(body.dim, [], "basic")
        if self.head == "regression":
            head: Any = RegressionHead(decoder.dim, activation, density_scale)
        elif self.head == "zip":
            zero, rate = LinearHead(decoder.dim, 2), LinearHead(decoder.dim, len(self.bins) - 1)
            head = ZeroInflatedHead(zero, rate, self._representatives())
        else:
            head = BinHead(LinearHead(decoder.dim, len(self.bins)), self._representatives())
        self.network = BlockwiseNet(body, decoder, head, reduction=self.reduction, normalization=normalization)


class CLIPEBC(BlockwiseCounter):
    """CLIP-EBC: blocks are classified by how well CLIP's image features fit texts such as "There are two people."

    Ma, Sanchez, Guha: "CLIP-EBC: CLIP Can Count Accurately through Enhanced Blockwise Classification",
    arXiv 2403.09281. The defaults mend what the reference gets wrong; ``load_official`` chooses its behaviour.

    Args:
        clip: a CLIP ViT (hub name, folder), a CLIP ResNet (``resnet50`` ..., an OpenAI or open_clip file or folder),
            or a config mapping for random weights.
        pretrained_encoder: a file that ``RegionCLIPPretraining.export`` wrote: both towers start from it in place of
            ``clip``'s weights.
        tokenizer: folder or hub name; where ``clip`` has one if ``None``. A random-weight CLIP makes its own.
        prompt_style: numbers in the texts as a ``word`` or a ``number``.
        prompt_wording: ``corrected`` says "four or more" of a bin that four is in; the reference says "more than
            four" (``official``).
        nouns: singular and plural of what is counted.
        train_text: train the text tower along; otherwise its features are computed once, and it is not kept.
        train_vision: ``None`` trains a ResNet and freezes a ViT, as the reference does.
        visual_prompts: learnable tokens of a ViT.
        deep_prompts: own tokens for each layer, or those of the first carried on.
        prompt_dropout: of the visual prompts.
        prompt_init: range they are drawn from; ``official`` takes 3 * patch for 3 * patch ** 2.
        decoder: channels of the decoder's blocks; the reference's for that encoder if ``None``.
        decoder_block: ``basic``, ``bottleneck``, or by the encoder if ``None``.
        normalization: whose mean and deviation images are normalised with.
        options: those of :class:`~counting_zoo.models.clip_ebc.module.BlockwiseCounter`; ``head: regression`` is
            :class:`EBC`'s alone.
    """

    def __init__(
        self,
        clip: CLIPSource = "openai/clip-vit-base-patch16",
        *,
        pretrained_encoder: str | None = None,
        tokenizer: str | None = None,
        prompt_style: Style = "word",
        prompt_wording: Wording = "corrected",
        nouns: tuple[str, str] = ("person", "people"),
        train_text: bool = False,
        train_vision: bool | None = None,
        visual_prompts: int = 32,
        deep_prompts: bool = True,
        prompt_dropout: float = 0.0,
        prompt_init: Literal["xavier", "official"] = "xavier",
        decoder: list[int] | None = None,
        decoder_block: Block | None = None,
        normalization: Normalization = "clip",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if self.head == "regression":
            raise InputError("head is 'regression', which compares no texts: use EBC for blockwise regression")
        self._texts = partial(
            bin_prompts, style=prompt_style, wording=prompt_wording, singular=nouns[0], plural=nouns[1]
        )
        without_text = isinstance(clip, Mapping) and "text_config" not in clip
        towers = build_towers({**clip, "text_config": _NO_TEXT} if without_text else clip)  # type: ignore[dict-item]
        tower = TextTower(towers, n_context=0, pool="eot", train=train_text)
        self.text = tower if train_text else None
        self.hparams["clip"] = towers_config(towers)
        self.hparams["tokenizer"] = None  # the checkpoint brings what it needs of it along
        if not train_text:
            del self.hparams["clip"]["text_config"]
        body: Any
        if isinstance(towers, CLIPResNetModel):
            body = towers.image_encoder(self.reduction, train=train_vision is not False)
        else:
            body = PromptedViT(
                towers,
                n_prompts=visual_prompts,
                deep=deep_prompts,
                dropout=prompt_dropout,
                init=prompt_init,
                train=bool(train_vision),
            )
        if pretrained_encoder is not None:
            pretrained = read_pretrained(pretrained_encoder)
            load_vision(body, pretrained)
            if tokenizer is not None:
                tower.set_tokenizer(tokenizer)
            load_text(tower, pretrained, tokenizer_of(clip))
            self.hparams["pretrained_encoder"] = None  # the checkpoint has the weights
        neck = Decoder(
            body.dim,
            _published_decoder(body) if decoder is None else decoder,
            decoder_block or ("bottleneck" if isinstance(body, CLIPResNet) else "basic"),
        )
        self.network = BlockwiseNet(
            body, neck, self._text_head(neck.dim, tower.dim), reduction=self.reduction, normalization=normalization
        )
        if isinstance(clip, str | Mapping) and not without_text:
            known = None if tower.tokenizer is None else tower.tokenizer.to_json()
            self.describe_bins(tower, tokenizer or known or tokenizer_of(clip))

    @property
    def text_tower(self) -> TextTower | None:
        return self.text

    def _text_head(self, inside: int, dim: int) -> BinHead | ZeroInflatedHead:
        if self.head == "bins":
            return BinHead(TextHead(inside, dim, self._texts(self.bins), self.text), self._representatives())
        zero = TextHead(inside, dim, self._texts(Bins.of([[0, 0], [1, None]])), self.text)
        rate = TextHead(inside, dim, self._texts(self.bins)[1:], self.text)
        return ZeroInflatedHead(zero, rate, self._representatives())

    def describe_bins(self, text: TextTower, tokenizer: TokenizerLike | None = None) -> None:
        """Compute the features of the bins' texts with a text tower, once.

        Args:
            text: CLIP's.
            tokenizer: as in ``load_official``; ``None`` makes one of the words in the texts.
        """
        heads = [module for module in self.network.head.modules() if isinstance(module, TextHead)]
        if tokenizer is None:
            text.set_tokenizer(text.tokenizer_of([prompt for head in heads for prompt in head.prompts]))
            text.tokenizer_is_made = True
        else:
            text.set_tokenizer(tokenizer)
        for head in heads:
            head.remember(text)


_NO_TEXT = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 0,
    "num_attention_heads": 1,
    "vocab_size": 8,
    "max_position_embeddings": 8,
}
"""Stands in for the text tower of a model that keeps its texts' features alone."""


def _published_decoder(encoder: Any) -> list[int]:
    """Return the channels of the reference's decoder (models/utils.py), which differ by encoder."""
    if isinstance(encoder, CLIPResNet):
        published = {2560: [1280], 3072: [1536], 4096: [2048]}
        deep = len(encoder.layer3) > 6 and encoder.dim == 2048
        return [2048, 1024] if deep else published.get(encoder.dim, [encoder.dim])
    return [encoder.dim]
