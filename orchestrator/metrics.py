"""How good predictions are: columns of per-example contributions whose means are the metrics.

Shape suffixes: N examples, C classes, B bins of confidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from results.schema import FloatArray, IntArray
from trainables.evaluation import Probabilities

METRICS = ("accuracy", "top5_accuracy", "nll", "brier", "ece")
HIGHER_IS_BETTER = {"accuracy": True, "top5_accuracy": True, "nll": False, "brier": False, "ece": False}
ECE_BINS = 15


@dataclass(frozen=True)
class Scored:
    """One system's contributions on one split.

    The columns of `columns_NK` are those of `names`, then, when there are probabilities, ECE_BINS more: the gap
    between correctness and confidence where the confidence lies in the bin. ECE is the sum of the absolute
    means of these.
    """

    names: tuple[str, ...]
    columns_NK: FloatArray

    def metrics(self, means_K: FloatArray) -> dict[str, FloatArray]:
        """The metrics behind means of the columns, [..., K]; whatever axes come before stay."""
        values = {name: means_K[..., i] for i, name in enumerate(self.names)}
        if "nll" in values:
            values["ece"] = np.abs(means_K[..., len(self.names) :]).sum(-1)
        return values


def score(scores_NC: FloatArray, labels_N: IntArray, *, log_probs_NC: Probabilities | None) -> Scored:
    """Contributions of a system that ranks classes by `scores_NC`; NLL (nats), Brier and ECE need probabilities.

    Brier is the sum over classes of squared differences (Brier 1950), 0 to 2. ECE has 15 equal-width bins
    (Guo et al. 2017).
    """
    rows = np.arange(len(labels_N))
    correct_N = scores_NC.argmax(1) == labels_N
    rank_N = (scores_NC > scores_NC[rows, labels_N][:, None]).sum(1)
    columns: dict[str, FloatArray] = {
        "accuracy": correct_N.astype(np.float64),
        "top5_accuracy": (rank_N < 5).astype(np.float64),
    }
    if log_probs_NC is None:
        return Scored(tuple(columns), np.stack(list(columns.values()), axis=1))
    probs_NC = np.exp(log_probs_NC)
    columns["nll"] = -log_probs_NC[rows, labels_N]
    columns["brier"] = (probs_NC**2).sum(1) - 2 * probs_NC[rows, labels_N] + 1
    confidence_N = probs_NC.max(1)
    bin_N = np.clip(np.ceil(confidence_N * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps_NB = np.zeros((len(labels_N), ECE_BINS))
    gaps_NB[rows, bin_N] = (probs_NC.argmax(1) == labels_N) - confidence_N
    return Scored(tuple(columns), np.concatenate([np.stack(list(columns.values()), axis=1), gaps_NB], axis=1))


def mean_scored(scored: list[Scored]) -> Scored:
    """The mean over several systems, such as draws of a random control; ECE is then of the mean gaps."""
    return Scored(scored[0].names, np.mean([s.columns_NK for s in scored], axis=0))
