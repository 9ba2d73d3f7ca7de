"""The Pareto front of several objectives. Shape suffixes: N points, K objectives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from results.schema import FloatArray


def non_dominated(values_NK: FloatArray, modes: Sequence[str]) -> list[int]:
    """The places of the points that no other is at least as good as in everything and better in something.

    `modes`: "max" or "min" for each objective. Points that are equal are in it together. Values must be finite.
    """
    costs_NK = as_costs(values_NK, modes)
    front: list[int] = []
    # In this order a point is dominated by earlier ones only, and by one of the front if by any.
    for place in np.lexsort(costs_NK.T[::-1]).tolist():
        mine = costs_NK[place]
        others = costs_NK[front]
        if not ((others <= mine).all(1) & (others < mine).any(1)).any():
            front.append(place)
    return sorted(front)


def as_costs(values_NK: FloatArray, modes: Sequence[str]) -> FloatArray:
    """The values, with signs that make less better."""
    return np.asarray(values_NK, dtype=np.float64) * [-1.0 if mode == "max" else 1.0 for mode in modes]


def best_first(values_NK: FloatArray, modes: Sequence[str], *, wanted: int) -> list[int]:
    """The places of the `wanted` best points: front after front, and within one by the first objective."""
    values_NK = np.asarray(values_NK, dtype=np.float64)
    costs_NK = as_costs(values_NK, modes)
    if len(modes) == 1:
        return np.argsort(costs_NK[:, 0], kind="stable")[:wanted].tolist()
    left = list(range(len(values_NK)))
    chosen: list[int] = []
    while left and len(chosen) < wanted:
        front = {left[place] for place in non_dominated(values_NK[left], modes)}
        chosen += sorted(front, key=lambda place: costs_NK[place, 0])
        left = [place for place in left if place not in front]
    return chosen[:wanted]
