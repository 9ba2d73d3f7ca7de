"""SearchSpace: a base configuration, the fields that vary, known good settings, and what the search may spend."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import create_trial

from results.schema import Scalar, UsageError
from trainables.backbones import check_backbone
from trainables.config import FIELD_TYPES, INTERLOCKED, TrainConfig

METRICS: dict[str, Literal["max", "min"]] = {"val_accuracy": "max", "val_nll": "min"}
DATA_FIELDS = ("dataset", "image_size", "train_fraction", "val_fraction", "pipeline")
FIXED_FIELDS = (*DATA_FIELDS, "max_epochs", "monitor", "seed")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a search may spend. No trial is judged before `grace_epochs` (None: a third of `max_epochs`)."""

    num_trials: int = 24
    max_epochs: int = 9
    grace_epochs: int | None = None
    reduction_factor: float = 3.0
    max_total_epochs: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_trials", "max_epochs", "grace_epochs"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name}={value!r}: wanted a whole number, 1 or more")
        if not self.reduction_factor > 1:
            raise UsageError(f"reduction_factor={self.reduction_factor!r}: wanted a number above 1")

    @property
    def grace(self) -> int:
        """Epochs of the first rung."""
        return min(self.grace_epochs or max(1, self.max_epochs // 3), self.max_epochs)


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """What a search explores. `dimensions` maps fields of TrainConfig to Optuna distributions.

    `baselines` are run first; each gives values for some dimensions, the base configuration the others.
    `metric` is `val_accuracy` or `val_nll`; `budget` bounds the search and its `max_epochs` every trial.
    """

    base: TrainConfig
    dimensions: Mapping[str, BaseDistribution]
    baselines: tuple[Mapping[str, Scalar], ...] = ()
    budget: Budget = field(default_factory=Budget)
    metric: str = "val_accuracy"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"metric={self.metric!r}: wanted one of {', '.join(METRICS)}")
        base = replace(self.base, max_epochs=self.budget.max_epochs, monitor=self.metric)
        object.__setattr__(self, "base", base)
        for name in self.dimensions:
            if name not in FIELD_TYPES:
                raise UsageError(
                    f"dimension {name!r} is not a field of TrainConfig; there are {', '.join(FIELD_TYPES)}"
                )
            if name in FIXED_FIELDS:
                raise UsageError(f"dimension {name!r} cannot vary within a search; set it in the base configuration")
            self._check_bounds(name)
        for _ in self.corners():
            pass  # each is checked when it is made
        for baseline in self.complete_baselines():
            self.base.having(baseline)  # checks every value

    def _check_bounds(self, name: str) -> None:
        """Raise UsageError unless the ends of a dimension, or all its choices, are values the field may have."""
        for value in self._ends(name):
            try:
                check_backbone(self.base.having({name: value}).backbone)
            except UsageError as error:
                raise UsageError(f"dimension {name!r} reaches {error}") from error

    def _ends(self, name: str) -> list[Scalar]:
        """The ends of a dimension, or all its choices."""
        distribution = self.dimensions[name]
        if isinstance(distribution, CategoricalDistribution):
            return list(distribution.choices)
        if isinstance(distribution, FloatDistribution | IntDistribution):
            return [distribution.low, distribution.high]
        raise UsageError(f"dimension {name!r} is {distribution!r}; wanted one of optuna.distributions")

    def corners(self) -> Iterator[TrainConfig]:
        """Every combination of ends and choices of the dimensions that may be wrong together.

        Raises UsageError for one that makes no sense.
        """
        names = [name for name in self.dimensions if name in INTERLOCKED]
        for values in itertools.product(*(self._ends(name) for name in names)):
            together = dict(zip(names, values, strict=True))
            try:
                yield self.base.having(together)
            except UsageError as error:
                raise UsageError(f"dimensions {', '.join(names)} reach {error}") from error

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether a higher or a lower metric is better."""
        return METRICS[self.metric]

    def complete_baselines(self) -> list[dict[str, Scalar]]:
        """The baselines with a value for every dimension, in the order in which they are run, without repeats.

        Raises UsageError when one names something else or lies outside the space.
        """
        complete: list[dict[str, Scalar]] = []
        for baseline in self.baselines:
            unknown = [name for name in baseline if name not in self.dimensions]
            if unknown:
                raise UsageError(f"baseline {dict(baseline)} sets {', '.join(unknown)}, which are not dimensions")
            values = {name: baseline.get(name, getattr(self.base, name)) for name in self.dimensions}
            for name, value in values.items():
                if not _contains(self.dimensions[name], value):
                    raise UsageError(f"baseline {name}={value!r} lies outside {self.dimensions[name]}")
            if values not in complete:
                complete.append(values)
        return complete

    def with_overrides(self, overrides: Mapping[str, Scalar], *, num_trials: int | None = None) -> SearchSpace:
        """The space with fields of the base set; a field that was a dimension is then fixed."""
        budget = self.budget
        if num_trials is not None:
            budget = replace(budget, num_trials=num_trials)
        if "max_epochs" in overrides:
            budget = replace(budget, max_epochs=overrides["max_epochs"], grace_epochs=None)  # type: ignore[arg-type]
        baselines = tuple({k: v for k, v in b.items() if k not in overrides} for b in self.baselines)
        return SearchSpace(
            base=self.base.having(overrides),
            dimensions={name: d for name, d in self.dimensions.items() if name not in overrides},
            baselines=baselines,
            budget=budget,
            metric=self.metric,
        )

    def describe(self) -> dict[str, Any]:
        """The space as plain values, for `experiment.json`; what a resume compares."""
        return {
            "base": self.base.to_dict(),
            "dimensions": {name: distribution_to_json(d) for name, d in self.dimensions.items()},
            "baselines": self.complete_baselines(),
            "budget": {**asdict(self.budget), "grace_epochs": self.budget.grace},
            "metric": self.metric,
        }


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


def available() -> list[str]:
    """The names of the spaces in this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in {"__init__", "space"})


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
