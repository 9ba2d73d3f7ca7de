"""Temperature scaling of members and of what is pooled from them, and Platt scaling of the confidence.

A temperature is fitted for the NLL of all classes (Guo et al. 2017). Of networks that are far from fitting their data
it leaves the top class too unsure, or too sure, so that the confidence is scaled too (Platt 1999; of the top label as
in Gupta & Ramdas 2022). Neither changes which class is the top one.
Shape suffixes: M members, N examples, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq, minimize
from scipy.special import expit

from results.schema import FloatArray, IntArray
from trainables.validation import Probabilities, log_softmax

BOUNDS = (0.05, 20.0)
FIRST_STEP = 0.25
LEAST_LEAD = 1e-5
"""Of the top class over the second one, in log-odds."""
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


@dataclass(frozen=True)
class Confidence:
    """The log-odds of the top class are scaled by `slope`, which is above 0, and moved by `intercept`."""

    slope: float = 1.0
    intercept: float = 0.0

    def scale(self, log_probs_NC: Probabilities) -> Probabilities:
        """Log-probabilities whose top class has the scaled confidence; the others share what is left as before.

        The top class stays just above the second one where scaling would put it below.
        """
        rows, top_N = np.arange(len(log_probs_NC)), log_probs_NC.argmax(1)
        if log_probs_NC.shape[1] < 2:
            return log_probs_NC
        rest_N, second_N = _rest_and_second(log_probs_NC)
        odds_N = self.slope * (log_probs_NC[rows, top_N] - rest_N) + self.intercept
        odds_N = np.maximum(odds_N, second_N - rest_N + LEAST_LEAD)
        scaled_NC = log_probs_NC + (-np.logaddexp(0, odds_N) - rest_N)[:, None]
        scaled_NC[rows, top_N] = -np.logaddexp(0, -odds_N)
        return scaled_NC


UNSCALED = Confidence()


def fit_confidence(log_probs_NC: Probabilities, labels_N: IntArray) -> Confidence:
    """The most probable slope and intercept for whether the top class is right, under priors around no change.

    Both priors have the width of that of the temperature.
    """
    correct_N = (log_probs_NC.argmax(1) == labels_N).astype(np.float64)
    odds_N = (log_probs_NC.max(1) - _rest_and_second(log_probs_NC)[0]).astype(np.float64)

    def objective(parameters: FloatArray) -> tuple[float, FloatArray]:
        slope, intercept = math.exp(parameters[0]), parameters[1]
        scaled_N = slope * odds_N + intercept
        value = np.logaddexp(0, scaled_N).sum() - correct_N @ scaled_N + 0.5 * (parameters**2).sum() / PRIOR_SCALE**2
        residual_N = expit(scaled_N) - correct_N
        slopes = np.array([slope * (residual_N @ odds_N), residual_N.sum()]) + parameters / PRIOR_SCALE**2
        return float(value), slopes

    log_slope, intercept = minimize(objective, np.zeros(2), jac=True, method="L-BFGS-B").x
    return Confidence(math.exp(log_slope), float(intercept))


def _rest_and_second(log_probs_NC: Probabilities) -> tuple[Probabilities, Probabilities]:
    """The logarithms of all but the top class's probability together, and of the second one's, however small."""
    second_N = np.partition(log_probs_NC, -2, axis=1)[:, -2]
    over_second_N = np.exp(np.minimum(log_probs_NC - second_N[:, None], 0)).sum(1) - 1  # the top class counts 1
    return second_N + np.log(over_second_N), second_N
