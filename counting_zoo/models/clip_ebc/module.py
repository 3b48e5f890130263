"""Blockwise counters with and without CLIP: their networks, texts of bins, and the recipe in their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from counting_zoo.errors import InputError
from counting_zoo.models.clip_ebc.bins import Bins
from counting_zoo.models.clip_ebc.blockwise import BlockwiseCounter
from counting_zoo.models.clip_ebc.decoder import Block, Decoder
from counting_zoo.models.clip_ebc.encoders import build_encoder
from counting_zoo.models.clip_ebc.heads import BinHead, LinearHead, RegressionHead, TextHead, ZeroInflatedHead
from counting_zoo.models.clip_ebc.network import BlockwiseNet
from counting_zoo.models.clip_ebc.prompts import Style, Wording, bin_prompts
from counting_zoo.nn.clip import CLIPSource, build_towers, tokenizer_of, towers_config
from counting_zoo.nn.clip_resnet import CLIPResNet, CLIPResNetModel
from counting_zoo.nn.normalization import Normalization
from counting_zoo.nn.pretrained import load_text, load_vision, read_pretrained
from counting_zoo.nn.prompted_vit import PromptedViT
from counting_zoo.nn.small_encoder import SmallEncoder
from counting_zoo.nn.text import TextTower
from counting_zoo.nn.tokenizer import TokenizerLike, word_tokenizer


class EBC(BlockwiseCounter):
    """Enhanced blockwise classification, its zero-inflated successor or blockwise regression, without CLIP.

    Args:
        encoder: ``small`` (from scratch on a CPU), ``vgg19_ae`` (DM-Count's), ``csrnet``, ``cannet`` or another name
            of :func:`~counting_zoo.models.clip_ebc.encoders.build_encoder`; ``auto:`` with a hub name or folder, or
            a config mapping with ``model_type``, for any transformers ``AutoBackbone``.
        pretrained: weights of the encoder: ``imagenet``, a file, or ``None`` for random ones.
        width: of the ``small`` encoder.
        activation: of ``head: regression``.
        density_scale: with ``head: regression``, the network gives so many times the count of a block.
        normalization: whose mean and deviation pictures are normalised with.
        options: those of :class:`~counting_zoo.models.clip_ebc.blockwise.BlockwiseCounter`.
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
        normalization: whose mean and deviation pictures are normalised with.
        options: those of :class:`~counting_zoo.models.clip_ebc.blockwise.BlockwiseCounter`; ``head: regression`` is
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
                towers, n_prompts=visual_prompts, deep=deep_prompts, dropout=prompt_dropout, init=prompt_init,
                train=bool(train_vision),
            )  # fmt: skip
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
            texts = [prompt for head in heads for prompt in head.prompts]
            tokenizer = word_tokenizer(texts, text.model.embeddings.token_embedding.num_embeddings)
        text.set_tokenizer(tokenizer)
        for head in heads:
            head.remember(text)

    def recipe(self) -> dict[str, Any]:
        tokenizer = None if self.text is None else self.text.tokenizer
        return {"tokenizer": None if tokenizer is None else tokenizer.to_json()}

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        if self.text is not None and recipe["tokenizer"] is not None:
            self.text.set_tokenizer(recipe["tokenizer"])


_NO_TEXT = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 0, "num_attention_heads": 1, "vocab_size": 8,
    "max_position_embeddings": 8,
}  # fmt: skip
"""Stands in for the text tower of a model that keeps its texts' features alone."""


def _published_decoder(encoder: Any) -> list[int]:
    """Channels of the reference's decoder (models/utils.py): a ResNet-101's has two blocks, an RN50x4's is narrower."""
    if isinstance(encoder, CLIPResNet):
        published = {2560: [1280], 3072: [1536], 4096: [2048]}
        deep = len(encoder.layer3) > 6 and encoder.dim == 2048
        return [2048, 1024] if deep else published.get(encoder.dim, [encoder.dim])
    return [encoder.dim]


__all__ = ["CLIPEBC", "EBC"]
