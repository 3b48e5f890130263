"""Counting with a model: whole pictures, in tiles where the recipe says so, and pictures as people have them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from counting_zoo.errors import InputError
from counting_zoo.geometry import Preprocess
from counting_zoo.inference import count_tiled
from counting_zoo.peaks import peak_points
from counting_zoo.pictures import as_picture
from counting_zoo.types import Batch, CountOutput, Prediction, SpreadOutput

if TYPE_CHECKING:
    from counting_zoo.evaluation.intervals import IntervalCalibration


class Counter(nn.Module, ABC):
    """How every model of the zoo counts; :class:`~counting_zoo.module.CountingModule` adds how it is trained.

    The attributes are the part of a model's recipe that counting depends on; that class describes them.
    """

    preprocess: Preprocess
    window: int | None
    stride: int | None
    window_batch_size: int
    blend: Literal["average", "official"]
    pad: Literal["minimal", "official"]
    default_classes: list[str] | None
    #: Whether the model counts without names: K is 1 and it is scored on the sum over all names.
    class_blind: ClassVar[bool] = False
    #: How far off its counts are, where that was measured (:func:`counting_zoo.calibrate`); kept in checkpoints.
    interval_calibration: IntervalCalibration | None = None
    device: Any  # LightningModule's

    @abstractmethod
    def forward(self, image: Tensor, classes: list[list[str]]) -> CountOutput:
        """Count ``classes`` in ``(B, 3, H, W)`` pictures in [0, 1]; normalises inside."""

    @property
    def cell(self) -> int:
        """Pixels along one side of a density cell, which tiles must be multiples of."""
        return 1

    @property
    def vocabulary(self) -> list[str] | None:
        """The only names it can count; ``None`` where there is no such list."""
        return None

    def reported(self, counts: Tensor) -> Tensor:
        """What is said of a count: itself, or rounded or clamped where the recipe says so."""
        return counts

    @property
    def has_law(self) -> bool:
        """Whether it gives chances of counts, and not a number alone."""
        return False

    def check_law(self) -> None:
        """Refuse a model that gives a number alone where its chances of counts are needed.

        Raises:
            InputError: says which models give more.
        """
        if not self.has_law:
            raise InputError(
                f"{type(self).__name__} gives a count and no chances of counts, so intervals of width 'bins' cannot be "
                "made from it; take the width 'residual', or a CLIPEBC or EBC whose head is 'bins' or 'zip'"
            )

    def count_variance(self, output: CountOutput) -> Tensor:
        """``(B, K, h, w)`` variance of the count of each cell, of models that have a law of counts.

        Raises:
            InputError: the model gives a number alone.
        """
        self.check_law()
        assert isinstance(output, SpreadOutput), f"a {type(output).__name__}, whose variance the model should know"
        return output.variance

    def count_spread(self, output: CountOutput) -> Tensor:
        """``(B, K)`` standard deviation of the counts that the model itself expects; cells are taken for independent.

        Raises:
            InputError: the model gives a number alone.
        """
        return self.count_variance(output).float().sum((-2, -1)).sqrt()

    def interval(self, output: CountOutput) -> Tensor | None:
        """``(B, K, 2)`` float64 lower and upper bounds of the true counts, on the CPU; ``None`` if not calibrated."""
        calibration = self.interval_calibration
        if calibration is None:
            return None
        spread = self.count_spread(output).detach().cpu().numpy() if calibration.width == "bins" else None
        counts = self.reported(output.counts).detach().cpu().numpy()
        return torch.from_numpy(calibration.bounds(counts, spread))

    def extent(self, density: Tensor, size: tuple[int, int]) -> tuple[float, float] | None:
        """Height and width of a picture in the cells of its density, whose last ones may reach beyond it.

        Args:
            density: ``(..., h, w)``.
            size: (H, W) of the picture as the model saw it.

        Returns:
            ``(H / cell, W / cell)`` for a density of ``ceil(H / cell) x ceil(W / cell)`` cells, and ``None`` for
            every other one: it covers exactly the picture.
        """
        (height, width), cell = size, self.cell
        if cell == 1 or tuple(density.shape[-2:]) != (-(-height // cell), -(-width // cell)):
            return None
        return height / cell, width / cell

    def count_batch(
        self,
        images: Tensor | Sequence[Tensor],
        classes: list[list[str]],
        window: int | None = None,
        stride: int | None = None,
        *,
        image_ids: Sequence[str] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> CountOutput | list[CountOutput]:
        """Count whole pictures, in tiles where the recipe or the arguments say so.

        Args:
            images: ``(B, 3, H, W)``, or B pictures ``(3, H_i, W_i)`` of any size, uint8 or float in [0, 1].
            classes: B x K names.
            window: overrides the recipe's window; 0 for none.
            stride: overrides the recipe's stride.
            image_ids: what the pictures are called, for models that know something of each beforehand.
            sizes: (H, W) of the pictures as they are stored, where they were resized; for the same.

        Returns:
            One output for a tensor; for a list one output (of batch 1) for each picture.
        """
        if self.class_blind:
            classes = [[" + ".join(names)] for names in classes]
        pictures = [image.to(self.device) for image in images]
        side = (self.window or 0) if window is None else window
        step = (self.stride if window is None else None) if stride is None else stride
        if stride is not None and not side:
            raise InputError(f"stride={stride} without a window; give a window too, or no stride to count in one piece")
        if side:
            spreads = self.interval_calibration is not None and self.interval_calibration.width == "bins"
            found = count_tiled(
                self._with_variance if spreads else lambda tiles, names: self(tiles, names).density,
                pictures,
                classes=[names * 2 for names in classes] if spreads else classes,
                window=side,
                stride=step or side,
                cell=self.cell,
                window_batch_size=self.window_batch_size,
                blend=self.blend,
                pad=self.pad,
            )
            outputs = [
                SpreadOutput(*map_[None].chunk(2, dim=1)) if spreads else CountOutput(map_[None]) for map_ in found
            ]
        elif len({p.shape for p in pictures}) == len({len(names) for names in classes}) == 1:
            together = self(torch.stack([_as_float(p) for p in pictures]), classes)
            if isinstance(images, Tensor):
                return together
            outputs = together.split()
        else:
            outputs = [self(_as_float(p)[None], [names]) for p, names in zip(pictures, classes, strict=True)]
        if isinstance(images, Tensor):
            density = torch.cat([o.density for o in outputs])
            variances = [o.variance for o in outputs if isinstance(o, SpreadOutput)]
            return SpreadOutput(density, torch.cat(variances)) if variances else CountOutput(density)
        return outputs

    def _with_variance(self, tiles: Tensor, names: list[list[str]]) -> Tensor:
        """``(n, 2K, h, w)`` densities of tiles and then their variances; ``names`` has each of the K names twice.

        Where windows overlap, their variances are averaged as their densities are. That is never below the variance of
        the averaged density, however the windows depend on each other.
        """
        output = self(tiles, [own[: len(own) // 2] for own in names])
        return torch.cat([output.density, self.count_variance(output)], 1)

    @torch.inference_mode()
    def count(
        self,
        pictures: Any,
        names: str | Sequence[str] | None = None,
        *,
        window: int | None = None,
        stride: int | None = None,
    ) -> Prediction | list[Prediction]:
        """Count in pictures as they come.

        Args:
            pictures: a path, PIL image, ``(H, W[, C])`` array or ``(3, H, W)`` tensor, or a list of these.
            names: what to count; the model's default classes if ``None``.
            window: overrides the recipe's window; 0 for none.
            stride: overrides the recipe's stride.

        Returns:
            One :class:`Prediction`, or a list for a list. It has an interval where the model is calibrated and neither
            window nor stride differs from the recipe's, which it was calibrated with.

        Raises:
            InputError: no name, an empty name, or something that is no picture.
            ImageError: a file that cannot be read.
        """
        asked = [names] if isinstance(names, str) else list(names) if names is not None else self.default_classes
        if not asked:
            raise InputError("no name to count: count(picture, ['apples', ...]); this model has no default classes")
        if len(set(asked)) != len(asked):
            raise InputError(f"a name is asked about twice: {asked}")
        many = isinstance(pictures, list | tuple)
        training = self.training
        if training:
            self.eval()
        try:
            found = [self._count_one(p, asked, window, stride) for p in (pictures if many else [pictures])]
        finally:
            if training:
                self.train()
        return found if many else found[0]

    def _count_one(self, source: Any, names: list[str], window: int | None, stride: int | None) -> Prediction:
        picture, image_id = as_picture(source)  # (3, H, W) uint8
        seen = self.preprocess(picture)
        size = (picture.shape[1], picture.shape[2])
        output = self.count_batch([seen], [names], window, stride, image_ids=[image_id], sizes=[size])
        assert isinstance(output, list)
        prediction = self.to_prediction(output[0], names, size, image_id, seen)
        if window not in (None, self.window or 0) or stride not in (None, self.stride or self.window):
            prediction.interval = None
        return prediction

    def to_prediction(
        self, output: CountOutput, names: list[str], size: tuple[int, int], image_id: str, seen: Tensor
    ) -> Prediction:
        """One picture's output as plain data on the CPU; points are density peaks.

        Args:
            output: of batch 1.
            names: the names asked about.
            size: (H, W) of the picture given, which the points are in pixels of.
            image_id: what the picture is called.
            seen: ``(3, h, w)`` picture as the model saw it.
        """
        density = output.density[0].float()
        extent = self.extent(density, (seen.shape[1], seen.shape[2]))
        interval = self.interval(output)
        return Prediction(
            counts=self.reported(output.counts)[0].cpu(),
            names=list(names) if len(density) == len(names) else [" + ".join(names)],
            density=density.cpu(),
            points=[p.cpu() for p in peak_points(density, size, extent=extent)],
            interval=None if interval is None else interval[0].float(),
            image_id=image_id,
            image=_as_uint8(seen),
            size=size,
            extent=extent,
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Prediction]:
        if not batch["image_id"]:
            return []
        names = [asked or self.default_classes or [] for asked in batch["classes"]]
        if not all(names):
            raise InputError(
                f"no name to count in {batch['image_id'][0]!r}: name it with --data.classes '[apples]'; this model "
                "has no default classes"
            )
        images = list(batch["image"])
        sizes = batch.get("original_size") or [(int(i.shape[-2]), int(i.shape[-1])) for i in images]
        outputs = self.count_batch(images, names, image_ids=batch["image_id"], sizes=sizes)
        assert isinstance(outputs, list)
        return [
            self.to_prediction(o, n, s, i, picture)
            for o, n, s, i, picture in zip(outputs, names, sizes, batch["image_id"], images, strict=True)
        ]


def _as_float(image: Tensor) -> Tensor:
    image = image.contiguous()  # pictures from files have their colours beside each other
    return image if torch.is_floating_point(image) else image.float() / 255


def _as_uint8(image: Tensor) -> Any:
    """``(H, W, 3)`` uint8 array of a ``(3, H, W)`` picture."""
    if torch.is_floating_point(image):
        image = (image * 255).round().clamp(0, 255).to(torch.uint8)
    return image.permute(1, 2, 0).cpu().numpy()


__all__ = ["Counter"]
