"""How good predictions are: columns of per-example contributions whose means are the metrics, and figures of
calibration that are no such means.

Shape suffixes: N examples, C classes, B bins of confidence, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from results.schema import FloatArray, IntArray
from trainables.validation import ECE_BINS, Probabilities, calibration_gaps

MEANS = ("accuracy", "top5_accuracy", "nll", "brier", "ece")
"""Metrics that follow from means of columns."""
OTHERS = ("ece_floor", "ece_equal_mass", "ece_equal_mass_floor", "auroc")
METRICS = (*MEANS, *OTHERS)
HIGHER_IS_BETTER = {"accuracy": True, "top5_accuracy": True, "nll": False, "brier": False, "ece": False, "auroc": True}
FLOOR_RESAMPLES = 400
FLOOR_PERCENTILE = 95


@dataclass(frozen=True, eq=False)
class Scored:
    """One system's contributions on one split.

    The columns of `columns_NK` are those of `names`, then, when there are probabilities, those of
    `calibration_gaps`. ECE is the sum of the absolute means of these. `confidence_N`: None without probabilities.
    """

    names: tuple[str, ...]
    columns_NK: FloatArray
    correct_N: npt.NDArray[np.bool_]
    confidence_N: FloatArray | None

    def metrics(self, means_K: FloatArray) -> dict[str, FloatArray]:
        """The metrics behind means of the columns, [..., K]; whatever axes come before stay."""
        values = {name: means_K[..., i] for i, name in enumerate(self.names)}
        if "nll" in values:
            values["ece"] = np.abs(means_K[..., len(self.names) :]).sum(-1)
        return values

    def others(self, rng: np.random.Generator) -> dict[str, float | None]:
        """The metrics that are no means; empty without probabilities."""
        if self.confidence_N is None:
            return {}
        width_N, mass_N = equal_width_bins(self.confidence_N), equal_mass_bins(self.confidence_N)
        return {
            "ece_floor": noise_floor(self.confidence_N, width_N, rng),
            "ece_equal_mass": calibration_error(self.confidence_N, self.correct_N, mass_N),
            "ece_equal_mass_floor": noise_floor(self.confidence_N, mass_N, rng),
            "auroc": auroc(self.confidence_N, self.correct_N),
        }


def score(scores_NC: FloatArray, labels_N: IntArray, *, log_probs_NC: Probabilities | None) -> Scored:
    """Contributions of a system that ranks classes by `scores_NC`; NLL (nats), Brier and ECE need probabilities.

    Brier is the sum over classes of squared differences (Brier 1950), 0 to 2.
    """
    rows = np.arange(len(labels_N))
    correct_N = scores_NC.argmax(1) == labels_N
    of_label_N1 = scores_NC[rows, labels_N][:, None]
    # Of equal scores the first class wins, as argmax has it.
    wins_tie_NC = (scores_NC == of_label_N1) & (np.arange(scores_NC.shape[1]) < labels_N[:, None])
    rank_N = ((scores_NC > of_label_N1) | wins_tie_NC).sum(1)
    columns: dict[str, FloatArray] = {
        "accuracy": correct_N.astype(np.float64),
        "top5_accuracy": (rank_N < 5).astype(np.float64),
    }
    if log_probs_NC is None:
        return Scored(tuple(columns), np.stack(list(columns.values()), axis=1), correct_N, None)
    probs_NC = np.exp(log_probs_NC)
    columns["nll"] = -log_probs_NC[rows, labels_N]
    columns["brier"] = (probs_NC**2).sum(1) - 2 * probs_NC[rows, labels_N] + 1
    gaps_NB = calibration_gaps(probs_NC, labels_N)
    columns_NK = np.concatenate([np.stack(list(columns.values()), axis=1), gaps_NB], axis=1)
    return Scored(tuple(columns), columns_NK, correct_N, probs_NC.max(1))


def equal_width_bins(confidence_N: FloatArray) -> IntArray:
    """The bin of each confidence among 15 of equal width over (0, 1], as ECE has them."""
    return np.clip(np.ceil(confidence_N * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)


def equal_mass_bins(confidence_N: FloatArray) -> IntArray:
    """The bin of each confidence among 15 that hold equally many (Nguyen & O'Connor 2015)."""
    order = confidence_N.argsort(kind="stable")
    bins_N = np.empty(len(confidence_N), dtype=np.int64)
    bins_N[order] = np.arange(len(confidence_N)) * ECE_BINS // len(confidence_N)
    return bins_N


def calibration_error(confidence_N: FloatArray, correct_N: npt.NDArray[np.bool_], bins_N: IntArray) -> float:
    """The sum over bins of |correctness less confidence|, summed within the bin, over the number of examples."""
    gaps_B = np.bincount(bins_N, weights=correct_N - confidence_N, minlength=ECE_BINS)
    return float(np.abs(gaps_B).sum() / len(confidence_N))


def noise_floor(confidence_N: FloatArray, bins_N: IntArray, rng: np.random.Generator) -> float:
    """The 95th percentile of the calibration error that a perfectly calibrated system of these confidences would show.

    Being right is drawn anew, with the confidence as its probability (consistency resampling, Broecker & Smith 2007).
    """
    order = bins_N.argsort(kind="stable")
    sorted_N = confidence_N[order].astype(np.float32)
    starts_B = np.unique(bins_N[order], return_index=True)[1]
    confidence_B = np.add.reduceat(sorted_N.astype(np.float64), starts_B)
    drawn_RN = rng.random((FLOOR_RESAMPLES, len(sorted_N)), dtype=np.float32) < sorted_N
    right_RB = np.add.reduceat(drawn_RN, starts_B, axis=1, dtype=np.int64)
    errors_R = np.abs(right_RB - confidence_B).sum(1) / len(sorted_N)
    return float(np.percentile(errors_R, FLOOR_PERCENTILE))


def auroc(confidence_N: FloatArray, correct_N: npt.NDArray[np.bool_]) -> float | None:
    """The probability that a right prediction is more confident than a wrong one, ties counting half.

    None when all are right or all are wrong.
    """
    right = int(correct_N.sum())
    wrong = len(correct_N) - right
    if not right or not wrong:
        return None
    ranks_N = rankdata(confidence_N)
    return float((ranks_N[correct_N].sum() - right * (right + 1) / 2) / (right * wrong))


def class_accuracies(correct_N: npt.NDArray[np.bool_], labels_N: IntArray, num_classes: int) -> FloatArray:
    """The accuracy on each class's examples [C]; NaN for a class without any."""
    totals_C = np.bincount(labels_N, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.bincount(labels_N, weights=correct_N, minlength=num_classes) / totals_C)
