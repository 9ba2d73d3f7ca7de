"""Combiners on the device where a student trains: what COMBINERS computes, in float32 and without leaving the device.

Shape suffixes: M members, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from orchestrator.calibration import LEAST_LEAD, Confidence
from orchestrator.combination import Combination


def _arithmetic(log_probs_MBC: Tensor, weights_M: Tensor) -> Tensor:
    return (log_probs_MBC + weights_M.log()[:, None, None]).logsumexp(0)


def _geometric(log_probs_MBC: Tensor, weights_M: Tensor) -> Tensor:
    return torch.einsum("m,mbc->bc", weights_M, log_probs_MBC).log_softmax(-1)


def _per_class(log_probs_MBC: Tensor, weights_MC: Tensor) -> Tensor:
    return (log_probs_MBC + weights_MC.log()[:, None, :]).logsumexp(0).log_softmax(-1)


def _max_confidence(log_probs_MBC: Tensor, weights_M: Tensor) -> Tensor:
    confidence_MB = log_probs_MBC.amax(2).masked_fill((weights_M <= 0)[:, None], -torch.inf)
    surest_B = confidence_MB.argmax(0)
    return log_probs_MBC[surest_B, torch.arange(len(surest_B), device=surest_B.device)]


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _arithmetic,
    "weighted": _arithmetic,
    "max_confidence": _max_confidence,
    "geometric": _geometric,
    "stacking": _geometric,
    "per_class": _per_class,
}
"""The combiners that give probabilities."""


def pooled_log_probs(combination: Combination, log_probs_MBC: Tensor) -> Tensor:
    """The members' log-probabilities as one, calibrated, as `Combination.combine` has them."""
    assert combination.temperature is not None
    temperatures_M, weights = (
        torch.from_numpy(array).to(log_probs_MBC) for array in (combination.temperatures_M, combination.weights)
    )
    calm_MBC = (log_probs_MBC / temperatures_M[:, None, None]).log_softmax(-1)
    pooled_BC = POOLS[combination.combiner](calm_MBC, weights)
    return _with_confidence((pooled_BC / combination.temperature).log_softmax(-1), combination.confidence)


def _with_confidence(log_probs_BC: Tensor, confidence: Confidence) -> Tensor:
    """See Confidence.scale."""
    if log_probs_BC.shape[1] < 2:
        return log_probs_BC
    (top_B, second_B), (index_B, _) = (values.unbind(1) for values in log_probs_BC.topk(2, dim=1))
    rest_B = second_B + ((log_probs_BC - second_B[:, None]).clamp(max=0).exp().sum(1) - 1).log()
    odds_B = confidence.slope * (top_B - rest_B) + confidence.intercept
    odds_B = torch.maximum(odds_B, second_B - rest_B + LEAST_LEAD)
    scaled_BC = log_probs_BC + (logsigmoid(-odds_B) - rest_B)[:, None]
    return scaled_BC.scatter(1, index_B[:, None], logsigmoid(odds_B)[:, None])
