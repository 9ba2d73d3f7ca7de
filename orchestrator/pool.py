"""Pools of candidates' predictions, a type for each split.

Choosing takes a SelectPool: handing it estimate or test predictions does not type-check.
Shape suffixes: M candidates, K members, N examples, C classes.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from orchestrator.calibration import fit_temperature
from orchestrator.greedy import LEAST_PROBABILITY
from results.schema import (
    EstimatePredictions,
    FloatArray,
    IntArray,
    Predictions,
    SelectPredictions,
    Split,
    TestPredictions,
)
from trainables.validation import Probabilities, log_softmax

KEPT_BYTES = 224 * 2**20
"""Log-probabilities, and likewise logits, that a pool keeps in memory; the rest is computed or read again."""

T = TypeVar("T")
R = TypeVar("R")
THREADS = min(4, os.cpu_count() or 1)


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """The function of each item, in order; reading, decoding and NumPy's loops do not hold each other up."""
    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(function, items)


class Logits(Protocol):
    """Candidates' logits [N, C], one candidate after the other."""

    def __len__(self) -> int:
        """How many candidates there are."""

    def __getitem__(self, candidate: int, /) -> Any:
        """An array [N, C], float16 or wider."""


class Kept:
    """Arrays that are computed when they are asked for; the latest ones stay in memory, up to so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._arrays: OrderedDict[Hashable, FloatArray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, compute: Callable[[], FloatArray]) -> FloatArray:
        """The array of a key. Two threads that ask for a new one at once both compute it."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = compute()
        with self._lock:
            self._bytes += array.nbytes - (self._arrays[key].nbytes if key in self._arrays else 0)
            self._arrays[key] = array
            while self._bytes > self._most_bytes and self._arrays:
                _, oldest = self._arrays.popitem(last=False)
                self._bytes -= oldest.nbytes
        return array


class StoredLogits:
    """Logits that are read when they are asked for. The latest are kept, up to `most_bytes`."""

    def __init__(self, read: Callable[[int], FloatArray], count: int, *, most_bytes: int = 0) -> None:
        self._read = read
        self._count = count
        self._kept = Kept(most_bytes)

    def __len__(self) -> int:
        """See Logits."""
        return self._count

    def __getitem__(self, candidate: int) -> FloatArray:
        """See Logits."""
        return self._kept.get(candidate, lambda: self._read(candidate))

    def keep(self, candidate: int, logits_NC: FloatArray) -> None:
        """Take logits that have been read."""
        self._kept.get(candidate, lambda: logits_NC)


@dataclass(eq=False)
class Pool:
    """Candidates' logits for one split, and its labels. Use a subclass."""

    logits: Logits
    labels_N: IntArray
    _kept: Kept = field(default_factory=lambda: Kept(KEPT_BYTES), kw_only=True, repr=False)

    def log_probs(self, candidates: Sequence[int], temperatures_K: FloatArray | None = None) -> Probabilities:
        """Log-probabilities [K, N, C] of some candidates in float32, at temperatures of their own."""
        temperatures_K = np.ones(len(candidates)) if temperatures_K is None else temperatures_K
        return np.stack([self._tempered(c, float(t)) for c, t in zip(candidates, temperatures_K, strict=True)])

    def _tempered(self, candidate: int, temperature: float) -> FloatArray:
        def compute() -> FloatArray:
            return log_softmax(self.logits[candidate].astype(np.float32) / np.float32(temperature))

        return self._kept.get((candidate, temperature), compute)


@dataclass(frozen=True, eq=False)
class Summary:
    """What choosing mostly needs of a candidate: the true class's probability, at least 1e-19, and the top class."""

    label_probs_N: Probabilities
    top_N: npt.NDArray[np.int32]


def summarize(logits_NC: FloatArray, labels_N: IntArray) -> Summary:
    """A candidate's summary. The first of equal classes is the top one."""
    logits_NC = logits_NC.astype(np.float32)
    top_N = logits_NC.argmax(1)
    rows = np.arange(len(labels_N))
    logits_NC -= logits_NC[rows, top_N][:, None]
    of_label_N = logits_NC[rows, labels_N].astype(np.float64)
    total_N = np.exp(logits_NC, out=logits_NC).sum(1, dtype=np.float64)
    label_probs_N = np.maximum(np.exp(of_label_N) / total_N, LEAST_PROBABILITY)
    return Summary(label_probs_N, top_N.astype(np.int32))


@dataclass(eq=False)
class SelectPool(Pool):
    """What may be chosen on.

    `trials_M`: a number for each candidate, the same for variants of one trial. `weights_M`: likewise for views of the
    same weights (with and without test-time augmentation). `configurations_M`: for trainings of one configuration.
    `costs_M`: multiply-adds of predicting one image.
    """

    label_probs_MN: Probabilities
    top_MN: npt.NDArray[np.int32]
    trials_M: IntArray
    weights_M: IntArray
    configurations_M: IntArray
    costs_M: FloatArray
    _temperatures: dict[int, float] = field(default_factory=dict, kw_only=True, repr=False)

    @classmethod
    def of(
        cls,
        logits: Logits,
        labels_N: IntArray,
        *,
        summaries: Sequence[Summary] = (),
        trials_M: IntArray | None = None,
        weights_M: IntArray | None = None,
        configurations_M: IntArray | None = None,
        costs_M: FloatArray | None = None,
    ) -> SelectPool:
        """A pool; unless more is known each candidate is a trial and a configuration of its own, and costs the same."""
        count = len(logits)
        summaries = summaries or [summarize(logits[candidate], labels_N) for candidate in range(count)]
        return cls(
            logits,
            labels_N,
            label_probs_MN=np.stack([s.label_probs_N for s in summaries]),
            top_MN=np.stack([s.top_N for s in summaries]),
            trials_M=np.arange(count) if trials_M is None else trials_M,
            weights_M=np.arange(count) if weights_M is None else weights_M,
            configurations_M=np.arange(count) if configurations_M is None else configurations_M,
            costs_M=np.ones(count) if costs_M is None else costs_M,
        )

    def __len__(self) -> int:
        """How many candidates there are."""
        return len(self.label_probs_MN)

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whose top class is the true one where, [M, N]."""
        return np.asarray(self.top_MN == self.labels_N)

    def temperature(self, candidate: int) -> float:
        """A candidate's own temperature."""
        if candidate not in self._temperatures:
            self._temperatures[candidate] = fit_temperature(self.logits[candidate], self.labels_N)
        return self._temperatures[candidate]

    def on(self, examples: IntArray) -> SelectPool:
        """The same candidates on some of the examples."""
        return SelectPool(
            StoredLogits(lambda candidate: self.logits[candidate][examples], len(self)),
            self.labels_N[examples],
            label_probs_MN=self.label_probs_MN[:, examples],
            top_MN=self.top_MN[:, examples],
            trials_M=self.trials_M,
            weights_M=self.weights_M,
            configurations_M=self.configurations_M,
            costs_M=self.costs_M,
        )

    def among(self, candidates: IntArray) -> SelectPool:
        """Some of the candidates, numbered anew in their order."""
        return SelectPool(
            StoredLogits(lambda place: self.logits[int(candidates[place])], len(candidates)),
            self.labels_N,
            label_probs_MN=self.label_probs_MN[candidates],
            top_MN=self.top_MN[candidates],
            trials_M=self.trials_M[candidates],
            weights_M=self.weights_M[candidates],
            configurations_M=self.configurations_M[candidates],
            costs_M=self.costs_M[candidates],
        )

    def folds(self, count: int, rng: np.random.Generator) -> Iterator[tuple[IntArray, IntArray]]:
        """Examples in and out of each of so many folds, drawn at random."""
        parts = np.array_split(rng.permutation(len(self.labels_N)), count)
        for held_out in parts:
            yield np.setdiff1d(np.arange(len(self.labels_N)), held_out), np.sort(held_out)


class EstimatePool(Pool):
    """Scored once something has been chosen."""


class TestPool(Pool):
    """Scored once, for what was chosen."""

    __test__ = False  # not a pytest class


AnyPool = TypeVar("AnyPool", bound=Pool)
POOLS: dict[type[Pool], tuple[Split, type[Predictions]]] = {
    SelectPool: ("select", SelectPredictions),
    EstimatePool: ("estimate", EstimatePredictions),
    TestPool: ("test", TestPredictions),
}
