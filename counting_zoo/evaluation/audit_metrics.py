"""Figures of an audit, by which a count follows its prompt or does not: pure functions of arrays.

PrACo's negative-label and mosaic tests and their multi-class and localised variants (Ciampi et al., arXiv 2409.15953;
ciampluca/PrACo: benchmark/statistics_extractor.py, multiclass_statistics_extractor.py), PairTally's columns for two
classes in one image (arXiv 2509.13939), and checks that need no labels. NaN stands for what was not asked and is
skipped; a figure that nothing is known of is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Figures = dict[str, float]


DECIMALS = 2
"""To which ``official`` figures round every prediction, as PrACo's files of predictions do."""


FOLLOWS_RATIO, IGNORES_RATIO = 0.25, 0.75
"""A wrong prompt counts at most this part of what the right one does where the count follows the text; above the second
it does not."""


FOLLOWS_LOSS, IGNORES_LOSS = 1.5, 1.1
"""With wrong prompts the error is at least this many times the error with the right ones where the count follows the
text; below the second it does not."""


PRESENT_ABOVE = 0.5
"""A name is said to be in an image when its count is above this."""


def negative_label(
    counts: np.ndarray,
    positive: np.ndarray,
    truth: np.ndarray,
    *,
    absent: np.ndarray | None = None,
    official: bool = False,
) -> Figures:
    """Score PrACo's negative-label test: every image is asked about its own name and about others.

    Args:
        counts: ``(N, C)`` predicted count of each name in each image.
        positive: ``(N,)`` which name is the image's own.
        truth: ``(N,)`` its true count.
        absent: ``(N, C)`` names that are known to be absent; all but the image's own if ``None``, as in PrACo.
        official: round predictions as PrACo does.

    Returns:
        ``avg_np``: mean of the own count over the true one; ``nmn``: mean of the mean absent count over the true one,
        0 at best; ``pccn``: percentage of images whose own count is nearer to the truth than the mean absent one;
        ``mae`` and ``rmse`` of the own count; ``n`` images, of which ``n_empty`` have a true count of 0 and enter
        neither ``avg_np`` nor ``nmn``.

    Example:
        >>> figures = negative_label(np.array([[8.0, 2.0, 4.0]]), np.array([0]), np.array([10.0]))
        >>> figures["avg_np"], figures["nmn"], figures["pccn"], figures["mae"]
        (0.8, 0.3, 100.0, 2.0)
    """
    counts, truth = _rounded(counts, official), np.asarray(truth, np.float64)
    own = np.asarray(positive)[:, None] == np.arange(counts.shape[1])  # (N, C)
    right = np.where(own, counts, 0).sum(1)
    wrong = mean(np.where(~own if absent is None else absent & ~own, counts, np.nan), 1)
    true = np.where(truth > 0, truth, np.nan)
    own_error = abs(truth - right)
    return {
        "n": len(counts),
        "n_empty": int((truth == 0).sum()),
        "avg_np": float(mean(right / true)),
        "nmn": float(mean(wrong / true)),
        "pccn": 100 * float(mean(_below(own_error, abs(truth - wrong)))),
        "mae": float(mean(own_error)),
        "rmse": math.sqrt(float(mean(own_error**2))),
    }


def multi_class_negative_label(counts: np.ndarray, truth: np.ndarray, *, official: bool = False) -> Figures:
    """Score PrACo++'s negative-label test for images that hold several classes.

    Macro figures are means over images; micro ones pool all names of all images. Images that hold none or all of
    the names cannot be asked both ways and are left out.

    Args:
        counts: ``(N, C)`` predicted counts.
        truth: ``(N, C)`` true counts; a name with 0 is absent.
        official: round predictions as PrACo does.

    Returns:
        ``mnp_*``: mean count of absent names; ``nmn_*``: the same over the sum of the true counts; ``mae_*`` and
        ``rmse_*`` of the names that are present; ``pccn_one_at_a_time`` and ``pccn_mean_truth``: percentage of images
        whose mean error is below the mean distance of absent counts from each true count, and from their mean; ``n``
        and ``n_left_out`` images.
    """
    counts, truth = _rounded(counts, official), np.asarray(truth, np.float64)
    usable = (truth > 0).any(1) & (truth == 0).any(1)
    left_out = int((~usable).sum())
    counts, truth = counts[usable], truth[usable]
    wrong = np.where(truth == 0, counts, np.nan)
    true = np.where(truth > 0, truth, np.nan)
    error = abs(counts - true)
    total = np.nansum(true, 1)
    n_wrong = (~np.isnan(wrong)).sum(1)
    # (N, C, C) in blocks of images, which keep memory in bounds.
    blocks = zip(np.array_split(true, len(true) // 64 + 1), np.array_split(wrong, len(true) // 64 + 1), strict=True)
    each = [mean(mean(abs(t[:, :, None] - w[:, None]), 2), 1) for t, w in blocks]
    apart = mean(abs(mean(true, 1)[:, None] - wrong), 1)
    own = mean(error, 1)
    pooled = float((n_wrong * total).sum())
    return {
        "n": len(counts),
        "n_left_out": left_out,
        "mnp_macro": float(mean(mean(wrong, 1))),
        "mnp_micro": float(mean(wrong)),
        "nmn_macro": float(mean(mean(wrong, 1) / total)),
        "nmn_micro": float(np.nansum(wrong)) / pooled if pooled else math.nan,
        "pccn_one_at_a_time": 100 * float(mean(_below(own, np.concatenate(each)))),
        "pccn_mean_truth": 100 * float(mean(_below(own, apart))),
        "mae_macro": float(mean(own)),
        "mae_micro": float(mean(error)),
        "rmse_macro": float(mean(np.sqrt(mean(error**2, 1)))),
        "rmse_micro": math.sqrt(float(mean(error**2))),
    }


def mosaic_scores(upper: np.ndarray, lower: np.ndarray, truth: np.ndarray, *, official: bool = False) -> Figures:
    """Score PrACo's mosaic test: an image stands above one without its name, and is asked about its own.

    Args:
        upper, lower: ``(N, C)`` what is counted in either half, for each image and each class below it; NaN where
            there is no such mosaic. Negative counts are taken for 0.
        truth: ``(N,)`` true count of the upper half.
        official: round predictions as PrACo does, and take a mosaic that is not there (an image's own class) for one
            with full recall, as its file does by comparing with NaN.

    Returns:
        ``cnt_r``: mean of ``min(u, c) / c``; ``cnt_p``: of ``min(u, c) / (u + l)``; ``cnt_f1``: of their harmonic mean;
        over the classes of an image, then over images. What has a denominator of 0 is skipped, as in PrACo: nothing
        counted has no precision, and nothing rightly counted no F1; ``cnt_f1_zeros``: with an F1 of 0 there instead.
        ``n`` mosaics, of which ``n_without_f1``.

    Example:
        >>> figures = mosaic_scores(np.array([[8.0]]), np.array([[2.0]]), np.array([10.0]))
        >>> figures["cnt_p"], figures["cnt_r"], round(figures["cnt_f1"], 6)
        (0.8, 0.8, 0.8)
    """
    upper, lower = (np.maximum(_rounded(half, official), 0) for half in (upper, lower))
    true = np.where(np.asarray(truth) > 0, truth, np.nan)[:, None]
    return _matched(np.minimum(upper, true), upper + lower, true, full_recall_unasked=official)


def localised_mosaic_scores(tp: np.ndarray, fp: np.ndarray, truth: np.ndarray) -> Figures:
    """Score the mosaic test with counts compared cell by cell (PrACo++).

    Args:
        tp, fp: ``(N, C)`` of :func:`grid_matches`; NaN where there is no such mosaic.
        truth: ``(N,)`` true count of the upper half.

    Returns:
        as :func:`mosaic_scores`.
    """
    true = np.where(np.asarray(truth) > 0, truth, np.nan)[:, None]
    tp = np.where(np.isnan(true), np.nan, tp)
    return _matched(tp, tp + fp, true)


def grid_matches(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum the counts in the cells of a grid that objects match, and those in excess.

    Args:
        predicted, truth: ``(..., g, g)``; negative predictions are taken for 0.

    Returns:
        ``(...,)`` sums of ``min(predicted, truth)`` and of ``max(0, predicted - truth)``.

    Example:
        >>> [x.tolist() for x in grid_matches(np.array([[3.0, 1.0]]), np.array([[2.0, 2.0]]))]
        [3.0, 1.0]
    """
    predicted = np.maximum(predicted, 0)
    return np.minimum(predicted, truth).sum((-2, -1)), np.maximum(predicted - truth, 0).sum((-2, -1))


def pair_figures(a: np.ndarray, b: np.ndarray, f_a: np.ndarray, f_ab: np.ndarray) -> Figures:
    """Compute PairTally's six columns, for images with two annotated classes A and B.

    Args:
        a, b: ``(N,)`` true counts.
        f_a: ``(N,)`` count when asked for A.
        f_ab: ``(N,)`` count when asked for both; for the zoo's models the sum of the two counts when both names are
            asked together.

    Returns:
        means of ``|f(A) - a|``, ``|f(A+B) - (a+b)|``, ``|f(A) - (a+b)|`` and ``|f(A) - f(A+B)|``; ``over``: percentage
        with ``f(A) > a``; ``nearer_both``: percentage with ``f(A)`` nearer to ``a+b`` than to ``a``; ``n`` images.
    """
    a, b, f_a, f_ab = (np.asarray(values, np.float64) for values in (a, b, f_a, f_ab))
    own, merged = abs(f_a - a), abs(f_a - (a + b))
    return {
        "n": len(a),
        "error_a": float(mean(own)),
        "error_both": float(mean(abs(f_ab - (a + b)))),
        "a_from_both": float(mean(merged)),
        "change": float(mean(abs(f_a - f_ab))),
        "over": 100 * float(mean(_below(a, f_a))),
        "nearer_both": 100 * float(mean(_below(merged, own))),
    }


def count_ratio(counts: np.ndarray, right: np.ndarray) -> float:
    """Divide the counts of some prompts by those of the right one: sums over the images that have both.

    Args:
        counts: ``(N, P)`` of the prompts; an image's mean enters.
        right: ``(N,)``.

    Example:
        >>> count_ratio(np.array([[1.0, 3.0], [np.nan, 0.0]]), np.array([5.0, 3.0]))
        0.25
    """
    means = mean(np.asarray(counts, np.float64), 1)
    both = ~np.isnan(means + right)
    total = float(np.sum(right[both]))
    return float(means[both].sum()) / total if total > 0 else math.nan


def spread(counts: np.ndarray) -> Figures:
    """Compute the coefficient of variation, within an image, of counts of prompts that mean the same.

    Args:
        counts: ``(N, P)``, NaN where an image has fewer.

    Returns:
        ``mean`` and ``p95`` over the ``n`` images that have at least two prompts and a mean count above 0.
    """
    counts = np.asarray(counts, np.float64)
    centre = mean(counts, 1)
    deviation = np.sqrt(mean((counts - centre[:, None]) ** 2, 1))
    usable = ((~np.isnan(counts)).sum(1) > 1) & (centre > 0)
    variation = deviation[usable] / centre[usable]
    if not len(variation):
        return {"n": 0, "mean": math.nan, "p95": math.nan}
    return {"n": len(variation), "mean": float(variation.mean()), "p95": float(np.percentile(variation, 95))}


def false_positive_share(counts: np.ndarray, absent: np.ndarray, threshold: float = PRESENT_ABOVE) -> float:
    """Compute the share of absent names that are counted above a threshold.

    Args:
        counts: ``(N, C)``.
        absent: ``(N, C)`` bool.
        threshold: of the count.
    """
    return float(mean(np.where(absent & ~np.isnan(counts), counts > threshold, np.nan)))


Follows = Literal["yes", "partly", "no", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """Verdict of an audit: the count follows the text, in part, or does not.

    Args:
        follows: ``yes``, ``partly``, ``no``, or ``unknown`` where the data cannot tell.
        sentence: the same in plain words, with the numbers.
        ratio: count of absent names over count of the right one.
        loss: error with wrong names over error with the right one.
        mae, shuffled_mae: the two errors.
    """

    follows: Follows
    sentence: str
    ratio: float
    loss: float
    mae: float
    shuffled_mae: float


def verdict(ratio: float, mae: float, shuffled_mae: float) -> Verdict:
    """Classify by the two figures and the thresholds of this module.

    Args:
        ratio: of :func:`count_ratio` for absent names.
        mae: error with the right names.
        shuffled_mae: error of the same images with other names.

    Example:
        >>> verdict(0.05, 2.0, 20.0).follows, verdict(0.9, 2.0, 2.1).follows, verdict(0.5, 2.0, 8.0).follows
        ('yes', 'no', 'partly')
    """
    loss = shuffled_mae / mae if mae > 0 else math.inf if shuffled_mae > 0 else math.nan
    follows: Follows = "partly"
    if math.isnan(ratio) or math.isnan(loss):
        follows, said = "unknown", "Whether the count follows the text cannot be said"
    elif ratio >= IGNORES_RATIO or loss < IGNORES_LOSS:
        follows, said = "no", "The count does not follow the text"
    elif ratio <= FOLLOWS_RATIO and loss >= FOLLOWS_LOSS:
        follows, said = "yes", "The count follows the text"
    else:
        said = "The count follows the text partly"
    numbers = (
        f"an absent name counts {ratio:.2f} times what the right one does (follows: at most {FOLLOWS_RATIO}, does not: "
        f"{IGNORES_RATIO} and more), and with other names the mean error grows from {mae:.2f} to {shuffled_mae:.2f}, "
        f"{loss:.2f} times as much (follows: at least {FOLLOWS_LOSS}, does not: below {IGNORES_LOSS})"
    )
    reason = "the data have no absent names to ask about, or nothing was counted with the right ones"
    sentence = f"{said}: {reason if follows == 'unknown' else numbers}."
    return Verdict(follows, sentence, ratio, loss, mae, shuffled_mae)


def shuffled_error(counts: np.ndarray, positive: np.ndarray, truth: np.ndarray) -> float:
    """Compute the mean absolute error with the names of other classes, over all of them.

    Args:
        counts: ``(N, C)``.
        positive: ``(N,)`` which name is the image's own.
        truth: ``(N,)`` its true count.
    """
    own = np.asarray(positive)[:, None] == np.arange(counts.shape[1])
    return float(mean(mean(np.where(own, np.nan, abs(counts - truth[:, None])), 1)))


def mean(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Average without the NaN; NaN where there is nothing else."""
    known = ~np.isnan(values)
    n = known.sum(axis)
    return np.where(n > 0, np.where(known, values, 0).sum(axis) / np.maximum(n, 1), np.nan)


def _below(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compare: 1 where ``a < b``, 0 where not, NaN where one of them is."""
    return np.where(np.isnan(a) | np.isnan(b), np.nan, a < b)


def _rounded(values: np.ndarray, official: bool) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.round(values, DECIMALS) if official else values


def _matched(tp: np.ndarray, counted: np.ndarray, true: np.ndarray, *, full_recall_unasked: bool = False) -> Figures:
    """Compute recall, precision and F1 of ``(N, C)`` matches, averaged over classes and then over images."""
    recall = tp / true
    precision = tp / np.where(counted > 0, counted, np.nan)
    both = precision + recall
    f1 = 2 * precision * recall / np.where(both > 0, both, np.nan)
    asked = ~np.isnan(recall)
    if full_recall_unasked:
        recall = np.where(np.isnan(tp) & ~np.isnan(true), 1.0, recall)
    return {
        "n": int(asked.sum()),
        "n_without_f1": int((asked & np.isnan(f1)).sum()),
        "cnt_p": float(mean(mean(precision, 1))),
        "cnt_r": float(mean(mean(recall, 1))),
        "cnt_f1": float(mean(mean(f1, 1))),
        "cnt_f1_zeros": float(mean(mean(np.where(asked & np.isnan(f1), 0.0, f1), 1))),
    }
