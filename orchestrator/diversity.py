"""How much members differ, as a diagnosis. Shape suffixes: M members, N examples, C classes."""

from __future__ import annotations

import numpy as np

from results.schema import FloatArray
from trainables.validation import Probabilities


def disagreement(log_probs_MNC: Probabilities) -> FloatArray:
    """Share of examples [M, M] on which two members' top classes differ; 0 on the diagonal."""
    top_MN = log_probs_MNC.argmax(2)
    return np.stack([(top_MN != top_N).mean(1) for top_N in top_MN])


def mean_disagreement(disagreement_MM: FloatArray) -> float | None:
    """The mean over pairs; None for a single member."""
    members = len(disagreement_MM)
    return None if members < 2 else float(disagreement_MM.sum() / (members * (members - 1)))
