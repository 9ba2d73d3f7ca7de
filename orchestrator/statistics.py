"""Intervals by paired resampling of examples, every system with the same draws, and an exact test of accuracies.

Shape suffixes: R resamples, N examples, K columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from results.schema import FloatArray

RESAMPLES = 2000
CHUNK = 200
INTERVAL = (2.5, 97.5)


def resampled_means(columns_NK: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Means [R, K] of the columns over R bootstrap resamples of the N examples (Efron 1979)."""
    num_examples = len(columns_NK)
    means = []
    for start in range(0, RESAMPLES, CHUNK):
        draws = rng.integers(0, num_examples, size=(min(CHUNK, RESAMPLES - start), num_examples))
        counts_RN = np.stack([np.bincount(draw, minlength=num_examples) for draw in draws]).astype(columns_NK.dtype)
        means.append(counts_RN @ columns_NK / num_examples)
    return np.concatenate(means)


def interval(values_R: FloatArray) -> tuple[float, float]:
    """The 95% percentile interval."""
    low, high = np.percentile(values_R, INTERVAL)
    return float(low), float(high)


def mcnemar(correct_N: npt.NDArray[np.bool_], other_N: npt.NDArray[np.bool_]) -> float:
    """The exact two-sided p-value that two systems are equally accurate (McNemar 1947, by the binomial distribution).

    Only examples on which one of them is right and the other wrong count; 1 when there are none.
    """
    only_first, only_second = int((correct_N & ~other_N).sum()), int((other_N & ~correct_N).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)
