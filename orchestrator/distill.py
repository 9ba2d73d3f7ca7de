"""Train one network to do what an ensemble does: students of stage distilled, each beside one trained alone.

python -m orchestrator.distill --experiment cifar100 --ensemble e0001 --backbone small_cnn --seeds 3
python -m orchestrator.distill --data-dir DIR --resume
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # torch reads it once, when it is imported: idle threads otherwise spin
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from orchestrator import cli, driver
from orchestrator.description import Description, read_description
from orchestrator.distillation import compare, ensemble_accuracies, show, show_alone
from orchestrator.plan import SearchPlan, recorded_precision
from orchestrator.serving import Ensemble, digest, load_ensemble
from orchestrator.training import Teach, choose_device, drive
from results.schema import Scalar, UsageError
from results.store import Experiment, exists, names
from search_spaces.space import Budget, NamedSpace, SearchSpace
from trainables.config import TrainConfig
from trainables.datasets import SplitImages
from trainables.distillation import DistilledImages
from trainables.resident import TrainingImages

DISTILL_FIELDS = ("distill_weight", "distill_temperature")
DEFAULT_WEIGHT, DEFAULT_TEMPERATURE = 0.5, 1.0
"""What did least harm on short trainings, where both were tried; longer ones may want 0.9 and 4."""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", metavar="NAME", help="default: the newest with an ensemble")
    parser.add_argument("--ensemble", metavar="ID", help="the teacher (default: the experiment's newest)")
    parser.add_argument("--backbone", metavar="B", help="default: that of the member with the largest weight")
    parser.add_argument("--seeds", dest="num_seeds", type=cli.count, metavar="N", help="students (default: 1)")
    parser.add_argument(
        "--distill-weight", type=cli.fraction, help=f"share of the loss that follows the teacher ({DEFAULT_WEIGHT})"
    )
    parser.add_argument(
        "--distill-temperature", type=cli.positive, help=f"softens teacher and student ({DEFAULT_TEMPERATURE:g})"
    )
    parser.add_argument("--without-control", action="store_true", help="do not train the same network alone as well")
    driver.add_driving_arguments(parser)
    parser.add_argument("--name", help="of the students' experiment (default: EXPERIMENT-ENSEMBLE-BACKBONE)")
    parser.add_argument("--seed", type=cli.count_or_zero, help="of the first student (default: 0)")
    cli.add_threads(parser)
    return parser.parse_args(arguments)


@dataclass(frozen=True)
class Teacher:
    """An ensemble of an experiment, its weights not loaded yet."""

    experiment: Experiment
    ensemble_id: str
    description: Description

    @property
    def folder(self) -> Path:
        """Where it lies, with its members' weights."""
        return self.experiment.whole_ensemble(self.ensemble_id)

    @property
    def config(self) -> TrainConfig:
        """The configuration of the member with the largest weight, the first of several."""
        return max(self.description.members, key=lambda member: member.weight).train_config()

    def identity(self) -> dict[str, str]:
        """What an experiment records of its teacher."""
        return {"experiment": self.experiment.name, "ensemble_id": self.ensemble_id, "digest": digest(self.folder)}

    def check_teaches(self, data: SplitImages) -> None:
        """Raise UsageError for a dataset of other classes, other image sizes or other splits."""
        of = self.description
        for what, taught, given in (
            ("classes", len(of.class_names), data.num_classes),
            ("channels", of.channels, data.channels),
            ("pixels a side", of.image_size, data.image_size),
        ):
            if taught != given:
                raise UsageError(
                    f"ensemble {self.ensemble_id} was trained on images of {taught} {what}, the dataset has {given}; "
                    f"give --dataset {of.dataset} as it was then"
                )
        if data.split_hash != of.split_hash:
            raise UsageError(
                f"ensemble {self.ensemble_id} was trained on {of.dataset} with split hash {of.split_hash}, these "
                f"images have {data.split_hash}: it may have seen what is held out here; give the same dataset"
            )


def find_teacher(args: argparse.Namespace) -> Teacher:
    """The ensemble that is meant; of a resumed experiment its own. Raises UsageError, listing those there are."""
    recorded = _recorded_teacher(args)
    wanted = args.experiment or recorded.get("experiment") or _newest_with_ensemble(args.results_dir)
    experiment = Experiment.open(args.results_dir, wanted)
    there = experiment.ensemble_ids()
    ensemble_id = args.ensemble or recorded.get("ensemble_id") or (there[-1] if there else "")
    if ensemble_id not in there:
        raise UsageError(
            f"experiment {wanted!r} has no ensemble {ensemble_id!r}; there are: {', '.join(there) or 'none'}; make one "
            f"with python -m orchestrator.ensemble --experiment {wanted}"
        )
    return Teacher(experiment, ensemble_id, read_description(experiment.ensemble_folder(ensemble_id)))


def _recorded_teacher(args: argparse.Namespace) -> dict[str, str]:
    if not args.resume or args.name is None:
        return {}
    return Experiment.open(args.results_dir, args.name).info.get("teacher") or {}


def _newest_distilled(results_dir: str) -> str:
    for name in reversed(names(results_dir)):
        if Experiment.open(results_dir, name).info.get("teacher"):
            return name
    raise UsageError(f"nothing has been distilled in {results_dir}: there is nothing to resume; leave --resume out")


def _newest_with_ensemble(results_dir: str) -> str:
    for name in reversed(names(results_dir)):
        if Experiment.open(results_dir, name).ensemble_ids():
            return name
    raise UsageError(f"no experiment in {results_dir} has an ensemble; make one with python -m orchestrator.ensemble")


def plan_from(args: argparse.Namespace, teacher: Teacher) -> SearchPlan:
    """The plan of the students: one configuration, a trial for each seed."""
    overrides = driver.overrides_from(args, "dataset", "backbone", "train_fraction", "max_epochs", *DISTILL_FIELDS)
    base = teacher.config.having(
        {
            "seed": 0,
            "distill_weight": DEFAULT_WEIGHT,
            "distill_temperature": DEFAULT_TEMPERATURE,
            "precision": "auto",  # the teacher's was decided for its network, where it was trained
        }
    )
    student = base.having(overrides)
    if not student.distill_weight:
        raise UsageError("distill_weight=0: there is nothing to learn from a teacher; wanted a number above 0, up to 1")
    space = SearchSpace(
        base=base,
        dimensions={},
        baselines=({},),
        budget=Budget(num_trials=args.num_seeds or 1, max_epochs=base.max_epochs),
        metric=student.monitor,
    )
    return SearchPlan(
        source=NamedSpace(f"distilled-{student.backbone}", space, _hash(base)),
        overrides=overrides,
        num_trials=args.num_seeds,
        seed=args.seed or 0,
        halving="none",
        keep_checkpoints=max(SearchPlan.keep_checkpoints, args.num_seeds or 1),
        stage="distilled",
        teacher=teacher.identity(),
    )


def alone(plan: SearchPlan) -> SearchPlan:
    """The plan of the same trainings without the teacher."""
    base = plan.space.base.having({name: getattr(TrainConfig(), name) for name in DISTILL_FIELDS})
    return replace(
        plan,
        source=NamedSpace(f"alone-{base.backbone}", replace(plan.space, base=base), _hash(base)),
        overrides={name: value for name, value in plan.overrides.items() if name not in DISTILL_FIELDS},
        stage="single",
        teacher=None,
    )


def _hash(config: TrainConfig) -> str:
    return hashlib.sha256(repr(sorted(config.to_dict().items())).encode()).hexdigest()[:16]


def experiment_name(args: argparse.Namespace, teacher: Teacher, backbone: Scalar) -> str:
    """The name given, or one made of what is distilled into what."""
    return str(args.name or f"{teacher.experiment.name}-{teacher.ensemble_id}-{backbone}")


@dataclass(frozen=True)
class Part:
    """An experiment that the command drives: its plan, and itself if it is there already."""

    name: str
    plan: SearchPlan
    experiment: Experiment | None

    @classmethod
    def prepared(cls, args: argparse.Namespace, name: str, plan: SearchPlan, *, required: bool) -> Part:
        """Opened to go on with, or checked to be new. One that is not `required` may not have been begun."""
        begun = required or exists(args.results_dir, name)
        # As many weights are kept as there are students.
        keep = args.num_seeds and max(SearchPlan.keep_checkpoints, args.num_seeds)
        resumed = argparse.Namespace(**{**vars(args), "resume": args.resume and begun, "keep_checkpoints": keep})
        experiment, plan = driver.open_or_check_new(resumed, plan, name)
        return cls(name, plan, experiment)


def main(arguments: list[str] | None = None) -> int:
    """Distil an ensemble. Returns the exit status."""
    args = parse(sys.argv[1:] if arguments is None else arguments)
    console = cli.make_console()
    if args.resume and args.name is None:
        args.name = _newest_distilled(args.results_dir)
    teacher = find_teacher(args)
    ensemble = load_ensemble(teacher.folder, device=choose_device(args.device))
    ensemble.check_can_teach()
    parts = prepare_parts(args, teacher)
    data = driver.load_data(parts[0].plan, args.data_dir)
    teacher.check_teaches(data)
    finished: list[Experiment] = []
    for part, teach in zip(parts, (_taught_by(ensemble), _untaught), strict=False):
        # Both are compared seed by seed: they compute in the same number type.
        plan = replace(part.plan, precision=recorded_precision(finished[0].info)) if finished else part.plan
        driver.announce(plan, part.experiment, data, name=part.name, console=console)
        try:
            done = drive(part.experiment, plan, data, args, console, name=part.name, teach=teach)
        except cli.Interrupted:
            return driver.interrupted(args, part.name, console)
        except OSError as error:
            return driver.stopped_by(args, error)
        finished.append(done)
    return conclude(finished, teacher, console)


def prepare_parts(args: argparse.Namespace, teacher: Teacher) -> list[Part]:
    """The students' experiment and, unless nothing is to be compared, that of the networks trained alone."""
    plan = plan_from(args, teacher)
    name = experiment_name(args, teacher, plan.space.base.backbone)
    students = Part.prepared(args, name, plan, required=True)
    if args.without_control:
        return [students]
    return [students, Part.prepared(args, f"{name}-alone", alone(students.plan), required=False)]


def _taught_by(ensemble: Ensemble) -> Teach:
    return lambda images: DistilledImages(images, ensemble.log_probabilities, teacher_bytes=ensemble.num_bytes)


def _untaught(images: TrainingImages) -> TrainingImages:
    return images


def conclude(finished: list[Experiment], teacher: Teacher, console: Console) -> int:
    """Compare, store and show what came of it. Returns the exit status."""
    failed = [(e.name, trial) for e in finished for trial in e.history.ended if not trial.completed]
    for name, trial in failed:
        assert trial.ended is not None
        reason = trial.ended.stop_reason
        print(f"error: {name}/{trial.trial_id} {trial.ended.status} ({reason}); lower lr", file=sys.stderr)
    accuracies = ensemble_accuracies(teacher.experiment, teacher.ensemble_id)
    if len(finished) == 2:
        records = compare(finished[0], finished[1])
        with finished[0].driving():
            finished[0].write_distillation(records)
        show(console, records, accuracies)
    else:
        show_alone(console, finished[0], accuracies)
    for experiment in finished:
        console.print(f"stored in {experiment.where}", highlight=False, soft_wrap=True)
    return cli.FAILED if failed else cli.DONE


if __name__ == "__main__":
    cli.run(main)
