"""What a search is going to be: a new one from its arguments, or an old one gone on with unchanged."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.distributions import json_to_distribution

from orchestrator.halving import HALVINGS, Halving, Ladder
from results.schema import Scalar, Stage, UsageError
from search_spaces.space import OBJECTIVES, NamedSpace, SearchSpace, is_within
from trainables.backbones import check_backbone
from trainables.config import ANNOTATIONS, TrainConfig
from trainables.datasets import SplitImages

if TYPE_CHECKING:
    from trainables.precision import PrecisionChoice

FIXED = ("seed", "halving", "control_fraction")
MAY_CHANGE = ("base.dataset ", "budget.num_trials ", "budget.max_total_epochs ", "budget.max_seconds ")
EXECUTION = ("accumulation_steps", "gradient_compression", "sync_batch_norm")
"""How workers compute a batch, which they may do otherwise after a resume."""
RECORDED_VERSIONS = ("torch", "torchvision", "ray", "optuna", "numpy", "pandas", "pyarrow", "pillow")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a search does beside asking and judging.

    `control_fraction`: share of the trials that is never stopped early. `max_seconds`: of this driver, from now on.
    `finalists`: how many of the best configurations are trained anew at the end, each with `seeds` other seeds.
    """

    seed: int
    keep_checkpoints: int
    control_fraction: float = 0.0
    max_seconds: float | None = None
    finalists: int = 0
    seeds: int = 1


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """Everything that decides a search's results, apart from the data's place and the machine."""

    source: NamedSpace
    overrides: Mapping[str, Scalar]
    num_trials: int | None
    seed: int
    halving: str
    num_trials_given: bool = True
    """Whether the number of trials was asked for; else it is the space's, and follows it."""
    keep_checkpoints: int = 50
    control_fraction: float = 0.0
    finalists: int = 0
    seeds: int = 1
    stage: Stage = "search"
    warm_start: tuple[str, ...] = ()
    """Experiments whose trials the search learns from."""
    predicts_test: bool = True
    """Whether trained models predict the test split."""
    teacher: Mapping[str, str] | None = None
    """The ensemble that the trained models learn from: its experiment, its id, and a digest of what it is."""
    precision: PrecisionChoice | None = None
    """What `precision=auto` means in this experiment; None until that is decided."""

    def __post_init__(self) -> None:
        if self.halving not in HALVINGS:
            raise UsageError(f"--halving {self.halving!r}: wanted one of {', '.join(HALVINGS)}")
        if "seed" in self.overrides:
            raise UsageError("--set seed=...: give --seed, which every training's own seed is derived from")
        if self.stage == "search" and "monitor" in self.overrides:
            raise UsageError("--set monitor=...: a search goes by its space's metric; set it in the space")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: wanted 0 or more, below 2**32")
        check_backbone(self.space.base.backbone)
        if self.teacher is None and (self.space.base.distill_weight or "distill_weight" in self.space.dimensions):
            raise UsageError(
                "distill_weight above 0 without a teacher to learn from; leave it out, or give an ensemble to "
                "python -m orchestrator.distill"
            )
        if self.stage == "search" and self.space.base.val_fraction == 0:
            raise UsageError("a search chooses by validation: val_fraction=0 leaves none; wanted a fraction above 0")
        if not self.predicts_test and self.space.base.val_fraction == 0:
            raise UsageError(
                "--no-test with val_fraction=0 leaves no images to evaluate on; drop one, or add --set val_fraction=0.1"
            )

    def check(self) -> None:
        """Raise UsageError where the search, its space and its strategy of early stopping do not fit.

        Not when a plan is made: what a resume does not give is known only from the experiment.
        """
        if self.finalists > self.space.budget.num_trials:
            raise UsageError(
                f"--finalists {self.finalists}, but the search has {self.space.budget.num_trials} trials; "
                f"lower it or raise --num-trials"
            )
        self._check_halving()

    def _check_halving(self) -> None:
        for name, value in HALVINGS[self.halving].changes.items():
            if self.overrides.get(name, value) != value:
                raise UsageError(
                    f"--set {name}={self.overrides[name]}, but --halving {self.halving} trains with {name}={value}; "
                    f"drop one of them"
                )
        strategy, base, budget = HALVINGS[self.halving], self.space.base, self.space.budget
        if self.halving != "none" and budget.grace_epochs is not None and budget.grace_epochs >= budget.max_epochs:
            raise UsageError(
                f"grace_epochs={budget.grace_epochs} leaves no rung below max_epochs={budget.max_epochs}; lower it, "
                f"or give --halving none"
            )
        if strategy.needs_average and not (base.ema_decay or "ema_decay" in self.space.dimensions):
            raise UsageError(
                f"--halving {self.halving} compares moving averages of the weights, and there are none; "
                f"add --set ema_decay=0.99 (an average over about 100 steps), or choose another --halving"
            )
        course = self.make_halving().course
        if len(course) == 1:
            return
        if base.patience or "patience" in self.space.dimensions:
            raise UsageError(f"--halving {self.halving} has schedules of its own, which patience may not end early")
        for config in self.space.corners():
            for leg in course:
                leg.config(config)
            falling_from = (1 - config.decay_fraction) * config.max_epochs
            if any(leg.trunk and falling_from < leg.end for leg in course[:-1]):
                raise UsageError(
                    f"--halving {self.halving} wants a constant rate up to its last rung, and it falls from epoch "
                    f"{falling_from:g} on; lower decay_fraction={config.decay_fraction:g} or raise reduction_factor"
                )

    @cached_property
    def space(self) -> SearchSpace:
        """The space with its overrides, its precision and what the search may spend."""
        space = self.source.space.with_overrides(
            {**self.overrides, **HALVINGS[self.halving].changes},
            num_trials=self.num_trials,
        )
        if self.precision is None or space.base.precision != "auto":
            return space
        return replace(space, base=replace(space.base, precision=self.precision.resolved))

    @property
    def num_trials_in_all(self) -> int:
        """Trials of the search and finalists."""
        return self.space.budget.num_trials + self.finalists * self.seeds

    def rules(self, *, max_seconds: float | None = None) -> Rules:
        """The rules of a driver that has so many seconds."""
        return Rules(
            seed=self.seed,
            keep_checkpoints=self.keep_checkpoints,
            control_fraction=self.control_fraction,
            max_seconds=max_seconds,
            finalists=self.finalists,
            seeds=self.seeds,
        )

    def make_halving(self) -> Halving:
        """The strategy of early stopping, in its first state."""
        budget = self.space.budget
        ladder = Ladder(grace_epochs=budget.grace, max_epochs=budget.max_epochs, factor=float(budget.reduction_factor))
        return HALVINGS[self.halving](ladder)

    def info(self, *, name: str, data: SplitImages, command: str) -> dict[str, Any]:
        """What `experiment.json` records."""
        space = self.space
        return {
            "name": name,
            "started_at": datetime.now(UTC).isoformat(timespec="microseconds"),
            "dataset": space.base.dataset,
            "split_hash": data.split_hash,
            "split_sizes": data.sizes(),
            "class_names": list(data.class_names),
            "image_size": data.image_size,
            "channels": data.channels,
            "space": {"name": self.source.name, "source_hash": self.source.source_hash, **space.describe()},
            "overrides": dict(self.overrides),
            "seed": self.seed,
            "halving": self.halving,
            "control_fraction": self.control_fraction,
            "finalists": self.finalists,
            "seeds": self.seeds,
            "stage": self.stage,
            "keep_checkpoints": self.keep_checkpoints,
            "precision": None if self.precision is None else asdict(self.precision),
            "predicts_test": self.predicts_test,
            "metric": space.metric,
            "mode": space.mode,
            "further_objectives": {name: OBJECTIVES[name] for name in space.further_objectives},
            "warm_start": list(self.warm_start),
            "teacher": None if self.teacher is None else dict(self.teacher),
            "max_epochs": space.budget.max_epochs,
            "num_trials_given": self.num_trials_given,
            "strengths_within": space.describe()["dimensions"],
            "config_fields": ANNOTATIONS,
            **provenance(command),
        }


def resumed(
    plan: SearchPlan,
    info: Mapping[str, Any],
    *,
    seed: int | None = None,
    halving: str | None = None,
    keep_checkpoints: int | None = None,
    control_fraction: float | None = None,
    finalists: int | None = None,
    seeds: int | None = None,
) -> SearchPlan:
    """The plan of an experiment gone on with: what is not given is what it was before.

    A search may be made longer, and its space narrower: the same dimensions within their former ranges, without the
    baselines that are then outside.
    Raises UsageError, saying what, when the search would not be the same otherwise.
    """
    # Experiments of earlier versions do not have all of it.
    old = {"further_objectives": [], "conditional": False, **info["space"]}
    old["base"] = {**TrainConfig().to_dict(), **old["base"]}
    warm_start = tuple(info.get("warm_start", ()))
    if plan.warm_start and plan.warm_start != warm_start:
        raise UsageError(
            f"--warm-start {' '.join(plan.warm_start)}, but experiment {info['name']!r} was begun with "
            f"{' '.join(warm_start) or 'none'}; leave it out, or start anew with another --name"
        )
    same = SearchPlan(
        source=plan.source,
        overrides={**info["overrides"], **plan.overrides},
        num_trials=plan.num_trials or _num_trials(plan, info),
        num_trials_given=plan.num_trials is not None or info.get("num_trials_given", True),
        seed=info["seed"] if seed is None else seed,
        halving=halving or info["halving"],
        keep_checkpoints=info["keep_checkpoints"] if keep_checkpoints is None else keep_checkpoints,
        control_fraction=info.get("control_fraction", 0.0) if control_fraction is None else control_fraction,
        finalists=info.get("finalists", 0) if finalists is None else finalists,
        seeds=info.get("seeds", 1) if seeds is None else seeds,
        stage=plan.stage,
        warm_start=warm_start,
        predicts_test=info.get("predicts_test", True),
        teacher=plan.teacher,
        precision=recorded_precision(info),
    )
    if same.predicts_test and not plan.predicts_test:
        raise UsageError(
            f"--no-test, but experiment {info['name']!r} was begun without it, and its ended trials have predicted "
            f"test; leave it out, or start again with another --name"
        )
    _check_same_teacher(plan.teacher, info)
    if plan.stage != info.get("stage", "search"):
        raise UsageError(
            f"experiment {info['name']!r} is of stage {info.get('stage', 'search')}, not {plan.stage}; "
            f"go on with the command it was begun with: {info['command']}"
        )
    if plan.num_trials is not None and plan.num_trials < old["budget"]["num_trials"]:
        raise UsageError(
            f"--num-trials {plan.num_trials}, but experiment {info['name']!r} was to have "
            f"{old['budget']['num_trials']}; a resume may ask for more, not for fewer"
        )
    new = json.loads(json.dumps(same.space.describe()))
    narrowed = _is_narrowed(old["dimensions"], new["dimensions"])
    if narrowed and all(baseline in old["baselines"] for baseline in new["baselines"]):
        old = {**old, "dimensions": new["dimensions"], "baselines": new["baselines"]}
    changes = [
        *_differences("", {name: info.get(name, 0.0) for name in FIXED}, {name: getattr(same, name) for name in FIXED}),
        *_differences("", {k: old[k] for k in new}, new),
    ]
    # Data may have moved, its hash tells whether it is the same; a search may be made longer or shorter.
    of_workers = tuple(f"base.{name} " for name in EXECUTION) if plan.stage == "large_batch" else ()
    changes = [c for c in changes if not c.startswith(MAY_CHANGE + of_workers)]
    if changes:
        raise UsageError(
            f"experiment {info['name']!r} was begun with another search space: {'; '.join(changes)}; "
            f"undo that, or start anew with another --name"
        )
    return same


def recorded_precision(info: Mapping[str, Any]) -> PrecisionChoice | None:
    """What an experiment resolved `precision=auto` to; None for experiments that did not record it."""
    recorded = info.get("precision")
    from trainables.precision import PrecisionChoice  # and torch, which a new plan can do without

    return None if recorded is None else PrecisionChoice(**recorded)


def _check_same_teacher(teacher: Mapping[str, str] | None, info: Mapping[str, Any]) -> None:
    before = info.get("teacher")
    if teacher is None or before is None or dict(teacher) == before:
        return
    former, present = (f"{of['experiment']}/{of['ensemble_id']} ({of['digest']})" for of in (before, teacher))
    raise UsageError(
        f"experiment {info['name']!r} learns from ensemble {former}, not {present}; restore it, or start anew with "
        f"another --name"
    )


def _is_narrowed(old: Mapping[str, str], new: Mapping[str, str]) -> bool:
    """Whether a space has the dimensions of another one, none of them wider, and one or more of them narrower."""
    if old == new or old.keys() != new.keys():
        return False
    return all(is_within(json_to_distribution(new[name]), json_to_distribution(old[name])) for name in old)


def _num_trials(plan: SearchPlan, info: Mapping[str, Any]) -> int:
    """How many trials an experiment is to have when no number is given: what it was, or what its space asks for now.

    A number that was once given holds, as everything that is not given is what it was before.
    """
    before: int = info["space"]["budget"]["num_trials"]
    return before if info.get("num_trials_given", True) else max(before, plan.source.space.budget.num_trials)


def check_same_data(info: Mapping[str, Any], data: SplitImages) -> None:
    """Raise UsageError when the data is not what an experiment was begun with."""
    if data.split_hash != info["split_hash"]:
        raise UsageError(
            f"the images or splits of {info['dataset']} are not those experiment {info['name']!r} was begun with "
            f"(split hash {data.split_hash}, was {info['split_hash']}); restore the data or start anew with --name"
        )


def _differences(prefix: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    found = []
    for key in [*old, *(k for k in new if k not in old)]:
        before, after = old.get(key, "not there"), new.get(key, "not there")
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(f"{prefix}{key}.", before, after)
        elif before != after:
            found.append(f"{prefix}{key} was {_short(before)} and is {_short(after)}")
    return found


def _short(value: Any) -> str:
    """Distributions come as JSON texts: show what is in them."""
    if isinstance(value, str) and value.startswith("{"):
        distribution = json.loads(value)
        inside = ", ".join(f"{k}={v}" for k, v in distribution["attributes"].items() if v not in (None, False))
        return f"{distribution['name']}({inside})"
    return str(value)


def provenance(command: str) -> dict[str, Any]:
    """Versions, the code's commit and the command line."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "versions": {name: version(name) for name in RECORDED_VERSIONS},
        "git_commit": commit,
        "command": command,
    }
