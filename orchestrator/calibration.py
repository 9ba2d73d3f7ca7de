"""Temperature scaling of members and of what is pooled from them (Guo et al. 2017).

Shape suffixes: M members, N examples, C classes.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq

from results.schema import FloatArray, IntArray
from trainables.validation import Probabilities, log_softmax

BOUNDS = (0.05, 20.0)
FIRST_STEP = 0.25
PRIOR_SCALE = math.log(2)
"""Standard deviation of log T before the data: without it T falls to its bound where select has no error."""


def tempered(log_probs_NC: Probabilities, temperature: float) -> Probabilities:
    """Log-probabilities of softmax(log p / T). Above 1 softens, below 1 sharpens."""
    return log_softmax(log_probs_NC / temperature)


def fit_temperature(log_probs_NC: FloatArray, labels_N: IntArray) -> float:
    """The most probable temperature of log-probabilities or logits, between 0.05 and 20, under a log-normal prior
    around 1.

    The prior weighs as much as one example whose log-likelihood changes by half a nat when T doubles: hundreds
    of examples with some errors among them outweigh it.
    """
    below_best_NC = log_probs_NC.astype(np.float32)  # with the best class at 0, nothing overflows
    below_best_NC -= below_best_NC.max(1, keepdims=True)
    of_label = float(below_best_NC[np.arange(len(labels_N)), labels_N].sum(dtype=np.float64))

    def slope(log_temperature: float) -> float:
        """Of minus the log posterior in log T."""
        inverse = math.exp(-log_temperature)
        weights_NC = np.exp(below_best_NC * np.float32(inverse))
        expected_N = np.einsum("nc,nc->n", weights_NC, below_best_NC) / weights_NC.sum(1)
        return inverse * (of_label - float(expected_N.sum(dtype=np.float64))) + log_temperature / PRIOR_SCALE**2

    lowest, highest = (math.log(bound) for bound in BOUNDS)
    low = high = 0.0
    step = FIRST_STEP
    if slope(0.0) > 0:  # the best is below
        while low > lowest and slope(low) > 0:
            high, low, step = low, max(lowest, low - step), 2 * step
        return BOUNDS[0] if slope(low) > 0 else math.exp(brentq(slope, low, high, xtol=1e-3))
    while high < highest and slope(high) <= 0:
        low, high, step = high, min(highest, high + step), 2 * step
    return BOUNDS[1] if slope(high) <= 0 else math.exp(brentq(slope, low, high, xtol=1e-3))
