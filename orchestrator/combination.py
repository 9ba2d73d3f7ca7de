"""COMBINERS: how members' predictions become one, and what of it is fitted on select.

A combiner takes log-probabilities [M, N, C] and weights, non-negative and summing to 1 over the members unless it says
otherwise. It gives scores that rank the classes, and log-probabilities where it has any. Of one member, or of copies of
one, every combiner gives that member's ranking and, where it has any, its probabilities.
Shape suffixes: M members, N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax
from scipy.stats import rankdata

from orchestrator.calibration import UNSCALED, Confidence, fit_confidence, fit_temperature, tempered
from results.schema import FloatArray, IntArray
from trainables.validation import Probabilities, log_softmax

FIT_STEPS = 200
TINY = 1e-37
"""What a smaller probability counts as: 85 nats."""
CLASS_WEIGHT_SCALE = 0.5
"""Prior standard deviation of a class's log weights around those of all classes, which are at least LEAST_WEIGHT."""
LEAST_WEIGHT = 1e-3
STACKING_SCALE = 0.5
"""Prior standard deviation of a stacked member's coefficient around 1 / M."""


@dataclass(frozen=True)
class Combined:
    """`log_probs_NC` is None where a combiner gives no probabilities."""

    scores_NC: FloatArray
    log_probs_NC: Probabilities | None


def as_selected(log_probs_MNC: Probabilities, labels_N: IntArray, weights_M: FloatArray) -> FloatArray:
    """The weights that the selector gave."""
    return weights_M


@dataclass(frozen=True)
class Combiner:
    """`combine(log_probs_MNC, weights)`; `fit(log_probs_MNC, labels_N, weights_M)` gives its weights, from select.

    Weights are [M], or [M, C] where each class has its own.
    """

    combine: Callable[[Probabilities, FloatArray], Combined]
    fit: Callable[[Probabilities, IntArray, FloatArray], FloatArray] = as_selected


def mean(log_probs_MNC: Probabilities, weights_M: FloatArray) -> Combined:
    """The weighted arithmetic mean of probabilities (a linear opinion pool)."""
    log_probs_NC = _log_of_sum(log_probs_MNC, weights_M)
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


def per_class(log_probs_MNC: Probabilities, weights_MC: FloatArray) -> Combined:
    """The mean of probabilities with weights for each class, which sum to 1 over the members; normalized."""
    log_probs_NC = log_softmax(_log_of_sum(log_probs_MNC, weights_MC))
    return Combined(log_probs_NC, log_probs_NC)


def _log_of_sum(log_probs_MNC: Probabilities, weights: FloatArray) -> Probabilities:
    """The logarithm of weighted sums of probabilities, each at least TINY; weights are [M] or [M, C]."""
    total_NC = np.zeros_like(log_probs_MNC[0])
    for log_probs_NC, weight in zip(log_probs_MNC, weights.astype(total_NC.dtype), strict=True):
        total_NC += weight * np.exp(log_probs_NC)
    return np.asarray(np.log(np.maximum(total_NC, TINY)))


def fit_weights(log_probs_MNC: Probabilities, labels_N: IntArray, weights_M: FloatArray | None = None) -> FloatArray:
    """Weights [M] on the simplex that minimize the NLL of the weighted mean, whatever the selector's were.

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


def fit_class_weights(log_probs_MNC: Probabilities, labels_N: IntArray, weights_M: FloatArray) -> FloatArray:
    """Weights [M, C], the columns on the simplex, that minimize the NLL under a prior around those of `fit_weights`.

    The prior is normal in the log weights: what a few examples of a class say does not move its weights far.
    """
    members, examples, classes = log_probs_MNC.shape
    probs_MNC = np.exp(log_probs_MNC)
    of_label_MN = probs_MNC[:, np.arange(examples), labels_N]
    is_label_NC = np.eye(classes)[labels_N]
    start_M1 = np.log(np.maximum(fit_weights(log_probs_MNC, labels_N), LEAST_WEIGHT))[:, None]

    def objective(shifts: FloatArray) -> tuple[float, FloatArray]:
        shifts_MC = shifts.reshape(members, classes)
        weights_MC = softmax(start_M1 + shifts_MC, axis=0)
        label_N = (weights_MC[:, labels_N] * of_label_MN).sum(0) + np.finfo(np.float64).tiny
        total_N = np.einsum("mc,mnc->n", weights_MC, probs_MNC)
        slope_MC = np.einsum("n,mnc->mc", 1 / total_N, probs_MNC) - (of_label_MN / label_N) @ is_label_NC
        through_softmax_MC = weights_MC * (slope_MC - (weights_MC * slope_MC).sum(0))
        value = np.log(total_N).sum() - np.log(label_N).sum() + 0.5 * (shifts**2).sum() / CLASS_WEIGHT_SCALE**2
        return float(value), through_softmax_MC.reshape(-1) + shifts / CLASS_WEIGHT_SCALE**2

    found = minimize(objective, np.zeros(members * classes), jac=True, method="L-BFGS-B")
    weights: FloatArray = softmax(start_M1 + found.x.reshape(members, classes), axis=0)
    return weights


def fit_stacking(log_probs_MNC: Probabilities, labels_N: IntArray, weights_M: FloatArray) -> FloatArray:
    """Coefficients [M] of the members' log-probabilities that minimize the NLL, under a normal prior around 1 / M.

    They sum to 1 and may be negative (multinomial logistic regression on log-probabilities, one coefficient a member,
    whose common scale is left to the temperature).
    """
    members = len(log_probs_MNC)
    of_label_MN = log_probs_MNC[:, np.arange(len(labels_N)), labels_N]

    def coefficients(shifts_M: FloatArray) -> FloatArray:
        return np.asarray(shifts_M - shifts_M.mean() + 1 / members)

    def objective(shifts_M: FloatArray) -> tuple[float, FloatArray]:
        pooled_NC = log_softmax(np.tensordot(coefficients(shifts_M), log_probs_MNC, axes=1))
        expected_M = np.einsum("nc,mnc->m", np.exp(pooled_NC), log_probs_MNC)
        slope_M = expected_M - of_label_MN.sum(1)
        value = -pooled_NC[np.arange(len(labels_N)), labels_N].sum() + 0.5 * (shifts_M**2).sum() / STACKING_SCALE**2
        return float(value), slope_M - slope_M.mean() + shifts_M / STACKING_SCALE**2

    return coefficients(minimize(objective, np.zeros(members), jac=True, method="L-BFGS-B").x)


COMBINERS: dict[str, Combiner] = {
    "mean": Combiner(mean),
    "weighted": Combiner(mean, fit=fit_weights),
    "vote": Combiner(vote),
    "rank": Combiner(rank),
    "max_confidence": Combiner(max_confidence),
    "geometric": Combiner(geometric),
    "stacking": Combiner(geometric, fit=fit_stacking),
    "per_class": Combiner(per_class, fit=fit_class_weights),
}


@dataclass(frozen=True, eq=False)
class Combination:
    """A combiner with everything that was fitted on select; what turns members' predictions into the ensemble's.

    `weights` are [M] or [M, C], as the combiner has them. Each member's probabilities are tempered, then combined, then
    calibrated: tempered once more, and their confidence scaled. `temperature` is None where there are no probabilities.
    """

    combiner: str
    weights: FloatArray
    temperatures_M: FloatArray
    temperature: float | None
    confidence: Confidence = UNSCALED

    @classmethod
    def fit(
        cls,
        combiner: str,
        log_probs_MNC: Probabilities,
        labels_N: IntArray,
        *,
        weights_M: FloatArray,
        temperatures_M: FloatArray,
    ) -> Combination:
        """Fit on select what a combiner fits, then how what it gives is calibrated.

        `log_probs_MNC` have been tempered by `temperatures_M`.
        """
        weights = COMBINERS[combiner].fit(log_probs_MNC, labels_N, weights_M)
        log_probs_NC = COMBINERS[combiner].combine(log_probs_MNC, weights).log_probs_NC
        unfitted = cls(combiner, weights, temperatures_M, None)
        return unfitted if log_probs_NC is None else unfitted.calibrated_on(log_probs_NC, labels_N)

    def calibrated_on(self, log_probs_NC: Probabilities, labels_N: IntArray) -> Combination:
        """The same, calibrated on what it gives on select."""
        temperature = fit_temperature(log_probs_NC, labels_N)
        confidence = fit_confidence(tempered(log_probs_NC, temperature), labels_N)
        return replace(self, temperature=temperature, confidence=confidence)

    def calibrate(self, log_probs_NC: Probabilities) -> Probabilities:
        """Combined log-probabilities, calibrated."""
        assert self.temperature is not None
        return self.confidence.scale(tempered(log_probs_NC, self.temperature))

    def combine(self, log_probs_MNC: Probabilities) -> Combined:
        """The members' predictions as one, calibrated where there are probabilities."""
        return self.combine_tempered(log_softmax(log_probs_MNC / self.temperatures_M[:, None, None]))

    def combine_tempered(self, log_probs_MNC: Probabilities) -> Combined:
        """The same of members' predictions that have been tempered by `temperatures_M`."""
        combined = COMBINERS[self.combiner].combine(log_probs_MNC, self.weights)
        if combined.log_probs_NC is None or self.temperature is None:
            return combined
        calibrated_NC = self.calibrate(combined.log_probs_NC)
        return Combined(calibrated_NC, calibrated_NC)
