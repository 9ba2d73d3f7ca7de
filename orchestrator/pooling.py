"""Combiners on the device where a student trains: what COMBINERS computes, in float32 and without leaving the device.

Shape suffixes: M members, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
    """The members' log-probabilities as one, tempered before and after, as `Combination.combine` has them."""
    assert combination.temperature is not None
    temperatures_M, weights = (
        torch.from_numpy(array).to(log_probs_MBC) for array in (combination.temperatures_M, combination.weights)
    )
    calm_MBC = (log_probs_MBC / temperatures_M[:, None, None]).log_softmax(-1)
    pooled_BC = POOLS[combination.combiner](calm_MBC, weights)
    return (pooled_BC / combination.temperature).log_softmax(-1)
