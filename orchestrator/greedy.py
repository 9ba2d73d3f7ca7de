"""Forward selection with replacement (Caruana et al. 2004), fast and exact.

For the NLL of a mean only the probability of the true class matters, one number an example. For accuracy only classes
that some candidate can still lift to the top matter; the more members there are, the fewer they get.
Shape suffixes: M candidates, N examples, C classes, A candidates that are allowed, P pairs of an example and a class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from results.schema import FloatArray, IntArray
from trainables.validation import Probabilities

ROUNDS = 50
LEAST_PROBABILITY = 1e-19
"""What a probability of less counts as: 44 nats."""
FACTORS = 16
"""Probabilities multiplied before a logarithm is taken: 1e-19 to the sixteenth is within float64."""
BLOCK = 250
"""Examples looked at together, which bounds memory."""
ROUNDING_OF_LOSS = 1e-12
"""What a bag's loss may differ by from that of another one with the same weights."""
ROUNDING = 1e-4
"""More than sums of float32 probabilities can be off."""
CANDIDATES = 16
"""Candidates looked at together, so that their sums stay in the processor's cache."""


@dataclass(frozen=True)
class Bag:
    """How often each candidate was taken, in the order of first taking, and the objective with them."""

    counts: dict[int, int]
    loss: float


def mean_nll(probs_AN: Probabilities, sum_N: Probabilities, size: int) -> FloatArray:
    """Mean NLL in nats of the means (sum_N + probs_AN) / size of true classes' probabilities, at least 1e-19 each."""
    num_examples = probs_AN.shape[1]
    width = num_examples // FACTORS
    nll_A = np.empty(len(probs_AN))
    buffer = np.empty((min(CANDIDATES, len(probs_AN)), num_examples))
    for start in range(0, len(probs_AN), CANDIDATES):
        part = probs_AN[start : start + CANDIDATES]
        sums = np.add(part, sum_N, out=buffer[: len(part)])
        logs = np.log(sums[:, width * FACTORS :]).sum(1)
        factors = FACTORS
        while factors > 1:  # which number meets which does not matter
            factors //= 2
            half = width * factors
            np.multiply(sums[:, :half], sums[:, half : 2 * half], out=sums[:, :half])
        nll_A[start : start + CANDIDATES] = np.log(size) - (logs + np.log(sums[:, :width]).sum(1)) / num_examples
    return nll_A


def by_nll(label_probs_MN: Probabilities, k: int, *, rounds: int = ROUNDS, start: Sequence[int] = ()) -> Bag:
    """The bag with the lowest NLL of its mean among those of `rounds` rounds; at most k distinct members.

    `start`: members that the bag has from the beginning (sorted initialization).
    """
    probs_MN = np.ascontiguousarray(np.maximum(label_probs_MN, LEAST_PROBABILITY))
    sum_N = probs_MN[list(start)].sum(0)

    def add(candidate: int) -> None:
        sum_N.__iadd__(probs_MN[candidate])

    def losses(allowed_A: IntArray, size: int) -> FloatArray:
        whole = len(allowed_A) == len(probs_MN)
        return mean_nll(probs_MN if whole else probs_MN[allowed_A], sum_N, size)

    return _forward(losses, add, len(probs_MN), k, rounds=rounds, start=start)


def _forward(
    losses: Callable[[IntArray, int], FloatArray],
    add: Callable[[int], None],
    num_candidates: int,
    k: int,
    *,
    rounds: int,
    start: Sequence[int],
) -> Bag:
    """Take the candidate with the lowest loss, the first at ties, `rounds` times; of equal bags the first is best."""
    counts: dict[int, int] = {}
    for candidate in start:
        counts[candidate] = counts.get(candidate, 0) + 1
    best = Bag({}, np.inf)
    everyone = np.arange(num_candidates)
    for size in range(len(start) + 1, len(start) + rounds + 1):
        allowed_A = everyone if len(counts) < k else np.array(list(counts))
        loss_A = losses(allowed_A, size)
        chosen = int(allowed_A[loss_A.argmin()])
        add(chosen)
        counts[chosen] = counts.get(chosen, 0) + 1
        if loss_A.min() < best.loss - ROUNDING_OF_LOSS:
            best = Bag(dict(counts), float(loss_A.min()))
    return best


def by_accuracy(
    probs_MNC: Probabilities, labels_N: IntArray, k: int, *, rounds: int = ROUNDS, start: Sequence[int] = ()
) -> Bag:
    """The same for the error of the mean's top class; the first of equal classes is the top one.

    Ties between candidates go to the lower NLL of the mean. `probs_MNC` may be float32.
    """
    rows = np.arange(len(labels_N))
    race = Race(probs_MNC, labels_N)
    label_probs_MN = np.maximum(probs_MNC[:, rows, labels_N].astype(np.float64), LEAST_PROBABILITY)
    sum_N = np.zeros(len(labels_N))

    def add(candidate: int) -> None:
        race.add(candidate)
        sum_N.__iadd__(label_probs_MN[candidate])

    for candidate in start:
        add(candidate)

    def losses(allowed_A: IntArray, size: int) -> FloatArray:
        wrong_A = len(labels_N) - race.num_correct(allowed_A)
        tied = wrong_A == wrong_A.min()
        nll_A = np.full(len(allowed_A), np.inf)
        nll_A[tied] = mean_nll(label_probs_MN[allowed_A[tied]], sum_N, size)
        # Below one example whatever the NLL is, so that it decides between equals alone.
        return np.asarray((wrong_A + 1 - 1 / (1 + nll_A)) / len(labels_N))

    return _forward(losses, add, len(probs_MNC), k, rounds=rounds, start=start)


class Race:
    """Sums of probabilities, and which candidates would make whose top class the true one.

    A class that no candidate prefers to the true one by enough to pass it is no rival; where the true class has no
    rival, or has one that it cannot pass, the example is settled.
    """

    def __init__(self, probs_MNC: Probabilities, labels_N: IntArray) -> None:
        """`probs_MNC`: float32 or float64, all in one piece."""
        self._rows = np.arange(len(labels_N))
        self._probs_MNC = probs_MNC
        self._probs_MX = probs_MNC.reshape(len(probs_MNC), -1)
        self._labels_N = labels_N
        self._sum_NC = np.zeros_like(probs_MNC[0])
        self._most_NC, self._least_NC = np.full_like(self._sum_NC, -np.inf), np.full_like(self._sum_NC, np.inf)
        for probs_NC in probs_MNC:
            ahead_NC = probs_NC - probs_NC[self._rows, labels_N][:, None]
            np.maximum(self._most_NC, ahead_NC, out=self._most_NC)
            np.minimum(self._least_NC, ahead_NC, out=self._least_NC)

    def add(self, candidate: int) -> None:
        """Add a candidate's probabilities to the sums."""
        self._sum_NC += self._probs_MNC[candidate]

    def num_correct(self, allowed_A: IntArray) -> FloatArray:
        """For each candidate [A], on how many examples the sum with it has the true class on top."""
        if not self._sum_NC.any():
            return np.array([(self._probs_MNC[m].argmax(1) == self._labels_N).sum() for m in allowed_A], np.float64)
        ahead_NC = self._sum_NC - self._sum_NC[self._rows, self._labels_N][:, None]
        lost_N = (ahead_NC + self._least_NC > ROUNDING).any(1)
        rivals_NC = (ahead_NC + self._most_NC >= -ROUNDING) & ~lost_N[:, None]
        rivals_NC[self._rows, self._labels_N] = False
        contested_N = rivals_NC.any(1)
        count_A = np.full(len(allowed_A), float((~lost_N & ~contested_N).sum()))
        contested = np.flatnonzero(contested_N)
        for start in range(0, len(contested), BLOCK):
            block = contested[start : start + BLOCK]
            count_A += self._wins(allowed_A, block, rivals_NC[block])
        return count_A

    def _wins(self, allowed_A: IntArray, examples_E: IntArray, rivals_EC: npt.NDArray[np.bool_]) -> FloatArray:
        """For each candidate, on how many of some examples the true class beats its rivals."""
        example_P, class_P = np.nonzero(rivals_EC)
        label_E = self._labels_N[examples_E]
        rival_AP = self._with(allowed_A, examples_E[example_P], class_P)
        own_AP = self._with(allowed_A, examples_E, label_E)[:, example_P]
        loses_AP = rival_AP > own_AP
        loses_AP |= (rival_AP == own_AP) & (class_P < label_E[example_P])
        starts_E = np.searchsorted(example_P, np.arange(len(examples_E)))
        return np.asarray((~np.logical_or.reduceat(loses_AP, starts_E, axis=1)).sum(1))

    def _with(self, allowed_A: IntArray, examples_P: IntArray, classes_P: IntArray) -> FloatArray:
        """The sums of some examples' classes with each candidate added [A, P]."""
        taken_MP = self._probs_MX.take(examples_P * self._probs_MNC.shape[2] + classes_P, axis=1)
        return np.asarray(taken_MP[allowed_A] + self._sum_NC[examples_P, classes_P])
