"""Errors of counts, exact for any number of processes.

Each metric keeps one row for each picture and class, keyed by the picture's id, and drops repeated rows before it
computes. Samplers may therefore repeat pictures to even out the ranks, and a rank may see none at all. Rows are
float64 whatever the precision of the model.

What is undefined is left out of a result instead of being NaN or a flattering zero: no ``nae`` where no picture holds
an object, nothing but ``n = 0`` where no picture was scored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from counting_zoo.errors import InputError
from counting_zoo.ops import exact_dtype, points_to_grid, resize_density, sum_blocks

GAME_LEVELS = 4


def count_errors(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Mean absolute, root mean squared, normalised absolute and signed error of counts.

    ``nae`` is the mean of ``|predicted - target| / target`` over the entries whose target is above zero, and
    ``n_nae`` how many those are; where there are none, ``nae`` is left out. ``bias`` is the mean of
    ``predicted - target``.

    Args:
        predicted, target: of any equal shape.

    Returns:
        ``mae, rmse, bias, nae, n, n_nae``; only ``n`` and ``n_nae`` for empty input.

    Example:
        >>> count_errors(torch.tensor([3.0, 1.0]), torch.tensor([4.0, 0.0]))
        {'n': 2, 'n_nae': 1, 'mae': 1.0, 'rmse': 1.0, 'bias': 0.0, 'nae': 0.25}
    """
    if predicted.shape != target.shape:
        raise InputError(f"predicted counts of shape {tuple(predicted.shape)} for targets of {tuple(target.shape)}")
    target = target.to(exact_dtype(target.device)).flatten()
    error = predicted.to(target).flatten() - target
    some = target > 0
    result: dict[str, float] = {"n": error.numel(), "n_nae": int(some.sum())}
    if result["n"]:
        result |= {
            "mae": error.abs().mean().item(),
            "rmse": error.square().mean().sqrt().item(),
            "bias": error.mean().item(),
        }
    if result["n_nae"]:
        result["nae"] = (error.abs()[some] / target[some]).mean().item()
    return result


def constant_rows(
    target: Tensor, constants: Mapping[str, float | Sequence[float] | Tensor]
) -> dict[str, dict[str, float]]:
    """The errors of predicting the same number for every picture: what a model has to beat.

    Args:
        target: ``(N, K)`` counts.
        constants: by name, for example the mean and the median of the training counts; one number, or one for each
            class.

    Returns:
        :func:`count_errors` by name.

    Example:
        >>> constant_rows(torch.tensor([[1.0], [3.0]]), {"mean": 2.0})["mean"]["mae"]
        1.0
    """
    exact = target.to(exact_dtype(target.device))
    return {
        name: count_errors(torch.as_tensor(value, dtype=exact.dtype, device=exact.device).expand_as(exact), exact)
        for name, value in constants.items()
    }


def grid_errors(
    density: Tensor,
    points: Tensor,
    size: tuple[int, int],
    labels: Tensor | None = None,
    extent: tuple[float, float] | None = None,
    levels: int = GAME_LEVELS,
) -> Tensor:
    """Grid average mean absolute errors of one picture (Guerrero-Gomez-Olmedo et al., IbPRIA 2015).

    Level L cuts the picture into ``2^L x 2^L`` equal regions and adds up their absolute count errors; level 0 is the
    absolute error of the count. Regions cut cells in proportion to area, so any picture and map size is exact.

    Args:
        density: ``(K, h, w)`` predicted objects per cell.
        points: ``(N, 2)`` x, y in pixels.
        size: ``(H, W)`` of the picture that the points refer to.
        labels: ``(N,)`` class indices; needed when K is above 1.
        extent: height and width of the picture in cells, when the last cells reach beyond it.
        levels: how many.

    Returns:
        ``(K, levels)`` float64.
    """
    n = 2 ** (levels - 1)
    k = len(density)
    labelled = None if labels is None else [labels]
    exact = density.detach().to(exact_dtype(density.device))
    predicted = resize_density(exact, (n, n), extent)
    target = points_to_grid([points], size, (n, n), labels=labelled, num_classes=k)[0]
    error = predicted - target.to(predicted)
    return torch.stack([sum_blocks(error, n >> level).abs().sum((-2, -1)) for level in range(levels)], -1)


class PictureRows(Metric):
    """Rows of numbers, one for each picture and class, that survive any distribution over processes.

    Args:
        columns: names of the numbers in a row.
        kwargs: those of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    picture: list[Tensor] | Tensor
    kind: list[Tensor] | Tensor

    def __init__(self, columns: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = tuple(columns)
        self.names: dict[int, str] = {}
        for state in ("picture", "kind", *columns):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def append(self, image_ids: Sequence[str], **columns: Tensor) -> None:
        """Add ``(B, K)`` numbers for B pictures under each column."""
        shapes = {name: tuple(value.shape) for name, value in columns.items()}
        shape = next(iter(shapes.values()))
        if len(shape) != 2 or len(image_ids) != shape[0] or len(set(shapes.values())) > 1:
            raise InputError(
                f"{len(image_ids)} image ids came with {shapes}; expected (pictures, classes), the same for each"
            )
        keys = [_key(image_id) for image_id in image_ids]
        self.names.update(zip(keys, image_ids, strict=True))
        picture = torch.tensor(keys, dtype=torch.int64, device=self.device)
        kind = torch.arange(shape[1], device=self.device)
        self._state("picture").append(picture.repeat_interleave(shape[1]))
        self._state("kind").append(kind.repeat(shape[0]))
        for name, value in columns.items():
            self._state(name).append(value.detach().to(self.device, exact_dtype(self.device)).flatten())

    def rows(self) -> dict[str, Tensor]:
        """All columns without repetitions, ordered by picture and class: the same for every distribution."""
        joined = {name: self._joined(name) for name in ("picture", "kind", *self.columns)}
        order = joined["kind"].argsort(stable=True)
        order = order[joined["picture"][order].argsort(stable=True)]
        joined = {name: value[order] for name, value in joined.items()}
        key = torch.stack([joined["picture"], joined["kind"]])
        first = torch.ones_like(joined["kind"], dtype=torch.bool)
        first[1:] = (key[:, 1:] != key[:, :-1]).any(0)
        return {name: value[first] for name, value in joined.items()}

    def per_image(self) -> list[dict[str, Any]]:
        """One row for each picture this process saw: ``image_id`` and, for each column, its K numbers."""
        rows = self.rows()
        lengths = rows["picture"].unique_consecutive(return_counts=True)[1].tolist()
        pieces = {name: [part.tolist() for part in value.split(lengths)] for name, value in rows.items()}
        return [
            {"image_id": self.names[pieces["picture"][i][0]], **{name: pieces[name][i] for name in self.columns}}
            for i in range(len(lengths))
        ]

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes.

        A process without rows takes part with empty tensors of the right type; torchmetrics' own stand-in is always
        float32, which a gather of int64 and float64 rows does not survive.
        """
        for name in ("picture", "kind", *self.columns):
            if len(getattr(self, name)) == 0:
                setattr(self, name, [self._joined(name)])
        super().sync(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Follow to another device but keep the type: ``to(bfloat16)`` must not round counts."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    def _state(self, name: str) -> list[Tensor]:
        return getattr(self, name)

    def _joined(self, name: str) -> Tensor:
        """One state as one tensor, whether it is a list still or was gathered."""
        value = getattr(self, name)
        if isinstance(value, Tensor):
            return value
        dtype = torch.int64 if name in ("picture", "kind") else exact_dtype(self.device)
        return torch.cat(value) if value else torch.zeros(0, dtype=dtype, device=self.device)


class CountErrors(PictureRows):
    """MAE, RMSE, NAE and bias of counts over a data set.

    With several classes the figures run over all (picture, class) pairs, and those that start with ``sum_`` over the
    total of each picture.

    Args:
        constants: constant predictions to be scored on the same pictures, as in :func:`constant_rows`; a constant
            called ``train_mean`` adds ``train_mean_mae`` and ``train_mean_rmse``.
        kwargs: those of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = CountErrors({"train_median": 5.0})
        >>> metric.update(torch.tensor([[2.0], [4.0]]), torch.tensor([[1.0], [4.0]]), ["a.jpg", "b.jpg"])
        >>> metric.update(torch.tensor([[4.0]]), torch.tensor([[4.0]]), ["b.jpg"])  # the sampler repeats it
        >>> result = metric.compute()
        >>> result["mae"], result["train_median_mae"], result["n"]
        (0.5, 2.5, 2)
    """

    def __init__(self, constants: Mapping[str, float | Sequence[float] | Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(("predicted", "target"), **kwargs)
        self.constants = dict(constants or {})

    def update(self, predicted: Tensor, target: Tensor, image_ids: Sequence[str]) -> None:
        """Add ``(B, K)`` predicted and true counts of B pictures."""
        self.append(image_ids, predicted=predicted, target=target)

    def compute(self) -> dict[str, float]:
        """:func:`count_errors` over all pictures; see the class for further keys."""
        rows = self.rows()
        result = count_errors(rows["predicted"], rows["target"])
        picture = rows["picture"].unique_consecutive(return_inverse=True)[1]
        if len(picture) and bool((rows["kind"] > 0).any()):
            n = int(picture[-1]) + 1
            total = {c: rows[c].new_zeros(n).index_add_(0, picture, rows[c]) for c in self.columns}
            result |= {f"sum_{key}": value for key, value in count_errors(total["predicted"], total["target"]).items()}
        for name, value in self.constants.items():
            constant = torch.as_tensor(value, dtype=rows["target"].dtype, device=self.device)
            if constant.ndim and len(picture) and len(constant) != int(rows["kind"].max()) + 1:
                raise InputError(
                    f"the constant {name!r} has {len(constant)} entries for {int(rows['kind'].max()) + 1} classes; "
                    "give one number, or one for each class"
                )
            each = constant[rows["kind"]] if constant.ndim else constant.expand_as(rows["target"])
            errors = count_errors(each, rows["target"])
            result |= {f"{name}_{key}": errors[key] for key in ("mae", "rmse") if key in errors}
        return result


class GAME(PictureRows):
    """Grid average mean absolute error, levels 0 to 3: counts that are right in the right places.

    See :func:`grid_errors`. ``game0`` is the MAE; with several classes, over all (picture, class) pairs.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = GAME()
        >>> left = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
        >>> metric.update([left], [torch.tensor([[9.0, 1.0]])], [(10, 10)], ["a.jpg"])
        >>> metric.compute()
        {'n': 1, 'game0': 0.0, 'game1': 2.0, 'game2': 2.0, 'game3': 2.0}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__([f"game{level}" for level in range(GAME_LEVELS)], **kwargs)

    def update(
        self,
        densities: Sequence[Tensor] | Tensor,
        points: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        image_ids: Sequence[str],
        labels: Sequence[Tensor] | None = None,
        extents: Sequence[tuple[float, float] | None] | None = None,
    ) -> None:
        """Add B pictures.

        Args:
            densities: B maps ``(K, h, w)`` of predicted objects per cell.
            points: B tensors ``(N_i, 2)`` of x, y in pixels.
            sizes: B times ``(H, W)``, in the frame of the points.
            image_ids: B ids.
            labels: B tensors ``(N_i,)`` of class indices; needed when K is above 1.
            extents: B heights and widths of pictures in cells, ``None`` where the map covers exactly its picture,
                as all do by default; see :func:`grid_errors`.
        """
        extents = [None] * len(densities) if extents is None else extents
        if not len(densities) == len(points) == len(sizes) == len(image_ids) == len(extents):
            raise InputError(
                f"{len(densities)} densities, {len(points)} point sets, {len(sizes)} sizes, {len(image_ids)} image "
                f"ids and {len(extents)} extents; expected one of each for every picture"
            )
        for i, (density, dots, size, extent) in enumerate(zip(densities, points, sizes, extents, strict=True)):
            errors = grid_errors(density, dots, size, None if labels is None else labels[i], extent)
            self.append(image_ids[i : i + 1], **dict(zip(self.columns, errors.mT[:, None], strict=True)))

    def compute(self) -> dict[str, float]:
        """``game0`` to ``game3`` and ``n``; only ``n`` where no picture was scored."""
        rows = self.rows()
        n = len(rows["picture"])
        return {"n": n} | ({name: rows[name].mean().item() for name in self.columns} if n else {})


class PromptErrors(PictureRows):
    """Whether a text-guided model counts what it was asked for, after the questions of PrACo (Ciampi et al., 2024).

    ``absent_ratio``: what the model counts for a name that is not in the picture, over what it counts for the one that
    is (sums over pictures; a model that ignores the text has 1). ``hard_absent_ratio``: the same for names close to
    one that is present, where there are such. ``wrong_over_right``: share of pictures in which the absent name is
    counted higher than the present one. ``mae`` and ``shuffled_mae``: error with the right name, and with names
    exchanged between pictures.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("predicted", "target", "absent", "hard_absent", "shuffled"), **kwargs)

    def update(
        self,
        image_ids: Sequence[str],
        predicted: Tensor,
        target: Tensor,
        absent: Tensor,
        hard_absent: Tensor,
        shuffled: Tensor,
    ) -> None:
        """Add ``(B,)`` counts of B pictures; NaN where a picture has no such question.

        Args:
            image_ids: B ids.
            predicted, target: predicted and true count of the name that is asked about.
            absent: predicted count of a name that is not in the picture.
            hard_absent: the same for a name that shares a part of its meaning with one in the picture.
            shuffled: predicted count with another picture's name.
        """
        columns = {"predicted": predicted, "target": target, "absent": absent}
        columns |= {"hard_absent": hard_absent, "shuffled": shuffled}
        self.append(image_ids, **{name: value.reshape(-1, 1) for name, value in columns.items()})

    def compute(self) -> dict[str, float]:
        """The figures of the class docstring and ``n``; those that nothing was asked for are left out."""
        rows = self.rows()
        result: dict[str, float] = {"n": len(rows["picture"])}
        for name in ("absent", "hard_absent"):
            asked = ~rows[name].isnan()
            right = rows["predicted"][asked].sum().item()
            if right > 0:
                result[f"{name}_ratio"] = rows[name][asked].sum().item() / right
        asked = ~rows["absent"].isnan()
        if bool(asked.any()):
            result["wrong_over_right"] = (rows["absent"] > rows["predicted"])[asked].float().mean().item()
        for key, name in (("mae", "predicted"), ("shuffled_mae", "shuffled")):
            asked = ~rows[name].isnan()
            if bool(asked.any()):
                result[key] = (rows[name] - rows["target"])[asked].abs().mean().item()
        return result


def _key(image_id: str) -> int:
    """64 bits that stand for an id on every process, as a signed integer."""
    return int.from_bytes(blake2b(image_id.encode(), digest_size=8).digest(), "big", signed=True)


__all__ = ["GAME", "CountErrors", "PictureRows", "PromptErrors", "constant_rows", "count_errors", "grid_errors"]
