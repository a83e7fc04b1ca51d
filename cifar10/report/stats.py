"""Statistics for reports: confusion matrix, confidence intervals, calibration, mean and spread over runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

from cifar10.run.predictions import Predictions

Z_95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution
BINS = 15  # equal-width confidence bins, as in Guo et al. 2017, "On Calibration of Modern Neural Networks"


# --- one model's predictions ----------------------------------------------------------------------------------------------


def confusion(predictions: Predictions) -> np.ndarray:
    """Confusion matrix: int64 [C, C], true classes in rows, predicted ones in columns."""
    classes = predictions.logits.shape[1]
    return np.bincount(predictions.labels * classes + predictions.predicted, minlength=classes**2).reshape(classes, classes)


def most_confused(counts: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The most frequent confusions in a confusion matrix: (true class, predicted class, images), most frequent first."""
    wrong = counts - np.diag(np.diag(counts))
    pairs = (divmod(int(place), len(wrong)) for place in np.argsort(-wrong, axis=None, kind="stable")[:most])
    return [(true, predicted, int(wrong[true, predicted])) for true, predicted in pairs if wrong[true, predicted]]


def wilson(successes: np.ndarray, trials: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95% confidence interval of a proportion; 0..1 for zero trials."""
    n = np.maximum(trials, 1)
    share = successes / n
    middle = (share + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
    half = Z_95 / (1 + Z_95**2 / n) * np.sqrt(share * (1 - share) / n + Z_95**2 / (4 * n**2))
    tried = np.asarray(trials) > 0
    return np.where(tried, np.clip(middle - half, 0, 1), 0.0), np.where(tried, np.clip(middle + half, 0, 1), 1.0)


@dataclass(frozen=True)
class Calibration:
    """Predictions in BINS bins of confidence: count, mean confidence, accuracy; the last two are NaN for empty bins."""

    counts: np.ndarray  # int64 [BINS]
    confidence: np.ndarray  # float64 [BINS]
    accuracy: np.ndarray  # float64 [BINS]

    @property
    def error(self) -> float:
        """Expected calibration error (ECE): |accuracy - confidence|, averaged over the images."""
        return float(np.nansum(self.counts * np.abs(self.accuracy - self.confidence)) / self.counts.sum())


def calibration(predictions: Predictions) -> Calibration:
    """Bin predictions by the probability of the predicted class."""
    confidence = predictions.probabilities.max(axis=1)
    right = predictions.predicted == predictions.labels
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    n = np.where(counts, counts, np.nan)
    return Calibration(counts, np.bincount(bins, confidence, BINS) / n, np.bincount(bins, right, BINS) / n)


def worst_mistakes(predictions: Predictions, count: int) -> np.ndarray:
    """Indices of the most confident mistakes, worst first: int64 [<= count]."""
    wrong = np.flatnonzero(predictions.predicted != predictions.labels)
    confidence = predictions.probabilities[wrong].max(axis=1)
    return wrong[np.argsort(-confidence, kind="stable")][:count]


# --- several runs -----------------------------------------------------------------------------------------------------


def t_95(df: int) -> float:
    """Two-sided 95% quantile of Student's distribution with `df` degrees of freedom: its density, integrated up to 20.

    >>> [round(t_95(df), 3) for df in (1, 2, 3, 4, 9, 30)]
    [12.706, 4.303, 3.182, 2.776, 2.262, 2.042]
    """
    t, step = np.linspace(0, 20, 200_001, retstep=True)
    at_zero = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    density = at_zero * (1 + t**2 / df) ** (-(df + 1) / 2)
    within = (2 * np.cumsum(density) - density - density[0]) * step  # P(|T| <= t), by trapezoids
    return float(np.interp(0.95, within, t))


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation, and half width of the mean's 95% confidence interval; the last two need n > 1."""

    n: int
    mean: float
    sd: float | None
    half_width: float | None


def spread(values: Sequence[float]) -> Spread | None:
    """The mean and spread of some values; None if there are none."""
    if len(values) < 2:
        return Spread(1, values[0], None, None) if values else None
    n, sd = len(values), stdev(values)
    return Spread(n, fmean(values), sd, t_95(n - 1) * sd / math.sqrt(n))
