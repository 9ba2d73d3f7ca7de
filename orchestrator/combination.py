"""COMBINERS: how members' predictions become one. Shape suffixes: M members, N examples, C classes.

Weights are non-negative and sum to 1. A combiner gives scores that rank the classes, and log-probabilities
where it has any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp
from scipy.stats import rankdata

from results.schema import FloatArray, IntArray
from trainables.validation import Probabilities, log_softmax

FIT_STEPS = 200


@dataclass(frozen=True)
class Combined:
    """`log_probs_NC` is None where a combiner gives no probabilities."""

    scores_NC: FloatArray
    log_probs_NC: Probabilities | None


Combiner = Callable[[Probabilities, FloatArray], Combined]


def mean(log_probs_MNC: Probabilities, weights_M: FloatArray) -> Combined:
    """The weighted arithmetic mean of probabilities (a linear opinion pool)."""
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights_M)[:, None, None]
    log_probs_NC = logsumexp(log_probs_MNC + log_weights, axis=0)
    return Combined(log_probs_NC, log_probs_NC)


def geometric(log_probs_MNC: Probabilities, weights_M: FloatArray) -> Combined:
    """The weighted geometric mean of probabilities, normalized (a logarithmic opinion pool)."""
    log_probs_NC = log_softmax(np.tensordot(weights_M, log_probs_MNC, axes=1))
    return Combined(log_probs_NC, log_probs_NC)


def vote(log_probs_MNC: Probabilities, weights_M: FloatArray) -> Combined:
    """The weighted majority of the members' top classes; ties go to the higher mean probability."""
    num_classes = log_probs_MNC.shape[2]
    votes_NC = np.tensordot(weights_M, np.eye(num_classes)[log_probs_MNC.argmax(2)], axes=1)
    # Two different sums of weights differ by far more than rounding to 9 digits and less than 1e-6.
    return Combined(np.round(votes_NC, 9) + 1e-6 * np.exp(mean(log_probs_MNC, weights_M).scores_NC), None)


def rank(log_probs_MNC: Probabilities, weights_M: FloatArray) -> Combined:
    """The weighted sum of each member's class ranks (Borda count); ties go to the higher mean probability.

    Classes a member finds equally likely share the mean of their ranks.
    """
    ranks_MNC = rankdata(log_probs_MNC, axis=2, method="average")
    sums_NC = np.tensordot(weights_M, ranks_MNC, axes=1)
    return Combined(np.round(sums_NC, 9) + 1e-6 * np.exp(mean(log_probs_MNC, weights_M).scores_NC), None)


def max_confidence(log_probs_MNC: Probabilities, weights_M: FloatArray) -> Combined:
    """For each example the probabilities of the member that is surest of its top class; weights do not matter."""
    surest_N = log_probs_MNC[weights_M > 0].max(2).argmax(0)
    log_probs_NC = log_probs_MNC[weights_M > 0][surest_N, np.arange(log_probs_MNC.shape[1])]
    return Combined(log_probs_NC, log_probs_NC)


# `weighted` is the mean with weights fitted on select instead of the selector's.
COMBINERS: dict[str, Combiner] = {
    "mean": mean,
    "weighted": mean,
    "vote": vote,
    "rank": rank,
    "max_confidence": max_confidence,
    "geometric": geometric,
}
FITS_WEIGHTS = frozenset({"weighted"})


def fit_weights(log_probs_MNC: Probabilities, labels_N: IntArray) -> FloatArray:
    """Weights [M] on the simplex that minimize the NLL of the weighted mean.

    Expectation-maximization for mixture proportions (Dempster et al. 1977): the problem is convex, every step
    lowers the NLL, and the weights stay on the simplex.
    """
    likelihood_MN = np.exp(log_probs_MNC[:, np.arange(len(labels_N)), labels_N])
    likelihood_MN = np.maximum(likelihood_MN, np.finfo(np.float64).tiny)
    weights_M = np.full(len(likelihood_MN), 1 / len(likelihood_MN))
    for _ in range(FIT_STEPS):
        responsibility_MN = weights_M[:, None] * likelihood_MN
        weights_M = (responsibility_MN / responsibility_MN.sum(0)).mean(1)
    return weights_M / weights_M.sum()
