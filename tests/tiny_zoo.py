"""A model and a data module of somebody else's, as small as can be: tests allow this package on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.records import Record, Split
from counting_zoo.module import CountingModule
from counting_zoo.nn.regions import roi_align
from counting_zoo.ops import sum_blocks
from counting_zoo.tiling import as_float
from counting_zoo.types import Batch, CountOutput, Query


class TinyCounter(CountingModule):
    """Counts by brightness; what it counts for a name depends on the length of the name.

    Args:
        width: channels.
        scale: of the density.
        broken: makes every loss NaN.
        kwargs: of the base class.
    """

    trains_on: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"counts"}),)
    text_guided: ClassVar[bool] = True

    def __init__(self, width: int = 4, *, scale: float = 0.05, broken: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale, self.broken = scale, broken
        self.layers = nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.ReLU(), nn.Conv2d(width, 1, 1), nn.Softplus())

    def forward(self, image: Tensor, queries: Sequence[Query]) -> CountOutput:
        lengths = image.new_tensor([[len(name) for name in query.names] for query in queries])
        return CountOutput(self.layers(image) * self.scale * lengths[:, :, None, None])

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        loss = (output.counts - batch["counts"]).square().mean()
        return {"count": loss * float("nan") if self.broken else loss}

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=1e-3)


class BlockCounter(CountingModule):
    """Counts the red in blocks of 8 pixels exactly, in pictures of any size, as blockwise models do.

    Args:
        kwargs: of the base class.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    @property
    def cell(self) -> int:
        return 8

    def forward(self, image: Tensor, queries: Sequence[Query]) -> CountOutput:
        return CountOutput(sum_blocks(image[:, :1], 8).expand(-1, len(queries[0].names), -1, -1))

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError


class ExemplarCounter(CountingModule):
    """Counts blocks that have the colour of the example boxes, of each name that has any.

    Args:
        kwargs: of the base class.
    """

    trains_on: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"points", "exemplars"}),)
    asks_for: ClassVar[frozenset[str]] = frozenset({"exemplars"})

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sharpness, self.scale = (nn.Parameter(torch.tensor(value)) for value in (2.0, 0.1))

    @property
    def cell(self) -> int:
        return 8

    def encode_exemplars(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Mean colour of each box, ``(E, 3)``."""
        return roi_align(as_float(image)[None], [boxes], 1).flatten(1)

    def forward(self, images: Tensor, queries: Sequence[Query]) -> CountOutput:
        padded = nn.functional.pad(images, (0, -images.shape[-1] % 8, 0, -images.shape[-2] % 8))
        colours = nn.functional.avg_pool2d(padded, 8)  # (B, 3, h, w)
        maps = []
        for image, colour, query in zip(images, colours, queries, strict=True):
            features = query.exemplar_features
            if features is None:
                assert query.exemplars is not None, "check_query refuses a query without examples"
                features = self.encode_exemplars(image, query.exemplars)
            labels = query.exemplar_labels
            labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
            near = (-self.sharpness * (colour[None] - features[:, :, None, None]).square().sum(1)).exp()  # (E, h, w)
            of_name = torch.nn.functional.one_hot(labels, len(query.names)).float()  # (E, K)
            mean = torch.einsum("ek,ehw->khw", of_name, near) / of_name.sum(0).clamp(min=1)[:, None, None]
            maps.append(self.scale * mean)
        return CountOutput(torch.stack(maps))

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        return {"count": (output.counts - batch["counts"])[:, 0].abs().mean()}


class TinyImages(CountingDataModule):
    """White dots on black, 32 x 40 pixels.

    Args:
        n: pictures of each split.
        bad: how many pictures of the predict split cannot be read.
        num_workers, batch_size, eval_batch_size, kwargs: of the base class.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        n: int = 5,
        bad: int = 0,
        num_workers: int = 0,
        batch_size: int = 2,
        eval_batch_size: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root, num_workers=num_workers, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs
        )
        self.n, self.bad = n, bad

    def read_split(self, split: Split) -> list[Record]:
        names = ["dots", "=stars"]
        records = []
        for i in range(self.n):
            dots = np.random.default_rng([i, len(split)]).integers(1, 30, (i + 1, 2)).astype(np.float32)
            known = {"points": dots, "labels": np.zeros(len(dots), np.int64)} if split != "predict" else {}
            records.append(Record(f"{split}/{i:02d} ü.png", classes=names, size=(32, 40), **known))  # type: ignore[arg-type]
        return records

    def read_bytes(self, record: Record) -> bytes:
        if record.image_id in [f"predict/{i:02d} ü.png" for i in range(self.bad)]:
            return b"not a picture"
        image = np.zeros((32, 40, 3), np.uint8)
        for x, y in [] if record.points is None else record.points.astype(int):
            image[y, x] = 255
        return cv2.imencode(".png", image)[1].tobytes()
