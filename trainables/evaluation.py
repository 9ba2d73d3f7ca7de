"""What a model predicts, and how good that is. Shape suffixes: N examples, C classes, H, W."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from results.schema import FloatArray, IntArray

EVALUATION_BATCH = 500
FLOAT16_MAX = 65504.0

LogitsF16 = npt.NDArray[np.float16]
Probabilities = npt.NDArray[np.float64]


@torch.inference_mode()
def predict(model: nn.Module, images_NCHW: Tensor, indices_N: Tensor) -> LogitsF16:
    """Float16 logits [N, C] of uint8 images, in evaluation mode. bfloat16 arithmetic on a GPU."""
    model.eval()
    device = images_NCHW.device.type
    logits = []
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        for chunk in indices_N.split(EVALUATION_BATCH):
            batch = images_NCHW[chunk].float().contiguous(memory_format=torch.channels_last)
            logits.append(model(batch).float())
    out_NC = torch.cat(logits).clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    result: LogitsF16 = out_NC.cpu().numpy().astype(np.float16)
    return result


def log_softmax(logits: FloatArray) -> Probabilities:
    """Log-probabilities in float64 over the last axis."""
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    out: Probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return out


def accuracy(scores_NC: FloatArray, labels_N: IntArray) -> float:
    """Top-1 accuracy: the share of examples whose highest score is the label's."""
    return float((scores_NC.argmax(1) == labels_N).mean())


def nll(log_probs_NC: Probabilities, labels_N: IntArray) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-log_probs_NC[np.arange(len(labels_N)), labels_N].mean())


def ece(probs_NC: Probabilities, labels_N: IntArray, *, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins of confidence, (0, 1] (Guo et al. 2017)."""
    confidence_N = probs_NC.max(1)
    gap_N = (probs_NC.argmax(1) == labels_N) - confidence_N
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(bin_N, weights=gap_N, minlength=bins)).sum() / len(labels_N))
