"""From features on the block grid to counts: a choice among bins, a zero-inflated choice, or a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from counting_zoo.errors import InputError
from counting_zoo.nn.text import TextTower
from counting_zoo.types import CountOutput

HeadKind = Literal["bins", "zip", "regression"]


INITIAL_SCALE = 2.6592600369327779  # log(1 / 0.07), as CLIP's training began; its end is 4.6052


@dataclass
class EBCOutput(CountOutput):
    """Counts of blocks with the choice among bins behind them.

    Args:
        logits: ``(B, n_bins, h, w)``.
    """

    logits: Tensor


@dataclass
class ZIPOutput(EBCOutput):
    """Counts of blocks under a zero-inflated Poisson law; ``logits`` choose among the bins above zero.

    Args:
        zero_logits: ``(B, 2, h, w)`` of an empty and of an occupied block.
        rate: ``(B, 1, h, w)`` mean of the Poisson law of an occupied block.
    """

    zero_logits: Tensor
    rate: Tensor


class Representatives(nn.Module):
    """One count for each bin, with which the expected count of a block is taken.

    Args:
        n_bins: number of bins.
        values: their counts, or ``None`` where the training data will tell (:meth:`set`).
    """

    values: Tensor

    def __init__(self, n_bins: int, values: list[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("values", torch.full((n_bins,), torch.nan))
        self._known = False
        if values is not None:
            self.set(values)

    def set(self, values: list[float]) -> None:
        """Use these counts."""
        self.values.copy_(torch.tensor(values, dtype=torch.float64))

    @property
    def known(self) -> bool:
        """True once they are set."""
        if not self._known:
            self._known = bool(torch.isfinite(self.values).all())
        return self._known

    def forward(self, logits: Tensor) -> Tensor:
        """Compute ``(B, 1, h, w)`` expected counts of ``(B, n_bins, h, w)`` logits, in float32.

        Raises:
            InputError: the counts were never set.
        """
        self._check()
        chances = logits.float().softmax(1)
        return (chances * self.values[:, None, None]).sum(1, keepdim=True)

    def variance(self, logits: Tensor) -> Tensor:
        """Compute the ``(B, 1, h, w)`` variance of block counts; counts within a bin are taken for its representative.

        Raises:
            InputError: the counts were never set.
        """
        self._check()
        chances, values = logits.float().softmax(1), self.values[:, None, None]
        mean = (chances * values).sum(1, keepdim=True)
        return (chances * (values - mean).square()).sum(1, keepdim=True)

    def _check(self) -> None:
        if not torch.compiler.is_exporting() and not self.known:
            raise InputError(
                "the representatives of the bins are not set: they are the mean counts of the training data's blocks. "
                "Fit the model, load a checkpoint, or give model.representatives a list or 'middle'"
            )


class LinearHead(nn.Module):
    """A 1x1 convolution to the logits, behind a narrower one where the features are wide.

    Args:
        inside: channels of the features.
        n_out: number of logits.
    """

    def __init__(self, inside: int, n_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(inside, n_out, 1)]
        if inside > 512:
            layers = [nn.Conv2d(inside, 512, 1), nn.ReLU(inplace=True), nn.Conv2d(512, n_out, 1)]
        self.layers = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inside, h, w)`` to ``(B, n_out, h, w)``."""
        return self.layers(x)


class TextHead(nn.Module):
    """Logits by the cosine between projected features and the texts that describe the bins.

    Args:
        inside: channels of the features.
        dim: width of CLIP's joint space.
        prompts: one text for each logit.
        text: the text tower where it trains along; ``None`` uses the features in ``text_features``.
    """

    text_features: Tensor

    def __init__(self, inside: int, dim: int, prompts: list[str], text: TextTower | None = None) -> None:
        super().__init__()
        self.projection = nn.Conv2d(inside, dim, 1)
        nn.init.kaiming_normal_(self.projection.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_SCALE))
        # In a list: the model holds the tower itself, once for all its heads.
        self.prompts, self._tower = prompts, [] if text is None else [text]
        self.register_buffer("text_features", torch.full((len(prompts), dim), torch.nan))

    @torch.no_grad()
    def remember(self, text: TextTower) -> None:
        """Compute the texts' features once and keep them."""
        if text.tokenizer is not None:
            text.tokenizer(self.prompts)  # all at once, in the bins' order, in which a callable may expect them
        self.text_features.copy_(text.eval()(self.prompts))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inside, h, w)`` to ``(B, n_prompts, h, w)`` in float32."""
        texts = self._tower[0](self.prompts) if self._tower else self.text_features
        features = self.projection(x).float()
        # Under autocast einsum would be rounded to bfloat16, and cosines lie close together.
        with torch.autocast(features.device.type, enabled=False):
            cosine = torch.einsum("bdhw,nd->bnhw", normalize(features, dim=1), normalize(texts.float(), dim=1))
            return self.logit_scale.exp() * cosine


class BinHead(nn.Module):
    """Expected count over bins.

    Args:
        logits: :class:`LinearHead` or :class:`TextHead` with one logit for each bin.
        representatives: the bins' counts.
    """

    def __init__(self, logits: nn.Module, representatives: Representatives) -> None:
        super().__init__()
        self.logits, self.representatives = logits, representatives

    def forward(self, x: Tensor) -> EBCOutput:
        logits = self.logits(x)
        variance = None if self.training else self.representatives.variance(logits)
        return EBCOutput(density=self.representatives(logits), logits=logits, variance=variance)


class ZeroInflatedHead(nn.Module):
    """Expected count under a zero-inflated Poisson law (ZIP, the successor of CLIP-EBC; spec of EBC-ZIP/models).

    Args:
        zero: logits of an empty and of an occupied block.
        rate: logits of the bins above zero.
        representatives: counts of the bins above zero.
    """

    def __init__(self, zero: nn.Module, rate: nn.Module, representatives: Representatives) -> None:
        super().__init__()
        self.zero, self.rate, self.representatives = zero, rate, representatives

    def forward(self, x: Tensor) -> ZIPOutput:
        zero, logits = self.zero(x), self.rate(x)
        rate = self.representatives(logits)
        occupied = zero.float().softmax(1)[:, 1:]  # (B, 1, h, w)
        variance = None if self.training else occupied * rate * (1 + (1 - occupied) * rate)
        return ZIPOutput(density=occupied * rate, logits=logits, zero_logits=zero, rate=rate, variance=variance)


class RegressionHead(nn.Module):
    """The count itself: the baseline that bins are compared with.

    Args:
        inside: channels of the features.
        activation: ``relu`` is the reference's; with ``none`` a block below zero still learns.
        scale: what the network gives is divided by this, so that small counts are not small numbers.
    """

    def __init__(self, inside: int, activation: Literal["relu", "none"] = "relu", scale: float = 1.0) -> None:
        super().__init__()
        if activation not in ("relu", "none"):
            raise InputError(f"activation is {activation!r}; expected 'relu' or 'none'")
        self.out, self.activation, self.scale = nn.Conv2d(inside, 1, 1), activation, scale
        nn.init.kaiming_normal_(self.out.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> CountOutput:
        density = self.out(x).float() / self.scale
        return CountOutput(density.relu() if self.activation == "relu" else density)
