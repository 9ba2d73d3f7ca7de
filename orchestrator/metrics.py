"""How good predictions are: columns of per-example contributions whose means are the metrics.

Shape suffixes: N examples, C classes, B bins of confidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from results.schema import FloatArray, IntArray
from trainables.validation import Probabilities, calibration_gaps

METRICS = ("accuracy", "top5_accuracy", "nll", "brier", "ece")
HIGHER_IS_BETTER = {"accuracy": True, "top5_accuracy": True, "nll": False, "brier": False, "ece": False}


@dataclass(frozen=True)
class Scored:
    """One system's contributions on one split.

    The columns of `columns_NK` are those of `names`, then, when there are probabilities, those of
    `calibration_gaps`. ECE is the sum of the absolute means of these.
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
        return Scored(tuple(columns), np.stack(list(columns.values()), axis=1))
    probs_NC = np.exp(log_probs_NC)
    columns["nll"] = -log_probs_NC[rows, labels_N]
    columns["brier"] = (probs_NC**2).sum(1) - 2 * probs_NC[rows, labels_N] + 1
    gaps_NB = calibration_gaps(probs_NC, labels_N)
    return Scored(tuple(columns), np.concatenate([np.stack(list(columns.values()), axis=1), gaps_NB], axis=1))
