"""The contracts every data module, model, metric and report of the zoo share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NotRequired, Self, TypedDict

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth value
class Query:
    """The question put to a model about one image.

    Args:
        names: K class names; a model that counts without names ignores all but their number.
        exemplars: ``(E, 4)`` float32 x1, y1, x2, y2 of example boxes, in pixels of the image that ``forward`` gets.
        exemplar_labels: ``(E,)`` int64 index into ``names``; all 0 where ``None``.
        exemplar_features: ``(E, D)`` examples that are encoded already, from this image or another one.
        negatives: what must not be counted, for models that compare names.

    Example:
        >>> Query(("figs", "dates")).select([1]).names
        ('dates',)
    """

    names: tuple[str, ...]
    exemplars: Tensor | None = None
    exemplar_labels: Tensor | None = None
    exemplar_features: Tensor | None = None
    negatives: tuple[str, ...] = ()

    def to(self, device: Any, **options: Any) -> Query:
        """Move the tensors to a device; Lightning moves batches through this."""
        moved: dict[str, Any] = {
            f.name: value.to(device, **options)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved) if moved else self

    def select(self, columns: Sequence[int]) -> Query:
        """Keep some of the names, in the order given, and their examples."""
        query = replace(self, names=tuple(self.names[k] for k in columns))
        examples = self.exemplar_features if self.exemplars is None else self.exemplars
        if examples is None:
            return query
        labels = self.exemplar_labels
        if labels is None:
            labels = torch.zeros(len(examples), dtype=torch.int64, device=examples.device)
        column = labels.new_full((len(self.names),), -1)
        column[list(columns)] = torch.arange(len(columns), device=labels.device)
        new = column[labels]
        return replace(
            query,
            exemplars=None if self.exemplars is None else self.exemplars[new >= 0],
            exemplar_labels=new[new >= 0],
            exemplar_features=None if self.exemplar_features is None else self.exemplar_features[new >= 0],
        )


class Batch(TypedDict):
    """Images and annotation that a data module hands to a model; B images, K names in the query of each."""

    # training: (B, 3, H, W) float32 RGB in [0, 1], or B x (3, H_i, W_i) for a model that pads; evaluation: uint8 list
    image: Tensor | list[Tensor]
    queries: list[Query]  # B; names that are absent from the image are allowed
    image_id: list[str]  # B, unique in the data set
    counts: NotRequired[Tensor]  # (B, K) float32; absent in predict
    points: NotRequired[list[Tensor]]  # B x (N_i, 2) float32 x, y in pixels of `image`, closed [0, W] x [0, H]
    labels: NotRequired[list[Tensor]]  # B x (N_i,) int64 index into queries[i].names
    boxes: NotRequired[list[Tensor]]  # B x (M_i, 4) float32 x1, y1, x2, y2 of all objects
    box_labels: NotRequired[list[Tensor]]  # B x (M_i,) int64 index into queries[i].names
    captions: NotRequired[list[list[str]]]  # B x any number of sentences
    present: NotRequired[list[list[str]]]  # B x every name known to be in the image, asked about or not
    original_size: NotRequired[list[tuple[int, int]]]  # B x (H, W) of the stored image, before any resizing
    failed: NotRequired[list[tuple[str, str]]]  # predict only: (image_id, reason) of images that could not be read


@dataclass
class CountOutput:
    """The one output of every network, in training and in evaluation.

    Args:
        density: ``(B, K, h, w)`` objects per cell, at any resolution.
        variance: ``(B, K, h, w)`` variance of the count of each cell, of models that predict a distribution.

    Example:
        >>> import torch
        >>> CountOutput(torch.full((1, 1, 2, 2), 0.5)).counts
        tensor([[2.]])
    """

    density: Tensor
    variance: Tensor | None = field(default=None, kw_only=True)

    @property
    def counts(self) -> Tensor:
        """``(B, K)`` float32 counts: the sum of the density, taken in float32 whatever the precision."""
        return self.density.float().sum((-2, -1))

    @property
    def deviation(self) -> Tensor | None:
        """``(B, K)`` standard deviation of the counts, cells taken for independent; ``None`` without a variance."""
        return None if self.variance is None else self.variance.float().sum((-2, -1)).sqrt()

    def split(self) -> list[Self]:
        """Split into outputs of batch 1, with everything a subclass adds (batch first, or ``None``)."""
        kind: Any = type(self)
        return [
            kind(**{name: None if value is None else value[i : i + 1] for name, value in vars(self).items()})
            for i in range(len(self.density))
        ]
