"""Percentile intervals of means by paired resampling (Efron 1979), of seeds or configurations rather than images.

Shape suffixes: R resamples, N items, K columns.
"""

from __future__ import annotations

import numpy as np

from results.schema import FloatArray

RESAMPLES = 2000
CHUNK = 200
INTERVAL = (2.5, 97.5)


def resampled_means(columns_NK: FloatArray, rng: np.random.Generator) -> FloatArray:
    """Means [R, K] of the columns over R resamples of the N items, the same for all columns."""
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
