"""The bins that the reference ships, by which its older files, which carry no bins, can still be read."""

from __future__ import annotations

from counting_zoo.errors import WeightsError
from counting_zoo.models.clip_ebc.bins import Bins

# (reduction, truncation, data set): the representative of the last bin (configs/reduction_{8,16,32}.json).
_LAST = {
    (8, 2, "sha"): 2.24479, (8, 2, "shb"): 2.15171, (8, 2, "nwpu"): 2.10737, (8, 2, "qnrf"): 2.09296,
    (8, 2, "jhu"): 2.18589, (8, 4, "sha"): 4.29992, (8, 4, "shb"): 4.41009, (8, 4, "nwpu"): 4.21931,
    (8, 4, "qnrf"): 4.21937, (8, 4, "jhu"): 4.24058, (8, 11, "qnrf"): 11.0, (16, 8, "qnrf"): 9.23349,
    (32, 19, "qnrf"): 23.01897,
}  # fmt: skip
# The representatives of bins that hold several counts, where the reference has such bins.
_WIDE = {
    (16, 8, "qnrf", "dynamic"): [4.29278, 6.31441, 9.23349],
    (16, 8, "qnrf", "coarse"): [1.14978, 3.27641, 5.30609, 8.11466],
    (32, 19, "qnrf", "dynamic"): [10.42903, 12.4332, 14.43341, 16.43521, 21.93548],
    (32, 19, "qnrf", "coarse"): [
        1.23498, 3.36108, 5.40298, 7.41406, 9.42356, 11.43094, 13.43244, 15.43697, 17.43759, 23.01897,
    ],
}  # fmt: skip
DATA_SETS = ("sha", "shb", "nwpu", "qnrf", "jhu")


def published_bins(
    reduction: int, truncation: int, dataset: str, granularity: str = "fine", anchors: str = "average"
) -> tuple[Bins, list[float]]:
    """Bins and representatives of the reference's configs/reduction_*.json.

    Args:
        reduction: side of a block in pixels.
        truncation: the reference's name for the largest count that has a bin of its own.
        dataset: ``sha``, ``shb``, ``nwpu``, ``qnrf`` or ``jhu``.
        granularity: ``fine``, ``dynamic`` or ``coarse``.
        anchors: ``average`` or ``middle``.

    Raises:
        WeightsError: the reference has no such table; lists those it has.

    Example:
        >>> published_bins(8, 2, "shb")[1]
        [0.0, 1.0, 2.15171]
    """
    bins = Bins.make(granularity, truncation)  # type: ignore[arg-type]
    key = (reduction, truncation, dataset)
    wide = [_LAST[key]] if granularity == "fine" and key in _LAST else _WIDE.get((*key, granularity))
    if wide is None:
        known = sorted((*_LAST, *_WIDE), key=str)
        raise WeightsError(f"the reference has no bins for {(*key, granularity)}; it has {known}")
    values = bins.middle()
    if anchors == "average":
        values[-len(wide) :] = wide
    return bins, values


__all__ = ["DATA_SETS", "published_bins"]
