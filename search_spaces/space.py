"""SearchSpace: a base configuration, the fields that vary, known good settings, and what the search may spend."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.trial import create_trial

from results.schema import Scalar, UsageError
from search_spaces.conditional import (
    Define,
    Draw,
    Point,
    check_dimension,
    check_same_distribution,
    ends,
    explore,
    fixing,
    run,
)
from trainables.backbones import check_backbone
from trainables.config import INTERLOCKED, TrainConfig

Mode = Literal["max", "min"]
METRICS: dict[str, Mode] = {"val_accuracy": "max", "val_nll": "min"}
OBJECTIVES: dict[str, Mode] = {**METRICS, "multiply_adds": "min", "num_parameters": "min"}
MOST_FURTHER_OBJECTIVES = 2
# Two configurations that differ in nothing else are draws of one point: their data are compared by hash, and the
# number type changes less than another seed does.
NOT_PART_OF_A_POINT = ("seed", "dataset", "precision")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may spend. No trial is judged before `grace_epochs` (None: a third of `max_epochs`).

    `max_total_epochs` bounds all trials together: none begins once they are spent. `max_seconds` bounds each run of the
    driver: what trains then is stopped. None: without a bound.
    """

    num_trials: int = 24
    max_epochs: int = 9
    grace_epochs: int | None = None
    reduction_factor: float = 3.0
    max_total_epochs: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_trials", "max_epochs", "grace_epochs", "max_total_epochs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name}={value!r}: wanted a whole number, 1 or more")
        if not 1 < self.reduction_factor < float("inf"):
            raise UsageError(f"reduction_factor={self.reduction_factor!r}: wanted a finite number above 1")
        seconds = self.max_seconds
        if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds < math.inf):
            raise UsageError(f"max_seconds={seconds!r}: wanted a finite number of seconds above 0")

    @property
    def grace(self) -> int:
        """Epochs of the first rung."""
        return min(self.grace_epochs or max(1, self.max_epochs // 3), self.max_epochs)


class Discovered(dict[str, BaseDistribution]):
    """Dimensions that nobody gave: none, or those that `define` was seen to suggest."""


class OutsideTheSpace(UsageError):
    """A value lies outside of the dimension it is meant for."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a search explores: the fields that vary, and the base configuration's values for all others.

    Give `dimensions`, fields of TrainConfig with Optuna distributions, or `define`, a function that calls
    `trial.suggest_float`, `suggest_int` and `suggest_categorical` with names of fields, some of them only where others
    have certain values: what it does not suggest keeps the base's value. It must depend on its suggestions alone.
    `dimensions` then holds all that it can suggest.

    `baselines` are run first; each gives values for some active dimensions, the base configuration the others.
    `metric` is `val_accuracy` or `val_nll`: what trials are stopped and chosen by. `further_objectives`, up to two of
    `val_accuracy`, `val_nll`, `multiply_adds` and `num_parameters`, are what proposals trade it off against.
    `budget` bounds the search and its `max_epochs` every trial.
    """

    base: TrainConfig
    dimensions: Mapping[str, BaseDistribution] = field(default_factory=Discovered)
    define: Define | None = None
    baselines: tuple[Mapping[str, Scalar], ...] = ()
    budget: Budget = field(default_factory=Budget)
    metric: str = "val_accuracy"
    further_objectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_objectives()
        base = replace(self.base, max_epochs=self.budget.max_epochs, monitor=self.metric)
        object.__setattr__(self, "base", base)
        given = not isinstance(self.dimensions, Discovered)
        if given == (self.define is not None):
            raise UsageError(
                f"a search space with {'both dimensions and define' if given else 'neither dimensions nor define'}; "
                f"wanted one of them"
            )
        if self.define is not None:
            object.__setattr__(self, "dimensions", self._discovered(self.define))
        else:
            for name in self.dimensions:
                check_dimension(name)
                self._check_bounds(name)
            for _ in self.corners():
                pass  # each is checked when it is made
        for baseline in self.complete_baselines():
            self.base.having(baseline)  # checks every value

    def _check_objectives(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"metric={self.metric!r}: wanted one of {', '.join(METRICS)}")
        further = self.further_objectives
        for name in further:
            if name not in OBJECTIVES:
                raise UsageError(f"further objective {name!r}: wanted one of {', '.join(OBJECTIVES)}")
        if len({self.metric, *further}) <= len(further):
            raise UsageError(
                f"further_objectives={further} with metric={self.metric!r}: an objective is named twice; "
                f"wanted different ones"
            )
        if len(further) > MOST_FURTHER_OBJECTIVES:
            raise UsageError(f"further_objectives={further}: wanted at most {MOST_FURTHER_OBJECTIVES}")

    def _discovered(self, define: Define) -> Discovered:
        """The union of what a function suggests. Raises UsageError for a configuration that makes no sense."""
        found = Discovered()
        for point in explore(define):
            for name, distribution in point.distributions.items():
                check_same_distribution(name, found.setdefault(name, distribution), distribution)
            try:
                check_backbone(self.base.having(point.params).backbone)
            except UsageError as error:
                raise UsageError(f"`define` reaches {error} (it suggested {point.params})") from error
        return found

    def _check_bounds(self, name: str) -> None:
        """Raise UsageError unless the ends of a dimension, or all its choices, are values the field may have."""
        for value in ends(name, self.dimensions[name]):
            try:
                check_backbone(self.base.having({name: value}).backbone)
            except UsageError as error:
                raise UsageError(f"dimension {name!r} reaches {error}") from error

    def corners(self) -> Iterator[TrainConfig]:
        """Every combination of ends and choices of the dimensions that may be wrong together.

        Of a space with `define`, those among the points that were drawn to find its dimensions.
        Raises UsageError for one that makes no sense.
        """
        names = [name for name in self.dimensions if name in INTERLOCKED]
        for together in self._combinations(names):
            try:
                yield self.base.having(together)
            except UsageError as error:
                raise UsageError(f"dimensions {', '.join(names)} reach {error}") from error

    def _combinations(self, names: list[str]) -> list[dict[str, Scalar]]:
        """Values of some dimensions, all at ends, each combination once."""
        ends_of = {name: ends(name, self.dimensions[name]) for name in names}
        if self.define is None:
            return [dict(zip(names, values, strict=True)) for values in itertools.product(*ends_of.values())]
        seen: list[dict[str, Scalar]] = []
        for point in explore(self.define):
            values = {name: value for name, value in point.params.items() if name in ends_of}
            if values not in seen and all(value in ends_of[name] for name, value in values.items()):
                seen.append(values)
        return seen

    @property
    def mode(self) -> Mode:
        """Whether a higher or a lower metric is better."""
        return METRICS[self.metric]

    @property
    def objectives(self) -> dict[str, Mode]:
        """Everything that is optimized and in which direction, the metric first."""
        return {name: OBJECTIVES[name] for name in (self.metric, *self.further_objectives)}

    def point(self, draw: Draw) -> Point:
        """A point of the space whose values come from `draw`, which is asked for active dimensions only."""
        if self.define is not None:
            return run(self.define, draw)
        return Point({name: draw(name, d) for name, d in self.dimensions.items()}, dict(self.dimensions))

    def locate(self, config: Mapping[str, Scalar]) -> Point | None:
        """The point at which a configuration lies; None when it lies outside, or differs in a field that is fixed.

        A field that is not in it (it was written by an earlier version) has its default.
        """
        whole = {**_DEFAULTS, **config}
        try:
            point = self.point(lambda name, distribution: _inside(name, whole[name], distribution))
        except OutsideTheSpace:
            return None
        expected = {**self.base.to_dict(), **point.params}
        same = all(whole[name] == value for name, value in expected.items() if name not in NOT_PART_OF_A_POINT)
        return point if same else None

    def complete_baselines(self) -> list[dict[str, Scalar]]:
        """The baselines with a value for every active dimension, in the order in which they are run, without repeats.

        Raises UsageError when one names something else or lies outside the space.
        """
        complete: list[dict[str, Scalar]] = []
        for baseline in self.baselines:
            values = self._completed(baseline)
            inactive = [name for name in baseline if name not in values]
            if unknown := [name for name in inactive if name not in self.dimensions]:
                raise UsageError(f"baseline {dict(baseline)} sets {', '.join(unknown)}, which are not dimensions")
            if inactive:
                raise UsageError(
                    f"baseline {dict(baseline)} sets {', '.join(inactive)}, which `define` does not suggest beside its "
                    f"other values; leave them out, or set what makes them active"
                )
            if values not in complete:
                complete.append(values)
        return complete

    def _completed(self, baseline: Mapping[str, Scalar]) -> dict[str, Scalar]:
        def draw(name: str, distribution: BaseDistribution) -> Scalar:
            return _inside(name, baseline.get(name, getattr(self.base, name)), distribution)

        return self.point(draw).params

    def with_overrides(self, overrides: Mapping[str, Scalar], *, num_trials: int | None = None) -> SearchSpace:
        """The space with fields of the base set; a field that was a dimension is then fixed."""
        budget = self.budget if num_trials is None else replace(self.budget, num_trials=num_trials)
        if "max_epochs" in overrides:
            budget = replace(budget, max_epochs=overrides["max_epochs"], grace_epochs=None)  # type: ignore[arg-type]
        base = self.base.having(overrides)
        baselines = tuple({k: v for k, v in b.items() if k not in overrides} for b in self.baselines)
        if self.define is None:
            dimensions = {name: d for name, d in self.dimensions.items() if name not in overrides}
            return replace(self, base=base, dimensions=dimensions, baselines=baselines, budget=budget)
        define = fixing(self.define, {name: getattr(base, name) for name in overrides})
        # What is fixed may make inactive what a baseline gives a value for.
        bare = replace(self, base=base, define=define, baselines=(), budget=budget)
        active = tuple({k: v for k, v in b.items() if k in bare._completed(b)} for b in baselines)
        return replace(bare, baselines=active)

    def describe(self) -> dict[str, Any]:
        """The space as plain values, for `experiment.json`; what a resume compares.

        Functions cannot be compared: of `define` the dimensions that it was seen to suggest are.
        """
        return {
            "base": self.base.to_dict(),
            "dimensions": {name: distribution_to_json(d) for name, d in self.dimensions.items()},
            "conditional": self.define is not None,
            "baselines": self.complete_baselines(),
            "budget": {**asdict(self.budget), "grace_epochs": self.budget.grace},
            "metric": self.metric,
            "further_objectives": list(self.further_objectives),
        }


_DEFAULTS = TrainConfig().to_dict()


def _inside(name: str, value: Scalar, distribution: BaseDistribution) -> Scalar:
    """`value`, which must lie in the distribution."""
    if not _contains(distribution, value):
        raise OutsideTheSpace(f"baseline {name}={value!r} lies outside {distribution}")
    return value


def is_within(narrow: BaseDistribution, wide: BaseDistribution) -> bool:
    """Whether a distribution is of the same kind as another one, and every value of it also one of the other's."""
    if type(narrow) is not type(wide) or getattr(narrow, "log", None) != getattr(wide, "log", None):
        return False
    return getattr(narrow, "step", None) == getattr(wide, "step", None) and all(
        _contains(wide, end) for end in ends("", narrow)
    )


def _contains(distribution: BaseDistribution, value: Scalar) -> bool:
    try:
        create_trial(value=0.0, params={"x": value}, distributions={"x": distribution})
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class NamedSpace:
    """A space and the file it came from; `source_hash` is of the file's text."""

    name: str
    space: SearchSpace
    source_hash: str


NOT_SPACES = ("__init__", "conditional", "space")


def available() -> list[str]:
    """The names of the spaces in this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in NOT_SPACES)


def load_space(name: str) -> NamedSpace:
    """The SPACE of a file in this folder, or of a path ending in .py.

    Raises UsageError for an unknown name and for a file that fails or does not define SPACE.
    """
    path = Path(name) if name.endswith(".py") else Path(__file__).parent / f"{name}.py"
    if not name.endswith(".py") and name not in available():
        raise UsageError(
            f"there is no search space {name!r}; there are {', '.join(available())}, "
            f"and any file that defines SPACE, such as ./mine.py"
        )
    if not path.is_file():
        raise UsageError(f"there is no file {path}; wanted a Python file that defines SPACE")
    spec = importlib.util.spec_from_file_location(f"search_space_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).resolve() == path.resolve()
        ]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise UsageError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    space = getattr(module, "SPACE", None)
    if not isinstance(space, SearchSpace):
        found = "does not define SPACE" if space is None else f"defines SPACE as a {type(space).__name__}"
        raise UsageError(f"{path} {found}; wanted SPACE = SearchSpace(...)")
    return NamedSpace(path.stem, space, hashlib.sha256(path.read_bytes()).hexdigest()[:16])
