"""What a trial would end with, from its score at a rung and the strength of its regularization.

Whether a trial is trained on depends on nothing else than those two, so a regression on both that is fitted to the
trials that were trained to their end stays valid for those that were stopped (selection on observed covariates:
Little & Rubin 2019, "Statistical analysis with missing data", chapter 1). With several rungs this is exact at the last
one only: of the trials that passed an earlier rung, those that a later one stopped are missing, the better ones are
not. Controls, trained to their end whatever is decided, are what corrects it.

Shape suffixes: N trials, K = 4 features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from results.schema import FloatArray

SLOPE_DEVIATION = 0.5
NOISE_SHARE = 0.3
PRIOR_TRIALS = 4
FLAT = 1e3
TINY = 1e-9
FIRST_CAPACITY = 64


@dataclass(frozen=True, kw_only=True)
class FinalScores:
    """Bayesian linear regression of what is still to come, conjugate in the noise (Gelman et al. 2013, "Bayesian data
    analysis", chapter 14; Bishop 2006, section 3.3):

        final - score = w0 + w1 (score - centre) + w2 z + w3 z^2 + noise,    z = 2 strength - 1 in [-1, 1].

    With r the spread of the scores at the rung, before any trial has ended: w0 is anything, w1 is N(0, 0.5), w2 and w3
    are N(0, r), the noise's variance is as if 4 trials had been seen with a deviation of 0.3 r. So the final score is
    expected to be the rung's plus the same for all, until the trials say otherwise, and what is not known about
    strengths of which none has ended widens `deviation`.
    """

    centre: float
    weights_K: FloatArray
    covariance_KK: FloatArray

    @classmethod
    def fit(cls, score_N: FloatArray, strength_N: FloatArray, final_N: FloatArray, *, spread: float) -> FinalScores:
        """The posterior after trials that ended with `final_N`. `spread`: standard deviation of the rung's scores."""
        centre = float(score_N.mean())
        features_NK, still_N = _features(score_N - centre, strength_N), final_N - score_N
        spread = max(spread, TINY)
        noise = NOISE_SHARE * spread
        flat = FLAT * (abs(float(still_N.mean())) + spread)
        precision_KK = np.diag((noise / np.array([flat, SLOPE_DEVIATION, spread, spread])) ** 2)
        covariance_KK = np.linalg.inv(features_NK.T @ features_NK + precision_KK)
        weights_K = covariance_KK @ features_NK.T @ still_N
        squares = float(((still_N - features_NK @ weights_K) ** 2).sum() + weights_K @ precision_KK @ weights_K)
        variance = (PRIOR_TRIALS * noise**2 + squares) / (PRIOR_TRIALS + len(still_N))
        return cls(centre=centre, weights_K=weights_K, covariance_KK=variance * covariance_KK)

    def mean(self, score_N: FloatArray, strength_N: FloatArray) -> FloatArray:
        """Final scores [N] that are expected of trials with these scores at the rung."""
        z_N, (level, slope, linear, square) = 2 * strength_N - 1, self.weights_K
        return score_N + level + slope * (score_N - self.centre) + z_N * (linear + square * z_N)

    def deviation(self, score_N: FloatArray, strength_N: FloatArray) -> FloatArray:
        """Standard deviations [N] of what is expected, without the noise of a single training."""
        features_NK = _features(score_N - self.centre, strength_N)
        return np.sqrt(((features_NK @ self.covariance_KK) * features_NK).sum(axis=1))


def _features(score_N: FloatArray, strength_N: FloatArray) -> FloatArray:
    z_N = 2 * strength_N - 1
    return np.stack([np.ones_like(z_N), score_N, z_N, z_N**2], axis=1)


class RungTable:
    """The trials that came to a rung: their scores there, strengths, final scores (nan until known), and whether others
    are compared with them. Grows by doubling, so that a trial costs the same however many there are."""

    def __init__(self) -> None:
        self._columns = np.empty((4, FIRST_CAPACITY))
        self._places: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, trial_id: object) -> bool:
        return trial_id in self._places

    def put(self, trial_id: str, *, score: float, strength: float, counts: bool) -> None:
        """Add a trial, or replace what was known of it."""
        place = self._places.setdefault(trial_id, len(self._places))
        if place == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)], axis=1)
        self._columns[:, place] = (score, strength, math.nan, counts)

    def end(self, trial_id: str, *, final: float) -> None:
        """Note what a trial of the table ended with."""
        self._columns[2, self._places[trial_id]] = final

    def row(self, trial_id: str) -> tuple[FloatArray, FloatArray]:
        """Score and strength of a trial, one each."""
        place = self._places[trial_id]
        return self._columns[0, place : place + 1], self._columns[1, place : place + 1]

    @property
    def scores(self) -> FloatArray:
        """Scores at the rung."""
        return self._columns[0, : len(self)]

    @property
    def strengths(self) -> FloatArray:
        """Strengths of regularization."""
        return self._columns[1, : len(self)]

    @property
    def finals(self) -> FloatArray:
        """Final scores, nan of trials that have not ended."""
        return self._columns[2, : len(self)]

    @property
    def counted(self) -> np.ndarray:
        """Whether others are compared with it."""
        return self._columns[3, : len(self)] > 0

    def regression(self, *, least: int) -> FinalScores | None:
        """Fitted to the trials that have ended; None while there are fewer than `least`."""
        ended_N = ~np.isnan(self.finals)
        if int(ended_N.sum()) < least:
            return None
        known = (self.scores[ended_N], self.strengths[ended_N], self.finals[ended_N])
        return FinalScores.fit(*known, spread=float(self.scores.std()))
