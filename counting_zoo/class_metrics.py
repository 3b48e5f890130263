"""Errors of counts class by class: the mRMSE family of Chattopadhyay et al. (CVPR 2017), and its intervals.

For class c over the pictures i, with ``e = predicted - target``::

    rmse_c     = sqrt(mean_i e_ic^2)
    rel_rmse_c = sqrt(mean_i e_ic^2 / (target_ic + 1))

The ``_nz`` forms run over the pictures whose true count of that class is above zero. ``mrmse, mrmse_nz, m_rel_rmse,
m_rel_rmse_nz`` are means over classes. A target of NaN says that this class is not annotated in this picture, and the
pair is left out. As in :mod:`counting_zoo.metrics`, what is undefined is left out of a result.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from counting_zoo.errors import InputError
from counting_zoo.metrics import PictureRows
from counting_zoo.ops import exact_dtype

ClassStatistic = Literal["mae", "rmse", "rmse_nz", "rel_rmse", "rel_rmse_nz"]
MeanStatistic = Literal["mrmse", "mrmse_nz", "m_rel_rmse", "m_rel_rmse_nz"]
CLASS_STATISTICS: tuple[ClassStatistic, ...] = ("mae", "rmse", "rmse_nz", "rel_rmse", "rel_rmse_nz")
#: Each mean over classes, with the figure of a class that it is the mean of.
MEAN_STATISTICS: dict[str, ClassStatistic] = {
    "mrmse": "rmse",
    "mrmse_nz": "rmse_nz",
    "m_rel_rmse": "rel_rmse",
    "m_rel_rmse_nz": "rel_rmse_nz",
}
#: Pictures times resamples that :func:`bootstrap_interval` holds at once: 32 MiB of float64.
RESAMPLED_AT_ONCE = 2**22


def reported_counts(counts: Tensor, rounding: bool, clamp: bool) -> Tensor:
    """Counts as a protocol reports them: no count below zero, whole numbers with halves to the even one.

    Lower-Count rounds and does not clamp, Chattopadhyay et al. clamp and round. No metric does either by itself.

    Example:
        >>> reported_counts(torch.tensor([-0.7, 0.5, 1.5]), rounding=True, clamp=True)
        tensor([0., 0., 2.])
    """
    if clamp:
        counts = counts.clamp(min=0)
    return counts.round() + 0.0 if rounding else counts  # + 0.0 makes 0 of the -0 that rounding leaves


def errors_by_class(predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The errors of each class; see the module for the formulas.

    Args:
        predicted: ``(N, K)`` counts of N pictures.
        target: ``(N, K)`` true counts, NaN where a class is not annotated in a picture.

    Returns:
        ``(K,)`` tensors: ``mae, rmse, rmse_nz, rel_rmse, rel_rmse_nz`` in float64, NaN for a class that no picture
        decides, and over how many pictures they run: ``n`` and, for those above zero, ``n_nz``.

    Raises:
        InputError: shapes differ, or a true count is negative or infinite.

    Example:
        >>> errors_by_class(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [3.0]]))["rel_rmse_nz"].item()
        0.5
    """
    predicted, target = _checked(predicted, target)
    once = target.new_ones(1, len(target))
    result = {statistic: _weighted(predicted, target, statistic, once)[0] for statistic in CLASS_STATISTICS}
    return result | {"n": (~target.isnan()).sum(0), "n_nz": (target > 0).sum(0)}


def class_count_errors(predicted: Tensor, target: Tensor, classes: Sequence[str] | None = None) -> dict[str, float]:
    """Means over classes of the errors of each class.

    A class without a picture in which it occurs has no ``_nz`` error; it is left out of those means, and one warning
    says which. Where that leaves no class, the keys are left out too.

    Args:
        predicted, target: as for :func:`errors_by_class`.
        classes: K names for the warning.

    Returns:
        ``mrmse, mrmse_nz, m_rel_rmse, m_rel_rmse_nz``; ``n``, the number of pictures in which a class is annotated;
        ``n_classes`` and ``n_classes_nz``, over how many classes the means run.

    Raises:
        InputError: as for :func:`errors_by_class`; or the number of names differs from K.

    Example:
        >>> result = class_count_errors(torch.tensor([[1.0, 0.0], [1.0, 3.0]]), torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> result["mrmse_nz"], result["m_rel_rmse"]
        (1.2071067811865475, 0.5576775358252053)
    """
    if classes is not None and len(classes) != target.shape[-1]:
        raise InputError(f"{len(classes)} class names for counts of {target.shape[-1]} classes; give one for each")
    by_class = errors_by_class(predicted, target)
    result: dict[str, float] = {"n": int((~target.isnan()).any(1).sum())}
    if result["n"]:
        _warn_of_absent(by_class, classes, stacklevel=3)
    result |= {"n_classes": int((by_class["n"] > 0).sum()), "n_classes_nz": int((by_class["n_nz"] > 0).sum())}
    return result | _means(by_class)


def bootstrap_interval(
    predicted: Tensor,
    target: Tensor,
    statistic: ClassStatistic | MeanStatistic,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Tensor, Tensor]:
    """Percentile interval of a figure over pictures drawn with replacement (Efron, 1979).

    It says how much the figure owes to the choice of pictures, not how much to the training run. A resample without a
    class that occurs leaves that class out, as :func:`class_count_errors` does. The interval of a class that occurs in
    no picture is NaN.

    Args:
        predicted, target: as for :func:`errors_by_class`.
        statistic: a figure of each class (:func:`errors_by_class`) or a mean over classes (:func:`class_count_errors`).
        n: how many resamples.
        seed: of the draws; equal seeds give equal intervals.
        level: share of the resamples within the interval.

    Returns:
        Lower and upper bound in float64: ``(K,)`` for a figure of each class, scalars for a mean.

    Raises:
        InputError: as for :func:`errors_by_class`; or an unknown statistic, no picture, ``n`` below 1, ``level``
            outside (0, 1), or a prediction that is not finite.

    Example:
        >>> low, high = bootstrap_interval(torch.ones(50, 1), torch.arange(50.0)[:, None] % 3, "mae")
        >>> bool(low < 2 / 3) and bool(high > 2 / 3)
        True
    """
    of_mean = statistic in MEAN_STATISTICS
    of_class: Any = MEAN_STATISTICS[statistic] if of_mean else statistic
    if of_class not in CLASS_STATISTICS:
        raise InputError(f"statistic {statistic!r}; choose one of {', '.join((*CLASS_STATISTICS, *MEAN_STATISTICS))}")
    predicted, target = _checked(predicted, target)
    if not len(target) or n < 1 or not 0 < level < 1:
        raise InputError(
            f"bootstrap of {len(target)} pictures, {n} resamples, level {level}; expected at least one picture and one "
            "resample, and a level between 0 and 1"
        )
    if not bool(predicted[~target.isnan()].isfinite().all()):
        raise InputError("predicted counts hold NaN or infinity, which have no interval; score finite counts")
    generator = torch.Generator().manual_seed(seed)
    ones = torch.ones(1, 1, dtype=target.dtype)
    resamples = []
    for drawn in _split(n, max(1, RESAMPLED_AT_ONCE // len(target))):
        chosen = torch.randint(len(target), (drawn, len(target)), generator=generator)
        times = torch.zeros(chosen.shape, dtype=target.dtype).scatter_add_(1, chosen, ones.expand_as(chosen))
        values = _weighted(predicted, target, of_class, times.to(target.device))  # (drawn, K)
        resamples.append(values.nanmean(1) if of_mean else values)
    tail = (1 - level) / 2
    low, high = torch.cat(resamples).nanquantile(target.new_tensor([tail, 1 - tail]), dim=0)
    return low, high


class ClassCountErrors(PictureRows):
    """The mRMSE family over a data set with a fixed list of classes, beside what needs no picture at all.

    Always 0 and always 1 are scored on the same pictures, under keys such as ``always_0_mrmse``: where most classes are
    absent from most pictures, a low mRMSE says little until it is read beside them.

    Args:
        classes: K names for warnings; may be set later.
        constants: further constant predictions by name, one number or one for each class: ``{"train_mean": [...]}``
            adds ``train_mean_mrmse`` and so on.
        present_1: also score a perfect judge of presence that says 1 for every class that is there, as ``present_1_*``.
            On PASCAL VOC 2007 without difficult objects its relative errors are below all published ones.
        kwargs: those of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = ClassCountErrors(["cat", "dog"])
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0]]), ["a.jpg"])
        >>> metric.update(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 4.0]]), ["b.jpg"])
        >>> metric.update(torch.tensor([[0.0, 4.0]]), torch.tensor([[0.0, 4.0]]), ["b.jpg"])  # the sampler repeats it
        >>> result = metric.compute()
        >>> result["n"], result["mrmse_nz"], result["always_1_mrmse_nz"]
        (2, 0.5, 2.0)
    """

    def __init__(
        self,
        classes: Sequence[str] | None = None,
        constants: Mapping[str, float | Sequence[float] | Tensor] | None = None,
        *,
        present_1: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(("predicted", "target"), **kwargs)
        self.classes = classes
        self.constants = dict(constants or {})
        self.present_1 = present_1

    def update(self, predicted: Tensor, target: Tensor, image_ids: Sequence[str]) -> None:
        """Add ``(B, K)`` predicted and true counts of B pictures; a target of NaN is not annotated."""
        self.append(image_ids, predicted=predicted, target=target)

    def compute(self) -> dict[str, float]:
        """:func:`class_count_errors` over all pictures, and its four means for every row of the class docstring."""
        predicted, target = self._tables()
        if not len(target):
            return {"n": 0, "n_classes": 0, "n_classes_nz": 0}
        result = class_count_errors(predicted, target, self.classes)
        rows = {"always_0": torch.zeros_like(target), "always_1": torch.ones_like(target)}
        rows |= {name: self._constant(name, target) for name in self.constants}
        if self.present_1:
            rows["present_1"] = (target > 0).to(target)
        for name, row in rows.items():
            result |= {f"{name}_{key}": value for key, value in _means(errors_by_class(row, target)).items()}
        return result

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Predicted and true counts as ``(N, K)``; NaN where a picture was not asked about a class."""
        rows = self.rows()
        if not len(rows["kind"]):
            return rows["predicted"].reshape(0, 1), rows["target"].reshape(0, 1)
        picture = rows["picture"].unique_consecutive(return_inverse=True)[1]
        predicted = rows["target"].new_full((int(picture[-1]) + 1, int(rows["kind"].max()) + 1), torch.nan)
        target = predicted.clone()
        predicted[picture, rows["kind"]] = rows["predicted"]
        target[picture, rows["kind"]] = rows["target"]
        return predicted, target

    def _constant(self, name: str, target: Tensor) -> Tensor:
        value = torch.as_tensor(self.constants[name], dtype=target.dtype, device=target.device)
        if value.ndim and value.shape != target.shape[1:]:
            raise InputError(
                f"the constant {name!r} has {len(value)} entries for {target.shape[1]} classes; give one number, or "
                "one for each class"
            )
        return value.expand_as(target)


class PointHits(PictureRows):
    """How many of the points found lie on an object of their class, among the classes that are in the picture.

    Args:
        kwargs: those of :class:`torchmetrics.Metric`.

    Example:
        >>> metric = PointHits()
        >>> points, kinds = torch.tensor([[5.0, 5.0], [50.0, 5.0], [5.0, 5.0]]), torch.tensor([0, 0, 1])
        >>> metric.update(points, kinds, torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0]), "a.jpg")
        >>> metric.compute()  # class 1 is not there, so its point is an error of its count
        {'n_points': 2, 'point_hits': 0.5}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(("hits", "points"), **kwargs)

    def update(self, points: Tensor, kinds: Tensor, boxes: Tensor, box_kinds: Tensor, image_id: str) -> None:
        """Add one picture.

        Args:
            points: ``(N, 2)`` x, y.
            kinds: ``(N,)`` classes of the points.
            boxes: ``(M, 4)`` x1, y1, x2, y2 of all objects, in the frame of the points.
            box_kinds: ``(M,)`` their classes.
            image_id: of the picture.
        """
        x, y = points[:, None].unbind(-1)  # (N, 1)
        x1, y1, x2, y2 = boxes.to(points).unbind(-1)  # (M,)
        same = kinds[:, None] == box_kinds.to(kinds)
        on = (same & (x >= x1) & (x <= x2) & (y >= y1) & (y <= y2)).any(1)
        present = same.any(1)
        self.append([image_id], hits=on.sum()[None, None], points=present.sum()[None, None])

    def compute(self) -> dict[str, float]:
        """``point_hits``, a share, and ``n_points``, of how many; only the latter where there are none."""
        rows = self.rows()
        n = int(rows["points"].sum())
        return {"n_points": n} | ({"point_hits": float(rows["hits"].sum() / n)} if n else {})


def _checked(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the exact type on one device."""
    if predicted.shape != target.shape or target.ndim != 2:
        raise InputError(
            f"predicted counts of shape {tuple(predicted.shape)} for targets of {tuple(target.shape)}; expected "
            "(pictures, classes) of both"
        )
    target = target.to(exact_dtype(target.device))
    wrong = (target < 0) | target.isinf()
    if bool(wrong.any()):
        i, k = (int(j) for j in wrong.nonzero()[0])
        raise InputError(
            f"the true count of class {k} in picture {i} is {target[i, k].item():g}; expected 0 or more, or NaN where "
            "the class is not annotated"
        )
    return predicted.detach().to(target), target


def _weighted(predicted: Tensor, target: Tensor, statistic: ClassStatistic, weight: Tensor) -> Tensor:
    """A statistic of each class over pictures that count ``weight`` ``(R, N)`` times: ``(R, K)``, NaN where none do."""
    used = target > 0 if statistic.endswith("_nz") else ~target.isnan()
    error = predicted - target
    error = error.abs() if statistic == "mae" else error.square()
    if statistic.startswith("rel"):
        error = error / (target + 1)
    mean = weight @ error.masked_fill(~used, 0) / (weight @ used.to(weight))
    return mean if statistic == "mae" else mean.sqrt()


def _means(by_class: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the classes that are defined, which a NaN among the predictions does not make undefined."""
    result = {}
    for mean, statistic in MEAN_STATISTICS.items():
        defined = by_class["n_nz" if mean.endswith("_nz") else "n"] > 0
        if bool(defined.any()):
            result[mean] = by_class[statistic][defined].mean().item()
    return result


def _warn_of_absent(by_class: Mapping[str, Tensor], classes: Sequence[str] | None, stacklevel: int) -> None:
    """Say which classes the means leave out."""
    unknown, absent = by_class["n"] == 0, (by_class["n"] > 0) & (by_class["n_nz"] == 0)
    for left_out, why in ((unknown, "annotated in no picture and left out"),
                          (absent, "in no picture and left out of mrmse_nz and m_rel_rmse_nz")):  # fmt: skip
        names = [str(k) if classes is None else classes[k] for k in left_out.nonzero()[:, 0].tolist()]
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            warnings.warn(
                f"{len(names)} of {len(left_out)} classes are {why}: {', '.join(names[:10])}{more}",
                stacklevel=stacklevel,
            )


def _split(n: int, most: int) -> list[int]:
    """n in parts of at most ``most``."""
    return [min(most, n - first) for first in range(0, n, most)]


__all__ = [
    "ClassCountErrors",
    "ClassStatistic",
    "MeanStatistic",
    "PointHits",
    "bootstrap_interval",
    "class_count_errors",
    "errors_by_class",
    "reported_counts",
]
