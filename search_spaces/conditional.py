"""Define-by-run spaces: which dimensions a function that suggests values has, found out by running it.

A space's `define` is called with a `Suggestions`. Whoever calls it decides where the values come from: from Optuna,
from a baseline, from the configuration of a trial that ran earlier, or at random.
"""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from results.schema import Scalar, UsageError
from trainables.config import FIELD_TYPES

DATA_FIELDS = ("dataset", "image_size", "train_fraction", "val_fraction", "pipeline")
FIXED_FIELDS = (*DATA_FIELDS, "max_epochs", "monitor", "seed")
EXPLORING_DRAWS = 400
SHARE_OF_ENDS = 0.5

Draw = Callable[[str, BaseDistribution], Scalar]


def check_dimension(name: str) -> None:
    """Raise UsageError unless a search may vary the field of that name."""
    if name not in FIELD_TYPES:
        raise UsageError(f"dimension {name!r} is not a field of TrainConfig; there are {', '.join(FIELD_TYPES)}")
    if name in FIXED_FIELDS:
        raise UsageError(f"dimension {name!r} cannot vary within a search; set it in the base configuration")


@dataclass(frozen=True)
class Point:
    """Values for the active dimensions, and where each was drawn from."""

    params: dict[str, Scalar] = field(default_factory=dict)
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)


class Suggestions:
    """What `define` is given: Optuna's suggest methods, for fields of TrainConfig.

    A name that is suggested again has the value it has; with another distribution it is refused with UsageError.
    """

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self.point = Point()

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """A number from `low` to `high`, both included."""
        return self.suggest(name, FloatDistribution(low, high, step=step, log=log))  # type: ignore[return-value]

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number from `low` to `high`, both included."""
        return self.suggest(name, IntDistribution(low, high, step=step, log=log))  # type: ignore[return-value]

    def suggest_categorical(self, name: str, choices: Sequence[Scalar]) -> Any:
        """One of `choices`."""
        return self.suggest(name, CategoricalDistribution(choices))

    def suggest(self, name: str, distribution: BaseDistribution) -> Scalar:
        """A value from a distribution."""
        check_dimension(name)
        before = self.point.distributions.setdefault(name, distribution)
        check_same_distribution(name, before, distribution)
        if name not in self.point.params:
            self.point.params[name] = self._draw(name, distribution)
        return self.point.params[name]


Define = Callable[[Suggestions], None]


def check_same_distribution(name: str, first: BaseDistribution, second: BaseDistribution) -> None:
    """Raise UsageError when a name has two distributions, which TPE's model could not learn from together."""
    if first != second:
        raise UsageError(
            f"dimension {name!r} is {first} in one branch of `define` and {second} in another; "
            f"wanted one distribution for each name"
        )


def run(define: Define, draw: Draw) -> Point:
    """What `define` suggests when its values come from `draw`. Raises UsageError, with the line, when it fails."""
    suggestions = Suggestions(draw)
    try:
        returned: object = define(suggestions)  # type: ignore[func-returns-value]
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{_place(define, error)}: {type(error).__name__}: {error}") from error
    if returned is not None:
        raise UsageError(
            f"`define` returned {returned!r}; wanted nothing: it suggests a configuration, and the search trains it"
        )
    return suggestions.point


def _place(define: Define, error: Exception) -> str:
    """The function, and the line of its file that an exception came from."""
    function = inspect.unwrap(define)
    code = getattr(function, "__code__", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if code and f.filename == code.co_filename]
    return f"`{getattr(function, '__name__', 'define')}`, line {lines[-1] if lines else '?'}"


def fixing(define: Define, values: Mapping[str, Scalar]) -> Define:
    """`define` with some fields set: it is given their values, and they are not searched."""

    @functools.wraps(define)
    def fixed(trial: Suggestions) -> None:
        def draw(name: str, distribution: BaseDistribution) -> Scalar:
            return values[name] if name in values else trial.suggest(name, distribution)

        return define(Suggestions(draw))

    return fixed


def explore(define: Define) -> Iterator[Point]:
    """Points of a space drawn at random, always the same ones; every other number is an end of its range."""
    rng = np.random.default_rng(0)
    for _ in range(EXPLORING_DRAWS):
        yield run(define, lambda name, distribution: _drawn(rng, name, distribution))


def ends(name: str, distribution: BaseDistribution) -> list[Scalar]:
    """The ends of a dimension, or all its choices."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return [distribution.low, distribution.high]
    raise UsageError(f"dimension {name!r} is {distribution!r}; wanted one of optuna.distributions")


def _drawn(rng: np.random.Generator, name: str, distribution: BaseDistribution) -> Scalar:
    choices = ends(name, distribution)
    if isinstance(distribution, CategoricalDistribution) or rng.random() < SHARE_OF_ENDS:
        return choices[rng.integers(len(choices))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if distribution.log:
        value = math.exp(rng.uniform(math.log(low), math.log(high)))
        return min(high, max(low, round(value) if isinstance(distribution, IntDistribution) else value))
    if step is None:
        return float(rng.uniform(low, high))
    return low + step * int(rng.integers(round((high - low) / step) + 1))
