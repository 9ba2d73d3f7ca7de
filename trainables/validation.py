"""The figures of validation, from logits alone. Shape suffixes: N examples, C classes, B bins of confidence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from results.schema import FloatArray, IntArray

ECE_BINS = 15

Probabilities = npt.NDArray[np.float64]


def log_softmax(logits: FloatArray) -> Probabilities:
    """Log-probabilities over the last axis, in float64; of float32 in float32."""
    out: Probabilities = logits.astype(np.float32 if logits.dtype == np.float32 else np.float64)
    out -= out.max(-1, keepdims=True)
    out -= np.log(np.exp(out).sum(-1, keepdims=True))
    return out


def accuracy(scores_NC: FloatArray, labels_N: IntArray) -> float:
    """Top-1 accuracy: the share of examples whose highest score is the label's."""
    return float((scores_NC.argmax(1) == labels_N).mean())


def nll(log_probs_NC: Probabilities, labels_N: IntArray) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-log_probs_NC[np.arange(len(labels_N)), labels_N].mean())


def calibration_gaps(probs_NC: Probabilities, labels_N: IntArray) -> FloatArray:
    """Correctness less confidence of each example, in the column [N, B] of its confidence, 0 in the others.

    15 equal-width bins of (0, 1]; ECE is the sum of the absolute means of the columns (Guo et al. 2017).
    """
    rows = np.arange(len(labels_N))
    confidence_N = probs_NC.max(1)
    bin_N = np.clip(np.ceil(confidence_N * ECE_BINS).astype(int) - 1, 0, ECE_BINS - 1)
    gaps_NB = np.zeros((len(labels_N), ECE_BINS))
    gaps_NB[rows, bin_N] = (probs_NC.argmax(1) == labels_N) - confidence_N
    return gaps_NB


def ece(probs_NC: Probabilities, labels_N: IntArray) -> float:
    """Expected calibration error over 15 equal-width bins of confidence (Guo et al. 2017)."""
    return float(np.abs(calibration_gaps(probs_NC, labels_N).mean(0)).sum())
