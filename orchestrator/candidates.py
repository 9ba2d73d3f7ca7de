"""Which stored models may become members: found in experiments, filtered, and their predictions read and checked.

Shape suffixes: N examples, C classes.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd

from orchestrator.pool import KEPT_BYTES, POOLS, AnyPool, SelectPool, StoredLogits, Summary, in_threads, summarize
from results.predictions import SEEN_FROM_VIEWS
from results.schema import DataWarning, FloatArray, IntArray, Predictions, SelectPredictions, Split, UsageError
from results.store import Experiment, names
from trainables.config import NUM_VIEWS


@dataclass(frozen=True)
class Candidate:
    """A variant of a trial that may become a member.

    `configuration` is the same for trainings of one configuration. `train_seconds` of a student include those of its
    teacher's members. `train_cost`: multiply-adds of the whole training's forward passes, by epochs, share of the data
    and network. `multiply_adds` and `images_per_second` are of predicting, with all views of test-time augmentation;
    the speed is what the trial's worker measured, None where it did not.
    """

    experiment: str
    trial_id: str
    variant: str
    configuration: str
    stage: str
    backbone: str
    status: str
    averaged: bool
    train_seconds: float
    train_cost: float
    num_parameters: int
    multiply_adds: int
    images_per_second: float | None

    @property
    def weights(self) -> tuple[str, str, str]:
        """What names its weights: test-time augmentation looks at more views with the same ones."""
        return self.experiment, self.trial_id, SEEN_FROM_VIEWS.get(self.variant, self.variant)

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.trial_id if self.variant == "best" else f"{self.trial_id}/{self.variant}"

    @property
    def kind(self) -> str:
        """What sort of single model it is: student, or the variant, an EMA being the best epoch's average."""
        if self.stage == "distilled":
            return "student"
        if self.variant == "best":
            return "ema" if self.averaged else "model"
        return "snapshot" if self.variant.startswith("epoch_") else self.variant


class NotFinite(UsageError):
    """A candidate's logits on a split are not all finite."""

    def __init__(self, candidate: Candidate, split: Split) -> None:
        super().__init__(f"{candidate.experiment}/{candidate.name} has {split} logits that are not finite")
        self.candidate = candidate


def _split_of(predictions: type[Predictions]) -> Split:
    return next(split for split, cls in POOLS.values() if cls is predictions)


@dataclass(frozen=True, eq=False)
class Candidates:
    """The candidates of one or several experiments with equal splits, and where to read their predictions."""

    rows: tuple[Candidate, ...]
    experiments: dict[str, Experiment] = field(repr=False)

    def read_select(self) -> tuple[Candidates, SelectPool]:
        """The candidates whose predictions on select are sound, and their pool; the others are named in a warning.

        Raises UsageError when examples, labels or classes differ, or when none is left.
        """
        first = self._read(0, SelectPredictions)
        logits = StoredLogits(self._reader(SelectPredictions, first), len(self.rows), most_bytes=KEPT_BYTES)

        def read(place: int) -> tuple[FloatArray, Summary | None]:
            logits_NC = self._checked(place, SelectPredictions, first).logits_NC
            return logits_NC, summarize(logits_NC, first.labels_N) if np.isfinite(logits_NC).all() else None

        summaries: dict[int, Summary] = {}
        for place, (logits_NC, summary) in enumerate(in_threads(read, range(len(self.rows)))):
            if summary is not None:
                summaries[place] = summary
                logits.keep(place, logits_NC)
        self._name_unsound([row for place, row in enumerate(self.rows) if place not in summaries])
        sound = list(summaries)
        kept = Candidates(tuple(self.rows[place] for place in sound), self.experiments)
        pool = SelectPool.of(
            StoredLogits(lambda place: logits[sound[place]], len(sound)),
            first.labels_N,
            summaries=list(summaries.values()),
            trials_M=_numbered((c.experiment, c.trial_id) for c in kept.rows),
            weights_M=_numbered(c.weights for c in kept.rows),
            configurations_M=_numbered(c.configuration for c in kept.rows),
            costs_M=np.array([c.multiply_adds for c in kept.rows], dtype=np.float64),
        )
        return kept, pool

    def _name_unsound(self, unsound: Sequence[Candidate]) -> None:
        """Warn of candidates that are left out. Raises UsageError when that is all of them."""
        if len(unsound) == len(self.rows):
            raise UsageError("no candidate has finite logits; search again with a lower learning rate")
        if unsound:
            listed = ", ".join(f"{c.experiment}/{c.name}" for c in unsound)
            warnings.warn(
                f"{len(unsound)} of {len(self.rows)} candidates have logits that are not finite, and are left out: "
                f"{listed}",
                DataWarning,
                stacklevel=3,
            )

    def load(self, of: type[AnyPool]) -> AnyPool:
        """The candidates' predictions for a split, read as they are asked for.

        Reading raises UsageError when what is stored does not fit.
        """
        first = self._read(0, POOLS[of][1])
        return of(StoredLogits(self._reader(POOLS[of][1], first), len(self.rows)), first.labels_N)

    def _reader(self, of: type[Predictions], first: Predictions) -> Callable[[int], npt.NDArray[np.float16]]:
        def read(place: int) -> npt.NDArray[np.float16]:
            logits_NC = self._checked(place, of, first).logits_NC
            if not np.isfinite(logits_NC).all():
                raise NotFinite(self.rows[place], _split_of(of))
            return logits_NC

        return read

    def _read(self, place: int, of: type[Predictions]) -> Predictions:
        row = self.rows[place]
        return self.experiments[row.experiment].predictions(row.trial_id, of, variant=row.variant)

    def _checked(self, place: int, of: type[Predictions], first: Predictions) -> Predictions:
        """A candidate's predictions. Raises UsageError when they are not of the same examples, labels and classes."""
        predictions = self._read(place, of)
        split = _split_of(of)
        name, other = (f"{c.experiment}/{c.name}" for c in (self.rows[place], self.rows[0]))
        fix = f"leave one of them out, with --experiment or --candidates \"trial_id != '{self.rows[place].trial_id}'\""
        if not np.array_equal(predictions.example_ids_N, first.example_ids_N):
            raise UsageError(f"{name} was predicted on other {split} examples than {other}, or in another order; {fix}")
        if not np.array_equal(predictions.labels_N, first.labels_N):
            raise UsageError(f"{name} has other labels than {other} for the same {split} examples; {fix}")
        if predictions.logits_NC.shape != first.logits_NC.shape:
            classes = [p.logits_NC.shape[1] for p in (predictions, first)]
            raise UsageError(f"{name} knows {classes[0]} classes and {other} {classes[1]}; {fix}")
        return predictions


def choose_experiments(results_dir: str, wanted: Sequence[str], *, include_stopped: bool) -> dict[str, Experiment]:
    """The named experiments, or the newest search with two or more usable trials.

    Raises UsageError when there is none, or when splits or classes differ.
    """
    if wanted:
        experiments = {name: Experiment.open(results_dir, name) for name in wanted}
        _check_alike(experiments, "split_hash", "splits")
        _check_alike(experiments, "class_names", "classes, or an order of classes,")
        return experiments
    there = names(results_dir)
    if not there:
        raise UsageError(
            f"there are no experiments in {results_dir}; make one with python -m orchestrator.search digits"
        )
    for name in reversed(there):
        experiment = Experiment.open(results_dir, name)
        is_search = experiment.info.get("stage", "search") == "search"
        if is_search and len(usable(experiment, include_stopped=include_stopped)) >= 2:
            return {name: experiment}
    kind, fix = "completed trials with predictions", ", or add --include-stopped"
    if include_stopped:
        kind, fix = "trials with predictions, or stopped ones with weights", ""
    raise UsageError(f"no experiment in {results_dir} has two or more {kind}; search longer{fix}")


def _check_alike(experiments: dict[str, Experiment], key: str, what: str) -> None:
    values = {name: experiment.info[key] for name, experiment in experiments.items()}
    if len({str(value) for value in values.values()}) > 1:
        listed = ", ".join(f"{name} {str(value)[:60]}" for name, value in values.items())
        raise UsageError(f"these experiments have different {what} and cannot be pooled: {listed}; take one")


def find_candidates(
    experiments: dict[str, Experiment], *, k: int, include_stopped: bool, expression: str = ""
) -> Candidates:
    """The candidates of experiments, those alone for which `expression` holds.

    `expression` is one of pandas (`DataFrame.query`) over the columns of `trials` with `config.` left off where that
    is no other column, `experiment` and `variant`. Raises UsageError when there are fewer trials than k.
    """
    tables = [_variants(experiment, include_stopped=include_stopped) for experiment in experiments.values()]
    filled = [table for table in tables if len(table)]
    table = pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()
    if expression and len(table):
        table = holding(table, expression)
    rows = tuple(_candidate(row) for _, row in table.iterrows())
    num_trials = len({(row.experiment, row.trial_id) for row in rows})
    if num_trials < k:
        raise _too_few(num_trials, experiments, k=k, include_stopped=include_stopped, expression=expression)
    return Candidates(rows, experiments)


METHODS = {"str", "contains", "startswith", "endswith", "len", "isin", "isna", "notna", "between"}
METHODS |= {"abs", "mean", "median", "min", "max", "quantile"}
"""What an expression may ask of a column."""


def _check_only_asks(expression: str) -> None:
    """Raise ValueError or SyntaxError unless an expression merely asks: pandas runs any method, and all after @."""
    if "@" in expression:
        raise ValueError("@ is not allowed")
    for node in ast.walk(ast.parse(expression.replace("`", "").strip())):
        of_column = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config"
        if isinstance(node, ast.Attribute) and node.attr not in METHODS and not of_column:
            raise ValueError(f".{node.attr} is not allowed; there are {', '.join(sorted(METHODS))}")


def holding(table: pd.DataFrame, expression: str) -> pd.DataFrame:
    """The rows of a table of variants for which an expression holds. Raises UsageError for one that is none."""
    short = {name: name.removeprefix("config.") for name in table.columns}
    named = table.rename(columns={name: new for name, new in short.items() if new == name or new not in table.columns})
    try:
        _check_only_asks(expression)
        chosen = named.eval(expression)
    except Exception as error:  # whatever pandas makes of what was typed
        raise UsageError(
            f"--candidates {expression!r} cannot be evaluated ({str(error).splitlines()[0]}); write it as for "
            f"pandas.DataFrame.query, for example \"variant == 'best' and dropout > 0.1\", over: "
            f"{', '.join(named.columns)}"
        ) from error
    if not isinstance(chosen, pd.Series) or chosen.dtype != bool:
        raise UsageError(f"--candidates {expression!r} is not true or false of a trial; write a comparison")
    return table[chosen.to_numpy()]


def _too_few(
    found: int, experiments: dict[str, Experiment], *, k: int, include_stopped: bool, expression: str
) -> UsageError:
    hint = ""
    if not include_stopped:
        more = sum(len(usable(e, include_stopped=True)) for e in experiments.values())
        more -= sum(len(usable(e, include_stopped=False)) for e in experiments.values())
        hint = f", or add --include-stopped for {more} more that were stopped early" if more else ""
    blind = sum(int(e.trials()["val_accuracy"].isna().sum()) for e in experiments.values())
    if blind:
        hint += f" (without validation, as with val_fraction=0, a trial cannot be chosen: {blind} have none)"
    kind = "trials" if include_stopped else "completed trials"
    given = f" for which {expression!r} holds" if expression else ""
    return UsageError(
        f"--top-k {k} but only {found} {kind}{given} in {', '.join(experiments)}; lower it, search longer, name more "
        f"experiments{hint}"
    )


def usable(experiment: Experiment, *, include_stopped: bool) -> pd.DataFrame:
    """The rows of `trials` with validation that have predictions or, of stopped trials, weights to predict with."""
    trials = experiment.trials()
    has_model = trials["predictions"] != ""
    if include_stopped:
        has_model |= (trials["status"] == "pruned") & (trials["checkpoint"] != "")
    statuses = ["completed", "pruned"] if include_stopped else ["completed"]
    return trials[trials["status"].isin(statuses) & has_model & trials["val_accuracy"].notna()]


def _variants(experiment: Experiment, *, include_stopped: bool) -> pd.DataFrame:
    """The trials with predictions, a row for each variant whose are whole; what is left out is named in a warning."""
    trials = usable(experiment, include_stopped=include_stopped).assign(experiment=experiment.name)
    trials = trials[trials["predictions"] != ""]
    experiment.fetch_predictions(trials["trial_id"])
    trials["train_seconds"] += _teacher_seconds(experiment)
    sizes = {split: size for split, size in experiment.info["split_sizes"].items() if split != "train" and size}
    lacking: dict[str, str] = {}
    rows = []
    for _, row in trials.iterrows():
        try:
            counts = experiment.stored_counts(row["trial_id"])
        except UsageError as error:
            lacking[row["trial_id"]] = str(error)
            continue
        for variant, of_variant in counts.items():
            wrong = {split: of_variant.get(split, 0) for split in sizes if of_variant.get(split, 0) != sizes[split]}
            if wrong:
                listed = ", ".join(f"{count:,} of {sizes[split]:,} {split} rows" for split, count in wrong.items())
                lacking[f"{row['trial_id']}/{variant}"] = f"{row['trial_id']}/{variant} has {listed}"
            else:
                rows.append({**row, "variant": variant})
    if lacking:
        warnings.warn(
            f"{len(lacking)} stored predictions of {experiment.name} are not whole and are left out: "
            f"{'; '.join(lacking.values())}",
            DataWarning,
            stacklevel=2,
        )
    return pd.DataFrame(rows, columns=[*trials.columns, "variant"])


def _teacher_seconds(experiment: Experiment) -> float:
    """What training the members of an experiment's teacher took; 0 without one, or where it is no longer known."""
    teacher = experiment.info.get("teacher")
    if not teacher:
        return 0.0
    if teacher["experiment"] not in names(experiment.results_dir):
        return 0.0
    beside = Experiment.open(experiment.results_dir, teacher["experiment"])
    path = beside.ensemble_folder(teacher["ensemble_id"]) / "scores.parquet"
    if not path.exists():
        return 0.0
    scores = pd.read_parquet(path, columns=["chosen", "training_seconds"])
    return float(scores[scores["chosen"]]["training_seconds"].iloc[0])


def _candidate(row: pd.Series) -> Candidate:
    views = NUM_VIEWS[row["config.test_time_augmentation"]] if row["variant"] in SEEN_FROM_VIEWS else 1
    speed = row["inference_images_per_second"]
    return Candidate(
        experiment=row["experiment"],
        trial_id=row["trial_id"],
        variant=row["variant"],
        configuration=f"{row['experiment']}/{row['finalist_of'] or row['trial_id']}",
        stage=row["stage"],
        backbone=row["backbone"],
        status=row["status"],
        averaged=row["config.ema_decay"] > 0,
        train_seconds=float(row["train_seconds"]),
        train_cost=float(row["epochs_trained"] * row["config.train_fraction"] * row["multiply_adds"]),
        num_parameters=int(row["num_parameters"]),
        multiply_adds=int(row["multiply_adds"]) * views,
        images_per_second=None if pd.isna(speed) else float(speed) / views,
    )


def _numbered(keys: Iterable[object]) -> IntArray:
    """A number for each key, the same for equal ones."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What models cost together: to train, each trial once however many of its variants there are; and to predict with.

    `images_per_second` is of predicting, one model after the other; None where a model's speed is not known.
    """

    train_seconds: float
    train_cost: float
    num_parameters: int
    multiply_adds: int
    images_per_second: float | None


def cost_of(members: Sequence[Candidate]) -> Cost:
    """What some models cost together."""
    trained = {(c.experiment, c.trial_id): c for c in members}.values()
    stored = {c.weights: c for c in members}.values()
    seconds_an_image = [1 / c.images_per_second if c.images_per_second else np.inf for c in members]
    return Cost(
        train_seconds=sum(c.train_seconds for c in trained),
        train_cost=sum(c.train_cost for c in trained),
        num_parameters=sum(c.num_parameters for c in stored),
        multiply_adds=sum(c.multiply_adds for c in members),
        images_per_second=1 / sum(seconds_an_image) if np.isfinite(seconds_an_image).all() else None,
    )
