"""Where CLIP-Count's weights come from: a pretrained CLIP, or another counter whose head is left behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from counting_zoo.errors import WeightsError
from counting_zoo.models.clip_count.network import CLIPCountNet
from counting_zoo.nn.pretrained import PretrainedCLIP, clip_state, load_text, load_vision
from counting_zoo.nn.tokenizer import TokenizerLike


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


def start_from_counter(network: CLIPCountNet, other: CLIPCountNet, settings: Mapping[str, Any], source: str) -> None:
    """Take all of another counter but its interaction and decoder: towers, prompts, context and projections.

    Args:
        network: what begins to train.
        other: what has trained.
        settings: the hyper-parameters of ``other``.
        source: what it is called in messages.

    Raises:
        WeightsError: the architectures differ; says in what.
        InputError: its texts were read at another place.
    """
    tokenizer = other.text.tokenizer
    kept = {"clip": settings["clip"], "text_pool": other.text.pool}
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


__all__ = ["start_from_clip", "start_from_counter"]
