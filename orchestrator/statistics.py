"""95% intervals of means over examples, and of paired differences of means; an exact test of accuracies.

How often the intervals cover: `benchmarks/interval_coverage.py`. (Percentile intervals of resampled means, which these
have replaced, were found too short for a hundred examples, and for the NLL of five hundred.)
Shape suffixes: N examples.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm, t

from results.schema import FloatArray

Z = float(norm.ppf(0.975))
LEAST_SKEWNESS = 1e-6
"""Below it a mean's distribution counts as symmetric."""


def fraction_interval(values_N: FloatArray) -> tuple[float, float]:
    """Of the mean of zeros and ones (Wilson 1927); it has a width where all are equal, as resampling has not.

    Of fractions in between, as means over draws are, it is too wide rather than too narrow: they vary less.
    """
    count, mean = len(values_N), float(values_N.mean())
    centre = mean + Z**2 / (2 * count)
    reach = Z * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
    shrinkage = 1 + Z**2 / count
    return max(0.0, (centre - reach) / shrinkage), min(1.0, (centre + reach) / shrinkage)


def fraction_gain_interval(gains_N: FloatArray) -> tuple[float, float]:
    """Of the mean of paired differences between zeros and ones (Agresti & Min 2005).

    Two examples are added, half a one to each way in which two systems can be right or wrong together: the interval
    has a width where the systems never differ. Differences of fractions in between are allowed.
    """
    count = len(gains_N) + 2
    mean = float(gains_N.sum()) / count
    reach = Z * math.sqrt((float((gains_N**2).sum()) + 1) / count - mean**2) / math.sqrt(count)
    return max(-1.0, mean - reach), min(1.0, mean + reach)


def bounded_loss_interval(losses_N: FloatArray) -> tuple[float, float]:
    """Of the mean of losses, none of them negative or large, most of them small.

    Student's statistic, with its skewness removed by a monotone cubic transformation (Hall 1992, "On the removal of
    skewness by transformation"): it reaches further up than down.
    """
    return _skewed_interval(losses_N, Z)


def loss_interval(losses_N: FloatArray) -> tuple[float, float]:
    """The same of losses without a bound, a few of which may be most of the sum.

    The variance is then less certain than that of as many normal values, by the kurtosis (O'Neill 2014, "Some useful
    moment results in sampling problems"), and Student's quantile is that of so many fewer degrees of freedom. No
    interval foresees large losses of which the examples hold none: where fewer than three examples are predicted
    wrongly it covers far less often than 95%.
    """
    return _skewed_interval(losses_N, _quantile(losses_N))


def _quantile(values_N: FloatArray) -> float:
    """Student's, with as many degrees of freedom as the values' kurtosis leaves their variance."""
    count, deviations_N = len(values_N), values_N - values_N.mean()
    variance = float((deviations_N**2).mean())
    if variance == 0:
        return Z
    kurtosis = float((deviations_N**4).mean()) / variance**2
    freedom = 2 * count / (kurtosis - (count - 3) / (count - 1))
    return float(t.ppf(0.975, min(freedom, count - 1)))


def _skewed_interval(losses_N: FloatArray, quantile: float) -> tuple[float, float]:
    count, mean, deviation = len(losses_N), float(losses_N.mean()), float(losses_N.std())
    if deviation == 0:
        return mean, mean
    skewness = float(((losses_N - mean) ** 3).mean()) / deviation**3
    reach = quantile / math.sqrt(count)
    low, high = (mean - deviation * _unskewed(signed, skewness, count) for signed in (reach, -reach))
    return max(0.0, low), high


def _unskewed(quantile: float, skewness: float, count: int) -> float:
    """What Student's statistic, over the root of the count, is where its transformation is `quantile`, likewise."""
    if abs(skewness) < LEAST_SKEWNESS:
        return quantile
    return 3 / skewness * (math.cbrt(1 + skewness * (quantile - skewness / (6 * count))) - 1)


def difference_interval(differences_N: FloatArray) -> tuple[float, float]:
    """Of the mean of paired differences of losses (Student 1908), whose skewness mostly cancels, but not their heavy
    tails: degrees of freedom are counted as in `loss_interval`. Of a single difference it is infinite."""
    count, mean = len(differences_N), float(differences_N.mean())
    if count < 2:
        return -math.inf, math.inf
    reach = _quantile(differences_N) * float(differences_N.std(ddof=1)) / math.sqrt(count)
    return mean - reach, mean + reach


def mcnemar(correct_N: npt.NDArray[np.bool_], other_N: npt.NDArray[np.bool_]) -> float:
    """The exact two-sided p-value that two systems are equally accurate (McNemar 1947, by the binomial distribution).

    Only examples on which one of them is right and the other wrong count; 1 when there are none.
    """
    only_first, only_second = int((correct_N & ~other_N).sum()), int((other_N & ~correct_N).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)
