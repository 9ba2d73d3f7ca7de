"""A population of ensembles that is kept diverse while each gets better (after Purucker et al. 2023, "Q(D)O-ES").

Ensembles are bags of candidates. The archive has a niche for every number of distinct members and every range of their
mean disagreement, and keeps the ensemble with the lowest NLL in each (MAP-Elites, Mouret & Clune 2015).
Shape suffixes: M candidates, N examples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from orchestrator.greedy import LEAST_PROBABILITY, Bag
from trainables.validation import Probabilities

STEPS = 1000
DISAGREEMENT_STEP = 0.02
MOST_COPIES = 5

Niche = tuple[int, int]
TopClasses = npt.NDArray[np.int32]


def illuminate(
    label_probs_MN: Probabilities, top_MN: TopClasses, start: Bag, *, k: int, rng: np.random.Generator
) -> Bag:
    """The best bag of at most k distinct members that the population comes to, `start` being its first."""
    probs_MN = np.maximum(label_probs_MN, LEAST_PROBABILITY)
    archive: dict[Niche, Bag] = {}

    def settle(counts: dict[int, int]) -> None:
        niche = (len(counts), int(_disagreement(top_MN, list(counts)) / DISAGREEMENT_STEP))
        loss = _nll(probs_MN, counts)
        if niche not in archive or loss < archive[niche].loss:
            archive[niche] = Bag(counts, loss)

    settle(start.counts)
    for _ in range(STEPS):
        elites = list(archive.values())
        parent = elites[rng.integers(len(elites))]
        other = elites[rng.integers(len(elites))]
        settle(_child(parent.counts, other.counts, num_candidates=len(probs_MN), k=k, rng=rng))
    return min(archive.values(), key=lambda bag: bag.loss)


def _child(
    parent: dict[int, int], other: dict[int, int], *, num_candidates: int, k: int, rng: np.random.Generator
) -> dict[int, int]:
    """A parent crossed with another one or not, with a candidate more or one less, cut to k distinct members."""
    counts = dict(parent)
    if rng.random() < 0.5:
        counts = {m: c for bag in (parent, other) for m, c in bag.items() if rng.random() < 0.5} or counts
    chosen = int(rng.integers(num_candidates)) if rng.random() < 0.7 else int(rng.choice(list(counts)))
    if chosen in counts and rng.random() < 0.5 and len(counts) > 1:
        del counts[chosen]
    else:
        counts[chosen] = min(MOST_COPIES, counts.get(chosen, 0) + 1)
    while len(counts) > k:
        del counts[int(rng.choice(list(counts)))]
    return counts


def _nll(probs_MN: Probabilities, counts: dict[int, int]) -> float:
    taken = np.array(list(counts.values()), dtype=np.float64)
    return float(-np.log((taken / taken.sum()) @ probs_MN[list(counts)]).mean())


def _disagreement(top_MN: TopClasses, members: list[int]) -> float:
    """Mean share of examples on which two members' top classes differ; 0 for a single one."""
    tops_KN = top_MN[members]
    pairs = [(tops_KN[i] != tops_KN[j]).mean() for i in range(len(members)) for j in range(i)]
    return float(np.mean(pairs)) if pairs else 0.0
