"""How much members differ, as a diagnosis: nothing is chosen by it but `diverse`'s bonus.

Shape suffixes: M members, N examples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from results.schema import FloatArray, IntArray
from trainables.validation import Probabilities


@dataclass(frozen=True)
class Diversity:
    """Means over pairs of members; None for a single member, or where a figure is not defined.

    `q_statistic`: Yule's Q of being right, 1 when members are right on the same examples (Kuncheva & Whitaker 2003).
    `error_correlation`: of being wrong. `kl`: from one member's probabilities to another's, in nats, over both orders.
    `mean_member_nll` less `ambiguity` is the NLL of the members' weighted mean: ambiguity is what averaging gains
    (Krogh & Vedelsby 1995, for the NLL of a linear pool).
    """

    disagreement: float | None
    q_statistic: float | None
    error_correlation: float | None
    kl: float | None
    mean_member_nll: float
    ambiguity: float


def diversity(log_probs_MNC: Probabilities, labels_N: IntArray, weights_M: FloatArray) -> Diversity:
    """How members differ on some examples."""
    correct_MN = log_probs_MNC.argmax(2) == labels_N
    of_label_MN = log_probs_MNC[:, np.arange(len(labels_N)), labels_N].astype(np.float64)
    member_nll = float(-(weights_M @ of_label_MN).mean())
    pooled_nll = float(-logsumexp(of_label_MN, axis=0, b=weights_M[:, None]).mean())
    return Diversity(
        disagreement=mean_over_pairs(disagreement(log_probs_MNC)),
        q_statistic=mean_over_pairs(q_statistic(correct_MN)),
        error_correlation=mean_over_pairs(error_correlation(correct_MN)),
        kl=mean_over_pairs(kl(log_probs_MNC)),
        mean_member_nll=member_nll,
        ambiguity=member_nll - pooled_nll,
    )


def disagreement(log_probs_MNC: Probabilities) -> FloatArray:
    """Share of examples [M, M] on which two members' top classes differ; 0 on the diagonal."""
    top_MN = log_probs_MNC.argmax(2)
    return np.stack([(top_MN != top_N).mean(1) for top_N in top_MN])


def q_statistic(correct_MN: FloatArray) -> FloatArray:
    """Yule's Q [M, M] of being right: (ad - bc) / (ad + bc) of the counts both, neither, one alone, the other alone.

    NaN where both products are 0.
    """
    right_MN = np.asarray(correct_MN, dtype=np.float64)
    both_MM = right_MN @ right_MN.T
    neither_MM = (1 - right_MN) @ (1 - right_MN).T
    alone_MM = right_MN @ (1 - right_MN).T
    agree_MM, differ_MM = both_MM * neither_MM, alone_MM * alone_MM.T
    with np.errstate(invalid="ignore"):
        return np.asarray((agree_MM - differ_MM) / (agree_MM + differ_MM))


def error_correlation(correct_MN: FloatArray) -> FloatArray:
    """Pearson correlation [M, M] of being wrong; NaN with a member that is always right or always wrong."""
    centred_MN = np.asarray(correct_MN, dtype=np.float64)
    centred_MN = centred_MN - centred_MN.mean(1, keepdims=True)
    scale_M = np.sqrt((centred_MN**2).sum(1))
    with np.errstate(invalid="ignore"):
        return np.asarray(centred_MN @ centred_MN.T / np.outer(scale_M, scale_M))


def kl(log_probs_MNC: Probabilities) -> FloatArray:
    """Mean Kullback-Leibler divergence [M, M] in nats, from the row's member to the column's."""
    members, examples, _ = log_probs_MNC.shape
    flat_MX = log_probs_MNC.reshape(members, -1)
    probs_MX = np.exp(flat_MX)
    own_M1 = (probs_MX * flat_MX).sum(1)[:, None]
    return np.asarray((own_M1 - probs_MX @ flat_MX.T) / examples)


def mean_over_pairs(values_MM: FloatArray) -> float | None:
    """The mean over pairs of different members that have a value; None when there is none."""
    values = values_MM[~np.eye(len(values_MM), dtype=bool)]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
