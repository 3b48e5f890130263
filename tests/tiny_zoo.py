"""A model and a data module of somebody else's, as small as can be: tests allow this package on the command line."""

from __future__ import annotations

from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from counting_zoo.data.base import CountingDataModule
from counting_zoo.data.records import Record, Split
from counting_zoo.module import CountingModule
from counting_zoo.ops import sum_blocks
from counting_zoo.types import Batch, CountOutput


class TinyCounter(CountingModule):
    """Counts by brightness; what it counts for a name depends on the length of the name.

    Args:
        width: channels.
        scale: of the density.
        broken: makes every loss NaN.
        kwargs: of the base class.
    """

    requires: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"counts"}),)
    text_guided: ClassVar[bool] = True

    def __init__(self, width: int = 4, *, scale: float = 0.05, broken: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale, self.broken = scale, broken
        self.layers = nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.ReLU(), nn.Conv2d(width, 1, 1), nn.Softplus())

    def forward(self, image: Tensor, classes: list[list[str]]) -> CountOutput:
        lengths = image.new_tensor([[len(name) for name in names] for names in classes])
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

    def forward(self, image: Tensor, classes: list[list[str]]) -> CountOutput:
        return CountOutput(sum_blocks(image[:, :1], 8).expand(-1, len(classes[0]), -1, -1))

    def losses(self, output: CountOutput, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError


class TinyPictures(CountingDataModule):
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
