"""Temperature scaling of pooled probabilities (Guo et al. 2017). Shape suffixes: N examples, C classes."""

from __future__ import annotations

import math

from scipy.optimize import minimize_scalar

from results.schema import IntArray
from trainables.validation import Probabilities, log_softmax, nll

BOUNDS = (0.05, 20.0)
PRIOR_SCALE = math.log(2)
"""Standard deviation of log T before the data: without it T falls to its bound where select has no error."""


def tempered(log_probs_NC: Probabilities, temperature: float) -> Probabilities:
    """Log-probabilities of softmax(log p / T). Above 1 softens, below 1 sharpens."""
    return log_softmax(log_probs_NC / temperature)


def fit_temperature(log_probs_NC: Probabilities, labels_N: IntArray) -> float:
    """The most probable temperature, between 0.05 and 20, under a log-normal prior around 1.

    The prior weighs as much as one example whose log-likelihood changes by half a nat when T doubles: hundreds
    of examples with some errors among them outweigh it.
    """

    def objective(log_temperature: float) -> float:
        prior = 0.5 * (log_temperature / PRIOR_SCALE) ** 2
        return len(labels_N) * nll(tempered(log_probs_NC, math.exp(log_temperature)), labels_N) + prior

    low, high = (math.log(bound) for bound in BOUNDS)
    return math.exp(minimize_scalar(objective, bounds=(low, high), method="bounded").x)
