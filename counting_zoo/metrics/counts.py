"""Errors of counts, exact for any number of processes: over images, by grid, and class by class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from counting_zoo.errors import InputError, listed
from counting_zoo.io import read_table, unsafe_cell, write_table
from counting_zoo.ops import exact_dtype, points_to_grid, resize_density, sum_blocks

GAME_LEVELS = 4


def count_errors(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """Compute mean absolute, root mean squared, normalised absolute and signed error of counts.

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
    """Score constant predictions, the baselines that a model has to beat.

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
    """Compute the grid average mean absolute errors of one image (Guerrero-Gomez-Olmedo et al., IbPRIA 2015).

    Level L cuts the image into ``2^L x 2^L`` equal regions and adds up their absolute count errors; level 0 is the
    absolute error of the count. Regions cut cells in proportion to area, so any image and map size is exact.

    Args:
        density: ``(K, h, w)`` predicted objects per cell.
        points: ``(N, 2)`` x, y in pixels.
        size: ``(H, W)`` of the image that the points refer to.
        labels: ``(N,)`` class indices; needed when K is above 1.
        extent: height and width of the image in cells, when the last cells reach beyond it.
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


class ImageRows(Metric):
    """Rows of numbers, one for each image and kind, that survive any distribution over processes.

    Args:
        columns: names of the numbers in a row.
        kwargs: those of :class:`torchmetrics.Metric`.
    """

    full_state_update = False

    def __init__(self, columns: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.columns = tuple(columns)
        self.texts: dict[int, str] = {}  # of the keys that this process has seen
        for state in (*_KEYS, *columns):
            self.add_state(f"{state}_", default=[], dist_reduce_fx="cat")

    def append(self, image_ids: Sequence[str], names: Sequence[Sequence[str]] | None = None, **columns: Tensor) -> None:
        """Add ``(B, K)`` numbers for B images under each column.

        Args:
            image_ids: B ids.
            names: B x K names, by which rows are told from each other; by their place among the K if ``None``.
            columns: the numbers.

        Raises:
            InputError: shapes that do not fit each other.
        """
        shapes = {name: tuple(value.shape) for name, value in columns.items()}
        shape = next(iter(shapes.values()))
        lengths = {shape[1]} if names is None or len(shape) != 2 else {len(own) for own in names}
        if len(shape) != 2 or len(image_ids) != shape[0] or len(set(shapes.values())) > 1 or lengths - {shape[1]}:
            raise InputError(
                f"{len(image_ids)} image ids came with {shapes}; expected (images, names), the same for each"
            )
        place = torch.arange(shape[1]).repeat(shape[0])
        kind = (
            place if names is None else torch.tensor(self._keys([n for own in names for n in own]), dtype=torch.int64)
        )
        image = torch.tensor(self._keys(image_ids), dtype=torch.int64).repeat_interleave(shape[1])
        for state, value in (("image_key", image), ("kind", kind), ("place", place)):
            self._state(state).append(value.to(self.device))
        for state, value in columns.items():
            self._state(state).append(value.detach().to(self.device, exact_dtype(self.device)).flatten())

    def rows(self) -> dict[str, Tensor]:
        """Join all columns without repetitions, ordered by image and place: the same for every distribution."""
        joined = {name: self._joined(name) for name in (*_KEYS, *self.columns)}
        order = joined["kind"].argsort(stable=True)
        order = order[joined["image_key"][order].argsort(stable=True)]
        key = torch.stack([joined["image_key"], joined["kind"]])[:, order]
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = (key[:, 1:] != key[:, :-1]).any(0)
        order = order[first]
        order = order[joined["place"][order].argsort(stable=True)]
        order = order[joined["image_key"][order].argsort(stable=True)]
        return {name: value[order] for name, value in joined.items()}

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the rows of all processes.

        A process without rows takes part with empty tensors of the right type; torchmetrics' own stand-in is always
        float32, which a gather of int64 and float64 rows does not survive.
        """
        for name in (*_KEYS, *self.columns):
            if len(self._state(name)) == 0:
                setattr(self, f"{name}_", [self._joined(name)])
        super().sync(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        """Follow to another device but keep the type: ``to(bfloat16)`` must not round counts."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)

    def _keys(self, texts: Sequence[str]) -> list[int]:
        """Hash each text to a signed 64-bit integer, the same on every process."""
        keys = [int.from_bytes(blake2b(t.encode(), digest_size=8).digest(), "big", signed=True) for t in texts]
        self.texts.update(zip(keys, texts, strict=True))
        return keys

    def _state(self, name: str) -> list[Tensor]:
        return getattr(self, f"{name}_")  # the columns' own names are free for what subclasses make of them

    def _joined(self, name: str) -> Tensor:
        """Join a state to one tensor, whether it is a list still or was gathered."""
        value: Any = self._state(name)
        if isinstance(value, Tensor):
            return value
        dtype = torch.int64 if name in _KEYS else exact_dtype(self.device)
        return torch.cat(value) if value else torch.zeros(0, dtype=dtype, device=self.device)


_KEYS = ("image_key", "kind", "place")


GAME_COLUMNS = ("game1", "game2", "game3")


SCHEMA = ("image", "name", "target", "predicted", "low", "high")
"""Columns of every file of counts; a number that is not known is an empty cell, and more columns may follow."""


class CountTable(ImageRows):
    """Predicted and true counts by image and name: the one metric of validation, test, benchmark and calibration.

    A row holds the true count (``target``, NaN where it is not known), the predicted one, the grid errors ``game0`` to
    ``game3`` (:func:`grid_errors`; NaN where the data have no points), the bounds ``low`` and ``high`` of a calibrated
    model and the ``deviation`` of one that predicts a distribution. Rows are known by image id and name, so that the
    scores are those of one process whatever the sampler repeats.

    Args:
        constants: constant predictions by name that are scored on the same rows: one number, or one for each of the
            names that every image is asked for. One called ``train_mean`` adds ``train_mean_mae`` and so on.
        kwargs: those of :class:`torchmetrics.Metric`.

    Example:
        >>> table = CountTable({"train_median": 5.0})
        >>> table.update(["a.jpg", "b.jpg"], [["figs"]] * 2, torch.tensor([[2.0], [4.0]]), torch.tensor([[1.0], [4.0]]))
        >>> table.update(["b.jpg"], [["figs"]], torch.tensor([[4.0]]), torch.tensor([[4.0]]))  # the sampler repeats it
        >>> result = table.compute()
        >>> result["mae"], result["train_median_mae"], result["n"]
        (0.5, 2.5, 2)
    """

    def __init__(self, constants: Mapping[str, float | Sequence[float] | Tensor] | None = None, **kwargs: Any) -> None:
        columns = ("target", "predicted", "game0", *GAME_COLUMNS, "low", "high", "deviation")
        super().__init__(columns, **kwargs)
        self.constants = dict(constants or {})

    # -- the metric -----------------------------------------------------------------------------------------------

    def update(
        self,
        image_ids: Sequence[str],
        names: Sequence[Sequence[str]],
        predicted: Tensor,
        target: Tensor,
        *,
        game: Tensor | None = None,
        interval: Tensor | None = None,
        deviation: Tensor | None = None,
    ) -> None:
        """Add B images with K names each.

        Args:
            image_ids: B ids.
            names: B x K names.
            predicted, target: ``(B, K)`` counts; a target of NaN is not known.
            game: ``(B, K, 4)`` grid errors.
            interval: ``(B, K, 2)`` lower and upper bounds.
            deviation: ``(B, K)`` standard deviations.
        """
        unknown = torch.full_like(target, torch.nan)
        grid = [unknown] * GAME_LEVELS if game is None else list(game.unbind(-1))
        low, high = (unknown, unknown) if interval is None else interval.unbind(-1)
        numbers = [target, predicted, *grid, low, high, unknown if deviation is None else deviation]
        self.append(image_ids, names, **dict(zip(self.columns, numbers, strict=True)))

    def compute(self) -> dict[str, float]:
        """Compute the scores over all rows.

        Returns:
            :func:`count_errors`; with several names an image also ``sum_`` errors of the total of each image and the
            means over classes of :func:`class_count_errors`, beside always 0, always 1 and a perfect judge of presence
            (``present_1``); ``game0`` to ``game3``; ``interval_coverage`` and ``interval_width``; the errors of each
            constant.
        """
        rows = self.rows()
        result: dict[str, float] = {}
        placed = ~rows["game0"].isnan()
        if bool(placed.any()):
            result |= {name: rows[name][placed].mean().item() for name in ("game0", *GAME_COLUMNS)}
        known = rows["target"].isfinite() & rows["low"].isfinite()
        if bool(known.any()):
            inside = (rows["low"] <= rows["target"]) & (rows["target"] <= rows["high"])
            result["interval_coverage"] = float(inside[known].double().mean())
            result["interval_width"] = float((rows["high"] - rows["low"])[known].mean())
        image = rows["image_key"].unique_consecutive(return_inverse=True)[1]
        several = len(image) > 0 and bool((rows["place"] > 0).any())
        if several:
            result |= self._class_scores(rows, image)
        result |= count_errors(rows["predicted"], rows["target"])
        if several:
            total = {
                c: rows[c].new_zeros(int(image[-1]) + 1).index_add_(0, image, rows[c]) for c in ("predicted", "target")
            }
            result |= {f"sum_{key}": value for key, value in count_errors(total["predicted"], total["target"]).items()}
        for name, value in self.constants.items():
            constant = torch.as_tensor(value, dtype=rows["target"].dtype, device=self.device)
            if constant.ndim and len(image) and len(constant) != int(rows["place"].max()) + 1:
                raise InputError(
                    f"the constant {name!r} has {len(constant)} entries for {int(rows['place'].max()) + 1} names; "
                    "give one number, or one for each name"
                )
            each = constant[rows["place"]] if constant.ndim else constant.expand_as(rows["target"])
            errors = count_errors(each, rows["target"])
            result |= {f"{name}_{key}": errors[key] for key in ("mae", "rmse") if key in errors}
        return result

    def _class_scores(self, rows: dict[str, Tensor], image: Tensor) -> dict[str, float]:
        """Average over classes the errors of the model and of baselines; classes stand in the order of their places."""
        first: dict[int, int] = {}
        for kind, place in zip(rows["kind"].tolist(), rows["place"].tolist(), strict=True):
            first[kind] = min(place, first.get(kind, place))
        kinds = sorted(first, key=lambda kind: (first[kind], kind))
        column = torch.tensor([kinds.index(kind) for kind in rows["kind"].tolist()], device=self.device)
        predicted = rows["target"].new_full((int(image[-1]) + 1, len(kinds)), torch.nan)
        target = predicted.clone()
        predicted[image, column], target[image, column] = rows["predicted"], rows["target"]
        names = [self.texts.get(kind, str(kind)) for kind in kinds]
        result = class_count_errors(predicted, target, names)
        baselines = {"always_0": torch.zeros_like(target), "always_1": torch.ones_like(target)}
        for name, value in self.constants.items():
            constant = torch.as_tensor(value, dtype=target.dtype, device=target.device)
            if not constant.ndim or constant.shape == target.shape[1:]:
                baselines[name] = constant.expand_as(target)
        baselines["present_1"] = (target > 0).to(target)
        for name, values in baselines.items():
            result |= {f"{name}_{key}": value for key, value in _means(errors_by_class(values, target)).items()}
        return result

    # -- the table ------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._joined("image_key"))

    @property
    def image(self) -> list[str]:
        """Ids of the images of all rows, in the order in which they came."""
        return [self.texts[key] for key in self._joined("image_key").tolist()]

    @property
    def name(self) -> list[str]:
        """Names of all rows; several joined by " + " where the model counts without names."""
        return [self.texts[key] for key in self._joined("kind").tolist()]

    def column(self, *names: str) -> np.ndarray:
        """Return ``(N,)`` float64 numbers of one column, or ``(N, C)`` of several."""
        found = [self._joined(name).cpu().double().numpy() for name in names]
        return found[0] if len(found) == 1 else np.stack(found, 1)

    @property
    def target(self) -> np.ndarray:
        """``(N,)`` true counts, NaN where they are not known."""
        return self.column("target")

    @property
    def predicted(self) -> np.ndarray:
        """``(N,)`` predicted counts."""
        return self.column("predicted")

    @property
    def game(self) -> np.ndarray:
        """``(N, 3)`` grid errors of levels 1 to 3, NaN where the data have no points."""
        return self.column(*GAME_COLUMNS)

    @property
    def interval(self) -> np.ndarray:
        """``(N, 2)`` lower and upper bounds, NaN where the model gives none."""
        return self.column("low", "high")

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any] | Sequence[Any]]) -> CountTable:
        """Build a table from rows: mappings of columns, or values in the order of the file; what a row lacks is NaN.

        Example:
            >>> table = CountTable.of([("a.jpg", "figs", 3, 2.5), {"image": "b.jpg", "name": "figs", "predicted": 1}])
            >>> table.predicted - table.target, table.game.shape
            (array([-0.5,  nan]), (2, 3))
        """
        order = (*SCHEMA, *GAME_COLUMNS)
        table = cls()
        made = [row if isinstance(row, Mapping) else dict(zip(order, row, strict=False)) for row in rows]
        if not made:
            return table
        images, place = [str(row["image"]) for row in made], []
        seen: dict[str, int] = {}
        for image in images:
            seen[image] = seen.get(image, -1) + 1
            place.append(seen[image])
        keys = (table._keys(images), table._keys([str(row["name"]) for row in made]), place)
        for state, values in zip(_KEYS, keys, strict=True):
            table._state(state).append(torch.tensor(values, dtype=torch.int64))
        for column in table.columns:
            numbers = [math.nan if (v := row.get(column)) is None else float(v) for row in made]
            table._state(column).append(torch.tensor(numbers, dtype=torch.float64))
        return table

    def known_cells(self) -> Iterator[dict[str, str | float]]:
        """Give each row as plain data without the cells that are not known; :meth:`of` makes a table of them again."""
        for image, name, numbers in zip(self.image, self.name, self.column(*self.columns).tolist(), strict=True):
            known = {column: v for column, v in zip(self.columns, numbers, strict=True) if not math.isnan(v)}
            yield {"image": image, "name": name, **known}

    def select(self, rows: np.ndarray) -> CountTable:
        """Keep some rows, by a mask or indices."""
        table, index = CountTable(self.constants), torch.from_numpy(np.arange(len(self))[rows])
        table.texts = self.texts
        for state in (*_KEYS, *self.columns):
            table._state(state).append(self._joined(state).cpu()[index])
        return table

    def with_interval(self, bounds: np.ndarray) -> CountTable:
        """Copy the rows with ``(N, 2)`` other bounds."""
        table = self.select(np.arange(len(self)))
        table.low_, table.high_ = ([torch.from_numpy(np.ascontiguousarray(side))] for side in bounds.T)
        return table

    def images(self) -> tuple[list[str], np.ndarray]:
        """List the ids of images in order of first appearance, and for each row the index into them."""
        place: dict[str, int] = {}
        index = [place.setdefault(image, len(place)) for image in self.image]
        return list(place), np.array(index, np.int64)

    def write(self, path: str | Path) -> Path:
        """Write as CSV in one piece; :meth:`read` gives the same table, to float32."""
        numbers = self.column(*SCHEMA[2:], *GAME_COLUMNS).tolist()
        return write_table(
            Path(path),
            (*SCHEMA, *GAME_COLUMNS),
            (
                (image, name, *("" if math.isnan(v) else v for v in row))
                for image, name, row in zip(self.image, self.name, numbers, strict=True)
            ),
        )

    @classmethod
    def read(cls, path: str | Path) -> CountTable:
        """Read a CSV file with the columns of :data:`SCHEMA`, and further ones that this table knows.

        Raises:
            InputError: the file is not there, lacks a column, or holds something that is no number.
        """
        table = read_table(Path(path), exact=True)
        if set(SCHEMA) - set(table.header):
            raise InputError(f"{path}: its columns are {','.join(table.header)}; expected {','.join(SCHEMA)}")
        columns = {name: table.column(name) for name in SCHEMA}
        columns |= {name: table.column(name) for name in GAME_COLUMNS if name in table.header}
        rows = []
        for i in range(len(table.lines)):
            row: dict[str, Any] = {name: unsafe_cell(columns[name][i]) for name in ("image", "name")}
            for name, cells in columns.items():
                try:
                    if name not in row and cells[i]:
                        row[name] = float(cells[i])
                except ValueError as error:
                    raise InputError(f"{table.where(i)}: {name} is {cells[i]!r}; expected a number") from error
            rows.append(row)
        return cls.of(rows)


class PromptErrors(ImageRows):
    """Errors of a text-guided model under wrong prompts, after the questions of PrACo (Ciampi et al., 2024).

    ``absent_ratio``: what the model counts for a name that is not in the image, over what it counts for the one that
    is (sums over images; a model that ignores the text has 1). ``hard_absent_ratio``: the same for names close to
    one that is present, where there are such. ``wrong_over_right``: share of images in which the absent name is
    counted higher than the present one. ``mae`` and ``shuffled_mae``: error with the right name, and with names
    exchanged between images.

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
        """Add ``(B,)`` counts of B images; NaN where an image has no such question.

        Args:
            image_ids: B ids.
            predicted, target: predicted and true count of the name that is asked about.
            absent: predicted count of a name that is not in the image.
            hard_absent: the same for a name that shares a part of its meaning with one in the image.
            shuffled: predicted count with another image's name.
        """
        columns = {"predicted": predicted, "target": target, "absent": absent}
        columns |= {"hard_absent": hard_absent, "shuffled": shuffled}
        self.append(image_ids, None, **{name: value.reshape(-1, 1) for name, value in columns.items()})

    def compute(self) -> dict[str, float]:
        """Compute the figures of the class docstring and ``n``; those that nothing was asked for are left out."""
        rows = self.rows()
        result: dict[str, float] = {"n": len(rows["image_key"])}
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


def reported_counts(counts: Tensor, rounding: bool, clamp: bool) -> Tensor:
    """Post-process counts for reporting: clamp at zero, and round halves to even.

    Lower-Count rounds and does not clamp, Chattopadhyay et al. clamp and round. No metric does either by itself.

    Example:
        >>> reported_counts(torch.tensor([-0.7, 0.5, 1.5]), rounding=True, clamp=True)
        tensor([0., 0., 2.])
    """
    if clamp:
        counts = counts.clamp(min=0)
    return counts.round() + 0.0 if rounding else counts  # + 0.0 makes 0 of the -0 that rounding leaves


def errors_by_class(predicted: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Compute the errors of each class over the images in which it is annotated.

    With p the predicted and t the true count, ``mae`` is the mean of ``|p - t|``, ``rmse`` the root of the mean of
    ``(p - t)^2`` and ``rel_rmse`` that of ``(p - t)^2 / (t + 1)`` (Chattopadhyay et al., CVPR 2017); those that end in
    ``_nz`` run over the images with ``t > 0``.

    Args:
        predicted: ``(N, K)`` counts of N images.
        target: ``(N, K)`` true counts, NaN where a class is not annotated in an image.

    Returns:
        ``(K,)`` tensors: ``mae, rmse, rmse_nz, rel_rmse, rel_rmse_nz`` in float64, NaN for a class that no image
        decides, and over how many images they run: ``n`` and, for those above zero, ``n_nz``.

    Raises:
        InputError: shapes differ, or a true count is negative or infinite.

    Example:
        >>> errors_by_class(torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [3.0]]))["rel_rmse_nz"].item()
        0.5
    """
    predicted, target = checked_counts(predicted, target)
    once = target.new_ones(1, len(target))
    result = {statistic: weighted_errors(predicted, target, statistic, once)[0] for statistic in CLASS_STATISTICS}
    return result | {"n": (~target.isnan()).sum(0), "n_nz": (target > 0).sum(0)}


def class_count_errors(predicted: Tensor, target: Tensor, classes: Sequence[str] | None = None) -> dict[str, float]:
    """Average the errors of each class over the classes.

    A class without an image in which it occurs has no ``_nz`` error; it is left out of those means, and one warning
    says which. Where that leaves no class, the keys are left out too.

    Args:
        predicted, target: as for :func:`errors_by_class`.
        classes: K names for the warning.

    Returns:
        ``mrmse, mrmse_nz, m_rel_rmse, m_rel_rmse_nz``; ``n``, the number of images in which a class is annotated;
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


def checked_counts(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Check ``(images, classes)`` counts, and give both the exact type on one device.

    Raises:
        InputError: shapes differ, or a true count is negative or infinite.
    """
    if predicted.shape != target.shape or target.ndim != 2:
        raise InputError(
            f"predicted counts of shape {tuple(predicted.shape)} for targets of {tuple(target.shape)}; expected "
            "(images, classes) of both"
        )
    target = target.to(exact_dtype(target.device))
    wrong = (target < 0) | target.isinf()
    if bool(wrong.any()):
        i, k = (int(j) for j in wrong.nonzero()[0])
        raise InputError(
            f"the true count of class {k} in image {i} is {target[i, k].item():g}; expected 0 or more, or NaN where "
            "the class is not annotated"
        )
    return predicted.detach().to(target), target


def weighted_errors(predicted: Tensor, target: Tensor, statistic: ClassStatistic, weight: Tensor) -> Tensor:
    """Compute a figure of each class over images that count several times.

    Args:
        predicted, target: as :func:`checked_counts` gives them.
        statistic: one of :data:`CLASS_STATISTICS`.
        weight: ``(R, N)`` how often each image counts in each of R draws.

    Returns:
        ``(R, K)``, NaN where no image decides a class.
    """
    used = target > 0 if statistic.endswith("_nz") else ~target.isnan()
    error = predicted - target
    error = error.abs() if statistic == "mae" else error.square()
    if statistic.startswith("rel"):
        error = error / (target + 1)
    mean = weight @ error.masked_fill(~used, 0) / (weight @ used.to(weight))
    return mean if statistic == "mae" else mean.sqrt()


def _means(by_class: Mapping[str, Tensor]) -> dict[str, float]:
    """Average over the classes that are annotated; a NaN among the predictions stays."""
    result = {}
    for mean, statistic in MEAN_STATISTICS.items():
        defined = by_class["n_nz" if mean.endswith("_nz") else "n"] > 0
        if bool(defined.any()):
            result[mean] = by_class[statistic][defined].mean().item()
    return result


def _warn_of_absent(by_class: Mapping[str, Tensor], classes: Sequence[str] | None, stacklevel: int) -> None:
    """Say which classes the means leave out."""
    unknown, absent = by_class["n"] == 0, (by_class["n"] > 0) & (by_class["n_nz"] == 0)
    for left_out, why in (
        (unknown, "annotated in no image and left out"),
        (absent, "in no image and left out of mrmse_nz and m_rel_rmse_nz"),
    ):
        names = [str(k) if classes is None else classes[k] for k in left_out.nonzero()[:, 0].tolist()]
        if names:
            warnings.warn(
                f"{len(names)} of {len(left_out)} classes are {why}: {listed(names, 10)}",
                stacklevel=stacklevel,
            )
