"""Invented learning curves that cross: a test bed of early stopping whose optimum is known.

A configuration has a strength x of regularization, a learning rate l and a third value that does nothing, all scaled
to [0, 1]. Scores are fractions of accuracy. What is assumed:

- Its true final score is F(x, l) = top - 0.12 (x - x*)^2 - 0.15 (l - l*)^2, with x* about 0.75, whatever the severity.
- After n of E epochs, with the learning rate at a share h of its peak, it scores

      F(x, l) - (d + (1 - a) K(x)) q(n) - h (p + a K(x)),

  where q falls from 1 (n = 0) to 0 (n = E) exponentially. K(x) = severity * 0.5 x (1 + c x) / (1 + c / 2) is what
  strong regularization costs early on. A part 1 - a of it is slowness, which every kind of training suffers from that
  is short; a part a is paid only while the rate is high, and comes back as soon as the rate falls.
- Severity 0: K = 0, so early ranks are those at the end, but for noise. Severity 1: at a ninth of the epochs the rank
  over x is upside down.
- h is that of the leg: a cosine over its own epochs (whole or short), 1 on a constant-rate trunk whose last fifth
  decays linearly, linear to 0 in a branch. A short schedule or a branch of n epochs therefore ends at what n annealed
  epochs give; no branch is too short, and a trunk ends as high as a cosine does. Both are optimistic.
- Averaged weights (EMA) suffer 0.4 of the terms with h.
- Every training adds N(0, 0.003) to all its readings, every reading N(0, 0.01) for the finite validation set; raw
  weights fluctuate by N(0, 0.02 h) more, averaged ones by 0.3 of that.
- What a strategy is told of the strength is x + N(0, 0.1): a mean over several dimensions is not what slows learning.

x*, l*, the speed of q, d, p, a and c are drawn anew for every instance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from trainables.course import Leg

DIMENSIONS = ("strength", "lr", "idle")
TOP = 0.7
STRENGTH_CURVATURE = 0.12
RATE_CURVATURE = 0.15
CROSSING = 0.5
AVERAGE_PENALTY = 0.4
AVERAGE_FLUCTUATION = 0.3
TRUNK_DECAY_FRACTION = 0.2


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations of scores. `strength`: of what is told about the strength of regularization."""

    reading: float = 0.01
    training: float = 0.003
    fluctuation: float = 0.02
    strength: float = 0.1


NOISELESS = Noise(reading=0.0, training=0.0, fluctuation=0.0, strength=0.0)


@dataclass(frozen=True, kw_only=True)
class CrossingCurves:
    """One instance of the family; the module's docstring has the formula and its symbols."""

    severity: float
    max_epochs: int
    best_strength: float  # x*
    best_rate: float  # l*
    speed: float  # q(n) falls like exp(-speed n / E)
    deficit: float  # d
    penalty: float  # p
    annealed_share: float  # a
    bend: float  # c
    seed: int
    noise: Noise = field(default_factory=Noise)

    @classmethod
    def draw(cls, seed: int, *, severity: float, max_epochs: int, noise: Noise | None = None) -> CrossingCurves:
        """The instance of a seed; the same but for the crossing at every severity."""
        rng = np.random.default_rng([seed, 1])
        return cls(
            severity=severity,
            max_epochs=max_epochs,
            best_strength=0.75 + rng.uniform(-0.12, 0.12),
            best_rate=0.5 + rng.uniform(-0.15, 0.15),
            speed=rng.uniform(1.5, 3.5),
            deficit=rng.uniform(0.15, 0.3),
            penalty=rng.uniform(0.03, 0.1),
            annealed_share=rng.uniform(0.0, 0.6),
            bend=rng.uniform(-0.3, 0.6),
            seed=seed,
            noise=noise or Noise(),
        )

    def final(self, strength: float, lr: float) -> float:
        """The true score at the end, F(x, l)."""
        loss = STRENGTH_CURVATURE * (strength - self.best_strength) ** 2 + RATE_CURVATURE * (lr - self.best_rate) ** 2
        return TOP - loss

    def score(self, strength: float, lr: float, *, epochs: float, rate: float, average: bool) -> float:
        """The true score after some epochs with the learning rate at a share `rate` of its peak."""
        end = math.exp(-self.speed)
        remaining = (math.exp(-self.speed * epochs / self.max_epochs) - end) / (1 - end)
        crossing = self.severity * CROSSING * strength * (1 + self.bend * strength) / (1 + self.bend / 2)
        slowness = self.deficit + (1 - self.annealed_share) * crossing
        paid = rate * (self.penalty + self.annealed_share * crossing) * (AVERAGE_PENALTY if average else 1.0)
        return self.final(strength, lr) - slowness * remaining - paid

    def training(self, number: int, *, strength: float, lr: float) -> CurveTraining:
        """The training of a configuration by the search's trial of that number, with its noise."""
        rng = np.random.default_rng([self.seed, 2, number])
        told = float(np.clip(strength + rng.normal(0, self.noise.strength), 0, 1))
        offset = rng.normal(0, self.noise.training)
        return CurveTraining(self, x=strength, lr=lr, strength=told, offset=offset, rng=rng)


@dataclass(frozen=True, kw_only=True)
class CurveTraining:
    """Readings of one trial. Each call draws noise, so a trial's readings are asked for once and in order."""

    curves: CrossingCurves = field(kw_only=False)
    x: float
    lr: float
    strength: float
    offset: float
    rng: np.random.Generator

    @property
    def final(self) -> float:
        """The true score at the end, without noise."""
        return self.curves.final(self.x, self.lr)

    def reading(self, leg: Leg, epoch: int, *, average: bool) -> float:
        """The validation score after an epoch of a leg, counted from the beginning of the leg's schedule."""
        rate = rate_share(leg, epoch, max_epochs=self.curves.max_epochs)
        true = self.curves.score(self.x, self.lr, epochs=epoch, rate=rate, average=average)
        noise, factor = self.curves.noise, AVERAGE_FLUCTUATION if average else 1.0
        return (
            true + self.offset + float(self.rng.normal(0, math.hypot(noise.reading, factor * noise.fluctuation * rate)))
        )


def rate_share(leg: Leg, epoch: int, *, max_epochs: int) -> float:
    """The learning rate after an epoch of a leg, as a share of its peak."""
    if leg.changes.get("schedule") != "warmup_stable_decay":
        return (1 + math.cos(math.pi * epoch / leg.end)) / 2
    if not leg.trunk:
        return (leg.end - epoch) / leg.num_epochs
    return min(1.0, (max_epochs - epoch) / (TRUNK_DECAY_FRACTION * max_epochs))
